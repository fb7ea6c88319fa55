/// Where a PCI function is: bus, device (slot) and function number.
public struct PCIAddress: Hashable, Sendable, CustomStringConvertible {
  /// Bus, 8 bits; device, 5 bits; function, 3 bits: the routing id of the PCI Express specification.
  public let routingID: UInt16

  /// Device 0-31 and function 0-7 of a bus.
  public init(bus: UInt8 = 0, device: UInt8, function: UInt8 = 0) {
    precondition(device < 32 && function < 8, "a PCI bus has 32 devices of 8 functions")
    routingID = UInt16(bus) << 8 | UInt16(device) << 3 | UInt16(function)
  }

  /// The function with that routing id.
  init(routingID: UInt16) {
    self.routingID = routingID
  }

  /// Bus number.
  public var bus: UInt8 { UInt8(routingID >> 8) }
  /// Device number, 0-31.
  public var device: UInt8 { UInt8(routingID >> 3 & 31) }
  /// Function number, 0-7.
  public var function: UInt8 { UInt8(routingID & 7) }

  /// `0000:00:01.0`, as lspci -D prints it.
  public var description: String {
    func hex(_ value: UInt8) -> String { (value < 16 ? "0" : "") + String(value, radix: 16) }
    return "0000:\(hex(bus)):\(hex(device)).\(function)"
  }
}
