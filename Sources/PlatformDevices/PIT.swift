import DeviceModel
import StateTree
import Synchronization

/// The 8254 programmable interval timer of a PC (Intel 8254 data sheet) and the part of port 0x61 that belongs to it.
///
/// Counters are computed from guest time when somebody looks. Counter 0 interrupts on its output's rising edges; where
/// the host lets several pass, they come as one.
public final class PIT: PlatformDevice {
  /// Input clock, in Hz.
  public static let frequency: UInt64 = 1_193_182
  /// The timer's global system interrupt.
  public static let interrupt: UInt32 = 0

  private static let controlOffset: UInt64 = 3
  private static let gateOffset: UInt64 = 4
  private static let end: UInt64 = 5
  /// A guest that asks for more than 20 kHz gets every so many edges at most: each costs the host a timer.
  private static let leastPeriod: UInt64 = frequency / 20_000
  /// Half a period of the refresh request that port 0x61 shows, in nanoseconds.
  private static let refreshTime: UInt64 = 15_085

  /// `pit`.
  public let name = "pit"
  /// Three counters and the control word; port 0x61 with the gate and output of counter 2.
  public let windows: [BusWindow] = [.ports(0x40, size: 4), .ports(0x61, size: 1, offset: gateOffset)]
  private let line: InterruptLine.Source
  private let clock: any DeviceClock
  private let state = Mutex(State())

  private struct State {
    var counters = InlineArray<3, Counter>(repeating: Counter())
    /// Bits 1-3 of port 0x61: speaker data and the two NMI gates, kept for the guest.
    var speaker: UInt8 = 0
    /// When counter 0 interrupts next, and when it last did.
    var edge: UInt64?
    var lastEdge: UInt64 = 0
    /// Whether counter 0's output reaches the interrupt controllers.
    var isConnected = true
    var timer: (any DeviceTimer)?

    init() { counters[2].gate = false }
  }

  /// A timer whose counter 0 drives `line`.
  public init(line: InterruptLine.Source, clock: any DeviceClock) {
    self.line = line
    self.clock = clock
    let timer = clock.makeTimer { [weak self] in self?.tick() }
    state.withLock { $0.timer = timer }
  }

  /// Takes counter 0 off its interrupt line or puts it back: what an HPET in legacy replacement mode does.
  public func setConnected(_ isConnected: Bool) {
    let now = clock.now()
    state.withLock { state in
      let ticks = ticks(at: now)
      interrupt(&state, ticks)
      state.isConnected = isConnected
      update(&state, ticks)
    }
  }

  /// A byte a register.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let now = clock.now()
    let ticks = ticks(at: now)
    return state.withLock { state in
      readBytes(offset, size, end: Self.end) { offset in
        switch offset {
        case 0..<Self.controlOffset: return state.counters[Int(offset)].read(ticks)
        case Self.gateOffset:
          let refresh: UInt8 = now / Self.refreshTime & 1 == 1 ? 0x10 : 0
          let output: UInt8 = state.counters[2].output(ticks) ? 0x20 : 0
          return state.speaker | refresh | output | (state.counters[2].gate ? 1 : 0)
        // The control word cannot be read.
        default: return 0xff
        }
      }
    }
  }

  /// A byte a register.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let ticks = ticks(at: clock.now())
    state.withLock { state in
      writeBytes(offset, size, value, end: Self.end) { offset, byte in
        switch offset {
        case 0..<Self.controlOffset:
          interrupt(&state, ticks)
          state.counters[Int(offset)].write(byte, ticks)
          update(&state, ticks)
        case Self.controlOffset:
          interrupt(&state, ticks)
          control(byte, &state, ticks)
          update(&state, ticks)
        default:
          state.speaker = byte & 0x0e
          state.counters[2].setGate(byte & 1 != 0, ticks)
        }
      }
    }
  }

  private func control(_ word: UInt8, _ state: inout State, _ ticks: UInt64) {
    let selected = Int(word >> 6)
    guard selected == 3 else {
      state.counters[selected].control(word, ticks)
      return
    }
    // The read-back command, for each counter in bits 1-3; its bits 5 and 4 are active low.
    for index in 0..<3 where word >> UInt8(index + 1) & 1 == 1 {
      if word & 0x20 == 0 { state.counters[index].latchCount(ticks) }
      if word & 0x10 == 0 { state.counters[index].latchStatus(ticks) }
    }
  }

  // MARK: Interrupt

  private func ticks(at time: UInt64) -> UInt64 {
    let (seconds, rest) = time.quotientAndRemainder(dividingBy: nanosecondsPerSecond)
    return seconds * Self.frequency + rest * Self.frequency / nanosecondsPerSecond
  }

  /// The first nanosecond of a tick; a tick that guest time never reaches is its last.
  private func time(ofTick tick: UInt64) -> UInt64 {
    let (seconds, rest) = tick.quotientAndRemainder(dividingBy: Self.frequency)
    guard seconds < .max / nanosecondsPerSecond else { return .max }
    return seconds * nanosecondsPerSecond + (rest * nanosecondsPerSecond + Self.frequency - 1) / Self.frequency
  }

  /// Gives the rising edge that is due.
  private func interrupt(_ state: inout State, _ ticks: UInt64) {
    guard let edge = state.edge, edge <= ticks else { return }
    state.edge = nil
    state.lastEdge = edge
    line.set(false)
    line.set(true)
  }

  /// Puts the line at the output's level, and the timer at the next rising edge.
  private func update(_ state: inout State, _ ticks: UInt64) {
    let counter = state.counters[0]
    line.set(state.isConnected && counter.lineLevel(ticks))
    let earliest = counter.isPeriodic ? max(ticks, state.lastEdge &+ Self.leastPeriod - 1) : ticks
    state.edge = state.isConnected ? counter.nextRise(after: earliest) : nil
    arm(state)
  }

  private func arm(_ state: State) {
    if let edge = state.edge { state.timer?.arm(at: time(ofTick: edge)) } else { state.timer?.cancel() }
  }

  private func tick() {
    let ticks = ticks(at: clock.now())
    state.withLock { state in
      interrupt(&state, ticks)
      update(&state, ticks)
    }
  }

  // MARK: Life

  /// The state after power-on.
  public func reset() {
    replace(State())
  }

  private func replace(_ replacement: State) {
    let ticks = ticks(at: clock.now())
    state.withLock { state in
      let (timer, isConnected) = (state.timer, state.isConnected)
      state = replacement
      state.timer = timer
      state.isConnected = isConnected
      line.set(isConnected && state.counters[0].lineLevel(ticks))
      arm(state)
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      for index in 0..<3 { state.counters[index].write(to: &writer) }
      writer.write(state.speaker)
      writer.write(state.edge != nil)
      writer.write(state.edge ?? 0)
      writer.write(state.lastEdge)
    }
  }

  /// Puts the counters back; guest time is put back first.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var state = State()
      for index in 0..<3 { try state.counters[index].read(from: &reader) }
      state.speaker = try reader.read(UInt8.self) & 0x0e
      let hasEdge = try reader.read(Bool.self)
      let edge = try reader.read(UInt64.self)
      state.edge = hasEdge ? edge : nil
      state.lastEdge = try reader.read()
      return state
    }
    replace(restored)
  }
}
