import CGuest

/// ACPI's tables (ACPI 6.5, 5.2). Checksums are the conformance suite's business, not a guest's.
enum ACPI {
  struct Table {
    var address: UInt64
    var length: UInt64 { UInt64(load32(address + 4)) }
  }

  static func findRSDP() -> UInt64? {
    if let rsdp = StartInfo.rsdp { return rsdp }
    var address: UInt64 = 0xe0000
    while address < 0x100000 {
      if load64(address) == rsdpSignature { return address }
      address += 16
    }
    return nil
  }

  private static let rsdpSignature: UInt64 = 0x2052_5450_2044_5352  // "RSD PTR "

  /// The first table with this signature in the XSDT, or in the RSDT where there is no XSDT.
  static func find(_ signature: StaticString) -> Table? {
    guard let rsdp = findRSDP() else { return nil }
    let extended = load8(rsdp + 15) >= 2 && load64(rsdp + 24) != 0
    let root = Table(address: extended ? load64(rsdp + 24) : UInt64(load32(rsdp + 16)))
    let width: UInt64 = extended ? 8 : 4
    var offset: UInt64 = 36
    while offset + width <= root.length {
      let address = extended ? load64(root.address + offset) : UInt64(load32(root.address + offset))
      if Bytes(address: address, count: 4).equals(signature) { return Table(address: address) }
      offset += width
    }
    return nil
  }

  /// Calls `body` with each enabled processor's APIC id (MADT, 5.2.12).
  static func forEachProcessor(_ body: (UInt32) -> Void) {
    forEachInMADT { type, entry in
      switch type {
      case 0 where load32(entry + 4) & 1 != 0: body(UInt32(load8(entry + 3)))
      case 9 where load32(entry + 8) & 1 != 0: body(load32(entry + 4))
      default: break
      }
    }
  }

  static var processorCount: Int {
    var count = 0
    forEachProcessor { _ in count += 1 }
    return count
  }

  static func forEachInMADT(_ body: (UInt8, UInt64) -> Void) {
    guard let madt = find("APIC") else { return }
    var offset: UInt64 = 44
    while offset + 2 <= madt.length {
      let size = load8(madt.address + offset + 1)
      if size < 2 { return }
      body(load8(madt.address + offset), madt.address + offset)
      offset += UInt64(size)
    }
  }

  /// FADT: the DSDT's address; X_DSDT where it has one.
  static func dsdt(of fadt: Table) -> Table? {
    let wide = fadt.length >= 148 ? load64(fadt.address + 140) : 0
    let address = wide != 0 ? wide : UInt64(load32(fadt.address + 40))
    return address == 0 ? nil : Table(address: address)
  }

  /// SLP_TYPa of \_S5 in the DSDT: the first element of the package named `_S5_` (20.2.5.4). AML is not interpreted:
  /// the name is searched for, which holds for every DSDT whose S5 is a constant package.
  static func powerOffType(in dsdt: Table) -> UInt8? {
    var offset: UInt64 = 36
    while true {
      offset = scan_byte(dsdt.address, offset, dsdt.length, UInt8(ascii: "_"))
      if offset + 8 >= dsdt.length { return nil }
      let name = dsdt.address + offset
      if load32(name) == 0x5f35_535f && load8(name + 4) == 0x12 {
        let packageLengthBytes = UInt64(load8(name + 5) >> 6) + 1
        let element = name + 5 + packageLengthBytes + 1
        return load8(element) == 0x0a ? load8(element + 1) : load8(element)
      }
      offset += 1
    }
  }
}
