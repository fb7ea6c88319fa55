// Fields carry the names of the SDM (vol. 3) and need no comment each.
// swift-format-ignore-file: AllPublicDeclarationsHaveDocumentation

/// The sixteen general registers, RIP and RFLAGS.
public struct GeneralRegisters: Equatable, Sendable {
  public var rax: UInt64 = 0
  public var rbx: UInt64 = 0
  public var rcx: UInt64 = 0
  public var rdx: UInt64 = 0
  public var rsi: UInt64 = 0
  public var rdi: UInt64 = 0
  public var rsp: UInt64 = 0
  public var rbp: UInt64 = 0
  public var r8: UInt64 = 0
  public var r9: UInt64 = 0
  public var r10: UInt64 = 0
  public var r11: UInt64 = 0
  public var r12: UInt64 = 0
  public var r13: UInt64 = 0
  public var r14: UInt64 = 0
  public var r15: UInt64 = 0
  public var rip: UInt64 = 0
  public var rflags: UInt64 = 2

  /// All zero but RFLAGS' fixed bit 1.
  public init() {}
}

/// One segment register with its hidden part (SDM vol. 3, 3.4.3).
public struct SegmentRegister: Equatable, Sendable {
  public var base: UInt64 = 0
  /// In bytes, after granularity is applied.
  public var limit: UInt32 = 0xffff
  public var selector: UInt16 = 0
  /// Bits 0-3 type, 4 S, 5-6 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G; bit 12 is set where the register is unusable (null).
  public var attributes: UInt16 = 0

  /// A segment with its hidden part.
  public init(base: UInt64 = 0, limit: UInt32 = 0xffff, selector: UInt16 = 0, attributes: UInt16 = 0x93) {
    self.base = base
    self.limit = limit
    self.selector = selector
    self.attributes = attributes
  }

  /// 64-bit ring-0 code, flat.
  public static func code64(selector: UInt16) -> Self {
    Self(limit: 0xffff_ffff, selector: selector, attributes: 0xa9b)
  }
  /// 32-bit ring-0 code, flat.
  public static func code32(selector: UInt16) -> Self {
    Self(limit: 0xffff_ffff, selector: selector, attributes: 0xc9b)
  }
  /// Ring-0 data, flat.
  public static func data(selector: UInt16) -> Self {
    Self(limit: 0xffff_ffff, selector: selector, attributes: 0xc93)
  }
  /// A real-mode segment.
  public static func real(selector: UInt16, code: Bool = false) -> Self {
    Self(base: UInt64(selector) << 4, selector: selector, attributes: code ? 0x9b : 0x93)
  }
  /// A busy 32/64-bit task-state segment.
  public static func task(base: UInt64 = 0, limit: UInt32 = 0x67, selector: UInt16) -> Self {
    Self(base: base, limit: limit, selector: selector, attributes: 0x8b)
  }
}

/// GDTR or IDTR.
public struct DescriptorTable: Equatable, Sendable {
  public var base: UInt64
  public var limit: UInt16

  /// A table of `limit + 1` bytes.
  public init(base: UInt64 = 0, limit: UInt16 = 0xffff) {
    self.base = base
    self.limit = limit
  }
}

/// Segment, control and descriptor-table registers, EFER and the APIC base.
public struct SystemRegisters: Equatable, Sendable {
  public var cs = SegmentRegister(attributes: 0x9b)
  public var ds = SegmentRegister()
  public var es = SegmentRegister()
  public var fs = SegmentRegister()
  public var gs = SegmentRegister()
  public var ss = SegmentRegister()
  public var tr = SegmentRegister(attributes: 0x8b)
  public var ldt = SegmentRegister(attributes: 0x82)
  public var gdt = DescriptorTable()
  public var idt = DescriptorTable()
  public var cr0: UInt64 = 0x6000_0010
  public var cr2: UInt64 = 0
  public var cr3: UInt64 = 0
  public var cr4: UInt64 = 0
  public var cr8: UInt64 = 0
  public var efer: UInt64 = 0
  public var apicBase: UInt64 = 0xfee0_0900

  /// Real mode with all segments at 0: not the reset state, which `VCPUState` has.
  public init() {}
}

/// What a vCPU waits for.
public enum ActivityState: UInt32, Sendable, CaseIterable {
  /// It runs.
  case runnable = 0
  /// An application processor that waits for INIT.
  case uninitialized = 1
  /// After INIT, it waits for SIPI.
  case waitForStartup = 2
  /// `hlt`.
  case halted = 3
  /// SIPI came and `vector` is set.
  case startupReceived = 4
}

/// Exceptions and interrupts that are pending or being delivered (KVM's `struct kvm_vcpu_events`, in the SDM's terms).
public struct PendingEvents: Equatable, Sendable {
  /// An exception that is being delivered or, when only `exceptionPending`, is to be.
  public var exceptionInjected = false
  public var exceptionPending = false
  public var exceptionVector: UInt8 = 0
  public var exceptionHasErrorCode = false
  public var exceptionErrorCode: UInt32 = 0
  public var exceptionPayload: UInt64?
  /// An external or software interrupt that is being delivered.
  public var interruptInjected = false
  public var interruptVector: UInt8 = 0
  public var interruptIsSoftware = false
  /// Bit 0: blocking by STI; bit 1: blocking by MOV SS.
  public var interruptShadow: UInt8 = 0
  public var nmiInjected = false
  public var nmiPending = false
  public var nmiMasked = false
  public var startupVector: UInt32 = 0
  public var tripleFaultPending = false

  /// Nothing pending.
  public init() {}
}

/// DR0-DR3, DR6 and DR7 as the guest set them.
public struct DebugRegisters: Equatable, Sendable {
  public var addresses: [UInt64] = [0, 0, 0, 0]
  public var dr6: UInt64 = 0xffff_0ff0
  public var dr7: UInt64 = 0x400

  /// The reset values.
  public init() {}
}

/// One model-specific register.
public struct ModelSpecificRegister: Equatable, Sendable {
  public var index: UInt32
  public var value: UInt64

  /// An MSR and its value.
  public init(index: UInt32, value: UInt64) {
    self.index = index
    self.value = value
  }
}

/// Everything a vCPU is: moved between accelerators, processes and files.
public struct VCPUState: Equatable, Sendable {
  public var general = GeneralRegisters()
  public var system = SystemRegisters()
  /// x87, SSE, AVX and further components in the standard XSAVE layout (SDM vol. 1, 13.4), XSTATE_BV set.
  public var extended: [UInt8] = []
  public var xcr0: UInt64 = 1
  public var modelSpecific: [ModelSpecificRegister] = []
  /// The local APIC's register page, 1024 bytes, where the accelerator holds the LAPIC; else empty.
  public var localAPIC: [UInt8] = []
  public var events = PendingEvents()
  public var debug = DebugRegisters()
  public var activity = ActivityState.runnable
  /// Guest TSC ticks a millisecond; 0 where unknown.
  public var tscKilohertz: UInt32 = 0

  /// The state after reset (SDM vol. 3, table 10-1) but for the extended part, which is the accelerator's own.
  public init() {
    general.rip = 0xfff0
    general.rdx = 0x600
    system.cs = SegmentRegister(base: 0xffff_0000, selector: 0xf000, attributes: 0x9b)
  }
}
