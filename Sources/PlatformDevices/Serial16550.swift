import DeviceModel
import StateTree
import Synchronization

/// Where a serial port's bytes go. Called by the thread that writes the port, under no lock of the port.
public protocol SerialOutput: AnyObject, Sendable {
  /// Takes a byte from the guest; never waits long, and drops what it cannot keep.
  func write(_ byte: UInt8)
}

/// A 16550A serial port (National Semiconductor PC16550D data sheet): 16-byte FIFO, interrupts, loopback.
///
/// The line is infinitely fast: output leaves at once, and the character time-out has always passed. Input waits
/// outside while the FIFO is full, so that none is lost.
public final class Serial16550: PlatformDevice {
  /// COM1's first port; its interrupt is 4.
  public static let com1: UInt64 = 0x3f8
  private static let windowSize: UInt64 = 8

  /// `serial0` and on.
  public let name: String
  /// Eight ports.
  public let windows: [BusWindow]
  private let line: InterruptLine.Source
  private let output: any SerialOutput
  private let state = Mutex(State())

  /// A port at `port` whose interrupt is `line`.
  public init(name: String, port: UInt64 = com1, line: InterruptLine.Source, output: any SerialOutput) {
    self.name = name
    windows = [.ports(port, size: Self.windowSize)]
    self.line = line
    self.output = output
  }

  private struct State {
    var registers = Registers()
    /// Called once when the receiver has room again.
    var room: (@Sendable () -> Void)?
  }

  private struct Registers {
    var interruptEnable: UInt8 = 0
    var fifoControl: UInt8 = 0
    var lineControl: UInt8 = 0
    var modemControl: UInt8 = 0
    var scratch: UInt8 = 0
    /// 9600 baud, as firmware leaves it.
    var divisor: UInt16 = 12
    var received = ByteFIFO()
    /// The transmitter-empty interrupt waits to be read, or to be cleared by the next byte.
    var transmitterInterrupt = false
    var overrun = false
    /// Changes of the modem lines since the last read (low half of the modem status register).
    var modemDelta: UInt8 = 0
    /// The guest has looked at the line status or asked for the data interrupt: it is ready for input. Until then input
    /// waits outside, or the FIFO's clearing by the guest's driver would lose what was typed before.
    var isListening = false

    var fifoEnabled: Bool { fifoControl & FIFOControl.enable != 0 }
    var capacity: Int { fifoEnabled ? ByteFIFO.capacity : 1 }
    var isLoopback: Bool { modemControl & ModemControl.loopback != 0 }
    var isLatchOpen: Bool { lineControl & 0x80 != 0 }

    /// Bytes in the FIFO that raise the data interrupt.
    var trigger: Int {
      guard fifoEnabled else { return 1 }
      return switch fifoControl >> 6 {
      case 0: 1
      case 1: 4
      case 2: 8
      default: 14
      }
    }

    /// DCD, RI, DSR and CTS in the high half: a null modem's, or in loopback OUT2, OUT1, DTR and RTS.
    var modemLines: UInt8 {
      guard isLoopback else { return 0xb0 }
      return (modemControl & 0x0c) << 4 | (modemControl & 0x02) << 3 | (modemControl & 0x01) << 5
    }

    /// The most urgent pending interrupt (data sheet, table IV).
    var cause: Cause {
      if interruptEnable & 4 != 0, overrun { return .lineStatus }
      if interruptEnable & 1 != 0, received.count >= trigger { return .received }
      if interruptEnable & 1 != 0, received.count > 0 { return .timeOut }
      if interruptEnable & 2 != 0, transmitterInterrupt { return .transmitter }
      if interruptEnable & 8 != 0, modemDelta != 0 { return .modemStatus }
      return .none
    }
  }

  private enum Register {
    static let data: UInt64 = 0
    static let interruptEnable: UInt64 = 1
    /// FIFO control on writes.
    static let identification: UInt64 = 2
    static let lineControl: UInt64 = 3
    static let modemControl: UInt64 = 4
    static let lineStatus: UInt64 = 5
    static let modemStatus: UInt64 = 6
  }

  private enum FIFOControl {
    static let enable: UInt8 = 0x01
    static let clearReceiver: UInt8 = 0x02
  }

  private enum ModemControl {
    static let loopback: UInt8 = 0x10
  }

  /// Values of the interrupt identification register.
  private enum Cause: UInt8 {
    case modemStatus = 0x00
    case none = 0x01
    case transmitter = 0x02
    case received = 0x04
    case lineStatus = 0x06
    case timeOut = 0x0c
  }

  /// Bytes from outside, from any thread; returns how many were taken. When fewer than all were, `room` is called
  /// once there is space, by the thread that made it; a later call replaces it.
  public func receive(_ bytes: [UInt8], room: @escaping @Sendable () -> Void) -> Int {
    state.withLock { state in
      var taken = 0
      if state.registers.isListening, !state.registers.isLoopback {
        while taken < bytes.count, state.registers.received.count < state.registers.capacity {
          state.registers.received.append(bytes[taken])
          taken += 1
        }
      }
      state.room = taken < bytes.count ? room : nil
      update(state.registers)
      return taken
    }
  }

