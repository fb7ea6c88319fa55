import DeviceModel
import StateTree
import Synchronization

/// The MC146818 real-time clock with its 128 bytes of CMOS RAM, at ports 0x70 (index) and 0x71 (data).
///
/// Time is UTC: an epoch taken once from the host plus guest time, plus what the guest has set it off by.
public final class RealTimeClock: BusDevice {
  /// Index port, at offset 0; the data port follows.
  public static let port: UInt64 = 0x70
  /// Ports of the device.
  public static let windowSize: UInt64 = 2
  /// Its ISA interrupt.
  public static let interrupt: UInt32 = 8

  /// What a PC's firmware reports of the machine in CMOS RAM.
  public struct Contents: Sendable {
    /// RAM below the PCI hole, in bytes.
    public var lowMemory: UInt64
    /// RAM from 4 GiB on, in bytes.
    public var highMemory: UInt64
    /// vCPUs.
    public var cpus: Int

    /// The contents of a machine's CMOS RAM.
    public init(lowMemory: UInt64, highMemory: UInt64, cpus: Int) {
      self.lowMemory = lowMemory
      self.highMemory = highMemory
      self.cpus = cpus
    }
  }

  /// `rtc`.
  public let name = "rtc"
  private let line: InterruptLine.Source
  private let clock: any DeviceClock
  private let machine: any MachineControl
  private let contents: Contents
  private let state: Mutex<State>
  private let timer: Mutex<(any DeviceTimer)?> = Mutex(nil)

  private struct State: Equatable {
    var index: UInt8 = 0
    var memory = [UInt8](repeating: 0, count: 128)
    /// Seconds since 1970 at guest time 0.
    var epoch: Int64
    /// Guest time up to which events were counted, in nanoseconds.
    var counted: UInt64 = 0
  }

  private enum Register {
    static let seconds = 0x00
    static let secondsAlarm = 0x01
    static let minutes = 0x02
    static let minutesAlarm = 0x03
    static let hours = 0x04
    static let hoursAlarm = 0x05
    static let weekday = 0x06
    static let day = 0x07
    static let month = 0x08
    static let year = 0x09
    static let a = 0x0a
    static let b = 0x0b
    static let c = 0x0c
    static let d = 0x0d
    static let century = 0x32
  }

  private enum B {
    static let set: UInt8 = 0x80
    static let periodic: UInt8 = 0x40
    static let alarm: UInt8 = 0x20
    static let update: UInt8 = 0x10
    static let binary: UInt8 = 0x04
    static let hours24: UInt8 = 0x02
  }

  private static let second: UInt64 = 1_000_000_000

  /// A clock that shows `epoch` (seconds since 1970, UTC) at guest time 0.
  public init(
    line: InterruptLine.Source, clock: any DeviceClock, machine: any MachineControl, contents: Contents, epoch: Int64
  ) {
    self.line = line
    self.clock = clock
    self.machine = machine
    self.contents = contents
    state = Mutex(State(memory: Self.initialMemory(contents), epoch: epoch))
    let alarm = clock.makeTimer { [weak self] in self?.tick() }
    timer.withLock { $0 = alarm }
  }

  private static func initialMemory(_ contents: Contents) -> [UInt8] {
    var memory = [UInt8](repeating: 0, count: 128)
    func store(_ value: UInt64, at offset: Int, bytes: Int) {
      for index in 0..<bytes { memory[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(index * 8)) }
    }
    memory[Register.a] = 0x26
    memory[Register.b] = B.hours24
    memory[Register.d] = 0x80
    // As a PC's firmware and QEMU lay them out: KiB of base memory, KiB above 1 MiB (twice), 64-KiB units above 16 MiB,
    // 64-KiB units above 4 GiB, processors but one.
    store(640, at: 0x15, bytes: 2)
    let extended = min(contents.lowMemory > 1 << 20 ? (contents.lowMemory - 1 << 20) >> 10 : 0, 0xffff)
    store(extended, at: 0x17, bytes: 2)
    store(extended, at: 0x30, bytes: 2)
    store(min(contents.lowMemory > 16 << 20 ? (contents.lowMemory - 16 << 20) >> 16 : 0, 0xffff), at: 0x34, bytes: 2)
    store(contents.highMemory >> 16, at: 0x5b, bytes: 3)
    store(UInt64(max(1, contents.cpus) - 1), at: 0x5f, bytes: 1)
    return memory
  }

