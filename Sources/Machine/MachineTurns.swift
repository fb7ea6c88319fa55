import Accelerator
import Host
import PlatformDevices
import Synchronization

/// vCPUs that take turns on one thread: each runs a fixed number of instructions, then the next one that has something to
/// do. With virtual time, whatever happens in the machine happens after an exact number of instructions.
extension Machine {
  /// Instructions of a turn: short beside what a kernel waits for another CPU, long beside what a change of turns costs.
  fileprivate static let turnLength: UInt64 = 20_000

  /// What the one thread of all vCPUs does.
  func runTurns() {
    let thread = ThreadIdentity.current.id
    threadIDs.withLock { ids in for vcpu in vcpus { ids[vcpu.index] = thread } }
    var turn = Turn()
    let running = RunningVCPU()
    virtualClock?.observe { [interrupts] deadline, now in
      if ThreadIdentity.current.id == thread {
        running.shorten(until: deadline, now: now)
      } else {
        interrupts.presences[0].wake()
      }
    }
    do throws(AcceleratorError) {
      while true {
        if gate.isClosed {
          for vcpu in vcpus { while let exit = try vcpu.completeExit() { try handle(exit, vcpu) } }
          if !gate.park() { return }
          turn.held = gate.held
          continue
        }
        virtualClock?.fireDue()
        guard let index = try nextWithWork(turn) else {
          if virtualClock?.skip() != true { try sleepUntilWork(turn) }
          continue
        }
        if index != turn.index { turn.change(to: index) }
        try run(&turn, running)
      }
    } catch {
      finish(.failed(error))
      while gate.park() {}
    }
  }

  /// Whose turn it is, and how far it goes.
  private struct Turn {
    var index = 0
    /// Instructions left of it.
    var left = Machine.turnLength
    /// vCPUs that a debugger keeps where they are.
    var held: Set<Int> = []

    mutating func change(to index: Int) {
      self.index = index
      left = Machine.turnLength
    }
  }

  /// The vCPU of the turn, or the first after it, that has something to do.
  private func nextWithWork(_ turn: Turn) throws(AcceleratorError) -> Int? {
    for offset in vcpus.indices {
      let index = (turn.index + offset) % vcpus.count
      if !turn.held.contains(index), try hasWork(vcpus[index]) { return index }
    }
    return nil
  }

  private func hasWork(_ vcpu: any VirtualCPU) throws(AcceleratorError) -> Bool {
    let local = interrupts.locals[vcpu.index]
    if local.hasEvents { return true }
    switch interrupts.presences[vcpu.index].activity {
    case .runnable: return true
    case .halted: return local.hasInterrupt ? try takesInterrupts(vcpu) : false
    default: return false
    }
  }

  /// Nothing in the machine will happen by itself: waits for a device's or the user's doing.
  private func sleepUntilWork(_ turn: Turn) throws(AcceleratorError) {
    var waiting: [LocalAPIC] = []
    for vcpu in vcpus where !turn.held.contains(vcpu.index) {
      guard interrupts.presences[vcpu.index].activity == .halted, try takesInterrupts(vcpu) else { continue }
      waiting.append(interrupts.locals[vcpu.index])
    }
    VCPUPresence.sleep(interrupts.presences) {
      gate.isClosed || virtualClock?.nextDeadline != nil
        || interrupts.locals.contains { $0.hasEvents && !turn.held.contains($0.index) }
        || waiting.contains { $0.hasInterrupt }
    }
  }

  /// Runs the vCPU of the turn until its next exit.
  private func run(_ turn: inout Turn, _ running: RunningVCPU) throws(AcceleratorError) {
    let vcpu = vcpus[turn.index]
    let local = interrupts.locals[turn.index]
    let presence = interrupts.presences[turn.index]
    if local.hasEvents { return try takeEvents(vcpu, local, presence) }
    presence.activity = .runnable
    let retired = vcpu.instructions ?? 0
    let now = virtualClock?.now() ?? 0
    var count = turn.left
    if let deadline = virtualClock?.nextDeadline {
      // At least one, so that a timer which is always due does not stop the guest.
      count = min(count, deadline > now ? deadline - now : 1)
    }
    vcpu.limitInstructions(count)
    presence.enterGuest()
    // As with a thread a vCPU: what came before that was no kick.
    if local.hasEvents {
      presence.leaveGuest()
      return
    }
    running.begin(vcpu, until: now &+ count)
    let exit = try vcpu.run()
    running.end()
    presence.leaveGuest()
    counters[turn.index].count(ExitCounters.Reason(exit))
    exitTrace?.record(exit, vcpu: turn.index, at: virtualClock?.now())
    // Exceptions count: virtual time tells of them, and so does the end of the run.
    let used = virtualClock.map { $0.now() &- now } ?? ((vcpu.instructions ?? 0) &- retired)
    turn.left &-= min(turn.left, used)
    if case .instructionLimit = exit, virtualClock == nil { turn.left = 0 }
    if turn.left == 0 { turn.change(to: (turn.index + 1) % vcpus.count) }
    try handle(exit, vcpu)
  }
}

/// The vCPU that executes instructions right now, for timers that those arm. All of it belongs to the vCPUs' thread.
private final class RunningVCPU: @unchecked Sendable {
  private var vcpu: (any VirtualCPU)?
  /// Virtual time at which its run ends.
  private var stop: UInt64 = 0

  func begin(_ vcpu: any VirtualCPU, until stop: UInt64) {
    self.vcpu = vcpu
    self.stop = stop
  }

  func end() { vcpu = nil }

  /// Ends the run at a deadline that an instruction of it has made the first.
  func shorten(until deadline: UInt64, now: UInt64) {
    guard let vcpu, deadline < stop else { return }
    stop = deadline
    vcpu.limitInstructions(deadline > now ? deadline - now : 0)
  }
}
