/// The fixed ACPI description table (ACPI 6.5, 5.2.9) and the FACS that it names.
///
/// Ports are those of PlatformDevices' ACPIPowerManagement and ResetControl. There is no SMI command port: the machine is
/// in ACPI mode from the start.
enum FADT {
  private static let eventBlock: UInt64 = 0x600
  private static let controlBlock: UInt64 = 0x604
  private static let timer: UInt64 = 0x608
  private static let generalEventBlock: UInt64 = 0x620
  private static let interrupt: UInt16 = 9
  private static let resetPort: UInt64 = 0xcf9
  /// A hard reset: bits 1 and 2.
  private static let resetValue: UInt8 = 0x06

  /// WBINVD works; C1 on all processors; no sleep button; the timer has 32 bits; the reset register works.
  private static let flags: UInt32 = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 8 | 1 << 10

  static func table(_ configuration: ACPIConfiguration, dsdt: UInt64) -> [UInt8] {
    var table = TableBytes()
    table.append(UInt32(ACPITables.facsAddress))
    table.append(UInt32(dsdt))
    table.append([0, 0] as [UInt8])  // reserved; no preferred power profile
    table.append(interrupt)
    table.append([UInt8](repeating: 0, count: 8))  // no SMI
    table.append(UInt32(eventBlock))
    table.append(UInt32(0))
    table.append(UInt32(controlBlock))
    table.append(UInt32(0))
    table.append(UInt32(0))
    table.append(UInt32(timer))
    table.append(UInt32(generalEventBlock))
    table.append(UInt32(0))
    table.append([4, 2, 0, 4, 4, 0, 0, 0] as [UInt8])  // lengths; no GPE1, no C-state control
    table.append(UInt16(0xfff))  // no C2
    table.append(UInt16(0xfff))  // no C3
    table.append(UInt32(0))  // flush size and stride
    table.append([0, 0, 0, 0, 0x32] as [UInt8])  // duty; no alarm day or month; century in CMOS register 0x32
    // Legacy devices; a keyboard controller where there is one; no VGA; ASPM is not for the guest.
    table.append(1 << 0 | (configuration.hasKeyboardController ? 1 << 1 : 0) | 1 << 2 | 1 << 4 as UInt16)
    table.append(UInt8(0))
    table.append(flags)
    table.appendPortAddress(resetPort, bits: 8, access: 1)
    table.append(resetValue)
    table.append([0, 0] as [UInt8])  // ARM
    table.append(UInt8(3))  // minor version: 6.3
    table.append(UInt64(0))  // the FACS is named above, where every guest looks
    table.append(dsdt)
    table.appendPortAddress(eventBlock, bits: 32, access: 2)
    table.append([UInt8](repeating: 0, count: 12))
    table.appendPortAddress(controlBlock, bits: 16, access: 2)
    table.append([UInt8](repeating: 0, count: 24))
    table.appendPortAddress(timer, bits: 32, access: 3)
    table.appendPortAddress(generalEventBlock, bits: 32, access: 1)
    table.append([UInt8](repeating: 0, count: 12))
    table.append([UInt8](repeating: 0, count: 24))  // no sleep control registers
    table.append("SWIFTVMM".utf8)  // hypervisor vendor identity
    return ACPITables.table("FACP", revision: 6, table.bytes)
  }

  /// The firmware ACPI control structure (5.2.10), version 2: the guest leaves its waking vector in it.
  static func facs() -> [UInt8] {
    var table = TableBytes(zeros: 64)
    table.store(Array("FACS".utf8), at: 0)
    table.store(UInt32(64), at: 4)
    table.store(UInt8(2), at: 32)
    return table.bytes
  }
}
