import Accelerator
import PlatformDevices

/// Which processor the guest sees: the accelerator's own leaves, minus what this machine does not offer, plus its topology.
///
/// Leaf and bit names follow the SDM (vol. 2A, CPUID) and AMD's APM (vol. 3, appendix E).
public struct CPUIDPolicy: Sendable {
  /// vCPUs: one package, one thread a core.
  public let cpus: Int
  /// Whether ring 0 is emulated one instruction at a time: then features whose instructions the emulator lacks, or gets
  /// wrong, are hidden, so that kernels take another path.
  public let emulatesRing0: Bool
  /// Where the local APICs live.
  public let controllers: InterruptControllerModel
  /// Whether the MSRs of local APICs in the VMM reach them.
  public let hasControllerRegisters: Bool

  /// The policy of a machine with `cpus` vCPUs.
  public init(
    cpus: Int, emulatesRing0: Bool = false, controllers: InterruptControllerModel = .inKernel,
    hasControllerRegisters: Bool = false
  ) {
    self.cpus = cpus
    self.emulatesRing0 = emulatesRing0
    self.controllers = controllers
    self.hasControllerRegisters = hasControllerRegisters
  }

  /// What the local APICs in the VMM offer, which the leaves then say: with their MSRs x2APIC, and the TSC deadline where
  /// the accelerator lists it.
  public func localAPICFeatures(supported: [CPUIDLeaf]) -> LocalAPIC.Features {
    guard hasControllerRegisters else { return [] }
    let hasDeadline = supported.contains { $0.function == 1 && $0.ecx & 1 << 24 != 0 }
    return hasDeadline ? [.x2APIC, .timestampDeadline] : [.x2APIC]
  }

  /// The leaves of one vCPU.
  public func leaves(supported: [CPUIDLeaf], apicID: UInt32) -> [CPUIDLeaf] {
    var leaves = supported.filter { !Self.replaced.contains($0.function) }.map { mask($0, apicID: apicID) }
    let maximum = supported.first { $0.function == 0 }?.eax ?? 0
    if maximum >= 0xb { leaves += topology(apicID: apicID) }
    return leaves
  }

  /// Leaves that describe the host's topology (0xB, 0x1F), its performance counters (0xA) or features that are
  /// hidden whole: SGX (0x12), processor trace (0x14), AMX tiles (0x1D, 0x1E).
  private static let replaced: Set<UInt32> = [0xa, 0xb, 0x12, 0x14, 0x1d, 0x1e, 0x1f]

  private func mask(_ leaf: CPUIDLeaf, apicID: UInt32) -> CPUIDLeaf {
    var leaf = emulatesRing0 ? Self.withoutMissingInstructions(leaf) : leaf
    let logical = UInt32(cpus)
    switch (leaf.function, leaf.index) {
    case (0x1, _):
      leaf.ebx = leaf.ebx & 0xffff | min(logical, 255) << 16 | (apicID & 0xff) << 24
      // MONITOR, VMX, SMX, performance capabilities: not offered. x2APIC, hypervisor: there but where its MSRs are not.
      leaf.ecx &= ~(1 << 3 | 1 << 5 | 1 << 6 | 1 << 15)
      leaf.ecx |= 1 << 21 | 1 << 31
      if controllers == .userSpace, !hasControllerRegisters { leaf.ecx &= ~(1 << 21 | 1 << 24) }
      leaf.edx = cpus > 1 ? leaf.edx | 1 << 28 : leaf.edx & ~(1 << 28)
    case (0x4, _) where leaf.eax & 0x1f != 0:
      // Cores a package in bits 26-31; the last level is shared by all, the others by one thread.
      leaf.eax &= 0x3fff
      leaf.eax |= (roundedUp(logical) - 1) << 26
      if leaf.eax >> 5 & 7 == 3 { leaf.eax |= (roundedUp(logical) - 1) << 14 }
    case (0x7, 0):
      // SGX and processor trace in EBX; 57-bit addresses, SGX launch control in ECX; AMX in EDX.
      leaf.ebx &= ~(1 << 2 | 1 << 25)
      leaf.ecx &= ~(1 << 16 | 1 << 30)
      leaf.edx &= ~(1 << 22 | 1 << 24 | 1 << 25)
    case (0xd, 0):
      // AMX state components 17 and 18 need a permission that nobody asked the host for.
      leaf.eax &= ~(3 << 17)
    case (0x4000_0001, _) where controllers == .userSpace:
      // KVM's own features that need its local APIC: asynchronous faults, their interrupt, paravirtual ends, wake-ups,
      // interprocessor interrupts and yields.
      leaf.eax &= ~(1 << 4 | 1 << 6 | 1 << 7 | 1 << 11 | 1 << 13 | 1 << 14)
    case (0x8000_0001, _):
      // SVM.
      leaf.ecx &= ~(1 << 2)
    case (0x8000_0008, _):
      leaf.ecx = leaf.ecx & ~0xf0ff | logical - 1 | UInt32(idWidth) << 12
    case (0x8000_001d, _) where leaf.eax & 0x1f != 0:
      leaf.eax &= 0x3fff
      if leaf.eax >> 5 & 7 == 3 { leaf.eax |= (logical - 1) << 14 }
    case (0x8000_001e, _):
      leaf.eax = apicID
      leaf.ebx = apicID & 0xff
      leaf.ecx = 0
    default: break
    }
    return leaf
  }

  /// What a paravirtual KVM's emulator cannot do in ring 0.
  private static func withoutMissingInstructions(_ leaf: CPUIDLeaf) -> CPUIDLeaf {
    var leaf = leaf
    switch (leaf.function, leaf.index) {
    case (0x1, _):
      // PCID (INVPCID goes with it), CMPXCHG16B, MOVBE, POPCNT.
      leaf.ecx &= ~(1 << 17 | 1 << 13 | 1 << 22 | 1 << 23)
    case (0x7, 0):
      // BMI1, BMI2, INVPCID, SMAP, CLFLUSHOPT, CLWB; UMIP, RDPID.
      leaf.ebx &= ~(1 << 3 | 1 << 8 | 1 << 10 | 1 << 20 | 1 << 23 | 1 << 24)
      leaf.ecx &= ~(1 << 2 | 1 << 22)
    case (0x8000_0001, _):
      // LZCNT; RDTSCP.
      leaf.ecx &= ~(1 << 5)
      leaf.edx &= ~(1 << 27)
    default: break
    }
    return leaf
  }

  /// Bits of the APIC id that number the threads of the package.
  private var idWidth: Int { cpus <= 1 ? 0 : 32 - UInt32(cpus - 1).leadingZeroBitCount }

  private func roundedUp(_ value: UInt32) -> UInt32 { min(64, 1 << UInt32(value <= 1 ? 0 : idWidth)) }

  /// Leaf 0xB (extended topology): one thread a core, all cores in one package.
  private func topology(apicID: UInt32) -> [CPUIDLeaf] {
    func level(_ index: UInt32, shift: Int, threads: Int, type: UInt32) -> CPUIDLeaf {
      CPUIDLeaf(
        function: 0xb, index: index, hasIndex: true, eax: UInt32(shift), ebx: UInt32(threads),
        ecx: index | type << 8, edx: apicID)
    }
    return [
      level(0, shift: 0, threads: 1, type: 1), level(1, shift: idWidth, threads: cpus, type: 2),
      level(2, shift: 0, threads: 0, type: 0),
    ]
  }
}
