import Accelerator
import CSoftCPU
import X86

/// What a CPU does between two looks of the VMM at it.
extension Processor {
  /// Executes until the VMM is needed: `.none` where it was kicked.
  func run() -> PendingExit {
    soft_store(soft_inside(cpu), 1)
    defer { soft_store(soft_inside(cpu), 0) }
    while true {
      if soft_attention(cpu) < 0 || soft_load(soft_requests(cpu)) != 0 {
        soft_set_attention(cpu, 0)
        answerRequests()
        // An instruction that waits for the rest of its device accesses comes first: its state is not whole.
        if isKicked {
          if replay.values.isEmpty {
            isKicked = false
            return .none
          }
          soft_set_attention(cpu, .min)
        }
      }
      if replay.values.isEmpty {
        if cpu.pointee.instructions >= instructionLimit { return .instructionLimit }
        if let exit = takeEvents() { return exit }
      }
      do throws(Interruption) {
        if stepsSingly { try step() } else { try runBlocks() }
        if let exit = hostStop() { return exit }
      } catch .exit {
        let exit = pendingExit
        pendingExit = .none
        return exit
      } catch {
        finishDeviceAccesses()
        countException()
        if let exit = deliver(error) ?? hostStop() { return exit }
      }
    }
  }

  /// Finishes the instruction that a device access interrupted, and nothing after it; nil when it is done.
  func finishInstruction() -> PendingExit? {
    guard !replay.values.isEmpty else { return nil }
    finishesOnly = true
    defer { finishesOnly = false }
    do throws(Interruption) {
      try step()
    } catch .exit {
      let exit = pendingExit
      pendingExit = .none
      return exit
    } catch {
      finishDeviceAccesses()
      return deliver(error)
    }
    return nil
  }

  /// Executes one instruction, decoded afresh.
  func step() throws(Interruption) {
    replay.position = 0
    if hostDebug.isActive, replay.values.isEmpty { try checkHostBreakpoints() }
    if isDebugged { return try stepDebugged() }
    let instruction = try fetch()
    let ip = cpu.pointee.rip
    let shadow = cpu.pointee.interrupt_shadow
    try execute(instruction)
    finish(instruction, at: ip, shadow: shadow)
  }

  /// The same with breakpoints, single-stepping or RF: what they find falls due after the instruction.
  private func stepDebugged() throws(Interruption) {
    try checkCodeBreakpoints()
    let instruction = try fetch()
    let ip = cpu.pointee.rip
    let shadow = cpu.pointee.interrupt_shadow
    let flags = cpu.pointee.other_flags
    let due = pendingDebug
    // Each iteration of a repeated string instruction is a step.
    let finishesOnly = self.finishesOnly
    if flags & RFLAGS.tf.rawValue != 0 { self.finishesOnly = true }
    defer { self.finishesOnly = finishesOnly }
    do throws(Interruption) {
      try execute(instruction)
    } catch {
      // An instruction that starts again, or never completed, has met nothing yet.
      if case .exception(.debug) = error {} else { pendingDebug = due }
      throw error
    }
    finishDebugging(instruction, flags: flags, shadow: shadow)
    finish(instruction, at: ip, shadow: shadow)
  }

  private func finish(_ instruction: Instruction, at ip: UInt64, shadow: UInt8) {
    finishDeviceAccesses()
    if tracesInstructions { traceInstruction(instruction, at: ip) }
    cpu.pointee.instructions &+= 1
    // What cast the shadow keeps it for one instruction.
    if shadow != 0, cpu.pointee.interrupt_shadow == shadow { cpu.pointee.interrupt_shadow = 0 }
  }

  /// Whether instructions must be taken one by one: a shadow to be lifted, or a device access to be repeated.
  private var stepsSingly: Bool {
    cpu.pointee.interrupt_shadow != 0 || !replay.values.isEmpty || tracesInstructions || isDebugged
      || hostDebug.singleStep || isNearLimit
  }

  // MARK: The instruction limit

  /// Makes `run` return after so many more instructions and exceptions, exactly; on the CPU's thread.
  ///
  /// Blocks may retire any number up to `Block.limit` at once, so the last of the way is gone one by one.
  func limitInstructions(_ count: UInt64) {
    let (limit, overflows) = (cpu.pointee.instructions &+ cpu.pointee.position).addingReportingOverflow(count)
    guard !overflows, limit < UInt64(Int64.max) else {
      instructionLimit = .max
      cpu.pointee.budget = .max
      return
    }
    instructionLimit = limit
    cpu.pointee.budget = Int64(limit) &- Int64(Block.limit)
  }

  /// A program whose handlers cannot be executed retires nothing: for limits and time, an exception is an instruction.
  private func countException() {
    cpu.pointee.time_base &+= 1
    guard instructionLimit != .max, instructionLimit > cpu.pointee.instructions else { return }
    instructionLimit &-= 1
    cpu.pointee.budget &-= 1
  }

  private var isNearLimit: Bool { Int64(bitPattern: cpu.pointee.instructions) > cpu.pointee.budget }

  /// Delivers the events that are due between two instructions, highest priority first (SDM vol. 3, table 6-2).
  private func takeEvents() -> PendingExit? {
    if let exception = pendingException {
      pendingException = nil
      if let exit = deliver(exception) { return exit }
    }
    if pendingDebug != 0, cpu.pointee.interrupt_shadow & 2 == 0 {
      if let exit = deliver(.exception(.debug)) { return exit }
    }
    guard cpu.pointee.interrupt_shadow == 0 else { return nil }
    if pendingNMIs > 0, !cpu.pointee.nmi_masked {
      pendingNMIs -= 1
      isHalted = false
      if let exit = deliverNMI() { return exit }
    }
    // A debugger that steps through a program does not want to be led into its interrupt handlers.
    if cpu.pointee.other_flags & RFLAGS.if.rawValue != 0, !hostDebug.singleStep {
      if let vector = pendingInterrupt {
        pendingInterrupt = nil
        isHalted = false
        if let exit = deliverInterrupt(vector) { return exit }
      } else if let localAPIC, localAPIC.hasInterrupt, soft_attention(cpu) >= 0,
        // An NMI that was sent before the interrupt comes before it: the VMM has it, and wants to be looked at.
        let vector = localAPIC.acknowledgeInterrupt()
      {
        isHalted = false
        if let exit = deliverInterrupt(vector) { return exit }
      } else if wantsInterruptWindow {
        return .interruptWindow
      }
    }
    guard isHalted else { return nil }
    isHalted = false
    return .halt
  }
}
