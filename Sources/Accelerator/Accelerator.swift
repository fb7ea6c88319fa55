import GuestMemory
import MemoryViews
import StateTree

/// What runs a machine's vCPUs: KVM, or a CPU in software. Everything above sees only these protocols.
public protocol Accelerator: Sendable {
  /// The name that `--engine` takes and reports print.
  var name: String { get }
  /// What this accelerator can do on this host.
  var capabilities: AcceleratorCapabilities { get }
  /// CPUID leaves that a vCPU can be given here, before any policy.
  func supportedCPUID() throws(AcceleratorError) -> [CPUIDLeaf]
  /// A virtual machine without slots or vCPUs.
  func makeVirtualMachine(
    memory: GuestMemory, interrupts: InterruptControllerModel
  ) throws(AcceleratorError) -> any VirtualMachine
}

/// Where the interrupt controllers live.
public enum InterruptControllerModel: String, Sendable, CaseIterable {
  /// PIC, IOAPIC, LAPICs and PIT in the accelerator.
  case inKernel
  /// LAPICs in the accelerator; PIC, IOAPIC and PIT in the VMM.
  case split
  /// All of them in the VMM.
  case userSpace
}

/// What an accelerator can do on this host; tests and `doctor` ask before they use it.
public struct AcceleratorCapabilities: OptionSet, Sendable {
  /// A bit a capability.
  public let rawValue: UInt32
  /// A bit a capability.
  public init(rawValue: UInt32) { self.rawValue = rawValue }
  /// Slots that the guest reads and fetches natively and whose writes exit.
  public static let readOnlyMemory = Self(rawValue: 1 << 0)
  /// Pages written by the guest, as a bitmap a slot.
  public static let dirtyLog = Self(rawValue: 1 << 1)
  /// Pages written by the guest, as a ring a vCPU that never overflows.
  public static let dirtyRing = Self(rawValue: 1 << 2)
  /// PIC, IOAPIC, LAPIC and PIT in the accelerator.
  public static let inKernelInterrupts = Self(rawValue: 1 << 3)
  /// LAPIC in the accelerator, the rest in the VMM.
  public static let splitInterrupts = Self(rawValue: 1 << 4)
  /// Interrupts from an eventfd, and guest writes to one, without leaving the accelerator.
  public static let eventNotifiers = Self(rawValue: 1 << 5)
  /// Single step and execute breakpoints in ring 0.
  public static let guestDebug = Self(rawValue: 1 << 6)
  /// Data watchpoints that fire.
  public static let watchpoints = Self(rawValue: 1 << 7)
  /// Ring 0 runs at the speed of the processor (or of the translator), not one instruction at a time.
  public static let nativeRing0 = Self(rawValue: 1 << 8)
  /// Execute permission of a page apart from read permission.
  public static let executePermission = Self(rawValue: 1 << 9)
  /// A guest TSC at another rate than the host's.
  public static let tscScaling = Self(rawValue: 1 << 10)
  /// The APIC's MSRs reach the controller that `attach` gives a vCPU. Without, a guest whose local APICs are in the VMM
  /// must see neither x2APIC nor TSC deadline.
  public static let controllerRegisters = Self(rawValue: 1 << 11)
  /// `limitInstructions`.
  public static let instructionLimit = Self(rawValue: 1 << 12)
  /// `pin`.
  public static let registerPinning = Self(rawValue: 1 << 14)
  /// Views, where the interrupt controllers are in the VMM. Without `.executePermission` no page can be executed that may
  /// not be read, pages of which a view has been told nothing can be executed where they can be read, and an access that a
  /// view forbids is told of after its instruction, which it ended without: a write is lost, a read gives 0.
  public static let memoryViews = Self(rawValue: 1 << 15)
  /// Data watchpoints on reads alone.
  public static let readWatchpoints = Self(rawValue: 1 << 13)
}

/// One virtual machine of an accelerator. Its methods may be called from any thread.
public protocol VirtualMachine: AnyObject, Sendable {
  /// RAM behind the slots.
  var memory: GuestMemory { get }
  /// Where the interrupt controllers live.
  var interrupts: InterruptControllerModel { get }

  /// Adds the slot, or replaces the one with its number, which stays where the new one is refused.
  func setMemorySlot(_ slot: MemorySlot) throws(AcceleratorError)
  /// Removes a slot; accesses to its range exit from then on. Unknown numbers are ignored.
  func removeMemorySlot(_ number: UInt32) throws(AcceleratorError)

  /// A vCPU with `index` as its APIC id and the leaves of `cpuid`, in the state that follows reset.
  func makeVCPU(index: Int, cpuid: [CPUIDLeaf]) throws(AcceleratorError) -> any VirtualCPU

