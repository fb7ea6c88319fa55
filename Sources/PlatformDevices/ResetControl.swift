import DeviceModel
import StateTree
import Synchronization

/// The two reset ports of a PC's chipset: system control port A (0x92) and the reset control register (0xcf9).
public final class ResetControl: PlatformDevice {
  /// System control port A: bit 0 resets, bit 1 is A20.
  public static let portA: UInt64 = 0x92
  /// The reset control register: bit 2 resets, bit 1 says hard.
  public static let resetRegister: UInt64 = 0xcf9
  private static let portAOffset: UInt64 = 0
  private static let resetOffset: UInt64 = 1

  /// `reset-control`.
  public let name = "reset-control"
  /// System control port A at offset 0, the reset control register at offset 1.
  public let windows: [BusWindow] = [
    .ports(portA, size: 1, offset: portAOffset), .ports(resetRegister, size: 1, offset: resetOffset),
  ]
  private let machine: any MachineControl
  private let state = Mutex(State())

  private struct State {
    /// Bit 1 is A20, which stays open whatever it says.
    var portA: UInt8 = 0x02
    /// Bits 1 (hard) and 3 (full) are kept; bit 2 resets.
    var control: UInt8 = 0
  }

  /// Ports that reset `machine`.
  public init(machine: any MachineControl) {
    self.machine = machine
  }

  /// What was written, without the reset bits.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    state.withLock { UInt64(offset == Self.portAOffset ? $0.portA : $0.control) }
  }

  /// Keeps the byte; a reset bit resets.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let byte = UInt8(truncatingIfNeeded: value)
    let resets = state.withLock { state in
      guard offset == Self.portAOffset else {
        state.control = byte & 0x0a
        return byte & 0x04 != 0
      }
      state.portA = byte & 0x02
      return byte & 0x01 != 0
    }
    if resets { machine.request(.reset) }
  }

  /// The state after power-on.
  public func reset() {
    state.withLock { $0 = State() }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.portA)
      writer.write(state.control)
    }
  }

  /// Puts the registers back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      State(portA: try reader.read(), control: try reader.read())
    }
    state.withLock { $0 = restored }
  }
}
