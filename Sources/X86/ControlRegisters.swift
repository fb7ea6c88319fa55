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
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Carry.
  @inlinable public static var cf: Self { Self(rawValue: 1 << 0) }
  /// Parity of the result's low byte.
  @inlinable public static var pf: Self { Self(rawValue: 1 << 2) }
  /// Carry out of bit 3.
  @inlinable public static var af: Self { Self(rawValue: 1 << 4) }
  /// Zero.
  @inlinable public static var zf: Self { Self(rawValue: 1 << 6) }
  /// Sign.
  @inlinable public static var sf: Self { Self(rawValue: 1 << 7) }
  /// Trap after each instruction.
  @inlinable public static var tf: Self { Self(rawValue: 1 << 8) }
  /// Maskable interrupts are enabled.
  @inlinable public static var `if`: Self { Self(rawValue: 1 << 9) }
  /// String operations go down.
  @inlinable public static var df: Self { Self(rawValue: 1 << 10) }
  /// Signed overflow.
  @inlinable public static var of: Self { Self(rawValue: 1 << 11) }
  /// The I/O privilege level's two bits.
  @inlinable public static var iopl: Self { Self(rawValue: 3 << 12) }
  /// The task is nested in another.
  @inlinable public static var nt: Self { Self(rawValue: 1 << 14) }
  /// Resume: no instruction breakpoint before the next instruction.
  @inlinable public static var rf: Self { Self(rawValue: 1 << 16) }
  /// Virtual-8086 mode.
  @inlinable public static var vm: Self { Self(rawValue: 1 << 17) }
  /// Alignment checks in user mode; access to user pages in supervisor mode, with SMAP.
  @inlinable public static var ac: Self { Self(rawValue: 1 << 18) }
  /// Virtual interrupt flag.
  @inlinable public static var vif: Self { Self(rawValue: 1 << 19) }
  /// A virtual interrupt is pending.
  @inlinable public static var vip: Self { Self(rawValue: 1 << 20) }
  /// Can be changed where CPUID exists.
  @inlinable public static var id: Self { Self(rawValue: 1 << 21) }
  /// Bit 1, which is always set.
  @inlinable public static var alwaysSet: Self { Self(rawValue: 1 << 1) }

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
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Protection enable.
  @inlinable public static var pe: Self { Self(rawValue: 1 << 0) }
  /// Monitor coprocessor: WAIT obeys TS.
  @inlinable public static var mp: Self { Self(rawValue: 1 << 1) }
  /// Emulation: x87 instructions are #NM.
  @inlinable public static var em: Self { Self(rawValue: 1 << 2) }
  /// Task switched: x87 and SSE instructions are #NM.
  @inlinable public static var ts: Self { Self(rawValue: 1 << 3) }
  /// Extension type, always 1.
  @inlinable public static var et: Self { Self(rawValue: 1 << 4) }
  /// Numeric errors are #MF.
  @inlinable public static var ne: Self { Self(rawValue: 1 << 5) }
  /// Write protect: supervisor writes obey read-only pages.
  @inlinable public static var wp: Self { Self(rawValue: 1 << 16) }
  /// Alignment mask: RFLAGS.AC checks alignment.
  @inlinable public static var am: Self { Self(rawValue: 1 << 18) }
  /// Not write-through.
  @inlinable public static var nw: Self { Self(rawValue: 1 << 29) }
  /// Cache disable.
  @inlinable public static var cd: Self { Self(rawValue: 1 << 30) }
  /// Paging.
  @inlinable public static var pg: Self { Self(rawValue: 1 << 31) }

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
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Page-level write-through.
  @inlinable public static var pwt: Self { Self(rawValue: 1 << 3) }
  /// Page-level cache disable.
  @inlinable public static var pcd: Self { Self(rawValue: 1 << 4) }
  /// The process-context identifier's twelve bits, where CR4.PCIDE is set.
  @inlinable public static var pcid: Self { Self(rawValue: 0xfff) }
  /// In the operand of MOV to CR3 with CR4.PCIDE: keep the translations of that PCID.
  @inlinable public static var noFlush: Self { Self(rawValue: 1 << 63) }

  /// The names, for `description`.
  public static var names: [(bits: CR3, name: String)] { [(.pwt, "PWT"), (.pcd, "PCD"), (.noFlush, "NOFLUSH")] }
}

