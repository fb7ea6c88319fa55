import Accelerator
import GuestMemory
import Synchronization
import X86

/// Executes on software CPUs what another accelerator's vCPUs cannot: state over, one instruction, state back.
public final class SoftInstructionAssist: InstructionAssist {
  /// What the machine's vCPUs find in memory; the software machine over it is made when it is first needed.
  private let memory = Mutex<(memory: GuestMemory, slots: [MemorySlot])?>(nil)
  private let machine = Mutex<SoftVirtualMachine?>(nil)
  private let processors = Mutex<[Int: SoftVirtualCPU]>([:])

  /// An assist for one machine.
  public init() {}

  /// Shows the software CPUs the machine's memory.
  public func attach(_ memory: GuestMemory, slots: [MemorySlot]) throws(AcceleratorError) {
    self.memory.withLock { $0 = (memory, slots) }
  }

  /// Its writes are in no log of the accelerator's.
  public func takeDirtyLog(slot: UInt32) throws(AcceleratorError) -> [UInt64]? {
    try machine.withLock { $0 }?.takeDirtyLog(slot: slot)
  }

  /// Executes one instruction. A state that no software CPU can take is not executed.
  public func execute(
    _ vcpu: any VirtualCPU, handle: (VCPUExit) throws(AcceleratorError) -> Void
  ) throws(AcceleratorError) -> Bool {
    guard let soft = try processor(vcpu.index) else { return false }
    let state = try vcpu.readState()
    try soft.selectView(vcpu.activeView)
    guard let taken = try? take(state, soft) else { return false }
    var step = DebugControl()
    step.singleStep = true
    try soft.setDebug(step)
    while true {
      let exit = try vcpu.holdingViews { () throws(AcceleratorError) in try soft.run() }
      switch exit {
      case .debug:
        var result = state
        give(try soft.readState(), taken, to: &result)
        try vcpu.writeState(result)
        return true
      case .portIO, .memoryIO: try handle(exit)
      // The state of `vcpu` is the one before the instruction, too.
      case .viewViolation:
        try handle(exit)
        return true
      case .interrupted: continue
      // The state of `vcpu` is still the one before the instruction.
      default: return false
      }
    }
  }

  private func processor(_ index: Int) throws(AcceleratorError) -> SoftVirtualCPU? {
    guard let known = memory.withLock({ $0 }) else { return nil }
    let machine = try machine.withLock { machine throws(AcceleratorError) in
      if let machine { return machine }
      let made = SoftVirtualMachine(memory: known.memory)
      for var slot in known.slots {
        // Always: nobody tells when somebody begins to ask.
        slot.logsDirtyPages = true
        try made.setMemorySlot(slot)
      }
      machine = made
      return made
    }
    return processors.withLock { processors in
      if let known = processors[index] { return known }
      // Every feature there is: which ones the guest sees is the other accelerator's business.
      let made = SoftVirtualCPU(machine: machine, index: index, cpuid: SoftCPUID.leaves)
      processors[index] = made
      return made
    }
  }

  /// Puts a state into a software CPU, as far as that has the parts; returns what it then has.
  private func take(_ state: VCPUState, _ soft: SoftVirtualCPU) throws(AcceleratorError) -> VCPUState {
    let model = try soft.readState()
    var taken = state
    let known = Set(model.modelSpecific.map(\.index))
    taken.modelSpecific = state.modelSpecific.filter { known.contains($0.index) }
    taken.localAPIC = []
    taken.activity = .runnable
    taken.extended = model.extended
    let common = min(state.extended.count, model.extended.count)
    taken.extended.replaceSubrange(0..<common, with: state.extended[..<common])
    // Of the components only those that both have (SDM vol. 1, 13.4.2): x87, SSE and AVX.
    taken.extended[512] &= 7
    for index in 513..<520 { taken.extended[index] = 0 }
    try soft.writeState(taken)
    return try soft.readState()
  }

  /// Carries what the instruction changed over to the state of the other accelerator, which may have more parts.
  private func give(_ after: VCPUState, _ before: VCPUState, to result: inout VCPUState) {
    result.general = after.general
    result.system = after.system
    result.events.interruptShadow = after.events.interruptShadow
    result.events.nmiMasked = after.events.nmiMasked
    if after.debug != before.debug { result.debug = after.debug }
    if after.xcr0 != before.xcr0 { result.xcr0 = after.xcr0 }
    for (old, new) in zip(before.modelSpecific, after.modelSpecific)
    where old.value != new.value && new.index != MSR.timeStampCounter {
      if let place = result.modelSpecific.firstIndex(where: { $0.index == new.index }) {
        result.modelSpecific[place].value = new.value
      }
    }
    if after.extended != before.extended, result.extended.count >= 576 {
      let common = min(result.extended.count, 832)
      result.extended.replaceSubrange(0..<512, with: after.extended[..<512])
      result.extended.replaceSubrange(576..<common, with: after.extended[576..<common])
      result.extended[512] |= common == 832 ? 7 : 3
    }
  }
}
