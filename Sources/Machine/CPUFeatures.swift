import Accelerator

/// What a processor shows by CPUID, to be compared with what another one can.
public struct CPUFeatures: Sendable {
  private let leaves: [CPUIDLeaf]

  /// The features that some leaves show.
  public init(_ leaves: [CPUIDLeaf]) { self.leaves = leaves }

  /// What a guest that has seen these features would miss where only `other` are, by the names of Linux's /proc/cpuinfo;
  /// empty where it can go on there.
  public func missing(in other: CPUFeatures, anyVendor: Bool = false) -> [String] {
    var missing: [String] = []
    if !anyVendor, vendor != other.vendor { missing.append("vendor \(vendor) (not \(other.vendor))") }
    for (function, index, register, names) in Self.names {
      let lost = self[function, index][keyPath: register] & ~other[function, index][keyPath: register]
      missing += Self.named(lost, names)
    }
    if isKVM {
      let lost = self[0x4000_0001].eax & ~(other.isKVM ? other[0x4000_0001].eax : 0)
      missing += Self.named(lost, Self.kvmNames)
    }
    // x87 and SSE are everywhere.
    for component in 2..<63 where components >> UInt64(component) & 1 != 0 {
      let name = component < Self.components.count ? Self.components[component] : "\(component)"
      if other.components >> UInt64(component) & 1 == 0 {
        missing.append("xsave component \(name)")
      } else if self[0xd, UInt32(component)].ebx != other[0xd, UInt32(component)].ebx {
        missing.append("xsave component \(name) at \(self[0xd, UInt32(component)].ebx)")
      }
    }
    if addressBits > other.addressBits { missing.append("\(addressBits) bits of physical address") }
    return missing
  }

  /// XCR0's bits.
  var components: UInt64 { UInt64(self[0xd].edx) << 32 | UInt64(self[0xd].eax) }

  private var vendor: String { Self.text([self[0].ebx, self[0].edx, self[0].ecx]) }
  private var isKVM: Bool {
    Self.text([self[0x4000_0000].ebx, self[0x4000_0000].ecx, self[0x4000_0000].edx]).hasPrefix("KVMKVMKVM")
  }
  private var addressBits: UInt32 { self[0x8000_0008].eax & 0xff }

  private subscript(function: UInt32, index: UInt32 = 0) -> CPUIDLeaf {
    leaves.first { $0.function == function && (!$0.hasIndex || $0.index == index) } ?? CPUIDLeaf(function: function)
  }

  /// What is printable of it: it may come from a peer.
  private static func text(_ words: [UInt32]) -> String {
    var text = ""
    for word in words {
      for shift in stride(from: UInt32(0), to: 32, by: 8) {
        let byte = UInt8(truncatingIfNeeded: word >> shift)
        if (0x21...0x7e).contains(byte) { text.unicodeScalars.append(Unicode.Scalar(byte)) }
      }
    }
    return text
  }

  /// The names of bits. `-`: one that is no feature, or that changes while the guest runs.
  private static func named(_ bits: UInt32, _ names: [Substring]) -> [String] {
    (0..<32).compactMap { bit in
      guard bits >> UInt32(bit) & 1 != 0 else { return nil }
      let name = bit < names.count ? names[bit] : "?"
      // The first of the row says which register it is.
      return name == "-" ? nil : name == "?" ? "bit \(bit) beside \(names.first { $0.count > 1 } ?? "?")" : String(name)
    }
  }

  private static let components = [
    "x87", "sse", "avx", "bndregs", "bndcsr", "opmask", "zmm_hi256", "hi16_zmm", "pt", "pkru",
  ]

  private static let kvmNames =
    "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control ? ? ? ? ? ? kvmclock_stable"
    .split(separator: " ")

  /// By register, from bit 0 on.
  nonisolated(unsafe) private static let names: [(UInt32, UInt32, KeyPath<CPUIDLeaf, UInt32>, [Substring])] = [
    (
      1, 0, \.edx,
      "fpu vme de pse tsc msr pae mce cx8 - ? sep mtrr pge mca cmov pat pse36 pn clflush ? dts acpi mmx fxsr sse sse2 ss - tm ia64 pbe"
    ),
    (
      1, 0, \.ecx,
      "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm ? pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand -"
    ),
    (6, 0, \.eax, "dtherm ida arat - - - - - - - - - - - - - - - - - - - - - - - - - - - - -"),
    (
      7, 0, \.ebx,
      "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma ? clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (
      7, 0, \.ecx,
      "prefetchwt1 avx512vbmi umip pku - waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq ? la57 ? ? ? ? ? rdpid kl bus_lock_detect cldemote ? movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (
      7, 0, \.edx,
      "? ? avx512_4vnniw avx512_4fmaps fsrm uintr ? ? avx512_vp2intersect srbds_ctrl md_clear ? ? ? serialize hybrid_cpu tsxldtrk ? pconfig arch_lbr ibt ? amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd"
    ),
    (
      7, 1, \.eax,
      "sha512 sm3 sm4 ? avx_vnni avx512_bf16 lass cmpccxadd ? ? fzrm fsrs fsrc ? ? ? ? fred lkgs wrmsrns ? amx_fp16 ? avx_ifma ? ? lam"
    ),
    (0xd, 1, \.eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
      0x8000_0001, 0, \.ecx,
      "lahf_lm - svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt ? lwp fma4 tce ? nodeid_msr ? tbm - perfctr_core perfctr_nb ? bpext ptsc perfctr_llc mwaitx"
    ),
    // Without those that AMD repeats from leaf 1.
    (
      0x8000_0001, 0, \.edx,
      "- - - - - - - - - - ? syscall - - - - - - ? mp nx ? mmxext - - fxsr_opt pdpe1gb rdtscp ? lm 3dnowext 3dnow"
    ),
    (0x8000_0007, 0, \.edx, "- - - - - - - - constant_tsc - - - - - - - - - - - - - - - - - - - - - - -"),
    (
      0x8000_0008, 0, \.ebx,
      "clzero irperf xsaveerptr ? rdpru ? ? ? ? wbnoinvd ? ? amd_ibpb ? amd_ibrs amd_stibp ? amd_stibp_always_on ? ? ? ? ? amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no amd_ibpb_ret brs"
    ),
  ].map { ($0.0, $0.1, $0.2, $0.3.split(separator: " ")) }
}
