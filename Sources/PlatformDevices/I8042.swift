import DeviceModel
import StateTree
import Synchronization

/// The 8042 keyboard controller as far as firmware and kernels probe it: reset, A20, self-tests, no keyboard or mouse.
///
/// Every probe is answered at once (a controller that is silent costs Linux half a second of boot), and the answer is
/// that nothing is plugged in: the tests pass, devices do not reply.
public final class I8042: BusDevice {
  /// The data port, at offset 0 of the device.
  public static let dataPort: UInt64 = 0x60
  /// The command and status port, at offset 4; the ports between belong to others.
  public static let commandPort: UInt64 = 0x64

  /// `i8042`.
  public let name = "i8042"
  private let machine: any MachineControl
  private let state = Mutex(State())

  /// A controller whose reset line is the machine's.
  public init(machine: any MachineControl) {
    self.machine = machine
  }

  private struct State: Equatable {
    /// Keyboard interrupt off, system flag set, translation on: as firmware leaves it.
    var configuration: UInt8 = 0x44
    var outputPort: UInt8 = 0x03
    var output: UInt8?
    /// The command that waits for its data byte.
    var pendingCommand: UInt8?
  }

  /// Data at offset 0, status at offset 4.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    state.withLock { state in
      guard offset == 0 else {
        // Bit 4: not locked; bit 2: system flag; bit 0: a byte waits.
        return 0x10 | UInt64(state.configuration & 0x04) | (state.output == nil ? 0 : 1)
      }
      defer { state.output = nil }
      return UInt64(state.output ?? 0)
    }
  }

  /// Data at offset 0, commands at offset 4.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let byte = UInt8(truncatingIfNeeded: value)
    let resets = state.withLock { offset == 0 ? data(byte, &$0) : command(byte, &$0) }
    if resets { machine.request(.reset) }
  }

  /// The byte that a command waits for, or one for a device that is not there. True where the machine is to be reset.
  private func data(_ byte: UInt8, _ state: inout State) -> Bool {
    defer { state.pendingCommand = nil }
    switch state.pendingCommand {
    case 0x60: state.configuration = byte
    case 0xd1:
      state.outputPort = byte
      return byte & 1 == 0
    // The loop-back commands give the byte back.
    case 0xd2, 0xd3: state.output = byte
    default: break
    }
    return false
  }

  /// True where the machine is to be reset.
  private func command(_ command: UInt8, _ state: inout State) -> Bool {
    state.pendingCommand = nil
    switch command {
    case 0x20: state.output = state.configuration
    case 0x60, 0xd1, 0xd2, 0xd3, 0xd4: state.pendingCommand = command
    case 0xa7: state.configuration |= 0x20
    case 0xa8: state.configuration &= ~0x20
    case 0xa9, 0xab: state.output = 0
    case 0xaa:
      state.configuration |= 0x04
      state.output = 0x55
    case 0xad: state.configuration |= 0x10
    case 0xae: state.configuration &= ~0x10
    case 0xc0: state.output = 0x80
    case 0xd0: state.output = state.outputPort
    case 0xdd: state.outputPort &= ~0x02
    case 0xdf: state.outputPort |= 0x02
    // Pulses the output lines whose bit is 0; line 0 is the processor's reset.
    case 0xf0...0xff: return command & 1 == 0
    default: break
    }
    return false
  }

  /// The state after power-on.
  public func reset() {
    state.withLock { $0 = State() }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.configuration)
      writer.write(state.outputPort)
      writer.write(state.output.map { UInt16($0) } ?? 0xffff)
      writer.write(state.pendingCommand.map { UInt16($0) } ?? 0xffff)
    }
  }

  /// Puts the registers back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var state = State()
      state.configuration = try reader.read()
      state.outputPort = try reader.read()
      state.output = UInt8(exactly: try reader.read(UInt16.self))
      state.pendingCommand = UInt8(exactly: try reader.read(UInt16.self))
      return state
    }
    state.withLock { $0 = restored }
  }
}
