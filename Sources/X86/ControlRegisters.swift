/// Bits of a control, status or model-specific register or a table entry, named as in the Intel SDM.
///
/// `description` lists the names of the set bits, the highest first, as crash reports show them: `PG WP NE ET PE`.
public protocol NamedBits: OptionSet, Sendable, CustomStringConvertible where RawValue == UInt64 {
  /// The named bits from the lowest to the highest.
  static var names: [(bits: Self, name: String)] { get }
}

extension NamedBits {
  /// The names of the set bits, the highest first, separated by spaces.
  public var description: String {
    Self.names.reversed().filter { isSuperset(of: $0.bits) }.map(\.name).joined(separator: " ")
  }
}

/// The status register (Intel SDM, volume 1, section 3.4.3).
public struct RFLAGS: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The flags of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Carry.
  public static let cf = RFLAGS(rawValue: 1 << 0)
  /// Parity of the result's low byte.
  public static let pf = RFLAGS(rawValue: 1 << 2)
  /// Carry out of bit 3.
  public static let af = RFLAGS(rawValue: 1 << 4)
  /// Zero.
  public static let zf = RFLAGS(rawValue: 1 << 6)
  /// Sign.
  public static let sf = RFLAGS(rawValue: 1 << 7)
  /// Trap after each instruction.
  public static let tf = RFLAGS(rawValue: 1 << 8)
  /// Maskable interrupts are enabled.
  public static let `if` = RFLAGS(rawValue: 1 << 9)
  /// String operations go down.
  public static let df = RFLAGS(rawValue: 1 << 10)
  /// Signed overflow.
  public static let of = RFLAGS(rawValue: 1 << 11)
  /// The I/O privilege level's two bits.
  public static let iopl = RFLAGS(rawValue: 3 << 12)
  /// The task is nested in another.
  public static let nt = RFLAGS(rawValue: 1 << 14)
  /// Resume: no instruction breakpoint before the next instruction.
  public static let rf = RFLAGS(rawValue: 1 << 16)
  /// Virtual-8086 mode.
  public static let vm = RFLAGS(rawValue: 1 << 17)
  /// Alignment checks in user mode; access to user pages in supervisor mode, with SMAP.
  public static let ac = RFLAGS(rawValue: 1 << 18)
  /// Virtual interrupt flag.
  public static let vif = RFLAGS(rawValue: 1 << 19)
  /// A virtual interrupt is pending.
  public static let vip = RFLAGS(rawValue: 1 << 20)
  /// Can be changed where CPUID exists.
  public static let id = RFLAGS(rawValue: 1 << 21)
  /// Bit 1, which is always set.
  public static let alwaysSet = RFLAGS(rawValue: 1 << 1)

  /// CF, PF, AF, ZF, SF and OF.
  public static let status: RFLAGS = [.cf, .pf, .af, .zf, .sf, .of]

  /// The names, for `description`.
  public static var names: [(bits: RFLAGS, name: String)] {
    [
      (.cf, "CF"), (.pf, "PF"), (.af, "AF"), (.zf, "ZF"), (.sf, "SF"), (.tf, "TF"), (.if, "IF"), (.df, "DF"),
      (.of, "OF"), (.iopl, "IOPL3"), (.nt, "NT"), (.rf, "RF"), (.vm, "VM"), (.ac, "AC"), (.vif, "VIF"),
      (.vip, "VIP"), (.id, "ID"),
    ]
  }
}

