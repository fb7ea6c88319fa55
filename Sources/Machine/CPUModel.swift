import Accelerator

/// Which processor the guest is shown (`--cpu`).
public enum CPUModel: String, Sendable, CaseIterable {
  /// Whatever the engine offers on this host.
  case host
  /// One that every engine can be on every host: x86-64 with SSE2. A machine with it can move between engines.
  case common

  /// The model's leaves, before any policy; nil: the accelerator's own.
  var leaves: [CPUIDLeaf]? { self == .host ? nil : Self.commonLeaves }

  /// The least of all: what a KVM that emulates ring 0 offers, and the software CPU too.
  ///
  /// The vendor is Intel, whose ways the software CPU has. Family 6, model 15 is a processor that speculates and says nothing of its
  /// weaknesses, so that kernels take all of their precautions: they may run on any.
  private static let commonLeaves: [CPUIDLeaf] = {
    let vendor = words("GenuineIntel")
    let signature = words("SwiftVMM\0\0\0\0")
    let brand = words("swiftvmm common CPU" + String(repeating: "\0", count: 29))
    return [
      CPUIDLeaf(function: 0, eax: 0xd, ebx: vendor[0], ecx: vendor[2], edx: vendor[1]),
      // x2APIC, TSC deadline; FPU, DE, PSE, TSC, MSR, PAE, CX8, APIC, SEP, MTRR, PGE, CMOV, PAT, PSE36, CLFLUSH, MMX, FXSR,
      // SSE, SSE2.
      CPUIDLeaf(
        function: 1, eax: 0x6fb, ebx: 8 << 8, ecx: bits(21, 24, 31),
        edx: bits(0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26)),
      CPUIDLeaf(function: 2, eax: 0x01, edx: 0xff),
      cache(0, type: 1, level: 1, sets: 64), cache(1, type: 2, level: 1, sets: 64),
      cache(2, type: 3, level: 2, sets: 1024), CPUIDLeaf(function: 4, index: 3, hasIndex: true),
      // ARAT.
      CPUIDLeaf(function: 6, eax: bits(2)),
      // TSC_ADJUST.
      CPUIDLeaf(function: 7, index: 0, hasIndex: true, ebx: bits(1)),
      CPUIDLeaf(function: 0xb, index: 0, hasIndex: true),
      CPUIDLeaf(function: 0xd, index: 0, hasIndex: true),
      CPUIDLeaf(function: 0x4000_0000, eax: 0x4000_0000, ebx: signature[0], ecx: signature[1], edx: signature[2]),
      CPUIDLeaf(function: 0x8000_0000, eax: 0x8000_0008),
      // LAHF, PREFETCHW; SYSCALL, NX, long mode.
      CPUIDLeaf(function: 0x8000_0001, ecx: bits(0, 8), edx: bits(11, 20, 29)),
      CPUIDLeaf(function: 0x8000_0002, eax: brand[0], ebx: brand[1], ecx: brand[2], edx: brand[3]),
      CPUIDLeaf(function: 0x8000_0003, eax: brand[4], ebx: brand[5], ecx: brand[6], edx: brand[7]),
      CPUIDLeaf(function: 0x8000_0004, eax: brand[8], ebx: brand[9], ecx: brand[10], edx: brand[11]),
      CPUIDLeaf(function: 0x8000_0006, ecx: 512 << 16 | 6 << 12 | 64),
      // The TSC's rate never changes: a machine goes only where it is the same.
      CPUIDLeaf(function: 0x8000_0007, edx: bits(8)),
      CPUIDLeaf(function: 0x8000_0008, eax: 48 << 8 | 40),
    ]
  }()

  private static func bits(_ numbers: UInt32...) -> UInt32 { numbers.reduce(0) { $0 | 1 << $1 } }

  /// Leaf 4 (deterministic cache parameters): 8 ways, lines of 64 bytes.
  private static func cache(_ index: UInt32, type: UInt32, level: UInt32, sets: UInt32) -> CPUIDLeaf {
    CPUIDLeaf(
      function: 4, index: index, hasIndex: true, eax: type | level << 5 | 1 << 8, ebx: 7 << 22 | 63, ecx: sets - 1)
  }

  /// Text as registers hold it.
  private static func words(_ text: String) -> [UInt32] {
    let bytes = Array(text.utf8)
    return stride(from: 0, to: bytes.count, by: 4).map { start in
      (0..<4).reduce(UInt32(0)) { $0 | UInt32(bytes[start + $1]) << UInt32($1 * 8) }
    }
  }
}
