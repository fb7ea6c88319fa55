import DeviceModel

/// A PCI function: what it is stands in `function`, what its BARs do in two methods. One new file a device.
///
/// A device makes its `PCIFunction` in `init`, saves `function.save()` as a child of its own node, restores it with
/// `function.restore(_:for:)`, calls `function.reset(for:)` when it is reset, and is placed with `PCIHost.add`.
public protocol PCIDevice: BusDevice {
  /// Configuration space, BARs and interrupts.
  var function: PCIFunction { get }
  /// A guest's read in a BAR, `offset` bytes from its start.
  func readBAR(_ bar: Int, offset: UInt64, size: Int) -> UInt64
  /// A guest's write in a BAR.
  func writeBAR(_ bar: Int, offset: UInt64, size: Int, value: UInt64)
  /// The guest is about to read these bytes of configuration space.
  func willReadConfiguration(offset: Int, size: Int)
  /// The guest wrote these bytes of configuration space; their values are in `function`.
  func didWriteConfiguration(offset: Int, size: Int)
}

extension PCIDevice {
  /// All ones: a BAR with nothing in it but MSI-X.
  public func readBAR(_ bar: Int, offset: UInt64, size: Int) -> UInt64 { ~0 }
  /// Lost.
  public func writeBAR(_ bar: Int, offset: UInt64, size: Int, value: UInt64) {}
  /// Nothing of the device's own to do.
  public func willReadConfiguration(offset: Int, size: Int) {}
  /// Nothing of the device's own to do.
  public func didWriteConfiguration(offset: Int, size: Int) {}

  /// What an address bus calls: the BAR's number is in the offset's high bits.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let (bar, offset) = PCIFunction.split(offset)
    return function.readMSIX(bar, offset, size) ?? readBAR(bar, offset: offset, size: size)
  }

  /// What an address bus calls: the BAR's number is in the offset's high bits.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let (bar, offset) = PCIFunction.split(offset)
    if !function.writeMSIX(bar, offset, size, value) { writeBAR(bar, offset: offset, size: size, value: value) }
  }
}
