import DeviceModel
import StateTree
import Synchronization

/// Where a serial port's bytes go. Called by the thread that writes the port, under no lock of the port.
public protocol SerialOutput: AnyObject, Sendable {
  /// Takes bytes from the guest; never waits long, and drops what it cannot keep.
  func write(_ byte: UInt8)
}

/// A 16550A serial port (National Semiconductor PC16550D data sheet): 16-byte receive FIFO, interrupts, loopback.
///
/// Output is taken at once, whatever the line speed; input waits outside while the FIFO is full, so that none is lost.
public final class Serial16550: BusDevice {
  /// Ports of the device.
  public static let windowSize: UInt64 = 8

  /// `serial0` and on.
  public let name: String
  private let line: InterruptLine.Source
  private let output: any SerialOutput
  private let state = Mutex(State())
  private let room = Mutex<(@Sendable () -> Void)?>(nil)

  /// A port whose interrupt is `line`.
  public init(name: String, line: InterruptLine.Source, output: any SerialOutput) {
    self.name = name
    self.line = line
    self.output = output
  }

  private struct State: Equatable {
    var interruptEnable: UInt8 = 0
    var fifoEnabled = false
    var lineControl: UInt8 = 0
    var modemControl: UInt8 = 0
    var scratch: UInt8 = 0
    /// 9600 baud, as firmware leaves it.
    var divisor: UInt16 = 12
    var received: [UInt8] = []
    /// The transmitter-empty interrupt waits to be read or to be cleared by the next byte.
    var transmitterInterrupt = false
    var overrun = false
    var breakSeen = false
    /// CTS, DSR and DCD stand, as a null modem holds them; the low half are the changes since the last read.
    var modemStatus: UInt8 = 0xb0
  }

  private enum Register {
    static let data: UInt64 = 0
    static let interruptEnable: UInt64 = 1
    static let identification: UInt64 = 2
    static let lineControl: UInt64 = 3
    static let modemControl: UInt64 = 4
    static let lineStatus: UInt64 = 5
    static let modemStatus: UInt64 = 6
    static let scratch: UInt64 = 7
  }

  private static let fifoSize = 16
  private static let loopback: UInt8 = 0x10
  private static let divisorLatch: UInt8 = 0x80

  /// Bytes from outside; returns how many were taken. When fewer than all were, `room` is called once there is space.
  public func receive(_ bytes: [UInt8], room: @escaping @Sendable () -> Void) -> Int {
    let taken = state.withLock { state in
      guard state.modemControl & Self.loopback == 0 else { return 0 }
      let space = (state.fifoEnabled ? Self.fifoSize : 1) - state.received.count
      let taken = min(max(0, space), bytes.count)
      state.received += bytes.prefix(taken)
      update(state)
      return taken
    }
    if taken < bytes.count { self.room.withLock { $0 = room } }
    return taken
  }