/// Control register 4 (Intel SDM, volume 3, section 2.5).
public struct CR4: NamedBits {
  /// The register.
  public var rawValue: UInt64
  /// The bits of a register value.
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Virtual-8086 mode extensions.
  @inlinable public static var vme: Self { Self(rawValue: 1 << 0) }
  /// Protected-mode virtual interrupts.
  @inlinable public static var pvi: Self { Self(rawValue: 1 << 1) }
  /// RDTSC is privileged.
  @inlinable public static var tsd: Self { Self(rawValue: 1 << 2) }
  /// Debugging extensions.
  @inlinable public static var de: Self { Self(rawValue: 1 << 3) }
  /// 4 MiB pages with 32-bit paging.
  @inlinable public static var pse: Self { Self(rawValue: 1 << 4) }
  /// Physical address extension.
  @inlinable public static var pae: Self { Self(rawValue: 1 << 5) }
  /// Machine-check enable.
  @inlinable public static var mce: Self { Self(rawValue: 1 << 6) }
  /// Global pages.
  @inlinable public static var pge: Self { Self(rawValue: 1 << 7) }
  /// RDPMC in user mode.
  @inlinable public static var pce: Self { Self(rawValue: 1 << 8) }
  /// FXSAVE, FXRSTOR and SSE.
  @inlinable public static var osfxsr: Self { Self(rawValue: 1 << 9) }
  /// SIMD floating-point errors are #XM.
  @inlinable public static var osxmmexcpt: Self { Self(rawValue: 1 << 10) }
  /// User-mode instruction prevention.
  @inlinable public static var umip: Self { Self(rawValue: 1 << 11) }
  /// 57-bit linear addresses: 5-level paging.
  @inlinable public static var la57: Self { Self(rawValue: 1 << 12) }
  /// VMX.
  @inlinable public static var vmxe: Self { Self(rawValue: 1 << 13) }
  /// SMX.
  @inlinable public static var smxe: Self { Self(rawValue: 1 << 14) }
  /// RDFSBASE and its like.
  @inlinable public static var fsgsbase: Self { Self(rawValue: 1 << 16) }
  /// Process-context identifiers.
  @inlinable public static var pcide: Self { Self(rawValue: 1 << 17) }
  /// XSAVE and extended states.
  @inlinable public static var osxsave: Self { Self(rawValue: 1 << 18) }
  /// Key locker.
  @inlinable public static var kl: Self { Self(rawValue: 1 << 19) }
  /// Supervisor-mode execution prevention.
  @inlinable public static var smep: Self { Self(rawValue: 1 << 20) }
  /// Supervisor-mode access prevention.
  @inlinable public static var smap: Self { Self(rawValue: 1 << 21) }
  /// Protection keys for user pages.
  @inlinable public static var pke: Self { Self(rawValue: 1 << 22) }
  /// Control-flow enforcement.
  @inlinable public static var cet: Self { Self(rawValue: 1 << 23) }
  /// Protection keys for supervisor pages.
  @inlinable public static var pks: Self { Self(rawValue: 1 << 24) }

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
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// SYSCALL enable.
  @inlinable public static var sce: Self { Self(rawValue: 1 << 0) }
  /// Long mode enable.
  @inlinable public static var lme: Self { Self(rawValue: 1 << 8) }
  /// Long mode active.
  @inlinable public static var lma: Self { Self(rawValue: 1 << 10) }
  /// No-execute enable.
  @inlinable public static var nxe: Self { Self(rawValue: 1 << 11) }
  /// SVM enable.
  @inlinable public static var svme: Self { Self(rawValue: 1 << 12) }
  /// Fast FXSAVE and FXRSTOR.
  @inlinable public static var ffxsr: Self { Self(rawValue: 1 << 14) }

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
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Breakpoint 0 was met.
  @inlinable public static var b0: Self { Self(rawValue: 1 << 0) }
  /// Breakpoint 1 was met.
  @inlinable public static var b1: Self { Self(rawValue: 1 << 1) }
  /// Breakpoint 2 was met.
  @inlinable public static var b2: Self { Self(rawValue: 1 << 2) }
  /// Breakpoint 3 was met.
  @inlinable public static var b3: Self { Self(rawValue: 1 << 3) }
  /// A debug register was accessed with DR7.GD set.
  @inlinable public static var bd: Self { Self(rawValue: 1 << 13) }
  /// Single step.
  @inlinable public static var bs: Self { Self(rawValue: 1 << 14) }
  /// Task switch.
  @inlinable public static var bt: Self { Self(rawValue: 1 << 15) }
  /// The bits that are always set.
  @inlinable public static var alwaysSet: Self { Self(rawValue: 0xffff_0ff0) }

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
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Exact local breakpoints.
  @inlinable public static var le: Self { Self(rawValue: 1 << 8) }
  /// Exact global breakpoints.
  @inlinable public static var ge: Self { Self(rawValue: 1 << 9) }
  /// General detect: access to debug registers is #DB.
  @inlinable public static var gd: Self { Self(rawValue: 1 << 13) }
  /// Bit 10, which is always set.
  @inlinable public static var alwaysSet: Self { Self(rawValue: 1 << 10) }

  /// The names, for `description`.
  public static var names: [(bits: DR7, name: String)] { [(.le, "LE"), (.ge, "GE"), (.gd, "GD")] }
}
