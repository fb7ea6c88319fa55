import DeviceModel
import StateTree
import Synchronization

/// The high precision event timer (IA-PC HPET specification 1.0a): a 100 MHz 64-bit counter, three comparators that are
/// one-shot or periodic, interrupt by a line of their choice, by the timer's and clock's (legacy replacement) or by message.
public final class HPET: PlatformDevice {
  /// Guest-physical address of the registers.
  public static let address: UInt64 = 0xfed0_0000
  /// Global system interrupts that a comparator can be routed to.
  public static let routes: ClosedRange<UInt32> = 20...23

  private static let comparators = 3
  /// Nanoseconds a tick.
  private static let period: UInt64 = 10
  /// Revision 1, three comparators, 64 bits, legacy replacement, vendor 8086h, 10^7 femtoseconds a tick.
  private static let identification: UInt64 = period * 1_000_000 << 32 | 0x8086_a201
  /// Ticks between two interrupts of a periodic comparator, at least: each costs the host a timer.
  private static let leastPeriod: UInt64 = 50_000 / period

  private enum Register {
    static let identification: UInt64 = 0x00
    static let configuration: UInt64 = 0x10
    static let status: UInt64 = 0x20
    static let counter: UInt64 = 0xf0
    static let comparators: UInt64 = 0x100
    static let stride: UInt64 = 0x20
  }

  /// Bits of the general configuration register.
  private enum General {
    static let enable: UInt64 = 1
    static let legacy: UInt64 = 2
  }

  /// Bits of a comparator's configuration register.
  private enum Configuration {
    static let level: UInt64 = 1 << 1
    static let interrupt: UInt64 = 1 << 2
    static let periodic: UInt64 = 1 << 3
    static let setsAccumulator: UInt64 = 1 << 6
    static let is32Bit: UInt64 = 1 << 8
    static let message: UInt64 = 1 << 14
    static let writable: UInt64 = 0x7f4e
    /// Periodic, 64 bits, messages, and a bit a route.
    static let capabilities: UInt64 =
      0x8030 | routes.reduce(0) { $0 | 1 << UInt64($1) } << 32
  }

  /// `hpet`.
  public let name = "hpet"
  /// One block of 1 KiB.
  public let windows: [BusWindow] = [.memory(address, size: 0x400)]
  private let lines: [InterruptLine.Source]
  private let legacyLines: [InterruptLine.Source]
  private let clock: any DeviceClock
  private let interrupts: any InterruptSink
  private let onLegacyReplacement: @Sendable (Bool) -> Void
  private let state = Mutex(State())

  private struct State {
    var registers = Registers()
    var timers: [any DeviceTimer] = []
  }

  private struct Registers {
    var configuration: UInt64 = 0
    var status: UInt64 = 0
    /// The main counter when it last stopped or was set, and the guest time of that, while it runs.
    var counter: UInt64 = 0
    var since: UInt64 = 0
    var comparators = InlineArray<3, Comparator>(repeating: Comparator())

    var isRunning: Bool { configuration & General.enable != 0 }
    var isLegacy: Bool { configuration & General.legacy != 0 }

    func counter(at now: UInt64) -> UInt64 {
      isRunning ? counter &+ (now &- min(since, now)) / HPET.period : counter
    }
  }

  private struct Comparator {
    var configuration: UInt64 = 0
    var comparator: UInt64 = .max
    /// What a periodic comparator is advanced by.
    var period: UInt64 = 0
    /// Message data below, address above.
    var message: UInt64 = 0
    /// The counter value up to which the comparator was compared.
    var counted: UInt64 = 0

    var mask: UInt64 { configuration & Configuration.is32Bit != 0 ? 0xffff_ffff : ~0 }
    var isPeriodic: Bool { configuration & Configuration.periodic != 0 }

    /// Ticks from a counter value to the next match; a full turn where it matches just now.
    func distance(from counter: UInt64) -> UInt64 { (comparator &- counter &- 1) & mask }
  }

  /// A timer whose comparators reach the lines `routes` (in that order) and, in legacy replacement, the timer's and the
  /// clock's; `onLegacyReplacement` then takes PIT and RTC off theirs. It must not call back.
  public init(
    lines: [InterruptLine.Source], timerLine: InterruptLine.Source, clockLine: InterruptLine.Source,
    clock: any DeviceClock, interrupts: any InterruptSink, onLegacyReplacement: @escaping @Sendable (Bool) -> Void
  ) {
    precondition(lines.count == Self.routes.count, "a line for each route")
    self.lines = lines
    legacyLines = [timerLine, clockLine]
    self.clock = clock
    self.interrupts = interrupts
    self.onLegacyReplacement = onLegacyReplacement
    let timers = (0..<Self.comparators).map { index in clock.makeTimer { [weak self] in self?.tick(index) } }
    state.withLock { $0.timers = timers }
  }

