/// The multiple APIC description table (ACPI 6.5, 5.2.12).
enum MADT {
  static func table(_ configuration: ACPIConfiguration) -> [UInt8] {
    var table = TableBytes()
    table.append(UInt32(Platform.localAPIC))
    table.append(UInt32(1))  // a pair of 8259s is there too
    for id in 0..<configuration.cpus {
      // An 8-bit id of 255 is the broadcast, so from there on it takes an x2APIC entry.
      if id < 255 {
        table.append([0, 8, UInt8(id), UInt8(id)])
        table.append(UInt32(1))  // enabled
      } else {
        table.append([9, 16, 0, 0])
        table.append(UInt32(id))
        table.append(UInt32(1))
        table.append(UInt32(id))
      }
    }
    table.append([1, 12, 0, 0])  // IOAPIC 0
    table.append(UInt32(Platform.ioapic))
    table.append(UInt32(0))
    interruptOverride(&table, irq: 0, gsi: 2, flags: 0)  // the PIT: as the bus says, edge and high
    interruptOverride(&table, irq: 9, gsi: 9, flags: 0xd)  // the SCI: level, active high
    table.append([4, 6, 0xff, 0, 0, 1])  // NMI on LINT1 of every processor
    if configuration.cpus > 255 {
      table.append([0x0a, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0])
    }
    return ACPITables.table("APIC", revision: 5, table.bytes)
  }

  private static func interruptOverride(_ table: inout TableBytes, irq: UInt8, gsi: UInt32, flags: UInt16) {
    table.append([2, 10, 0, irq])
    table.append(gsi)
    table.append(flags)
  }
}
