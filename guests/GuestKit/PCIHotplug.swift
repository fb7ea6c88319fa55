import CGuest

/// PCI hot-plug on bus 0 by the registers that ACPI's tables use (QEMU's docs/specs/acpi_pci_hotplug), polled.
enum PCIHotplug {
  private static let arrivedPort: UInt16 = 0xae00
  private static let leavingPort: UInt16 = 0xae04
  private static let ejectPort: UInt16 = 0xae08

  /// How often the hot-plug's general-purpose event (bit 1 of block 0) has come as the SCI.
  nonisolated(unsafe) private(set) static var interrupts: UInt64 = 0
  nonisolated(unsafe) private static var events: UInt16 = 0

  /// Has the event delivered as an interrupt (ACPI 6.5, 4.8.4.1 and 5.2.9: FADT).
  static func listen(vector: UInt8) {
    guard let fadt = ACPI.find("FACP") else { return }
    events = UInt16(truncatingIfNeeded: load32(fadt.address + 80))
    let control = UInt16(truncatingIfNeeded: load32(fadt.address + 64))
    set_interrupt_handler(vector) { _ in
      if inw(PCIHotplug.events) & 2 != 0 {
        outw(PCIHotplug.events, 2)
        PCIHotplug.interrupts += 1
      }
      LocalAPIC.endOfInterrupt()
    }
    IOAPIC.route(pin: IOAPIC.pin(ofISA: UInt8(load16(fadt.address + 46))), vector: vector, to: LocalAPIC.id)
    outw(events, 2)
    outw(events + 2, 2)
    outw(control, inw(control) | 1)
  }

  /// The devices that came since the last call, a bit each.
  static func takeArrived() -> UInt32 { inl(arrivedPort) }

  /// Whether a device is to be given up.
  static func isLeaving(_ device: UInt8) -> Bool { inl(leavingPort) >> UInt32(device) & 1 != 0 }

  /// Gives a device up.
  static func eject(_ device: UInt8) { outl(ejectPort, 1 << UInt32(device)) }
}
