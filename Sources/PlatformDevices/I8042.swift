import DeviceModel
import StateTree
import Synchronization

/// The 8042 keyboard controller as firmware and kernels probe it: reset, A20 and self-tests, with nothing plugged in.
///
/// Every command and every byte for a device is answered at once, since a silent controller costs Linux half a second
/// of boot: the controller's tests pass, the second port fails its test, and a device that is not there answers
/// "resend" with the time-out bit, as a real controller does.
public final class I8042: PlatformDevice {
  /// The data port.
  public static let dataPort: UInt64 = 0x60
  /// The command and status port.
  public static let commandPort: UInt64 = 0x64
  /// The first port's ISA interrupt.
  public static let interrupt: UInt32 = 1
  private static let dataOffset: UInt64 = 0
  private static let commandOffset: UInt64 = 4
  private static let resend: UInt8 = 0xfe

  /// `i8042`.
  public let name = "i8042"
  /// Two single ports; those between belong to others.
  public let windows: [BusWindow] = [
    .ports(dataPort, size: 1, offset: dataOffset), .ports(commandPort, size: 1, offset: commandOffset),
  ]
  private let line: InterruptLine.Source
  private let machine: any MachineControl
  private let state = Mutex(State())

  /// Bits of the status register.
  private enum Status {
    static let outputFull: UInt8 = 0x01
    static let systemFlag: UInt8 = 0x04
    static let lastWasCommand: UInt8 = 0x08
    static let notLocked: UInt8 = 0x10
    static let fromSecondPort: UInt8 = 0x20
    static let timeOut: UInt8 = 0x40
  }

  /// Bits of the configuration byte.
  private enum Configuration {
    static let interrupt: UInt8 = 0x01
    static let systemFlag: UInt8 = 0x04
    static let firstPortOff: UInt8 = 0x10
    static let secondPortOff: UInt8 = 0x20
    static let translation: UInt8 = 0x40
  }

  private struct State {
    var configuration = Configuration.systemFlag | Configuration.secondPortOff | Configuration.translation
    /// Reset released, A20 open.
    var outputPort: UInt8 = 0x03
    var output: UInt8 = 0
    var status = Status.systemFlag | Status.notLocked
    /// The command that waits for its data byte; 0 for none.
    var pendingCommand: UInt8 = 0
  }

  /// A controller whose first port interrupts on `line` (IRQ 1) and whose reset output resets `machine`.
  public init(line: InterruptLine.Source, machine: any MachineControl) {
    self.line = line
    self.machine = machine
  }

  /// Data at offset 0, status at offset 4.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    state.withLock { state in
      guard offset == Self.dataOffset else { return UInt64(state.status) }
      state.status &= ~(Status.outputFull | Status.fromSecondPort | Status.timeOut)
      update(state)
      return UInt64(state.output)
    }
  }

  /// Data at offset 0, commands at offset 4.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let byte = UInt8(truncatingIfNeeded: value)
    let resets = state.withLock { state in
      defer { update(state) }
      return offset == Self.dataOffset ? takeData(byte, &state) : takeCommand(byte, &state)
    }
    if resets { machine.request(.reset) }
  }

  /// The byte that a command waits for, or one for a device. True where the machine is to be reset.
  private func takeData(_ byte: UInt8, _ state: inout State) -> Bool {
    state.status &= ~Status.lastWasCommand
    let command = state.pendingCommand
    state.pendingCommand = 0
    switch command {
    case 0x60:
      state.configuration = byte
      state.status = state.status & ~Status.systemFlag | byte & Configuration.systemFlag
    case 0xd1:
      state.outputPort = byte
      return byte & 1 == 0
    case 0xd2, 0xd3:
      // 0xd3 should answer as the second port would: without that bit Linux sees at once that there is none.
      put(byte, 0, &state)
    case 0xd4: put(Self.resend, Status.timeOut | Status.fromSecondPort, &state)
    default: put(Self.resend, Status.timeOut, &state)
    }
    return false
  }

  /// True where the machine is to be reset.
  private func takeCommand(_ command: UInt8, _ state: inout State) -> Bool {
    state.status |= Status.lastWasCommand
    state.pendingCommand = 0
    switch command {
    case 0x20: put(state.configuration, 0, &state)
    case 0x60, 0xd1, 0xd2, 0xd3, 0xd4: state.pendingCommand = command
    case 0xa7: state.configuration |= Configuration.secondPortOff
    case 0xa8: state.configuration &= ~Configuration.secondPortOff
    // The second port's clock line is stuck; the first port is in order.
    case 0xa9: put(0x01, 0, &state)
    case 0xab: put(0x00, 0, &state)
    case 0xaa:
      state.configuration |= Configuration.systemFlag
      state.status |= Status.systemFlag
      put(0x55, 0, &state)
    case 0xad: state.configuration |= Configuration.firstPortOff
    case 0xae: state.configuration &= ~Configuration.firstPortOff
    // The input port: keyboard not locked.
    case 0xc0: put(0x80, 0, &state)
    case 0xd0: put(state.outputPort, 0, &state)
    case 0xdd: state.outputPort &= ~0x02
    case 0xdf: state.outputPort |= 0x02
    // Pulses the output lines whose bit is 0; line 0 is the processor's reset.
    case 0xf0...0xff: return command & 1 == 0
    default: break
    }
    return false
  }

  private func put(_ byte: UInt8, _ flags: UInt8, _ state: inout State) {
    state.output = byte
    state.status &= ~(Status.fromSecondPort | Status.timeOut)
    state.status |= Status.outputFull | flags
  }

  private func update(_ state: State) {
    line.set(
      state.status & (Status.outputFull | Status.fromSecondPort) == Status.outputFull
        && state.configuration & Configuration.interrupt != 0)
  }

  /// The state after power-on.
  public func reset() {
    state.withLock { state in
      state = State()
      update(state)
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      for byte in [state.configuration, state.outputPort, state.output, state.status, state.pendingCommand] {
        writer.write(byte)
      }
    }
  }

  /// Puts the registers back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      State(
        configuration: try reader.read(), outputPort: try reader.read(), output: try reader.read(),
        status: try reader.read(), pendingCommand: try reader.read())
    }
    state.withLock { state in
      state = restored
      update(state)
    }
  }
}