/// Control register 0 (Intel SDM, volume 3, section 2.5).
public struct CR0: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Protection enable.
  public static let pe = CR0(rawValue: 1 << 0)
  /// Monitor coprocessor: WAIT obeys TS.
  public static let mp = CR0(rawValue: 1 << 1)
  /// Emulation: x87 instructions are #NM.
  public static let em = CR0(rawValue: 1 << 2)
  /// Task switched: x87 and SSE instructions are #NM.
  public static let ts = CR0(rawValue: 1 << 3)
  /// Extension type, always 1.
  public static let et = CR0(rawValue: 1 << 4)
  /// Numeric errors are #MF.
  public static let ne = CR0(rawValue: 1 << 5)
  /// Write protect: supervisor writes obey read-only pages.
  public static let wp = CR0(rawValue: 1 << 16)
  /// Alignment mask: RFLAGS.AC checks alignment.
  public static let am = CR0(rawValue: 1 << 18)
  /// Not write-through.
  public static let nw = CR0(rawValue: 1 << 29)
  /// Cache disable.
  public static let cd = CR0(rawValue: 1 << 30)
  /// Paging.
  public static let pg = CR0(rawValue: 1 << 31)

  /// The names, for `description`.
  public static var names: [(bits: CR0, name: String)] {
    [
      (.pe, "PE"), (.mp, "MP"), (.em, "EM"), (.ts, "TS"), (.et, "ET"), (.ne, "NE"), (.wp, "WP"), (.am, "AM"),
      (.nw, "NW"), (.cd, "CD"), (.pg, "PG"),
    ]
  }
}

/// Control register 3 (Intel SDM, volume 3, section 2.5): the page table's address, and these bits.
public struct CR3: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Page-level write-through.
  public static let pwt = CR3(rawValue: 1 << 3)
  /// Page-level cache disable.
  public static let pcd = CR3(rawValue: 1 << 4)
  /// The process-context identifier's twelve bits, where CR4.PCIDE is set.
  public static let pcid = CR3(rawValue: 0xfff)
  /// In the operand of MOV to CR3 with CR4.PCIDE: keep the translations of that PCID.
  public static let noFlush = CR3(rawValue: 1 << 63)

  /// The names, for `description`.
  public static var names: [(bits: CR3, name: String)] { [(.pwt, "PWT"), (.pcd, "PCD"), (.noFlush, "NOFLUSH")] }
}

/// Control register 4 (Intel SDM, volume 3, section 2.5).
public struct CR4: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Virtual-8086 mode extensions.
  public static let vme = CR4(rawValue: 1 << 0)
  /// Protected-mode virtual interrupts.
  public static let pvi = CR4(rawValue: 1 << 1)
  /// RDTSC is privileged.
  public static let tsd = CR4(rawValue: 1 << 2)
  /// Debugging extensions.
  public static let de = CR4(rawValue: 1 << 3)
  /// 4 MiB pages with 32-bit paging.
  public static let pse = CR4(rawValue: 1 << 4)
  /// Physical address extension.
  public static let pae = CR4(rawValue: 1 << 5)
  /// Machine-check enable.
  public static let mce = CR4(rawValue: 1 << 6)
  /// Global pages.
  public static let pge = CR4(rawValue: 1 << 7)
  /// RDPMC in user mode.
  public static let pce = CR4(rawValue: 1 << 8)
  /// FXSAVE, FXRSTOR and SSE.
  public static let osfxsr = CR4(rawValue: 1 << 9)
  /// SIMD floating-point errors are #XM.
  public static let osxmmexcpt = CR4(rawValue: 1 << 10)
  /// User-mode instruction prevention.
  public static let umip = CR4(rawValue: 1 << 11)
  /// 57-bit linear addresses: 5-level paging.
  public static let la57 = CR4(rawValue: 1 << 12)
  /// VMX.
  public static let vmxe = CR4(rawValue: 1 << 13)
  /// SMX.
  public static let smxe = CR4(rawValue: 1 << 14)
  /// RDFSBASE and its like.
  public static let fsgsbase = CR4(rawValue: 1 << 16)
  /// Process-context identifiers.
  public static let pcide = CR4(rawValue: 1 << 17)
  /// XSAVE and extended states.
  public static let osxsave = CR4(rawValue: 1 << 18)
  /// Key locker.
  public static let kl = CR4(rawValue: 1 << 19)
  /// Supervisor-mode execution prevention.
  public static let smep = CR4(rawValue: 1 << 20)
  /// Supervisor-mode access prevention.
  public static let smap = CR4(rawValue: 1 << 21)
  /// Protection keys for user pages.
  public static let pke = CR4(rawValue: 1 << 22)
  /// Control-flow enforcement.
  public static let cet = CR4(rawValue: 1 << 23)
  /// Protection keys for supervisor pages.
  public static let pks = CR4(rawValue: 1 << 24)

  /// The names, for `description`.
  public static var names: [(bits: CR4, name: String)] {
    [
      (.vme, "VME"), (.pvi, "PVI"), (.tsd, "TSD"), (.de, "DE"), (.pse, "PSE"), (.pae, "PAE"), (.mce, "MCE"),
      (.pge, "PGE"), (.pce, "PCE"), (.osfxsr, "OSFXSR"), (.osxmmexcpt, "OSXMMEXCPT"), (.umip, "UMIP"),
      (.la57, "LA57"), (.vmxe, "VMXE"), (.smxe, "SMXE"), (.fsgsbase, "FSGSBASE"), (.pcide, "PCIDE"),
      (.osxsave, "OSXSAVE"), (.kl, "KL"), (.smep, "SMEP"), (.smap, "SMAP"), (.pke, "PKE"), (.cet, "CET"),
      (.pks, "PKS"),
    ]
  }
}

