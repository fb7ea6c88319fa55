import Accelerator
import X86

/// What a software CPU is: the CPUID leaves it shows, and what follows from them.
struct ProcessorFeatures {
  /// The leaves that CPUID answers with.
  let leaves: [CPUIDLeaf]
  /// Features of the opcode table whose instructions exist: a bit each, by `Feature`'s raw value.
  let instructions: UInt64
  /// The width of physical addresses in bits.
  let physicalAddressBits: UInt64
  /// Whether page tables may map 1 GiB pages.
  let hasGigabytePages: Bool

  /// Whether instructions of a feature exist.
  @inline(__always)
  func has(_ feature: Feature) -> Bool { instructions >> UInt64(feature.rawValue) & 1 != 0 }
}