  /// Drives an input of the accelerator's interrupt controllers.
  func setInterruptLine(_ gsi: UInt32, level: Bool) throws(AcceleratorError)
  /// Delivers a message-signalled interrupt (SDM vol. 3, 11.11).
  func signalMSI(address: UInt64, data: UInt32) throws(AcceleratorError)
  /// Replaces the routes of all GSIs.
  func setInterruptRoutes(_ routes: [InterruptRoute]) throws(AcceleratorError)
  /// Raises `gsi` whenever the eventfd is signalled (edge; with `resample`, level until the guest's EOI signals that one).
  func attachInterrupt(_ gsi: UInt32, eventDescriptor: Int32, resample: Int32?) throws(AcceleratorError)
  /// Undoes `attachInterrupt`.
  func detachInterrupt(_ gsi: UInt32, eventDescriptor: Int32) throws(AcceleratorError)
  /// Signals the eventfd instead of exiting when the guest writes to the doorbell.
  func attachDoorbell(_ doorbell: Doorbell, eventDescriptor: Int32) throws(AcceleratorError)
  /// Undoes `attachDoorbell`.
  func detachDoorbell(_ doorbell: Doorbell, eventDescriptor: Int32) throws(AcceleratorError)

  /// Pages of a slot that the guest wrote since the last call, lowest page in bit 0 of the first word.
  ///
  /// The slot was set with `logsDirtyPages`. The VMM's own writes are in `GuestMemory.dirty`.
  func takeDirtyLog(slot: UInt32) throws(AcceleratorError) -> [UInt64]
  /// Pages that the vCPUs' dirty rings hold, as (slot, page in the slot); the rings are empty afterwards.
  func collectDirtyRings() throws(AcceleratorError) -> [(slot: UInt32, page: UInt64)]

  /// A view of this machine: all of memory with all rights, or what `base` says now.
  func makeView(base: MemoryView?) throws(AcceleratorError) -> MemoryView
  /// Changes rights in views; every vCPU obeys the new ones before this returns, but for what the caller's own vCPU does
  /// before its next `run`. Not from two threads at once for one view.
  func change(_ changes: [ViewChange]) throws(AcceleratorError)

  /// Guest time that the vCPUs' instructions make, where it comes from them: then no two vCPUs may run at once.
  var virtualTime: (any VirtualTime)? { get }
  /// Guest time of the paravirtual clock in nanoseconds, where there is one.
  func readClock() throws(AcceleratorError) -> UInt64
  /// Sets what `readClock` returns.
  func writeClock(_ nanoseconds: UInt64) throws(AcceleratorError)
  /// Interrupt controllers, timers and clock of the accelerator; vCPUs are apart.
  func save() throws(AcceleratorError) -> StateNode
  /// Puts a saved state in place.
  func restore(_ node: StateNode) throws(AcceleratorError)
}

/// Guest time that passes with instructions and exceptions, a nanosecond each, on whichever vCPU runs, and with nothing else.
public protocol VirtualTime: AnyObject, Sendable {
  /// Nanoseconds since the machine was made: exact on the thread that runs the vCPUs, recent on others.
  var now: UInt64 { get }
  /// Goes on from another time; while no vCPU runs.
  func set(_ nanoseconds: UInt64)
}

extension VirtualMachine {
  /// nil: time is the host's.
  public var virtualTime: (any VirtualTime)? { nil }
}

/// New rights for pages of a view.
public struct ViewChange: Sendable {
  /// The view.
  public var view: MemoryView
  /// The pages: every one that the range touches; nil: those that the view has no entry for.
  public var range: GuestRange?
  /// What may be done with them.
  public var rights: PageRights

  /// New rights for a range, or for the pages without an entry.
  public init(_ view: MemoryView, _ range: GuestRange?, _ rights: PageRights) {
    self.view = view
    self.range = range
    self.rights = rights
  }

  /// Writes them into the view; vCPUs may go on by the old ones.
  public func apply() {
    if let range { view.set(rights, for: range) } else { view.defaultRights = rights }
  }
}

extension VirtualMachine {
  /// Refused: there are no views here.
  public func makeView(base: MemoryView?) throws(AcceleratorError) -> MemoryView {
    throw .unsupported(engine: "kvm", what: "memory views")
  }

  /// Refused: there are no views here.
  public func change(_ changes: [ViewChange]) throws(AcceleratorError) {
    throw .unsupported(engine: "kvm", what: "memory views")
  }
}

/// One virtual CPU.
///
/// `run` and the state belong to the thread that runs it, and to whoever holds the machine paused; `kick` may come
/// from any thread. That contract, not a lock, makes it Sendable: a lock would stand in every exit's way.
public protocol VirtualCPU: AnyObject, Sendable {
  /// Its number and APIC id.
  var index: Int { get }

  /// Runs the guest until it needs the VMM, or until `kick`.
  ///
  /// The answer to a read of `.portIO` or `.memoryIO` is put where the exit's data pointer points, and taken by the next `run`.
  func run() throws(AcceleratorError) -> VCPUExit
  /// Completes what the last exit left half done (a port read's result, say) without running any guest instruction,
  /// so that the state read afterwards is whole.
  ///
  /// An access may have further parts (16 bytes come as two exits): the next one is returned, to be handled before
  /// this is called again. nil when the instruction is done.
  func completeExit() throws(AcceleratorError) -> VCPUExit?
  /// Makes `run` return `.interrupted` soon: now if it runs, else the next time it is called.
  func kick()

