import DeviceModel
import StateTree
import Synchronization

/// The MC146818 real-time clock with its 128 bytes of CMOS RAM, at ports 0x70 (index) and 0x71 (data).
///
/// Time is UTC: an epoch taken once from the host plus guest time, plus what the guest has set it off by.
public final class RealTimeClock: PlatformDevice {
  /// Index port; the data port follows.
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
  /// Two ports.
  public let windows: [BusWindow] = [.ports(port, size: windowSize)]
  private let line: InterruptLine.Source
  private let clock: any DeviceClock
  private let onAlarm: @Sendable () -> Void
  private let state: Mutex<State>
  private let isConnected = Atomic(true)

  private struct State {
    var registers: Registers
    var timer: (any DeviceTimer)?
  }

  private struct Registers {
    /// Bit 7 masks NMI on a PC: kept, without effect.
    var index: UInt8 = 0
    var memory: [UInt8]
    /// Seconds since 1970 at guest time 0.
    var epoch: Int
    /// Guest time up to which events were counted, in nanoseconds.
    var counted: UInt64

    subscript(_ index: Int) -> UInt8 {
      get { memory[index] }
      set { memory[index] = newValue }
    }
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

    static func isTime(_ index: Int) -> Bool {
      switch index {
      case seconds, minutes, hours, weekday, day, month, year, century: true
      default: false
      }
    }
  }

  private enum B {
    static let set: UInt8 = 0x80
    static let periodic: UInt8 = 0x40
    static let alarm: UInt8 = 0x20
    static let update: UInt8 = 0x10
    static let squareWave: UInt8 = 0x08
    static let binary: UInt8 = 0x04
    static let hours24: UInt8 = 0x02
    static let interrupts = periodic | alarm | update
  }

  private static let memorySize = 128
  private static let updateInProgress: UInt8 = 0x80
  private static let interruptRequest: UInt8 = 0x80
  private static let crystal: UInt64 = 32768
  /// UIP stands 244 us before an update and through its 1984 us (data sheet, figure 12).
  private static let updateTime: UInt64 = 2_228_000
  /// Some 34,000 years around 1970: nothing computed from a time in it can overflow.
  private static let epochs = -(1 << 40)...(1 << 40)

  /// A clock that shows `epoch` (seconds since 1970, UTC) at guest time 0; `onAlarm` is what the alarm's interrupt
  /// does beside its line, which is to wake a machine that sleeps. It must not call back.
  public init(
    line: InterruptLine.Source, clock: any DeviceClock, contents: Contents, epoch: Int64,
    onAlarm: @escaping @Sendable () -> Void
  ) {
    self.line = line
    self.clock = clock
    self.onAlarm = onAlarm
    let epoch = min(max(Int(epoch), Self.epochs.lowerBound), Self.epochs.upperBound)
    state = Mutex(
      State(registers: Registers(memory: Self.initialMemory(contents), epoch: epoch, counted: clock.now())))
    let timer = clock.makeTimer { [weak self] in self?.tick() }
    state.withLock { $0.timer = timer }
  }

  private static func initialMemory(_ contents: Contents) -> [UInt8] {
    var memory = [UInt8](repeating: 0, count: memorySize)
    func store(_ value: UInt64, at offset: Int, bytes: Int) {
      let value = min(value, (1 << UInt64(bytes * 8)) - 1)
      for index in 0..<bytes { memory[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(index * 8)) }
    }
    memory[Register.a] = 0x26
    memory[Register.b] = B.hours24
    memory[Register.d] = 0x80
    // As a PC's firmware and QEMU lay them out: KiB of base memory, KiB above 1 MiB (twice), 64-KiB units above 16 MiB,
    // 64-KiB units above 4 GiB, processors but one.
    store(640, at: 0x15, bytes: 2)
    let aboveOne = contents.lowMemory - min(contents.lowMemory, 1 << 20)
    let aboveSixteen = contents.lowMemory - min(contents.lowMemory, 16 << 20)
    store(aboveOne >> 10, at: 0x17, bytes: 2)
    store(aboveOne >> 10, at: 0x30, bytes: 2)
    store(aboveSixteen >> 16, at: 0x34, bytes: 2)
    store(contents.highMemory >> 16, at: 0x5b, bytes: 3)
    store(UInt64(max(1, contents.cpus) - 1), at: 0x5f, bytes: 1)
    return memory
  }

