import Accelerator
import CSoftCPU
import X86

/// Model-specific registers (SDM vol. 4).
extension Processor {
  /// RDMSR: nil where the register does not exist.
  func readMSR(_ index: UInt32) -> UInt64? {
    switch index {
    case MSR.timeStampCounter: return timeStampCounter
    case MSR.apicBase: return localAPIC?.readMSR(index) ?? cpu.pointee.apic_base
    // Locked, without VMX.
    case MSR.featureControl: return 1
    case MSR.tscAdjust: return cpu.pointee.tsc_adjust
    case MSR.specCtrl: return features.hasSpeculationControl ? cpu.pointee.spec_ctrl : nil
    case MSR.biosSignID: return 1 << 32
    // Eight variable ranges, fixed ranges, write combining.
    case MSR.mtrrCap: return 0x508
    case MSR.archCapabilities: return features.hasArchitecturalCapabilities ? SoftCPUID.architecturalCapabilities : nil
    case MSR.sysenterCS: return cpu.pointee.sysenter_cs
    case MSR.sysenterESP: return cpu.pointee.sysenter_esp
    case MSR.sysenterEIP: return cpu.pointee.sysenter_eip
    // No machine-check banks, no platform information.
    case MSR.platformID, Self.platformInfo, MSR.mcgCap, MSR.mcgStatus, MSR.hwcr: return 0
    case MSR.miscEnable: return cpu.pointee.misc_enable
    case MSR.debugCtl: return cpu.pointee.debug_ctl
    case MSR.mtrrPhysBase0..<MSR.mtrrPhysBase0 + 16: return soft_mtrr_variable(cpu)[Int(index & 15)]
    case MSR.mtrrFix64K00000, MSR.mtrrFix16K80000...MSR.mtrrFix16K80000 + 1,
      MSR.mtrrFix4KC0000...MSR.mtrrFix4KC0000 + 7:
      return soft_mtrr_fixed(cpu)[Self.fixedRange(index)]
    case MSR.pat: return cpu.pointee.pat
    case MSR.mtrrDefType: return cpu.pointee.mtrr_default
    case MSR.tscDeadline: return features.hasDeadlineTimer ? localAPIC?.readMSR(index) : nil
    case MSR.x2APICFirst...MSR.x2APICLast: return isX2APIC ? localAPIC?.readMSR(index) : nil
    case MSR.xss: return features.has(.xsaves) ? cpu.pointee.xss : nil
    case MSR.efer: return cpu.pointee.efer
    case MSR.star: return cpu.pointee.star
    case MSR.lstar: return cpu.pointee.lstar
    case MSR.cstar: return cpu.pointee.cstar
    case MSR.fmask: return cpu.pointee.fmask
    case MSR.fsBase: return segments[SegmentIndex.fs].base
    case MSR.gsBase: return segments[SegmentIndex.gs].base
    case MSR.kernelGSBase: return cpu.pointee.kernel_gs_base
    case MSR.tscAux: return features.hasProcessorID ? cpu.pointee.tsc_aux : nil
    default: return nil
    }
  }

  /// WRMSR: false where the register does not exist or does not take the value.
  func writeMSR(_ index: UInt32, _ value: UInt64) -> Bool {
    switch index {
    case MSR.timeStampCounter: writeTimeStampCounter(value)
    case MSR.apicBase: return writeAPICBase(value)
    case MSR.tscAdjust:
      cpu.pointee.tsc_offset &+= value &- cpu.pointee.tsc_adjust
      cpu.pointee.tsc_adjust = value
    case MSR.specCtrl:
      // IBRS, STIBP, SSBD: there is no speculation to hold back.
      guard features.hasSpeculationControl, value & ~7 == 0 else { return false }
      cpu.pointee.spec_ctrl = value
    case MSR.predCmd: return features.hasSpeculationControl && value & ~1 == 0
    // The microcode's loader clears the revision before it asks for it.
    case MSR.biosSignID, MSR.mcgStatus, MSR.hwcr: break
    case MSR.sysenterCS: cpu.pointee.sysenter_cs = value
    case MSR.sysenterESP:
      guard isCanonical(value) else { return false }
      cpu.pointee.sysenter_esp = value
    case MSR.sysenterEIP:
      guard isCanonical(value) else { return false }
      cpu.pointee.sysenter_eip = value
    case MSR.miscEnable: cpu.pointee.misc_enable = value
    case MSR.debugCtl:
      guard value & ~3 == 0 else { return false }
      cpu.pointee.debug_ctl = value
    case MSR.mtrrPhysBase0..<MSR.mtrrPhysBase0 + 16:
      let isMask = index & 1 != 0
      let reserved = features.noAddressBits | (isMask ? 0x7ff : 0xf00)
      guard value & reserved == 0, isMask || Self.isMemoryType(value & 0xff) else { return false }
      soft_mtrr_variable(cpu)[Int(index & 15)] = value
    case MSR.mtrrFix64K00000, MSR.mtrrFix16K80000...MSR.mtrrFix16K80000 + 1,
      MSR.mtrrFix4KC0000...MSR.mtrrFix4KC0000 + 7:
      guard Self.areMemoryTypes(value, allowsUncachedMinus: false) else { return false }
      soft_mtrr_fixed(cpu)[Self.fixedRange(index)] = value
    case MSR.pat:
      guard Self.areMemoryTypes(value, allowsUncachedMinus: true) else { return false }
      cpu.pointee.pat = value
    case MSR.mtrrDefType:
      guard value & ~0xcff == 0, Self.isMemoryType(value & 0xff) else { return false }
      cpu.pointee.mtrr_default = value
    case MSR.tscDeadline: return features.hasDeadlineTimer && writeLocalAPIC(index, value)
    case MSR.x2APICFirst...MSR.x2APICLast: return isX2APIC && writeLocalAPIC(index, value)
    case MSR.xss: return features.has(.xsaves) && value == 0
    case MSR.efer: return writeEFER(value)
    case MSR.star: cpu.pointee.star = value
    case MSR.lstar:
      guard isCanonical(value) else { return false }
      cpu.pointee.lstar = value
    case MSR.cstar:
      guard isCanonical(value) else { return false }
      cpu.pointee.cstar = value
    case MSR.fmask:
      guard value >> 32 == 0 else { return false }
      cpu.pointee.fmask = value
    case MSR.fsBase:
      guard isCanonical(value) else { return false }
      segments[SegmentIndex.fs].base = value
    case MSR.gsBase:
      guard isCanonical(value) else { return false }
      segments[SegmentIndex.gs].base = value
    case MSR.kernelGSBase:
      guard isCanonical(value) else { return false }
      cpu.pointee.kernel_gs_base = value
    case MSR.tscAux:
      guard features.hasProcessorID, value >> 32 == 0 else { return false }
      cpu.pointee.tsc_aux = value
    default: return false
    }
    return true
  }

