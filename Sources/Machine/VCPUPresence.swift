import Accelerator
import Host
import Synchronization

/// Where a vCPU's thread is, for those who have an interrupt for it: in the VMM, in the guest, or asleep in `hlt`.
///
/// Whoever posts an interrupt makes it visible first and looks at the phase then; the thread sets its phase first and
/// looks for interrupts then. So either the thread finds it or the poster wakes the thread, and a thread that is in the
/// VMM anyway costs no signal.
final class VCPUPresence: Sendable {
  private enum Phase {
    static let inVMM: UInt8 = 0
    static let inGuest: UInt8 = 1
    static let asleep: UInt8 = 2
  }

  /// The machine owns it; it holds the controllers that hold this.
  private weak let vcpu: (any VirtualCPU)?
  private let phase = Atomic(Phase.inVMM)
  private let change: Condition<Void>
  /// What the vCPU waits for; its thread writes it, and whoever holds the machine paused.
  private let waitsFor = Atomic<UInt32>(ActivityState.runnable.rawValue)

  /// vCPUs of one thread share what that thread waits for.
  init(_ vcpu: any VirtualCPU, change: Condition<Void> = Condition(())) {
    self.vcpu = vcpu
    self.change = change
  }

  /// What the vCPU waits for, where the VMM has its local APIC.
  var activity: ActivityState {
    get { ActivityState(rawValue: waitsFor.load(ordering: .relaxed)) ?? .runnable }
    set { waitsFor.store(newValue.rawValue, ordering: .relaxed) }
  }

  /// Tells the thread that there is something for it; on any thread.
  func wake() {
    switch phase.load(ordering: .sequentiallyConsistent) {
    case Phase.inGuest: vcpu?.kick()
    case Phase.asleep: change.withLock { _ in }
    default: break
    }
  }

  /// Guest nanoseconds until the vCPU's time-stamp counter has a value; nil where that is not known.
  func nanoseconds(untilTimestamp ticks: UInt64) -> UInt64? { vcpu?.nanoseconds(untilTimestamp: ticks) }

  /// Takes the thread to the gate, wherever it is; on any thread.
  func kick() {
    vcpu?.kick()
    change.withLock { _ in }
  }

  /// What is posted from now on comes with a kick.
  @inline(__always)
  func enterGuest() { phase.store(Phase.inGuest, ordering: .sequentiallyConsistent) }

  /// The thread looks for what is posted from now on before it enters again.
  @inline(__always)
  func leaveGuest() { phase.store(Phase.inVMM, ordering: .relaxed) }

  /// Sleeps until `isOver`, which is asked now and at every wake-up and kick.
  func sleep(until isOver: () -> Bool) { Self.sleep([self], until: isOver) }

  /// The same for the thread of several vCPUs.
  static func sleep(_ presences: [VCPUPresence], until isOver: () -> Bool) {
    for presence in presences { presence.phase.store(Phase.asleep, ordering: .sequentiallyConsistent) }
    presences[0].change.wait { _ in isOver() ? () : nil }
    for presence in presences { presence.phase.store(Phase.inVMM, ordering: .relaxed) }
  }
}
