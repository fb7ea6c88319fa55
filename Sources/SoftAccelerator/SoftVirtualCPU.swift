import Accelerator
import CSoftCPU
import GuestMemory
import MemoryViews
import X86

/// One software CPU as the machine sees it: the protocol's contract over a `Processor`.
public final class SoftVirtualCPU: VirtualCPU, @unchecked Sendable {
  /// Its number and APIC id.
  public let index: Int
  private let machine: SoftVirtualMachine
  let processor: Processor
  /// The bytes of the access that the last exit was about.
  private let data = UnsafeMutableRawPointer.allocate(byteCount: 16, alignment: 16)
  /// Whether the last exit was an access whose answer `data` holds now.
  private var awaitsAccess = false

  init(machine: SoftVirtualMachine, index: Int, cpuid: [CPUIDLeaf]) {
    self.machine = machine
    self.index = index
    processor = Processor(
      number: index, memory: machine.physical, features: ProcessorFeatures(leaves: cpuid), group: machine.group)
    machine.group.add(processor)
    if let time = machine.time {
      processor.isDeterministic = true
      processor.randomState = UInt64(index)
      processor.timeSource = time.source
      if index == 0 { time.run(processor.cpu) }
    } else {
      processor.timeSource = machine.counter
      processor.ownTimeSource = machine.counter
    }
  }

  deinit {
    machine.group.remove(index)
    machine.time?.forget(processor.cpu)
    data.deallocate()
  }

  // MARK: Running

  /// Runs the guest.
  public func run() throws(AcceleratorError) -> VCPUExit {
    takeAnswer()
    machine.time?.run(processor.cpu)
    while true {
      if let exit = exit(processor.run()) { return exit }
    }
  }

  /// Finishes the instruction whose access the last exit was.
  public func completeExit() throws(AcceleratorError) -> VCPUExit? {
    takeAnswer()
    while let pending = processor.finishInstruction() {
      if let exit = exit(pending) { return exit }
    }
    return nil
  }

  /// Makes `run` return soon.
  public func kick() {
    processor.isKicked = true
    soft_set_attention(processor.cpu, .min)
  }

  /// Hands the VMM's answer to the instruction that waits for it.
  private func takeAnswer() {
    guard awaitsAccess else { return }
    awaitsAccess = false
    processor.replay.values.append(data.load(as: UInt64.self))
  }

  /// What the machine is told of a pending exit; nil where nothing is left to do.
  private func exit(_ pending: PendingExit) -> VCPUExit? {
    switch pending {
    case .none: return .interrupted
    case .memory(let physical, let size, let isWrite, let value):
      data.storeBytes(of: value, as: UInt64.self)
      awaitsAccess = true
      if isWrite, machine.ring(.memory, physical, size: size, value: value) {
        takeAnswer()
        return nil
      }
      return .memoryIO(
        MemoryAccess(address: GuestPhysicalAddress(physical), size: size, isWrite: isWrite, data: data))
    case .port(let port, let size, let isWrite, let value):
      data.storeBytes(of: value, as: UInt64.self)
      awaitsAccess = true
      if isWrite, machine.ring(.port, UInt64(port), size: size, value: value) {
        takeAnswer()
        return nil
      }
      return .portIO(PortAccess(port: port, size: size, isWrite: isWrite, count: 1, data: data))
    case .memoryFault(let physical): return .memoryFault(GuestPhysicalAddress(physical), size: 1, flags: 0)
    case .viewViolation(let violation): return .viewViolation(violation)
    case .pinnedRegister(let register, let value): return .pinnedRegister(register, value: value)
    case .debug(let event): return .debug(event)
    case .halt: return .halt
    case .interruptWindow: return .interruptWindow
    case .instructionLimit: return .instructionLimit
    case .tripleFault: return .tripleFault
    }
  }

  // MARK: State

  /// The whole state.
  public func readState() throws(AcceleratorError) -> VCPUState { processor.state }

  /// Replaces the whole state.
  public func writeState(_ state: VCPUState) throws(AcceleratorError) {
    dropAccess()
    try processor.setState(state)
  }

