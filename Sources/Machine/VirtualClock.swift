import Accelerator
import DeviceModel
import Synchronization

/// Guest time from the vCPUs' instructions. Timers fire on the thread that runs the vCPUs, between two instructions, and
/// in the order of their deadlines: nothing of the host's time shows.
final class VirtualClock: GuestClock {
  /// What the real-time clock says at the start: 1 January 2026, 00:00 UTC, in seconds since 1970.
  static let epoch: Int64 = 1_767_225_600

  private struct State {
    /// Armed timers, by deadline, and in the order of arming where those are the same.
    var armed: [(deadline: UInt64, timer: Timer)] = []
    /// Told of a deadline that became the first.
    var observer: (@Sendable (_ deadline: UInt64, _ now: UInt64) -> Void)?
  }

  private let time: any VirtualTime
  private let state = Mutex(State())
  /// The first deadline; the largest number where there is none.
  private let first = Atomic(UInt64.max)

  init(_ time: any VirtualTime) {
    self.time = time
  }

  func now() -> UInt64 { time.now }

  func makeTimer(_ fire: @escaping @Sendable () -> Void) -> any DeviceTimer { Timer(clock: self, fire: fire) }

  // Time passes while vCPUs run, and stands while they do not.
  func start() {}
  func stop() {}
  func set(_ nanoseconds: UInt64) { time.set(nanoseconds) }

  /// The deadline of the next timer; nil where none is armed.
  @inline(__always)
  var nextDeadline: UInt64? {
    let deadline = first.load(ordering: .relaxed)
    return deadline == .max ? nil : deadline
  }

  /// Calls `observer` whenever a new deadline is the first, on the thread that armed it.
  func observe(_ observer: @escaping @Sendable (_ deadline: UInt64, _ now: UInt64) -> Void) {
    state.withLock { $0.observer = observer }
  }

  /// Fires every timer that is due now, but not what those arm in turn.
  func fireDue() {
    let now = time.now
    guard first.load(ordering: .relaxed) <= now else { return }
    let due = state.withLock { state in
      let count = state.armed.firstIndex { $0.deadline > now } ?? state.armed.count
      defer {
        state.armed.removeFirst(count)
        publish(state)
      }
      return state.armed.prefix(count).map(\.timer)
    }
    for timer in due { timer.fire() }
  }

  /// Goes to the next deadline, since nobody has anything to do until then; false where there is none.
  func skip() -> Bool {
    guard let deadline = nextDeadline else { return false }
    if deadline > time.now { time.set(deadline) }
    return true
  }

  private func publish(_ state: State) {
    first.store(state.armed.first?.deadline ?? .max, ordering: .relaxed)
  }

  private func arm(_ timer: Timer, at deadline: UInt64) {
    let observer = state.withLock { state in
      state.armed.removeAll { $0.timer === timer }
      let place = state.armed.firstIndex { $0.deadline > deadline } ?? state.armed.count
      state.armed.insert((deadline, timer), at: place)
      publish(state)
      return place == 0 ? state.observer : nil
    }
    observer?(deadline, time.now)
  }

  private func cancel(_ timer: Timer) {
    state.withLock { state in
      state.armed.removeAll { $0.timer === timer }
      publish(state)
    }
  }

  private final class Timer: DeviceTimer {
    private unowned let clock: VirtualClock
    let fire: @Sendable () -> Void

    init(clock: VirtualClock, fire: @escaping @Sendable () -> Void) {
      self.clock = clock
      self.fire = fire
    }

    // The largest number is no time that ever comes.
    func arm(at deadline: UInt64) { clock.arm(self, at: min(deadline, .max - 1)) }
    func cancel() { clock.cancel(self) }
  }
}