  /// A register a byte: wider reads get the registers that follow, as the bus splits them.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let (value, room) = state.withLock { state in
      let value = readBytes(offset, size, end: Self.windowSize) { read($0, &state.registers) }
      update(state.registers)
      return (value, takeRoom(&state))
    }
    room?()
    return value
  }

  /// A register a byte, as for reads.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    writeBytes(offset, size, value, end: Self.windowSize) { register, byte in
      let (transmitted, room) = state.withLock { state in
        let transmitted = write(register, byte, &state.registers)
        update(state.registers)
        return (transmitted, takeRoom(&state))
      }
      if transmitted { output.write(byte) }
      room?()
    }
  }

  /// Whoever waits for room, once the receiver is empty: fewer and larger deliveries than byte by byte.
  private func takeRoom(_ state: inout State) -> (@Sendable () -> Void)? {
    guard state.room != nil, state.registers.isListening, state.registers.received.count == 0,
      !state.registers.isLoopback
    else { return nil }
    defer { state.room = nil }
    return state.room
  }

  private func read(_ register: UInt64, _ registers: inout Registers) -> UInt8 {
    switch register {
    case Register.data:
      return registers.isLatchOpen ? UInt8(truncatingIfNeeded: registers.divisor) : registers.received.removeFirst()
    case Register.interruptEnable:
      return registers.isLatchOpen ? UInt8(registers.divisor >> 8) : registers.interruptEnable
    case Register.identification:
      let cause = registers.cause
      if cause == .transmitter { registers.transmitterInterrupt = false }
      return cause.rawValue | (registers.fifoEnabled ? 0xc0 : 0)
    case Register.lineControl: return registers.lineControl
    case Register.modemControl: return registers.modemControl
    case Register.lineStatus:
      // The transmitter is always empty.
      let status: UInt8 = 0x60 | (registers.received.count > 0 ? 0x01 : 0) | (registers.overrun ? 0x02 : 0)
      registers.overrun = false
      registers.isListening = true
      return status
    case Register.modemStatus:
      defer { registers.modemDelta = 0 }
      return registers.modemLines | registers.modemDelta
    default: return registers.scratch
    }
  }

  /// True when the byte goes out on the line.
  private func write(_ register: UInt64, _ value: UInt8, _ registers: inout Registers) -> Bool {
    switch register {
    case Register.data where registers.isLatchOpen: registers.divisor = registers.divisor & 0xff00 | UInt16(value)
    case Register.data:
      registers.transmitterInterrupt = true
      guard registers.isLoopback else { return true }
      if registers.received.count < registers.capacity {
        registers.received.append(value)
      } else {
        registers.overrun = true
      }
    case Register.interruptEnable where registers.isLatchOpen:
      registers.divisor = registers.divisor & 0xff | UInt16(value) << 8
    case Register.interruptEnable:
      // Enabling the transmitter interrupt while the transmitter is empty raises it.
      if value & ~registers.interruptEnable & 2 != 0 { registers.transmitterInterrupt = true }
      registers.interruptEnable = value & 0x0f
      if value & 1 != 0 { registers.isListening = true }
    case Register.identification:
      let toggled = (value ^ registers.fifoControl) & FIFOControl.enable != 0
      if toggled || value & FIFOControl.clearReceiver != 0 { registers.received = ByteFIFO() }
      registers.fifoControl = value & FIFOControl.enable != 0 ? value & 0xc9 : 0
    case Register.lineControl: registers.lineControl = value
    case Register.modemControl:
      let before = registers.modemLines
      registers.modemControl = value & 0x1f
      let after = registers.modemLines
      // RI counts when it falls, the others when they change.
      registers.modemDelta |= ((before ^ after) & 0xb0 | before & ~after & 0x40) >> 4
    case Register.lineStatus, Register.modemStatus: break
    default: registers.scratch = value
    }
    return false
  }

  /// A PC gates the interrupt with OUT2; QEMU does not, and small kernels that were only ever run there forget it.
  private func update(_ registers: Registers) {
    line.set(registers.cause != .none)
  }

  /// The registers after power-on. Whoever waits for room is told.
  public func reset() {
    replace(Registers())
  }

  private func replace(_ registers: Registers) {
    let room = state.withLock { state in
      state.registers = registers
      update(registers)
      return takeRoom(&state)
    }
    room?()
  }

  /// Version 1.
  public func save() -> StateNode {
    let registers = state.withLock { $0.registers }
    return StateNode(name, version: 1) { writer in
      writer.write(registers.interruptEnable)
      writer.write(registers.fifoControl)
      writer.write(registers.lineControl)
      writer.write(registers.modemControl)
      writer.write(registers.scratch)
      writer.write(registers.divisor)
      writer.write(registers.received.bytes)
      writer.write(registers.transmitterInterrupt)
      writer.write(registers.overrun)
      writer.write(registers.modemDelta)
      writer.write(registers.isListening)
    }
  }

  /// Puts the registers and the FIFO back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      Registers(
        interruptEnable: try reader.read(), fifoControl: try reader.read(), lineControl: try reader.read(),
        modemControl: try reader.read(), scratch: try reader.read(), divisor: try reader.read(),
        received: ByteFIFO(try reader.read(limit: ByteFIFO.capacity)), transmitterInterrupt: try reader.read(),
        overrun: try reader.read(), modemDelta: try reader.read(), isListening: try reader.read())
    }
    replace(restored)
  }
}

/// Sixteen bytes in order, without allocation.
private struct ByteFIFO {
  static let capacity = 16

  private var storage = InlineArray<16, UInt8>(repeating: 0)
  private var head = 0
  private(set) var count = 0

  init() {}

  /// At most `capacity` bytes.
  init(_ bytes: [UInt8]) {
    for byte in bytes { append(byte) }
  }

  var bytes: [UInt8] { (0..<count).map { storage[(head + $0) % Self.capacity] } }

  /// Lost where the FIFO is full.
  mutating func append(_ byte: UInt8) {
    guard count < Self.capacity else { return }
    storage[(head + count) % Self.capacity] = byte
    count += 1
  }

  /// 0 where the FIFO is empty.
  mutating func removeFirst() -> UInt8 {
    guard count > 0 else { return 0 }
    defer {
      head = (head + 1) % Self.capacity
      count -= 1
    }
    return storage[head]
  }
}