  /// Index at offset 0 (reads as all ones), data at offset 1.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    guard offset == 1 else { return 0xff }
    return state.withLock { state in
      let index = Int(state.index)
      count(&state)
      switch index {
      case Register.c:
        let flags = state.memory[Register.c]
        state.memory[Register.c] = 0
        line.set(false)
        schedule(state)
        return UInt64(flags)
      case Register.a: return UInt64(state.memory[Register.a] & 0x7f | (isUpdating(state) ? 0x80 : 0))
      default:
        guard let value = time(index, state) else { return UInt64(state.memory[index]) }
        return UInt64(value)
      }
    }
  }

  /// Index at offset 0 (bit 7 masks NMI and is not kept), data at offset 1.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let byte = UInt8(truncatingIfNeeded: value)
    state.withLock { state in
      guard offset == 1 else {
        state.index = byte & 0x7f
        return
      }
      count(&state)
      let index = Int(state.index)
      switch index {
      case Register.c, Register.d: return
      case Register.seconds, Register.minutes, Register.hours, Register.weekday, Register.day, Register.month,
        Register.year, Register.century:
        setTime(index, byte, &state)
      case Register.a: state.memory[index] = byte & 0x7f
      case Register.b:
        // While SET is on, the time registers stand still and hold what the guest writes.
        if byte & B.set != 0, state.memory[Register.b] & B.set == 0 { freeze(&state) }
        let released = byte & B.set == 0 && state.memory[Register.b] & B.set != 0
        state.memory[index] = byte
        if released { thaw(&state) }
      default: state.memory[index] = byte
      }
      schedule(state)
    }
  }

  // MARK: Time

  private static let timeRegisters = [
    Register.seconds, Register.minutes, Register.hours, Register.weekday, Register.day, Register.month, Register.year,
    Register.century,
  ]

  private func unixTime(_ state: State) -> Int64 {
    state.epoch &+ Int64(truncatingIfNeeded: clock.now() / Self.second)
  }

  /// The last 244 microseconds before a second's end, as the data sheet says.
  private func isUpdating(_ state: State) -> Bool {
    state.memory[Register.b] & B.set == 0 && clock.now() % Self.second >= Self.second - 244_000
  }

  /// A time register in the guest's chosen encoding; nil for the others.
  private func time(_ index: Int, _ state: State) -> UInt8? {
    guard Self.timeRegisters.contains(index) else { return nil }
    if state.memory[Register.b] & B.set != 0 { return state.memory[index] }
    return encode(index, CivilTime(unix: unixTime(state)), state)
  }

  private func encode(_ index: Int, _ time: CivilTime, _ state: State) -> UInt8 {
    switch index {
    case Register.seconds: return encode(time.second, state)
    case Register.minutes: return encode(time.minute, state)
    case Register.hours:
      guard state.memory[Register.b] & B.hours24 == 0 else { return encode(time.hour, state) }
      return encode((time.hour + 11) % 12 + 1, state) | (time.hour >= 12 ? 0x80 : 0)
    case Register.weekday: return encode(time.weekday, state)
    case Register.day: return encode(time.day, state)
    case Register.month: return encode(time.month, state)
    case Register.year: return encode(time.year % 100, state)
    default: return encode(time.year / 100 % 100, state)
    }
  }

  private func encode(_ value: Int, _ state: State) -> UInt8 {
    UInt8(state.memory[Register.b] & B.binary != 0 ? value : value / 10 << 4 | value % 10)
  }

  private func decode(_ value: UInt8, _ state: State) -> Int {
    state.memory[Register.b] & B.binary != 0 ? Int(value) : Int(value >> 4) * 10 + Int(value & 15)
  }

  private func decodeHour(_ value: UInt8, _ state: State) -> Int {
    guard state.memory[Register.b] & B.hours24 == 0 else { return decode(value, state) }
    return decode(value & 0x7f, state) % 12 + (value & 0x80 != 0 ? 12 : 0)
  }

  private func freeze(_ state: inout State) {
    let now = CivilTime(unix: unixTime(state))
    for index in Self.timeRegisters { state.memory[index] = encode(index, now, state) }
  }

  private func thaw(_ state: inout State) {
    let year = decode(state.memory[Register.century], state) * 100 + decode(state.memory[Register.year], state)
    let time = CivilTime(
      year: year, month: decode(state.memory[Register.month], state), day: decode(state.memory[Register.day], state),
      hour: decodeHour(state.memory[Register.hours], state), minute: decode(state.memory[Register.minutes], state),
      second: decode(state.memory[Register.seconds], state))
    state.epoch = time.unix &- Int64(truncatingIfNeeded: clock.now() / Self.second)
  }

  /// A time register written without SET: the others keep their values.
  private func setTime(_ index: Int, _ value: UInt8, _ state: inout State) {
    let frozen = state.memory[Register.b] & B.set != 0
    if !frozen { freeze(&state) }
    state.memory[index] = value
    if !frozen { thaw(&state) }
  }

  // MARK: Interrupts

  /// Nanoseconds of the periodic interrupt; nil while none is selected (data sheet, table 5, 32.768 kHz base).
  private func period(_ state: State) -> UInt64? {
    let rate = UInt64(state.memory[Register.a] & 0x0f)
    guard rate != 0 else { return nil }
    let shift = rate <= 2 ? rate + 6 : rate - 1
    return (Self.second << shift) / 32768
  }

  /// Whether the alarm registers name this second; 0xC0-0xFF match anything.
  private func alarmMatches(_ unix: Int64, _ state: State) -> Bool {
    let time = CivilTime(unix: unix)
    for (alarm, register) in [
      (Register.secondsAlarm, Register.seconds), (Register.minutesAlarm, Register.minutes),
      (Register.hoursAlarm, Register.hours),
    ] where state.memory[alarm] < 0xc0 && state.memory[alarm] != encode(register, time, state) { return false }
    return true
  }

  /// Sets the flags of what happened since the last count. At most a day is looked at: an alarm comes round daily.
  private func count(_ state: inout State) {
    let now = clock.now()
    guard now > state.counted else { return }
    let before = state.counted
    state.counted = now
    if let period = period(state), now / period > before / period { state.memory[Register.c] |= B.periodic }
    let seconds = now / Self.second
    let first = before / Self.second
    if seconds > first, state.memory[Register.b] & B.set == 0 {
      state.memory[Register.c] |= B.update
      for second in max(first + 1, seconds &- min(seconds, 86_399))...seconds
      where alarmMatches(state.epoch &+ Int64(truncatingIfNeeded: second), state) {
        state.memory[Register.c] |= B.alarm
        break
      }
    }
    raise(&state)
  }

  private func raise(_ state: inout State) {
    guard state.memory[Register.c] & state.memory[Register.b] & 0x70 != 0 else { return }
    state.memory[Register.c] |= 0x80
    line.set(true)
    if state.memory[Register.c] & state.memory[Register.b] & B.alarm != 0 { machine.request(.wake) }
  }

  /// Arms the timer for the next event that an enabled interrupt waits for.
  private func schedule(_ state: State) {
    let enabled = state.memory[Register.b]
    guard let timer = timer.withLock({ $0 }) else { return }
    let now = clock.now()
    var deadline: UInt64?
    if enabled & B.periodic != 0, let period = period(state) { deadline = (now / period + 1) * period }
    if enabled & (B.alarm | B.update) != 0, enabled & B.set == 0 {
      let next = (now / Self.second + 1) * Self.second
      deadline = min(deadline ?? next, next)
    }
    if let deadline { timer.arm(at: deadline) } else { timer.cancel() }
  }

  private func tick() {
    state.withLock { state in
      count(&state)
      schedule(state)
    }
  }

  /// Clears interrupts; time and CMOS RAM are kept by the battery.
  public func reset() {
    state.withLock { state in
      state.memory[Register.b] &= ~(B.periodic | B.alarm | B.update)
      state.memory[Register.c] = 0
      line.set(false)
      schedule(state)
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.index)
      writer.write(state.memory)
      writer.write(state.epoch)
      writer.write(state.counted)
    }
  }

  /// Puts the registers and CMOS RAM back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      let index = try reader.read(UInt8.self)
      guard index < 128 else { throw reader.invalid("CMOS index", UInt64(index)) }
      let memory = try reader.read(limit: 128)
      guard memory.count == 128 else { throw reader.invalid("CMOS size", UInt64(memory.count)) }
      return State(index: index, memory: memory, epoch: try reader.read(), counted: try reader.read())
    }
    state.withLock { state in
      state = restored
      line.set(state.memory[Register.c] & 0x80 != 0)
      schedule(state)
    }
  }
}

