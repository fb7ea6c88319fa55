import DeviceModel
import Synchronization

/// Guest time that passes when the test says so.
public final class ManualClock: DeviceClock {
  private struct State {
    var now: UInt64 = 0
    var timers: [Timer] = []
  }
  private let state = Mutex(State())

  /// A clock at `now` nanoseconds.
  public init(now: UInt64 = 0) {
    state.withLock { $0.now = now }
  }

  /// Nanoseconds of guest time.
  public func now() -> UInt64 { state.withLock { $0.now } }

  /// A disarmed timer; `advance` calls `fire`.
  public func makeTimer(_ fire: @escaping @Sendable () -> Void) -> any DeviceTimer {
    let timer = Timer(fire: fire)
    state.withLock { $0.timers.append(timer) }
    return timer
  }

  /// Lets guest time pass and fires every timer that falls due on the way, each at its own time.
  public func advance(by nanoseconds: UInt64) {
    let end = now() &+ nanoseconds
    while let timer = nextDue(before: end) {
      timer.deadline.withLock { $0 = nil }
      timer.fire()
    }
    state.withLock { $0.now = end }
  }

  /// Lets guest time pass while the loop that fires timers is late: what falls due fires with the next `advance`.
  public func pass(_ nanoseconds: UInt64) {
    state.withLock { $0.now += nanoseconds }
  }

  private func nextDue(before end: UInt64) -> Timer? {
    state.withLock { state in
      let armed = state.timers.compactMap { timer in timer.deadline.withLock { $0 }.map { (timer, $0) } }
      guard let (timer, deadline) = armed.min(by: { $0.1 < $1.1 }), deadline <= end else { return nil }
      state.now = max(state.now, deadline)
      return timer
    }
  }

  private final class Timer: DeviceTimer {
    let deadline = Mutex<UInt64?>(nil)
    let fire: @Sendable () -> Void

    init(fire: @escaping @Sendable () -> Void) { self.fire = fire }
    func arm(at deadline: UInt64) { self.deadline.withLock { $0 = deadline } }
    func cancel() { deadline.withLock { $0 = nil } }
  }
}
