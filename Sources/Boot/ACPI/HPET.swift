/// The high precision event timer (IA-PC HPET Specification 1.0a, 3.2.4).
enum HPET {
  /// Vendor 8086h, legacy replacement capable, 64 bits, three comparators, revision 1: the low half of its first register.
  static let identification: UInt32 = 0x8086_a201

  static func table() -> [UInt8] {
    var table = TableBytes()
    table.append(identification)
    table.appendMemoryAddress(Platform.hpet, bits: 64)
    table.append(UInt8(0))  // the first of its kind
    table.append(UInt16(0x80))  // least ticks of a periodic timer
    table.append(UInt8(0))
    return ACPITables.table("HPET", revision: 1, table.bytes)
  }
}
