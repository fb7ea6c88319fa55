import CGuest

/// The id that says which copy of a machine this is (Microsoft's Virtual Machine Generation ID), and the general-purpose event that tells of
/// another one. AML is not interpreted: the name of the id's address is searched for.
enum GenerationID {
  private static let event: UInt16 = 5
  private static let addressName: UInt32 = 0x5244_4441  // "ADDR"
  private static let package: UInt8 = 0x12
  private static let doubleWord: UInt8 = 0x0c

  /// How often the event has come as the SCI.
  nonisolated(unsafe) private(set) static var events: UInt64 = 0
  nonisolated(unsafe) private static var eventPort: UInt16 = 0
  nonisolated(unsafe) private static var address: UInt64 = 0

  /// The 16 bytes as they are now.
  static var low: UInt64 { load64(address) }
  static var high: UInt64 { load64(address + 8) }

  /// Finds the id and has its event delivered as an interrupt; false where the machine has none.
  static func listen(vector: UInt8) -> Bool {
    guard let fadt = ACPI.find("FACP"), let dsdt = ACPI.dsdt(of: fadt), let found = find(in: dsdt) else { return false }
    address = found
    eventPort = UInt16(truncatingIfNeeded: load32(fadt.address + 80))
    let control = UInt16(truncatingIfNeeded: load32(fadt.address + 64))
    set_interrupt_handler(vector) { _ in
      let bit = UInt16(1) << GenerationID.event
      if inw(GenerationID.eventPort) & bit != 0 {
        outw(GenerationID.eventPort, bit)
        GenerationID.events += 1
      }
      LocalAPIC.endOfInterrupt()
    }
    IOAPIC.route(pin: IOAPIC.pin(ofISA: UInt8(load16(fadt.address + 46))), vector: vector, to: LocalAPIC.id)
    outw(eventPort, 1 << event)
    outw(eventPort + 2, 1 << event)
    outw(control, inw(control) | 1)
    return true
  }

  /// `Name (ADDR, Package {low, ...})` (20.2.5.4): below 4 GiB the first element is all of it.
  private static func find(in dsdt: ACPI.Table) -> UInt64? {
    var offset: UInt64 = 36
    while true {
      offset = scan_byte(dsdt.address, offset, dsdt.length, UInt8(ascii: "A"))
      if offset + 12 >= dsdt.length { return nil }
      let name = dsdt.address + offset
      if load32(name) == addressName && load8(name + 4) == package && load8(name + 7) == doubleWord {
        return UInt64(load32(name + 8))
      }
      offset += 1
    }
  }
}