/// A date and time of day in the proleptic Gregorian calendar, UTC.
struct CivilTime: Equatable {
  var year: Int
  var month: Int
  var day: Int
  var hour: Int
  var minute: Int
  var second: Int

  /// 1 is Sunday, as the clock counts.
  var weekday: Int { Int((days + 4) % 7 + 7) % 7 + 1 }

  init(year: Int, month: Int, day: Int, hour: Int, minute: Int, second: Int) {
    self.year = year
    self.month = month
    self.day = day
    self.hour = hour
    self.minute = minute
    self.second = second
  }

  init(unix: Int64) {
    // Days from 0000-03-01, in 400-year eras of 146097 days.
    let dayNumber = unix >= 0 ? unix / 86400 : (unix - 86399) / 86400
    let rest = Int(unix - dayNumber * 86400)
    let shifted = dayNumber + 719_468
    let era = (shifted >= 0 ? shifted : shifted - 146_096) / 146_097
    let dayOfEra = shifted - era * 146_097
    let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36524 - dayOfEra / 146_096) / 365
    let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
    let shiftedMonth = (5 * dayOfYear + 2) / 153
    day = Int(dayOfYear - (153 * shiftedMonth + 2) / 5 + 1)
    month = Int(shiftedMonth < 10 ? shiftedMonth + 3 : shiftedMonth - 9)
    year = Int(yearOfEra + era * 400) + (month <= 2 ? 1 : 0)
    hour = rest / 3600
    minute = rest / 60 % 60
    second = rest % 60
  }

  private var days: Int64 {
    let shiftedYear = Int64(month <= 2 ? year - 1 : year)
    let era = (shiftedYear >= 0 ? shiftedYear : shiftedYear - 399) / 400
    let yearOfEra = shiftedYear - era * 400
    let dayOfYear = Int64((153 * (month > 2 ? month - 3 : month + 9) + 2) / 5 + day - 1)
    return era * 146_097 + yearOfEra * 365 + yearOfEra / 4 - yearOfEra / 100 + dayOfYear - 719_468
  }

  var unix: Int64 { days * 86400 + Int64(hour * 3600 + minute * 60 + second) }
}