  /// MSR_PLATFORM_INFO.
  private static let platformInfo: UInt32 = 0xce

  /// The place of a fixed-range MTRR among the eleven.
  private static func fixedRange(_ index: UInt32) -> Int {
    switch index {
    case MSR.mtrrFix64K00000: 0
    case MSR.mtrrFix16K80000...MSR.mtrrFix16K80000 + 1: 1 + Int(index - MSR.mtrrFix16K80000)
    default: 3 + Int(index & 7)
    }
  }

  /// UC, WC, WT, WP and WB (SDM vol. 3, table 12-8).
  private static func isMemoryType(_ type: UInt64) -> Bool { type < 7 && type != 2 && type != 3 }

  private static func areMemoryTypes(_ value: UInt64, allowsUncachedMinus: Bool) -> Bool {
    for shift in stride(from: 0 as UInt64, to: 64, by: 8) {
      let type = value >> shift & 0xff
      guard isMemoryType(type) || allowsUncachedMinus && type == 7 else { return false }
    }
    return true
  }

  /// Both bits of IA32_APIC_BASE: x2APIC mode.
  private var isX2APIC: Bool { cpu.pointee.apic_base & 0xc00 == 0xc00 }

  private func writeLocalAPIC(_ index: UInt32, _ value: UInt64) -> Bool {
    localAPIC?.writeMSR(index, value: value) ?? false
  }

  /// The mode is changed in the order that the SDM allows (vol. 3, 11.12.5): x2APIC is entered from xAPIC, and left for
  /// "off" alone.
  private func writeAPICBase(_ value: UInt64) -> Bool {
    let reserved = features.noAddressBits | 0x2ff | (features.hasX2APIC ? 0 : 0x400)
    guard value & reserved == 0 else { return false }
    let old = cpu.pointee.apic_base >> 10 & 3
    let new = value >> 10 & 3
    guard new != 1, !(old == 3 && new == 2), !(old == 0 && new == 3) else { return false }
    if let localAPIC {
      guard localAPIC.writeMSR(MSR.apicBase, value: value) else { return false }
      cpu.pointee.apic_base = localAPIC.readMSR(MSR.apicBase) ?? value
    } else {
      cpu.pointee.apic_base = value
    }
    return true
  }

  /// The adjustment follows a write of the counter itself (SDM vol. 3, 18.17.3).
  private func writeTimeStampCounter(_ value: UInt64) {
    let delta = value &- timeStampCounter
    cpu.pointee.tsc_offset &+= delta
    cpu.pointee.tsc_adjust &+= delta
  }

  private func writeEFER(_ value: UInt64) -> Bool {
    let old = cpu.pointee.efer
    guard value & ~(features.efer | EFER.lma.rawValue) == 0 else { return false }
    if cpu.pointee.cr0 & CR0.pg.rawValue != 0, (value ^ old) & EFER.lme.rawValue != 0 { return false }
    cpu.pointee.efer = value & ~EFER.lma.rawValue | old & EFER.lma.rawValue
    if (value ^ old) & EFER.nxe.rawValue != 0 { flushTLB() }
    return true
  }
}