  /// The whole state.
  func readState() throws(AcceleratorError) -> VCPUState
  /// Replaces the whole state.
  func writeState(_ state: VCPUState) throws(AcceleratorError)
  /// General registers, RIP and RFLAGS alone: the cheap part.
  func readRegisters() throws(AcceleratorError) -> GeneralRegisters
  /// Replaces the general registers, RIP and RFLAGS.
  func writeRegisters(_ registers: GeneralRegisters) throws(AcceleratorError)
  /// Segment, control and descriptor-table registers, EFER and the APIC base.
  func readSystemRegisters() throws(AcceleratorError) -> SystemRegisters
  /// Replaces segment, control and descriptor-table registers, EFER and the APIC base.
  func writeSystemRegisters(_ registers: SystemRegisters) throws(AcceleratorError)

  /// Makes an external interrupt pending at the processor's INTR pin; only where the PIC is in the VMM, only when
  /// `isInterruptible`, and once before each `run`.
  func injectInterrupt(vector: UInt8) throws(AcceleratorError)
  /// Whether an external interrupt could be injected now, as of the last exit; only where the PIC is in the VMM.
  var isInterruptible: Bool { get }
  /// Asks for `.interruptWindow` as soon as one could be.
  func requestInterruptWindow(_ wanted: Bool)
  /// Makes a non-maskable interrupt pending.
  func injectNMI() throws(AcceleratorError)
  /// Guest-physical address of a linear address by the vCPU's own page tables; nil where it is not mapped.
  func translate(_ linear: UInt64) throws(AcceleratorError) -> GuestPhysicalAddress?
  /// Gives the vCPU its local APIC, once and before the first run, where the interrupt controllers are in the VMM
  /// (`.userSpace`). From then on `run` takes interrupts from it by itself.
  func attach(_ controller: any LocalInterruptController) throws(AcceleratorError)
  /// Instructions retired so far, where the accelerator counts them; any thread may ask, and gets a recent number.
  var instructions: UInt64? { get }
  /// Makes `run` return `.instructionLimit` after exactly `count` more instructions and exceptions, in place of an earlier limit; on the
  /// vCPU's thread, also while it runs. Only where `.instructionLimit` is among the capabilities.
  func limitInstructions(_ count: UInt64)
  /// Makes `view` the one that the vCPU's accesses, fetches and page walks obey from its next instruction on; nil: all of
  /// memory with all rights. In constant time; only where `.memoryViews` is among the capabilities.
  func selectView(_ view: MemoryView?) throws(AcceleratorError)
  /// Makes instructions that would change one of these registers an exit (bits: only where they would be cleared); an empty
  /// set lifts that. Only where `.registerPinning` is among the capabilities; on the vCPU's thread.
  func pin(_ registers: Set<PinnedRegister>) throws(AcceleratorError)
  /// What `selectView` chose last.
  var activeView: MemoryView? { get }
  /// Runs `body` while no `change` returns: what it finds in `activeView` holds until it ends. It must not change rights.
  func holdingViews<Result>(_ body: () throws(AcceleratorError) -> Result) throws(AcceleratorError) -> Result
  /// Gives the vCPU the PIC's interrupts, once and before the first run, where only the local APICs are the accelerator's
  /// (`.split`).
  func attach(external source: any InterruptSource) throws(AcceleratorError)
  /// Guest nanoseconds until the vCPU's time-stamp counter has this value, 0 where it has passed; nil where that will
  /// never be. For the TSC deadline of an attached local APIC, on the vCPU's thread.
  func nanoseconds(untilTimestamp ticks: UInt64) -> UInt64?
  /// How many breakpoints `setDebug` takes.
  var breakpointLimit: Int { get }
  /// Tells `tracer` of everything of a kind; before the first run.
  func trace(_ kind: VCPUTraceKind, to tracer: any VCPUTracer) throws(AcceleratorError)
  /// Single step and hardware breakpoints on behalf of a debugger.
  func setDebug(_ control: DebugControl) throws(AcceleratorError)
}

extension VirtualCPU {
  /// nil: nobody counts.
  public var instructions: UInt64? { nil }

  /// Nothing: there is no such capability here.
  public func limitInstructions(_ count: UInt64) {}

  /// A processor's own.
  public var breakpointLimit: Int { 4 }

  /// nil: there are no views here.
  public var activeView: MemoryView? { nil }

  /// As it is: rights change only while no vCPU executes.
  public func holdingViews<Result>(
    _ body: () throws(AcceleratorError) -> Result
  ) throws(AcceleratorError) -> Result { try body() }

  /// Refused: nobody sees those instructions here.
  public func pin(_ registers: Set<PinnedRegister>) throws(AcceleratorError) {
    throw .unsupported(engine: "kvm", what: "pinned registers")
  }

  /// Refused: there are no views here.
  public func selectView(_ view: MemoryView?) throws(AcceleratorError) {
    throw .unsupported(engine: "kvm", what: "memory views")
  }
}
