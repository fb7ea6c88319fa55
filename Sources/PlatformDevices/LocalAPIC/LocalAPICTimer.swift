import DeviceModel
import Synchronization

/// A local APIC's timer (SDM vol. 3, 11.5.4): one-shot, periodic and TSC-deadline, on guest time.
///
/// The bus clock that the counter divides is 1 GHz, one tick a nanosecond, as KVM's is: kernels that measure it find that,
/// and those that trust CPUID leaf 0x15 or 0x16 must be told the same. Counters are computed when somebody looks; the host's
/// timer is armed only where an interrupt will come of it.
final class LocalAPICTimer: @unchecked Sendable {
  private enum Mode {
    static let oneShot: UInt32 = 0
    static let periodic: UInt32 = 1
    static let deadline: UInt32 = 2
  }

  /// A guest that asks for more than 20 kHz gets every so many interrupts at most: each costs the host a timer.
  private static let leastPeriod: UInt64 = 50_000

  struct State {
    /// Guest time at which the counter reaches 0; in periodic mode one of those times. nil while it stands.
    var expiry: UInt64?
    /// IA32_TSC_DEADLINE.
    var deadline: UInt64 = 0
  }

  /// Takes the timer's vector when it expires; set once, before the first use.
  var onExpiry: @Sendable (UInt8) -> Void = { _ in }
  private let registers: APICRegisterPage
  private let clock: any DeviceClock
  private let untilTimestamp: @Sendable (UInt64) -> UInt64?
  private let state = Mutex(State())
  private let alarm = Mutex<(any DeviceTimer)?>(nil)

  init(
    registers: APICRegisterPage, clock: any DeviceClock, untilTimestamp: @escaping @Sendable (UInt64) -> UInt64?
  ) {
    self.registers = registers
    self.clock = clock
    self.untilTimestamp = untilTimestamp
    let timer = clock.makeTimer { [weak self] in self?.expire() }
    alarm.withLock { $0 = timer }
  }

  private var mode: UInt32 { LocalVector.timerMode(registers[APICRegister.timer]) }
  private var vector: UInt8 { UInt8(truncatingIfNeeded: registers[APICRegister.timer]) }
  private var isMasked: Bool { registers[APICRegister.timer] & LocalVector.masked != 0 }

  /// Nanoseconds a tick: the divide register's bits 0, 1 and 3 are the power of two less one, and 7 means none.
  private var divisor: UInt64 {
    let value = registers[APICRegister.divide]
    return 1 << UInt64(((value & 3 | value >> 1 & 4) + 1) & 7)
  }
  private var period: UInt64 { UInt64(registers[APICRegister.initialCount]) * divisor }

  // MARK: Registers

  /// The current count register.
  var currentCount: UInt32 {
    let now = clock.now()
    return state.withLock { count($0, now) }
  }

  private func count(_ state: State, _ now: UInt64) -> UInt32 {
    guard let expiry = state.expiry, mode != Mode.deadline else { return 0 }
    let left: UInt64
    if expiry > now {
      left = expiry - now
    } else {
      guard mode == Mode.periodic, period > 0 else { return 0 }
      left = period - (now - expiry) % period
    }
    // The counter shows its start value for the whole of its first tick.
    return UInt32(clamping: (left - 1) / divisor + 1)
  }

  func setInitialCount(_ value: UInt32) {
    change { state, now in
      guard mode != Mode.deadline else { return }
      registers[APICRegister.initialCount] = value
      state.expiry = value == 0 ? nil : now &+ period
      arm(state, now)
    }
  }

  /// The count goes on from where it is, at the new rate.
  func setDivide(_ value: UInt32) {
    change { state, now in
      let count = UInt64(count(state, now))
      registers[APICRegister.divide] = value
      guard mode != Mode.deadline, count > 0 else { return }
      state.expiry = now &+ count * divisor
      arm(state, now)
    }
  }

  /// Into and out of TSC-deadline mode the timer is disarmed (SDM vol. 3, 11.5.4.1).
  func setLocalVector(_ value: UInt32) {
    change { state, now in
      let wasDeadline = mode == Mode.deadline
      registers[APICRegister.timer] = value
      if (mode == Mode.deadline) != wasDeadline {
        state = State()
        registers[APICRegister.initialCount] = 0
      }
      arm(state, now)
    }
  }

  /// IA32_TSC_DEADLINE; 0 outside its mode and while disarmed.
  var deadline: UInt64 { state.withLock { $0.deadline } }

  /// Arms the timer for a value of the time-stamp counter; 0 disarms it. Ignored in the other modes.
  func setDeadline(_ value: UInt64) {
    // One that has passed is due at once, and not when the loop gets round to it.
    let isDue = value != 0 && untilTimestamp(value) == 0
    let fires = change { state, now in
      guard mode == Mode.deadline else { return false }
      setDeadline(isDue ? 0 : value, &state, now)
      return isDue && !isMasked
    }
    if fires { onExpiry(vector) }
  }

  private func setDeadline(_ value: UInt64, _ state: inout State, _ now: UInt64) {
    state.deadline = value
    state.expiry =
      value == 0
      ? nil
      : untilTimestamp(value).map { now.addingReportingOverflow($0) }
        .flatMap { $0.overflow ? nil : $0.partialValue }
    arm(state, now)
  }

  // MARK: Expiry

  /// Puts the host's timer at the next interrupt, where there will be one.
  private func arm(_ state: State, _ now: UInt64) {
    alarm.withLock { alarm in
      guard var expiry = state.expiry, mode == Mode.deadline || !isMasked, mode <= Mode.deadline else {
        alarm?.cancel()
        return
      }
      if mode == Mode.periodic {
        expiry = expiry > now ? expiry : now &+ UInt64(count(state, now)) * divisor
        if period < Self.leastPeriod { expiry = max(expiry, now &+ Self.leastPeriod) }
      }
      alarm?.arm(at: expiry)
    }
  }

  /// On the loop that runs devices. A guest that armed the timer anew meanwhile is called again.
  private func expire() {
    change { state, now in arm(state, now) }
  }

  /// Changes the timer. What it expired before comes first, by the registers as they were: the loop may not have got
  /// round to it.
  @discardableResult
  private func change<Result>(_ body: (inout State, UInt64) -> Result) -> Result {
    let now = clock.now()
    let (result, due): (Result, UInt8?) = state.withLock { state in
      let due = takeExpiry(&state, now) && !isMasked ? vector : nil
      return (body(&state, now), due)
    }
    if let due { onExpiry(due) }
    return result
  }

  /// Whether the counter has reached 0; it then stands, or has begun anew. Periods that the host let pass count as one.
  private func takeExpiry(_ state: inout State, _ now: UInt64) -> Bool {
    guard let expiry = state.expiry, expiry <= now else { return false }
    if mode == Mode.periodic, period > 0 {
      state.expiry = now &+ UInt64(count(state, now)) * divisor
    } else {
      state = State()
    }
    return true
  }

  // MARK: Life

  var saved: State { state.withLock { $0 } }

  /// Goes on from a saved state, whose registers are in place already.
  func restore(_ saved: State) {
    let now = clock.now()
    state.withLock { state in
      state = saved
      if mode == Mode.deadline { setDeadline(saved.deadline, &state, now) } else { arm(state, now) }
    }
  }

  /// Goes on from a current count, whose registers are in place already; what a register page holds.
  func restore(count: UInt32, deadline: UInt64) {
    let now = clock.now()
    restore(
      State(expiry: count == 0 || mode == Mode.deadline ? nil : now &+ UInt64(count) * divisor, deadline: deadline))
  }
}
