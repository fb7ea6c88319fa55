/// Numbers of model-specific registers (Intel SDM, volume 4; AMD APM, volume 2, appendix A).
public enum MSR {
  /// IA32_TIME_STAMP_COUNTER.
  public static let timeStampCounter: UInt32 = 0x10
  /// IA32_PLATFORM_ID.
  public static let platformID: UInt32 = 0x17
  /// IA32_APIC_BASE.
  public static let apicBase: UInt32 = 0x1b
  /// IA32_FEATURE_CONTROL.
  public static let featureControl: UInt32 = 0x3a
  /// IA32_TSC_ADJUST.
  public static let tscAdjust: UInt32 = 0x3b
  /// IA32_SPEC_CTRL.
  public static let specCtrl: UInt32 = 0x48
  /// IA32_PRED_CMD.
  public static let predCmd: UInt32 = 0x49
  /// IA32_BIOS_SIGN_ID, the microcode revision.
  public static let biosSignID: UInt32 = 0x8b
  /// IA32_MTRRCAP.
  public static let mtrrCap: UInt32 = 0xfe
  /// IA32_ARCH_CAPABILITIES.
  public static let archCapabilities: UInt32 = 0x10a
  /// IA32_SYSENTER_CS.
  public static let sysenterCS: UInt32 = 0x174
  /// IA32_SYSENTER_ESP.
  public static let sysenterESP: UInt32 = 0x175
  /// IA32_SYSENTER_EIP.
  public static let sysenterEIP: UInt32 = 0x176
  /// IA32_MCG_CAP.
  public static let mcgCap: UInt32 = 0x179
  /// IA32_MCG_STATUS.
  public static let mcgStatus: UInt32 = 0x17a
  /// IA32_MCG_CTL.
  public static let mcgCtl: UInt32 = 0x17b
  /// IA32_MISC_ENABLE.
  public static let miscEnable: UInt32 = 0x1a0
  /// IA32_DEBUGCTL.
  public static let debugCtl: UInt32 = 0x1d9
  /// IA32_MTRR_PHYSBASE0; PHYSMASK0 follows, then the other pairs.
  public static let mtrrPhysBase0: UInt32 = 0x200
  /// IA32_MTRR_FIX64K_00000.
  public static let mtrrFix64K00000: UInt32 = 0x250
  /// IA32_MTRR_FIX16K_80000; A0000 follows.
  public static let mtrrFix16K80000: UInt32 = 0x258
  /// IA32_MTRR_FIX4K_C0000; seven more follow.
  public static let mtrrFix4KC0000: UInt32 = 0x268
  /// IA32_PAT.
  public static let pat: UInt32 = 0x277
  /// IA32_MTRR_DEF_TYPE.
  public static let mtrrDefType: UInt32 = 0x2ff
  /// IA32_MC0_CTL; STATUS, ADDR and MISC follow, then the other banks.
  public static let mc0Ctl: UInt32 = 0x400
  /// IA32_TSC_DEADLINE.
  public static let tscDeadline: UInt32 = 0x6e0
  /// The first x2APIC register.
  public static let x2APICFirst: UInt32 = 0x800
  /// The last x2APIC register.
  public static let x2APICLast: UInt32 = 0x8ff
  /// IA32_XSS.
  public static let xss: UInt32 = 0xda0
  /// IA32_EFER.
  public static let efer: UInt32 = 0xc000_0080
  /// IA32_STAR.
  public static let star: UInt32 = 0xc000_0081
  /// IA32_LSTAR.
  public static let lstar: UInt32 = 0xc000_0082
  /// CSTAR (AMD).
  public static let cstar: UInt32 = 0xc000_0083
  /// IA32_FMASK.
  public static let fmask: UInt32 = 0xc000_0084
  /// IA32_FS_BASE.
  public static let fsBase: UInt32 = 0xc000_0100
  /// IA32_GS_BASE.
  public static let gsBase: UInt32 = 0xc000_0101
  /// IA32_KERNEL_GS_BASE.
  public static let kernelGSBase: UInt32 = 0xc000_0102
  /// IA32_TSC_AUX.
  public static let tscAux: UInt32 = 0xc000_0103
  /// HWCR (AMD).
  public static let hwcr: UInt32 = 0xc001_0015
}