  // MARK: Registers

  /// Any part of a 64-bit register.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let now = clock.now()
    return state.withLock { state in
      if count(&state, now) { update(&state, now) }
      return register(offset & ~7, state.registers, now) >> ((offset & 7) * 8)
    }
  }

  /// A whole 64-bit register or a half of it; other writes are lost.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    guard size == 8 && offset & 7 == 0 || size == 4 && offset & 3 == 0 else { return }
    let now = clock.now()
    state.withLock { state in
      _ = count(&state, now)
      let shift = (offset & 7) * 8
      let mask: UInt64 = size == 8 ? ~0 : 0xffff_ffff << shift
      let old = register(offset & ~7, state.registers, now)
      setRegister(offset & ~7, old & ~mask | value << shift & mask, written: mask, &state.registers, now)
      update(&state, now)
    }
  }

  private func register(_ offset: UInt64, _ registers: Registers, _ now: UInt64) -> UInt64 {
    switch offset {
    case Register.identification: return Self.identification
    case Register.configuration: return registers.configuration
    case Register.status: return registers.status
    case Register.counter: return registers.counter(at: now)
    default:
      guard let index = Self.index(offset) else { return 0 }
      let comparator = registers.comparators[index]
      return switch offset & (Register.stride - 1) {
      case 0x00: comparator.configuration | Configuration.capabilities
      case 0x08: comparator.comparator
      case 0x10: comparator.message
      default: 0
      }
    }
  }

  /// The comparator whose registers are at an offset.
  private static func index(_ offset: UInt64) -> Int? {
    guard offset >= Register.comparators else { return nil }
    let index = Int((offset - Register.comparators) / Register.stride)
    return index < comparators ? index : nil
  }

  /// `written` has the bits that the access covered; the rest of `value` is what the register held.
  private func setRegister(
    _ offset: UInt64, _ value: UInt64, written: UInt64, _ registers: inout Registers, _ now: UInt64
  ) {
    switch offset {
    case Register.configuration:
      registers.counter = registers.counter(at: now)
      registers.since = now
      let wasLegacy = registers.isLegacy
      registers.configuration = value & (General.enable | General.legacy)
      if registers.isLegacy != wasLegacy {
        releaseLines()
        onLegacyReplacement(registers.isLegacy)
      }
    case Register.status: registers.status &= ~(value & written)
    // Software sets the counter while it stands; one that runs goes on from there.
    case Register.counter:
      registers.counter = value
      registers.since = now
      for index in 0..<Self.comparators { registers.comparators[index].counted = value }
    default:
      guard let index = Self.index(offset) else { return }
      set(&registers.comparators[index], offset & (Register.stride - 1), value, written: written)
      registers.comparators[index].counted = registers.counter(at: now)
      if offset & (Register.stride - 1) == 0 { releaseLines() }
    }
  }

  private func set(_ comparator: inout Comparator, _ register: UInt64, _ value: UInt64, written: UInt64) {
    switch register {
    case 0x00:
      comparator.configuration = value & Configuration.writable
      comparator.comparator &= comparator.mask
    case 0x08:
      let setsAccumulator = comparator.configuration & Configuration.setsAccumulator != 0
      if !comparator.isPeriodic || setsAccumulator { comparator.comparator = value & comparator.mask }
      // In periodic mode the last value written is the period; VAL_SET lets one write through to the accumulator.
      if comparator.isPeriodic {
        comparator.period = (comparator.period & ~written | value & written) & comparator.mask
        if written >> 32 != 0 || comparator.mask == 0xffff_ffff {
          comparator.configuration &= ~Configuration.setsAccumulator
        }
      }
    case 0x10: comparator.message = value
    default: break
    }
  }

  // MARK: Interrupts

  private func tick(_ index: Int) {
    let now = clock.now()
    state.withLock { state in
      _ = count(&state, now)
      update(&state, now)
    }
  }

  /// Raises what the comparators matched since they were last compared; false where none did.
  private func count(_ state: inout State, _ now: UInt64) -> Bool {
    guard state.registers.isRunning else { return false }
    var matched = false
    let counter = state.registers.counter(at: now)
    for index in 0..<Self.comparators {
      var comparator = state.registers.comparators[index]
      let distance = comparator.distance(from: comparator.counted)
      let passed = (counter &- comparator.counted) & comparator.mask
      comparator.counted = counter
      if passed > distance {
        matched = true
        if comparator.isPeriodic, comparator.period > 0 {
          let late = passed - distance - 1
          comparator.comparator =
            (comparator.comparator &+ (late / comparator.period &+ 1) &* comparator.period) & comparator.mask
        }
        if comparator.configuration & Configuration.interrupt != 0 { raise(index, comparator, &state.registers) }
      }
      state.registers.comparators[index] = comparator
    }
    return matched
  }

  private func raise(_ index: Int, _ comparator: Comparator, _ registers: inout Registers) {
    if comparator.configuration & Configuration.message != 0 {
      interrupts.signalMSI(
        address: comparator.message >> 32, data: UInt32(truncatingIfNeeded: comparator.message))
    } else if comparator.configuration & Configuration.level != 0 {
      registers.status |= 1 << UInt64(index)
    } else {
      line(index, comparator, registers)?.pulse()
    }
  }

  private func line(_ index: Int, _ comparator: Comparator, _ registers: Registers) -> InterruptLine.Source? {
    if registers.isLegacy, index < legacyLines.count { return legacyLines[index] }
    let route = UInt32(comparator.configuration >> 9 & 31)
    return Self.routes.contains(route) ? lines[Int(route - Self.routes.lowerBound)] : nil
  }

  private func releaseLines() {
    for line in lines + legacyLines { line.set(false) }
  }

  /// Puts level-triggered lines at what the status says, and each timer at its comparator's next match.
  private func update(_ state: inout State, _ now: UInt64) {
    let registers = state.registers
    let counter = registers.counter(at: now)
    var high: [InterruptLine.Source] = []
    for index in 0..<Self.comparators {
      let comparator = registers.comparators[index]
      let wanted = Configuration.interrupt
      if comparator.configuration & Configuration.level != 0, let line = line(index, comparator, registers) {
        let isHigh = comparator.configuration & wanted != 0 && registers.status >> UInt64(index) & 1 == 1
        // Two comparators may share a route.
        if isHigh { high.append(line) } else { line.set(false) }
      }
      guard registers.isRunning, comparator.configuration & wanted != 0, !state.timers.isEmpty else {
        if !state.timers.isEmpty { state.timers[index].cancel() }
        continue
      }
      var ticks = comparator.distance(from: counter)
      if comparator.isPeriodic, comparator.period < Self.leastPeriod { ticks = max(ticks, Self.leastPeriod) }
      let time = (ticks &+ 1).multipliedReportingOverflow(by: Self.period)
      let deadline = now.addingReportingOverflow(time.partialValue)
      // A match that guest time never reaches; a full turn is one more than 64 bits hold.
      if ticks == .max || time.overflow || deadline.overflow {
        state.timers[index].cancel()
      } else {
        state.timers[index].arm(at: deadline.partialValue)
      }
    }
    for line in high { line.set(true) }
  }

  // MARK: Life

  /// The state after power-on: counter 0 and stopped.
  public func reset() {
    replace(Registers())
  }

  private func replace(_ registers: Registers) {
    let now = clock.now()
    state.withLock { state in
      state.registers = registers
      releaseLines()
      onLegacyReplacement(registers.isLegacy)
      update(&state, now)
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let registers = state.withLock { $0.registers }
    return StateNode(name, version: 1) { writer in
      writer.write(registers.configuration)
      writer.write(registers.status)
      writer.write(registers.counter)
      writer.write(registers.since)
      for index in 0..<Self.comparators {
        let comparator = registers.comparators[index]
        for value in [
          comparator.configuration, comparator.comparator, comparator.period, comparator.message, comparator.counted,
        ] { writer.write(value) }
      }
    }
  }

  /// Puts the registers back; guest time is put back first.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var registers = Registers(
        configuration: try reader.read(), status: try reader.read(), counter: try reader.read(),
        since: try reader.read())
      for index in 0..<Self.comparators {
        registers.comparators[index] = Comparator(
          configuration: try reader.read(), comparator: try reader.read(), period: try reader.read(),
          message: try reader.read(), counted: try reader.read())
      }
      return registers
    }
    replace(restored)
  }
}
