import DeviceModel
import Host
import Synchronization

/// Guest time as the machine drives it.
protocol GuestClock: DeviceClock {
  /// Lets guest time pass.
  func start()
  /// Stops guest time, and with it every timer.
  func stop()
  /// Puts the clock of a saved machine in place; it must stand.
  func set(_ nanoseconds: UInt64)
}

/// Guest time from the host's monotonic clock: it stands still while the machine is paused.
final class MachineClock: GuestClock {
  private struct State {
    /// Guest time when the clock last stopped or started.
    var base: UInt64 = 0
    /// Host time of the start; nil while it stands.
    var startedAt: UInt64?
    var armed: [ObjectIdentifier: (timer: Timer, deadline: UInt64)] = [:]
  }

  private let loop: EventLoop
  private let state = Mutex(State())

  init(loop: EventLoop) {
    self.loop = loop
  }

  func now() -> UInt64 {
    state.withLock { Self.now($0) }
  }

  func makeTimer(_ fire: @escaping @Sendable () -> Void) -> any DeviceTimer {
    Timer(clock: self, fire: fire)
  }

  /// Lets guest time pass.
  func start() {
    state.withLock { state in
      guard state.startedAt == nil else { return }
      state.startedAt = monotonicNanoseconds()
      for (timer, deadline) in state.armed.values { timer.host.arm(at: Self.hostTime(of: deadline, state)) }
    }
  }

  /// Stops guest time, and with it every timer.
  func stop() {
    state.withLock { state in
      guard state.startedAt != nil else { return }
      state.base = Self.now(state)
      state.startedAt = nil
      for (timer, _) in state.armed.values { timer.host.cancel() }
    }
  }

  /// Puts the clock of a saved machine in place; it must stand.
  func set(_ nanoseconds: UInt64) {
    state.withLock { state in state.base = nanoseconds }
  }

  private static func now(_ state: State) -> UInt64 {
    guard let startedAt = state.startedAt else { return state.base }
    return state.base &+ (monotonicNanoseconds() &- startedAt)
  }

  private static func hostTime(of deadline: UInt64, _ state: State) -> UInt64 {
    guard let startedAt = state.startedAt else { return 0 }
    return deadline > state.base ? startedAt.addingReportingOverflow(deadline - state.base).partialValue : startedAt
  }

  private final class Timer: DeviceTimer {
    private unowned let clock: MachineClock
    private let relay: Relay
    let host: EventLoop.Timer

    /// Stands between the loop's timer and this one, which does not exist yet when the loop's is made.
    private final class Relay: Sendable {
      /// In a struct: a bare function in a Mutex gets another two layers of thunks with every `withLock`.
      struct Target {
        var call: (@Sendable () -> Void)?
      }

      let target = Mutex(Target())
    }

    init(clock: MachineClock, fire: @escaping @Sendable () -> Void) {
      self.clock = clock
      let relay = Relay()
      self.relay = relay
      host = clock.loop.makeTimer { relay.target.withLock { $0 }.call?() }
      relay.target.withLock { target in
        target.call = { [unowned self] in if self.clock.disarm(self) { fire() } }
      }
    }

    func arm(at deadline: UInt64) {
      clock.state.withLock { state in
        state.armed[ObjectIdentifier(self)] = (self, deadline)
        if state.startedAt != nil { host.arm(at: MachineClock.hostTime(of: deadline, state)) }
      }
    }

    func cancel() {
      clock.state.withLock { $0.armed[ObjectIdentifier(self)] = nil }
      host.cancel()
    }
  }

  /// False where the timer was stopped or rearmed before its call came through.
  private func disarm(_ timer: Timer) -> Bool {
    state.withLock { state in
      guard state.startedAt != nil, let armed = state.armed[ObjectIdentifier(timer)],
        armed.deadline <= Self.now(state)
      else { return false }
      state.armed[ObjectIdentifier(timer)] = nil
      return true
    }
  }
}
