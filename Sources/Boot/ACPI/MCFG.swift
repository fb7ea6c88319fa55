import GuestMemory

/// Where PCI Express configuration space is (PCI Firmware Specification 3.3, 4.1.2).
enum MCFG {
  static func table() -> [UInt8] {
    var table = TableBytes(zeros: 8)
    table.append(Platform.ecam.start.rawValue)
    table.append(UInt16(0))  // segment group
    table.append([0, UInt8(Platform.ecam.size >> 20 - 1)])  // first and last bus, a MiB each
    table.append(UInt32(0))
    return ACPITables.table("MCFG", revision: 1, table.bytes)
  }
}