/// The extended-feature-enable register, MSR C000_0080 (Intel SDM, volume 3, section 2.2.1; AMD APM, volume 2, 3.1.7).
public struct EFER: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// SYSCALL enable.
  public static let sce = EFER(rawValue: 1 << 0)
  /// Long mode enable.
  public static let lme = EFER(rawValue: 1 << 8)
  /// Long mode active.
  public static let lma = EFER(rawValue: 1 << 10)
  /// No-execute enable.
  public static let nxe = EFER(rawValue: 1 << 11)
  /// SVM enable.
  public static let svme = EFER(rawValue: 1 << 12)
  /// Fast FXSAVE and FXRSTOR.
  public static let ffxsr = EFER(rawValue: 1 << 14)

  /// The names, for `description`.
  public static var names: [(bits: EFER, name: String)] {
    [(.sce, "SCE"), (.lme, "LME"), (.lma, "LMA"), (.nxe, "NXE"), (.svme, "SVME"), (.ffxsr, "FFXSR")]
  }
}

/// Debug register 6 (Intel SDM, volume 3, section 18.2.3).
public struct DR6: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Breakpoint 0 was met.
  public static let b0 = DR6(rawValue: 1 << 0)
  /// Breakpoint 1 was met.
  public static let b1 = DR6(rawValue: 1 << 1)
  /// Breakpoint 2 was met.
  public static let b2 = DR6(rawValue: 1 << 2)
  /// Breakpoint 3 was met.
  public static let b3 = DR6(rawValue: 1 << 3)
  /// A debug register was accessed with DR7.GD set.
  public static let bd = DR6(rawValue: 1 << 13)
  /// Single step.
  public static let bs = DR6(rawValue: 1 << 14)
  /// Task switch.
  public static let bt = DR6(rawValue: 1 << 15)
  /// The bits that are always set.
  public static let alwaysSet = DR6(rawValue: 0xffff_0ff0)

  /// The names, for `description`.
  public static var names: [(bits: DR6, name: String)] {
    [(.b0, "B0"), (.b1, "B1"), (.b2, "B2"), (.b3, "B3"), (.bd, "BD"), (.bs, "BS"), (.bt, "BT")]
  }
}

/// Debug register 7 (Intel SDM, volume 3, section 18.2.4); R/W and LEN of breakpoint n are the four bits from 16 + 4n.
public struct DR7: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Exact local breakpoints.
  public static let le = DR7(rawValue: 1 << 8)
  /// Exact global breakpoints.
  public static let ge = DR7(rawValue: 1 << 9)
  /// General detect: access to debug registers is #DB.
  public static let gd = DR7(rawValue: 1 << 13)
  /// Bit 10, which is always set.
  public static let alwaysSet = DR7(rawValue: 1 << 10)

  /// The names, for `description`.
  public static var names: [(bits: DR7, name: String)] { [(.le, "LE"), (.ge, "GE"), (.gd, "GD")] }
}
