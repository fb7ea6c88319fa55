import CGuest

/// PCI hot-plug on bus 0 by the registers that ACPI's tables use (QEMU's docs/specs/acpi_pci_hotplug), polled.
enum PCIHotplug {
  private static let arrivedPort: UInt16 = 0xae00
  private static let leavingPort: UInt16 = 0xae04
  private static let ejectPort: UInt16 = 0xae08

  /// The devices that came since the last call, a bit each.
  static func takeArrived() -> UInt32 { inl(arrivedPort) }

  /// Whether a device is to be given up.
  static func isLeaving(_ device: UInt8) -> Bool { inl(leavingPort) >> UInt32(device) & 1 != 0 }

  /// Gives a device up.
  static func eject(_ device: UInt8) { outl(ejectPort, 1 << UInt32(device)) }
}
