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
  /// The bits of CR4 that can be set.
  let cr4: CR4
  /// The bits of EFER that can be set.
  let efer: UInt64
  /// The bits of XCR0 that can be set.
  let xcr0: UInt64
  let hasX2APIC: Bool
  let hasDeadlineTimer: Bool
  /// IA32_SPEC_CTRL and IA32_PRED_CMD.
  let hasSpeculationControl: Bool
  /// IA32_ARCH_CAPABILITIES.
  let hasArchitecturalCapabilities: Bool
  /// IA32_TSC_AUX: RDTSCP or RDPID.
  let hasProcessorID: Bool

  /// The bits of a 64-bit number that are beyond physical addresses.
  var noAddressBits: UInt64 { ~0 << physicalAddressBits }

  /// Whether instructions of a feature exist.
  @inline(__always)
  func has(_ feature: Feature) -> Bool { instructions >> UInt64(feature.rawValue) & 1 != 0 }

  /// A CPU that shows these leaves, as far as it is built at all.
  init(leaves: [CPUIDLeaf]) {
    self.leaves = leaves
    func leaf(_ function: UInt32, _ index: UInt32 = 0) -> CPUIDLeaf { Self.find(leaves, function, index) }
    let basic = leaf(1)
    let extended = leaf(7)
    let state = leaf(0xd, 1)
    let amd = leaf(0x8000_0001)

    var instructions: UInt64 = 0
    func add(_ feature: Feature, _ register: UInt32, _ bit: UInt32) {
      if register >> bit & 1 != 0 { instructions |= 1 << UInt64(feature.rawValue) }
    }
    add(.base, 1, 0)
    for (feature, bit) in Self.basicEDX { add(feature, basic.edx, bit) }
    for (feature, bit) in Self.basicECX { add(feature, basic.ecx, bit) }
    for (feature, bit) in Self.extendedEBX { add(feature, extended.ebx, bit) }
    for (feature, bit) in Self.extendedECX { add(feature, extended.ecx, bit) }
    for (feature, bit) in Self.stateEAX { add(feature, state.eax, bit) }
    add(.lzcnt, amd.ecx, 5)
    add(.prefetchw, amd.ecx, 8)
    add(.syscall, amd.edx, 11)
    add(.rdtscp, amd.edx, 27)
    add(.clzero, leaf(0x8000_0008).ebx, 0)
    add(.wbnoinvd, leaf(0x8000_0008).ebx, 9)
    self.instructions = instructions

    let bits = UInt64(leaf(0x8000_0008).eax & 0xff)
    physicalAddressBits = bits == 0 ? 36 : min(max(bits, 32), 52)
    hasGigabytePages = amd.edx >> 26 & 1 != 0

    var cr4: CR4 = [.pce]
    func allow(_ bit: CR4, _ register: UInt32, _ position: UInt32) {
      if register >> position & 1 != 0 { cr4.formUnion(bit) }
    }
    allow(.tsd, basic.edx, 4)
    allow(.de, basic.edx, 2)
    allow(.pse, basic.edx, 3)
    allow(.pae, basic.edx, 6)
    allow(.mce, basic.edx, 7)
    allow(.pge, basic.edx, 13)
    allow([.osfxsr, .osxmmexcpt], basic.edx, 25)
    allow(.umip, extended.ecx, 2)
    allow(.la57, extended.ecx, 16)
    allow(.fsgsbase, extended.ebx, 0)
    allow(.pcide, basic.ecx, 17)
    allow(.osxsave, basic.ecx, 26)
    allow(.smep, extended.ebx, 7)
    allow(.smap, extended.ebx, 20)
    allow(.pke, extended.ecx, 3)
    self.cr4 = cr4

    var efer: EFER = []
    if amd.edx >> 11 & 1 != 0 { efer.insert(.sce) }
    if amd.edx >> 20 & 1 != 0 { efer.insert(.nxe) }
    if amd.edx >> 29 & 1 != 0 { efer.insert(.lme) }
    self.efer = efer.rawValue

    let components = leaf(0xd)
    xcr0 = (UInt64(components.edx) << 32 | UInt64(components.eax)) & Processor.stateComponents | 1
    hasX2APIC = basic.ecx >> 21 & 1 != 0
    hasDeadlineTimer = basic.ecx >> 24 & 1 != 0
    hasSpeculationControl = extended.edx >> 26 & 1 != 0
    hasArchitecturalCapabilities = extended.edx >> 29 & 1 != 0
    hasProcessorID = amd.edx >> 27 & 1 != 0 || extended.ecx >> 22 & 1 != 0
  }

  /// A leaf of CPUID; zeros where there is none.
  func leaf(_ function: UInt32, _ index: UInt32) -> CPUIDLeaf { Self.find(leaves, function, index) }

  private static func find(_ leaves: [CPUIDLeaf], _ function: UInt32, _ index: UInt32) -> CPUIDLeaf {
    for leaf in leaves where leaf.function == function && (!leaf.hasIndex || leaf.index == index) { return leaf }
    return CPUIDLeaf(function: function, index: index)
  }

  // Bits of CPUID (SDM vol. 2A, tables 3-8 to 3-11) that stand for instructions of the opcode table.
  private static let basicEDX: [(Feature, UInt32)] = [
    (.sep, 11), (.clflush, 19), (.mmx, 23), (.fxsr, 24), (.sse, 25), (.sse2, 26),
  ]
  private static let basicECX: [(Feature, UInt32)] = [
    (.sse3, 0), (.pclmulqdq, 1), (.monitor, 3), (.ssse3, 9), (.fma, 12), (.cmpxchg16b, 13), (.sse41, 19), (.sse42, 20),
    (.movbe, 22), (.popcnt, 23), (.aes, 25), (.xsave, 26), (.avx, 28), (.f16c, 29), (.rdrand, 30),
  ]
  private static let extendedEBX: [(Feature, UInt32)] = [
    (.fsgsbase, 0), (.bmi1, 3), (.avx2, 5), (.bmi2, 8), (.invpcid, 10), (.rdseed, 18), (.adx, 19), (.smap, 20),
    (.clflushopt, 23), (.clwb, 24), (.sha, 29),
  ]
  private static let extendedECX: [(Feature, UInt32)] = [(.pku, 3), (.rdpid, 22), (.cldemote, 25)]
  private static let stateEAX: [(Feature, UInt32)] = [(.xsaveopt, 0), (.xsavec, 1), (.xsaves, 3)]
}