  /// Index at offset 0 (reads as all ones), data at offset 1.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    guard offset == 1 else { return 0xff }
    let now = clock.now()
    return state.withLock { state in
      count(&state.registers, now)
      let index = Int(state.registers.index & 0x7f)
      switch index {
      case Register.a:
        let left = nanosecondsPerSecond - now % nanosecondsPerSecond
        let updating = isRunning(state.registers) && left <= Self.updateTime
        return UInt64(state.registers[index] | (updating ? Self.updateInProgress : 0))
      case Register.c:
        let flags = state.registers[Register.c]
        state.registers[Register.c] = 0
        line.set(false)
        schedule(state, now)
        return UInt64(flags)
      case _ where Register.isTime(index) && isRunning(state.registers):
        return UInt64(encode(index, civilTime(state.registers, now), state.registers))
      default: return UInt64(state.registers[index])
      }
    }
  }

  /// Index at offset 0, data at offset 1.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    // Guests write both with one 16-bit access now and then.
    let now = clock.now()
    writeBytes(offset, size, value, end: Self.windowSize) { offset, byte in
      state.withLock { state in
        guard offset == 1 else {
          state.registers.index = byte
          return
        }
        count(&state.registers, now)
        write(byte, at: Int(state.registers.index & 0x7f), &state.registers, now)
        raise(&state.registers)
        schedule(state, now)
      }
    }
  }

  private func write(_ byte: UInt8, at index: Int, _ registers: inout Registers, _ now: UInt64) {
    switch index {
    case Register.a, Register.b:
      let wasRunning = isRunning(registers)
      let held = wasRunning ? civilTime(registers, now) : nil
      if index == Register.a {
        registers[index] = byte & ~Self.updateInProgress
      } else {
        // SET turns the update interrupt off (data sheet, register B).
        registers[index] = byte & B.set != 0 ? byte & ~B.update : byte
      }
      // While it stands, the time registers hold the time it stopped at, or what the guest writes.
      switch (wasRunning, isRunning(registers)) {
      case (true, false): if let held { store(held, &registers) }
      case (false, true): start(&registers, now)
      default: break
      }
    case Register.c, Register.d: break
    case _ where Register.isTime(index) && isRunning(registers):
      store(civilTime(registers, now), &registers)
      registers[index] = byte
      start(&registers, now)
    default: registers[index] = byte
    }
  }

  // MARK: Time

  /// Time stands while SET is on or the divider is held in reset (register A, bits 6-5).
  private func isRunning(_ registers: Registers) -> Bool {
    registers[Register.b] & B.set == 0 && registers[Register.a] & 0x60 != 0x60
  }

  private func civilTime(_ registers: Registers, _ now: UInt64) -> CivilTime {
    CivilTime(unix: registers.epoch + Int(now / nanosecondsPerSecond))
  }

  private func encode(_ index: Int, _ time: CivilTime, _ registers: Registers) -> UInt8 {
    switch index {
    case Register.seconds: return encode(time.second, registers)
    case Register.minutes: return encode(time.minute, registers)
    case Register.hours:
      guard registers[Register.b] & B.hours24 == 0 else { return encode(time.hour, registers) }
      return encode((time.hour + 11) % 12 + 1, registers) | (time.hour >= 12 ? 0x80 : 0)
    case Register.weekday: return encode(time.weekday, registers)
    case Register.day: return encode(time.day, registers)
    case Register.month: return encode(time.month, registers)
    // A guest can set a year before 0; its clock then shows nonsense, as a PC's would.
    case Register.year: return encode(abs(time.year) % 100, registers)
    default: return encode(abs(time.year) / 100 % 100, registers)
    }
  }

  private func encode(_ value: Int, _ registers: Registers) -> UInt8 {
    UInt8(truncatingIfNeeded: registers[Register.b] & B.binary != 0 ? value : (value / 10) << 4 | value % 10)
  }

  private func decode(_ value: UInt8, _ registers: Registers) -> Int {
    registers[Register.b] & B.binary != 0 ? Int(value) : Int(value >> 4) * 10 + Int(value & 15)
  }

  private func decodeHour(_ registers: Registers) -> Int {
    let value = registers[Register.hours]
    guard registers[Register.b] & B.hours24 == 0 else { return decode(value, registers) }
    return decode(value & 0x7f, registers) % 12 + (value & 0x80 != 0 ? 12 : 0)
  }

  private func store(_ time: CivilTime, _ registers: inout Registers) {
    for index in 0...Register.century where Register.isTime(index) { registers[index] = encode(index, time, registers) }
  }

  private func start(_ registers: inout Registers, _ now: UInt64) {
    let time = CivilTime(
      year: decode(registers[Register.century], registers) * 100 + decode(registers[Register.year], registers),
      month: decode(registers[Register.month], registers), day: decode(registers[Register.day], registers),
      hour: decodeHour(registers), minute: decode(registers[Register.minutes], registers),
      second: decode(registers[Register.seconds], registers))
    registers.epoch = time.unix - Int(now / nanosecondsPerSecond)
  }

  // MARK: Interrupts

  /// Crystal ticks of the periodic interrupt; nil while none is selected (data sheet, table 5, 32.768 kHz base).
  private func period(_ registers: Registers) -> UInt64? {
    let rate = UInt64(registers[Register.a] & 0x0f)
    guard rate != 0, registers[Register.a] & 0x60 != 0x60 else { return nil }
    return 1 << (rate <= 2 ? rate + 6 : rate - 1)
  }

  private func ticks(at time: UInt64) -> UInt64 {
    let (seconds, rest) = time.quotientAndRemainder(dividingBy: nanosecondsPerSecond)
    return seconds * Self.crystal + rest * Self.crystal / nanosecondsPerSecond
  }

  /// The first nanosecond of a crystal tick.
  private func time(ofTick tick: UInt64) -> UInt64 {
    let (seconds, rest) = tick.quotientAndRemainder(dividingBy: Self.crystal)
    return seconds &* nanosecondsPerSecond &+ (rest * nanosecondsPerSecond + Self.crystal - 1) / Self.crystal
  }

  /// Whether the alarm registers name this second; 0xC0-0xFF match anything.
  private func alarmMatches(_ time: CivilTime, _ registers: Registers) -> Bool {
    func matches(_ alarm: Int, _ register: Int) -> Bool {
      registers[alarm] >= 0xc0 || registers[alarm] == encode(register, time, registers)
    }
    return matches(Register.secondsAlarm, Register.seconds) && matches(Register.minutesAlarm, Register.minutes)
      && matches(Register.hoursAlarm, Register.hours)
  }

  /// Sets the flags of what happened since the last count.
  private func count(_ registers: inout Registers, _ now: UInt64) {
    let before = registers.counted
    guard now > before else { return }
    registers.counted = now
    if let period = period(registers), ticks(at: now) / period > ticks(at: before) / period {
      registers[Register.c] |= B.periodic
    }
    let second = now / nanosecondsPerSecond
    let first = before / nanosecondsPerSecond
    if second > first, isRunning(registers) {
      registers[Register.c] |= B.update
      // An alarm comes round daily, so one day tells whether it came at all.
      if registers[Register.c] & B.alarm == 0 {
        for passed in 0..<min(second - first, 86400)
        where alarmMatches(CivilTime(unix: registers.epoch + Int(second - passed)), registers) {
          registers[Register.c] |= B.alarm
          if registers[Register.b] & B.alarm != 0 { onAlarm() }
          break
        }
      }
    }
    raise(&registers)
  }

  private func raise(_ registers: inout Registers) {
    guard registers[Register.c] & registers[Register.b] & B.interrupts != 0 else { return }
    registers[Register.c] |= Self.interruptRequest
    line.set(isConnected.load(ordering: .relaxed))
  }

  /// Takes the clock off its interrupt line or puts it back: what an HPET in legacy replacement mode does.
  public func setConnected(_ isConnected: Bool) {
    state.withLock { state in
      self.isConnected.store(isConnected, ordering: .relaxed)
      line.set(isConnected && state.registers[Register.c] & Self.interruptRequest != 0)
    }
  }

  /// Arms the timer for the next event that an enabled interrupt waits for and that has not happened yet.
  private func schedule(_ state: State, _ now: UInt64) {
    let registers = state.registers
    let awaited = registers[Register.b] & ~registers[Register.c] & B.interrupts
    var deadline: UInt64?
    if awaited & B.periodic != 0, let period = period(registers) {
      deadline = time(ofTick: (ticks(at: now) / period + 1) * period)
    }
    if awaited & (B.alarm | B.update) != 0, isRunning(registers) {
      let next = (now / nanosecondsPerSecond &+ 1) &* nanosecondsPerSecond
      deadline = min(deadline ?? next, next)
    }
    if let deadline { state.timer?.arm(at: deadline) } else { state.timer?.cancel() }
  }

  private func tick() {
    let now = clock.now()
    state.withLock { state in
      count(&state.registers, now)
      schedule(state, now)
    }
  }

  /// Turns the interrupts off; the battery keeps time and CMOS RAM.
  public func reset() {
    let now = clock.now()
    state.withLock { state in
      state.registers.index = 0
      state.registers[Register.b] &= ~(B.interrupts | B.squareWave)
      state.registers[Register.c] = 0
      state.registers.counted = now
      line.set(false)
      schedule(state, now)
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let registers = state.withLock { $0.registers }
    return StateNode(name, version: 1) { writer in
      writer.write(registers.index)
      writer.write(registers.memory)
      writer.write(Int64(registers.epoch))
      writer.write(registers.counted)
    }
  }

  /// Puts the registers and CMOS RAM back; guest time is put back first.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      let index = try reader.read(UInt8.self)
      let memory = try reader.read(limit: Self.memorySize)
      guard memory.count == Self.memorySize else { throw reader.invalid("CMOS size", UInt64(memory.count)) }
      let epoch = try reader.read(Int64.self)
      guard Self.epochs.contains(Int(epoch)) else { throw reader.invalid("epoch", UInt64(bitPattern: epoch)) }
      return Registers(index: index, memory: memory, epoch: Int(epoch), counted: try reader.read())
    }
    let now = clock.now()
    state.withLock { state in
      state.registers = restored
      line.set(isConnected.load(ordering: .relaxed) && restored[Register.c] & Self.interruptRequest != 0)
      schedule(state, now)
    }
  }
}