  /// A byte a register: wider reads get the registers that follow, as the bus would split them.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    var value: UInt64 = 0
    var madeRoom = false
    state.withLock { state in
      for index in 0..<UInt64(size) where offset + index < Self.windowSize {
        let hadInput = !state.received.isEmpty
        value |= UInt64(read(offset + index, &state)) << (index * 8)
        madeRoom = madeRoom || hadInput && state.received.isEmpty
      }
      update(state)
    }
    if madeRoom { callRoom() }
    return value
  }

  /// A byte a register, as for reads.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    for index in 0..<UInt64(size) where offset + index < Self.windowSize {
      let byte = UInt8(truncatingIfNeeded: value >> (index * 8))
      let transmitted = state.withLock { state in
        let transmitted = write(offset + index, byte, &state)
        update(state)
        return transmitted
      }
      if transmitted { output.write(byte) }
    }
    callRoom()
  }

  private func callRoom() {
    let waiting = room.withLock { room in
      defer { room = nil }
      return room
    }
    waiting?()
  }

  private func read(_ register: UInt64, _ state: inout State) -> UInt8 {
    let latch = state.lineControl & Self.divisorLatch != 0
    switch register {
    case Register.data where latch: return UInt8(truncatingIfNeeded: state.divisor)
    case Register.data: return state.received.isEmpty ? 0 : state.received.removeFirst()
    case Register.interruptEnable where latch: return UInt8(state.divisor >> 8)
    case Register.interruptEnable: return state.interruptEnable
    case Register.identification:
      let cause = cause(state)
      if cause == .transmitter { state.transmitterInterrupt = false }
      return cause.rawValue | (state.fifoEnabled ? 0xc0 : 0)
    case Register.lineControl: return state.lineControl
    case Register.modemControl: return state.modemControl
    case Register.lineStatus:
      var status: UInt8 = 0x60
      if !state.received.isEmpty { status |= 0x01 }
      if state.overrun { status |= 0x02 }
      if state.breakSeen { status |= 0x10 }
      state.overrun = false
      state.breakSeen = false
      return status
    case Register.modemStatus:
      defer { state.modemStatus &= 0xf0 }
      guard state.modemControl & Self.loopback != 0 else { return state.modemStatus }
      // In loopback DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
      let control = state.modemControl
      return (control & 0x0c) << 4 | (control & 0x02) << 3 | (control & 0x01) << 5
    default: return state.scratch
    }
  }

  /// True when the byte goes out on the line.
  private func write(_ register: UInt64, _ value: UInt8, _ state: inout State) -> Bool {
    let latch = state.lineControl & Self.divisorLatch != 0
    switch register {
    case Register.data where latch: state.divisor = state.divisor & 0xff00 | UInt16(value)
    case Register.data:
      state.transmitterInterrupt = true
      guard state.modemControl & Self.loopback != 0 else { return true }
      if state.received.count < (state.fifoEnabled ? Self.fifoSize : 1) {
        state.received.append(value)
      } else {
        state.overrun = true
      }
    case Register.interruptEnable where latch: state.divisor = state.divisor & 0xff | UInt16(value) << 8
    case Register.interruptEnable:
      // Enabling the transmitter interrupt while the transmitter is empty raises it.
      if value & ~state.interruptEnable & 2 != 0 { state.transmitterInterrupt = true }
      state.interruptEnable = value & 0x0f
    case Register.identification:
      if (value & 1 != 0) != state.fifoEnabled || value & 2 != 0 { state.received = [] }
      state.fifoEnabled = value & 1 != 0
    case Register.lineControl: state.lineControl = value
    case Register.modemControl: state.modemControl = value & 0x1f
    case Register.scratch: state.scratch = value
    default: break
    }
    return false
  }

  private enum Cause: UInt8 {
    case none = 1
    case modemStatus = 0
    case transmitter = 2
    case received = 4
    case lineStatus = 6
  }

  /// The most urgent pending interrupt (data sheet, table 5).
  private func cause(_ state: State) -> Cause {
    if state.interruptEnable & 4 != 0, state.overrun || state.breakSeen { return .lineStatus }
    if state.interruptEnable & 1 != 0, !state.received.isEmpty { return .received }
    if state.interruptEnable & 2 != 0, state.transmitterInterrupt { return .transmitter }
    if state.interruptEnable & 8 != 0, state.modemStatus & 0x0f != 0 { return .modemStatus }
    return .none
  }

  /// OUT2 gates the interrupt on a PC; in loopback it is not connected.
  private func update(_ state: State) {
    line.set(cause(state) != .none && state.modemControl & 0x18 == 0x08)
  }

  /// The registers after power-on.
  public func reset() {
    state.withLock { state in
      state = State()
      update(state)
    }
    callRoom()
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      for value in [
        state.interruptEnable, state.lineControl, state.modemControl, state.scratch, state.modemStatus,
      ] { writer.write(value) }
      writer.write(state.divisor)
      writer.write(state.fifoEnabled)
      writer.write(state.transmitterInterrupt)
      writer.write(state.overrun)
      writer.write(state.breakSeen)
      writer.write(state.received)
    }
  }

  /// Puts the registers and the FIFO back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var state = State()
      state.interruptEnable = try reader.read()
      state.lineControl = try reader.read()
      state.modemControl = try reader.read()
      state.scratch = try reader.read()
      state.modemStatus = try reader.read()
      state.divisor = try reader.read()
      state.fifoEnabled = try reader.read()
      state.transmitterInterrupt = try reader.read()
      state.overrun = try reader.read()
      state.breakSeen = try reader.read()
      state.received = try reader.read(limit: Self.fifoSize)
      return state
    }
    state.withLock { state in
      state = restored
      update(state)
    }
    callRoom()
  }
}
