import Accelerator
import CSoftCPU

/// The processor that `--engine soft` shows: what is implemented, and no more.
///
/// Vendor and model are those of an in-order Intel Atom, which this CPU resembles in what matters to kernels: it does not
/// speculate, so they need no mitigations; and they take its TSC's frequency from leaf 0x15 without calibrating.
/// Protection keys are implemented, and not shown: kernels would write PKRU, which costs every translation, for nothing
/// that programs use.
enum SoftCPUID {
  /// IA32_ARCH_CAPABILITIES, where it is shown: nothing leaks (RDCL_NO, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, TAA_NO).
  static let architecturalCapabilities: UInt64 = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8

  /// The leaves, without what a machine adds (topology, APIC ids): all that is implemented on this host.
  static let leaves = make(units: soft_host_units())

  /// The same on every host: the vector instructions of x86-64-v2.
  static let portableLeaves = make(units: portableUnits)

  private static let portableUnits: UInt32 =
    1 << UInt32(SOFT_HOST_SSE3) | 1 << UInt32(SOFT_HOST_SSSE3) | 1 << UInt32(SOFT_HOST_SSE41)
    | 1 << UInt32(SOFT_HOST_SSE42)

  /// Whether this host has what `portableLeaves` show.
  static var hasPortableUnits: Bool { soft_host_units() & portableUnits == portableUnits }

  private static func make(units: UInt32) -> [CPUIDLeaf] {
    // A bit for an instruction set that the host's units have.
    func host(_ unit: Int, _ bit: UInt32) -> UInt32 { (units >> UInt32(unit) & 1) << bit }
    let vendor = words("GenuineIntel")
    let signature = words("SwiftVMMSoft")
    let brand = words("swiftvmm software CPU".padding(to: 48))
    let kilohertz = TimeSource.kilohertz
    // AVX, F16C, FMA and AVX2 are shown together, as processors have them.
    let showsAVX = [SOFT_HOST_AVX, SOFT_HOST_AVX2, SOFT_HOST_FMA, SOFT_HOST_F16C].allSatisfy { host($0, 0) != 0 }
    let avx: UInt32 = showsAVX ? 1 : 0
    return [
      CPUIDLeaf(function: 0, eax: 0x16, ebx: vendor[0], ecx: vendor[2], edx: vendor[1]),
      // Family 6, model 0x36, stepping 1; CLFLUSH of 64 bytes.
      CPUIDLeaf(
        function: 1, eax: 0x0003_0661, ebx: 8 << 8,
        ecx: bits(13, 17, 21, 22, 23, 24, 26, 30, 31) | avx * bits(12, 28, 29) | host(SOFT_HOST_SSE3, 0)
          | host(SOFT_HOST_PCLMULQDQ, 1) | host(SOFT_HOST_SSSE3, 9) | host(SOFT_HOST_SSE41, 19)
          | host(SOFT_HOST_SSE42, 20) | host(SOFT_HOST_AES, 25),
        edx: bits(0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26)),
      // Caches are in leaf 4; no prefetch of its own.
      CPUIDLeaf(function: 2, eax: 0x01, edx: 0xff),
      cache(0, type: 1, level: 1, ways: 8, sets: 64),
      cache(1, type: 2, level: 1, ways: 8, sets: 64),
      cache(2, type: 3, level: 2, ways: 8, sets: 1024),
      CPUIDLeaf(function: 4, index: 3, hasIndex: true),
      CPUIDLeaf(function: 5),
      // The local APIC's timer always runs.
      CPUIDLeaf(function: 6, eax: bits(2)),
      // FSGSBASE, TSC_ADJUST, BMI1, SMEP, BMI2, ERMS, INVPCID, no FCS and FDS, RDSEED, ADX, SMAP, CLFLUSHOPT; UMIP,
      // LA57, RDPID; fast short REP MOV.
      CPUIDLeaf(
        function: 7, index: 0, hasIndex: true,
        ebx: bits(0, 1, 3, 7, 8, 9, 10, 13, 18, 19, 20, 23) | avx * bits(5) | host(SOFT_HOST_SHA, 29),
        ecx: bits(2, 16, 22), edx: bits(4)),
      CPUIDLeaf(function: 0xb, index: 0, hasIndex: true, ebx: 1, ecx: 0x100),
      CPUIDLeaf(
        function: 0xd, index: 0, hasIndex: true, eax: bits(0, 1) | avx * bits(2), ebx: 576, ecx: 576 + avx * 256),
      // XSAVEOPT, XSAVEC, XGETBV of what is in use, XSAVES.
      CPUIDLeaf(function: 0xd, index: 1, hasIndex: true, eax: bits(0, 1, 2, 3)),
      CPUIDLeaf(function: 0xd, index: 2, hasIndex: true, eax: avx * 256, ebx: avx * 576),
      // The TSC counts nanoseconds: 1 / 1 of a crystal of 1 GHz.
      CPUIDLeaf(function: 0x15, eax: 1, ebx: 1, ecx: kilohertz * 1000),
      CPUIDLeaf(function: 0x16, eax: kilohertz / 1000, ebx: kilohertz / 1000, ecx: kilohertz / 1000),
      CPUIDLeaf(function: 0x4000_0000, eax: 0x4000_0000, ebx: signature[0], ecx: signature[1], edx: signature[2]),
      CPUIDLeaf(function: 0x8000_0000, eax: 0x8000_0008),
      // LAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
      CPUIDLeaf(function: 0x8000_0001, ecx: bits(0, 5, 8), edx: bits(11, 20, 26, 27, 29)),
      CPUIDLeaf(function: 0x8000_0002, eax: brand[0], ebx: brand[1], ecx: brand[2], edx: brand[3]),
      CPUIDLeaf(function: 0x8000_0003, eax: brand[4], ebx: brand[5], ecx: brand[6], edx: brand[7]),
      CPUIDLeaf(function: 0x8000_0004, eax: brand[8], ebx: brand[9], ecx: brand[10], edx: brand[11]),
      CPUIDLeaf(function: 0x8000_0005),
      // A second-level cache of 512 KiB, 8 ways, lines of 64 bytes.
      CPUIDLeaf(function: 0x8000_0006, ecx: 512 << 16 | 6 << 12 | 64),
      // The TSC's rate never changes.
      CPUIDLeaf(function: 0x8000_0007, edx: bits(8)),
      // 40 bits of physical, 48 of linear address.
      CPUIDLeaf(function: 0x8000_0008, eax: 48 << 8 | 40),
    ]
  }

  private static func bits(_ numbers: UInt32...) -> UInt32 { numbers.reduce(0) { $0 | 1 << $1 } }

  /// Leaf 4 (deterministic cache parameters): lines of 64 bytes.
  private static func cache(_ index: UInt32, type: UInt32, level: UInt32, ways: UInt32, sets: UInt32) -> CPUIDLeaf {
    CPUIDLeaf(
      function: 4, index: index, hasIndex: true, eax: type | level << 5 | 1 << 8, ebx: (ways - 1) << 22 | 63,
      ecx: sets - 1)
  }

  /// Text as registers hold it.
  private static func words(_ text: String) -> [UInt32] {
    let bytes = Array(text.utf8)
    return stride(from: 0, to: bytes.count & ~3, by: 4).map { start in
      (0..<4).reduce(UInt32(0)) { $0 | UInt32(bytes[start + $1]) << UInt32($1 * 8) }
    }
  }
}

extension String {
  /// The text with zero bytes behind it, `count` bytes in all.
  fileprivate func padding(to count: Int) -> String {
    self + String(repeating: "\0", count: max(0, count - utf8.count))
  }
}