  /// General registers, RIP and RFLAGS.
  public func readRegisters() throws(AcceleratorError) -> GeneralRegisters { processor.generalRegisters }

  /// Replaces general registers, RIP and RFLAGS.
  public func writeRegisters(_ registers: GeneralRegisters) throws(AcceleratorError) {
    // Whoever sends the CPU elsewhere gives up the instruction under way.
    if registers.rip != processor.cpu.pointee.rip { dropAccess() }
    processor.generalRegisters = registers
  }

  /// Segment, control and descriptor-table registers.
  public func readSystemRegisters() throws(AcceleratorError) -> SystemRegisters { processor.systemRegisters }

  /// Replaces segment, control and descriptor-table registers.
  public func writeSystemRegisters(_ registers: SystemRegisters) throws(AcceleratorError) {
    processor.systemRegisters = registers
  }

  /// An access of the state that is being replaced will not be finished.
  private func dropAccess() {
    awaitsAccess = false
    processor.isHalted = false
    processor.finishDeviceAccesses()
  }

  /// Instructions retired, without those of the block under way.
  public var instructions: UInt64? { soft_load(soft_instructions(processor.cpu)) }

  /// Makes `run` return `.instructionLimit` after so many more instructions.
  public func limitInstructions(_ count: UInt64) { processor.limitInstructions(count) }

  /// Makes a view the active one.
  public func selectView(_ view: MemoryView?) throws(AcceleratorError) {
    processor.view = view
    processor.selectSpace(keep: true)
  }

  /// Makes changes of registers an exit.
  public func pin(_ registers: Set<PinnedRegister>) throws(AcceleratorError) { processor.pins = registers }

  /// The view that is active.
  public var activeView: MemoryView? { processor.view }

  // MARK: Events

  /// Attaches the local APIC.
  public func attach(_ controller: any LocalInterruptController) throws(AcceleratorError) {
    processor.localAPIC = controller
  }

  /// Nanoseconds until the time-stamp counter has a value.
  public func nanoseconds(untilTimestamp ticks: UInt64) -> UInt64? {
    let now = processor.timeStampCounter
    return ticks > now ? processor.timeSource.nanoseconds(ofTicks: ticks - now) : 0
  }

  /// Puts an external interrupt at the INTR pin.
  public func injectInterrupt(vector: UInt8) throws(AcceleratorError) { processor.pendingInterrupt = vector }

  /// Whether an external interrupt would be taken at once.
  public var isInterruptible: Bool {
    processor.cpu.pointee.other_flags & RFLAGS.if.rawValue != 0 && processor.cpu.pointee.interrupt_shadow == 0
      && processor.pendingInterrupt == nil && processor.replay.values.isEmpty
  }

  /// Asks for `.interruptWindow`.
  public func requestInterruptWindow(_ wanted: Bool) { processor.wantsInterruptWindow = wanted }

  /// Makes an NMI pending.
  public func injectNMI() throws(AcceleratorError) { processor.postNMI() }

  /// Walks the guest's page tables without changing anything.
  public func translate(_ linear: UInt64) throws(AcceleratorError) -> GuestPhysicalAddress? {
    processor.translate(linear).map { GuestPhysicalAddress($0) }
  }

  /// Every block that is decoded is looked up among them.
  public var breakpointLimit: Int { 1024 }

  /// Tells `tracer` of everything of a kind.
  public func trace(_ kind: VCPUTraceKind, to tracer: any VCPUTracer) throws(AcceleratorError) {
    processor.trace(kind, to: tracer)
  }

  /// Sets what the debugger wants.
  public func setDebug(_ control: DebugControl) throws(AcceleratorError) {
    guard control.breakpoints.count <= breakpointLimit else {
      throw .breakpointCount(control.breakpoints.count, limit: breakpointLimit)
    }
    for breakpoint in control.breakpoints {
      guard breakpoint.kind == .execute ? breakpoint.length == 1 : [1, 2, 4, 8].contains(breakpoint.length) else {
        throw .breakpointLength(address: breakpoint.address, length: breakpoint.length)
      }
    }
    processor.setHostDebug(control)
  }
}
