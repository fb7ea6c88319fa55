import DeviceModel
import StateTree

/// Bochs' and QEMU's debug console: bytes written to port 0xe9 come out, reads give 0xe9 to say that it is there.
public final class DebugConsole: PlatformDevice {
  /// The port.
  public static let port: UInt64 = 0xe9

  /// `debug-console`.
  public let name = "debug-console"
  /// One port.
  public let windows: [BusWindow] = [.ports(port, size: 1)]
  private let output: any SerialOutput

  /// A console that writes to `output`.
  public init(output: any SerialOutput) {
    self.output = output
  }

  /// 0xe9.
  public func read(offset: UInt64, size: Int) -> UInt64 { Self.port }

  /// Sends the low byte.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    output.write(UInt8(truncatingIfNeeded: value))
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
