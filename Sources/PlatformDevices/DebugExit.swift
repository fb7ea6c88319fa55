import DeviceModel
import StateTree

/// QEMU's isa-debug-exit: writing v ends the run with status (v << 1) | 1.
public final class DebugExit: PlatformDevice {
  /// The port that QEMU's users choose.
  public static let port: UInt64 = 0xf4

  /// `debug-exit`.
  public let name = "debug-exit"
  /// Four ports.
  public let windows: [BusWindow] = [.ports(port, size: 4)]
  private let machine: any MachineControl

  /// A port that asks `machine` to end.
  public init(machine: any MachineControl) {
    self.machine = machine
  }

  /// Reads as 0, as QEMU's does.
  public func read(offset: UInt64, size: Int) -> UInt64 { 0 }

  /// Ends the run.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    machine.request(.debugExit(UInt32(truncatingIfNeeded: value)))
  }

  /// Holds no state.
  public func reset() {}

  /// Version 1, empty.
  public func save() -> StateNode { StateNode(name, version: 1) }

  /// Checks name and version.
  public func restore(_ node: StateNode) throws(StateError) {
    try node.read(name, versions: 1...1) { _, _ in }
  }
}
