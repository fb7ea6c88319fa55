import DeviceModel
import StateTree

/// The host bridge as a function of its own bus (0000:00:00.0): an identity, no registers.
public final class PCIHostBridge: PCIDevice {
  /// Its place on the bus.
  public static let address = PCIAddress(device: 0)

  /// `pci-host-bridge`.
  public let name = "pci-host-bridge"
  /// Configuration space.
  public let function: PCIFunction

  /// The bridge of `host`, with the identity of QEMU's generic PCIe host.
  public init(host: PCIHost, interrupts: any InterruptSink) {
    let configuration = PCIConfiguration(
      vendor: 0x1b36, device: 0x0008, subsystemVendor: 0x1af4, subsystem: 0x1100, classCode: 0x060000)
    function = PCIFunction(configuration, host: host, line: host.line(device: 0), interrupts: interrupts)
  }

  /// The state after power-on.
  public func reset() {
    function.reset(for: self)
  }

  /// Version 1: the function alone.
  public func save() -> StateNode {
    StateNode(name, version: 1, children: [function.save()])
  }

  /// Puts configuration space back.
  public func restore(_ node: StateNode) throws(StateError) {
    try node.read(name, versions: 1...1) { _, _ in }
    try function.prepareRestore(node.child(PCIFunction.nodeName), for: self)()
  }
}
