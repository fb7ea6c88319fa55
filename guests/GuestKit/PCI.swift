import CGuest

/// PCI configuration space, through ports or, where the MCFG table has one, through ECAM.
enum PCI {
  struct Function {
    var bus: UInt8
    var device: UInt8
    var function: UInt8

    var configAddress: UInt32 { UInt32(bus) << 16 | UInt32(device) << 11 | UInt32(function) << 8 }
  }

  /// Through 0xcf8 and 0xcfc.
  static func read32(_ function: Function, _ offset: UInt8) -> UInt32 {
    outl(0xcf8, 0x8000_0000 | function.configAddress | UInt32(offset & 0xfc))
    return inl(0xcfc)
  }

  static func write32(_ function: Function, _ offset: UInt8, _ value: UInt32) {
    outl(0xcf8, 0x8000_0000 | function.configAddress | UInt32(offset & 0xfc))
    outl(0xcfc, value)
  }

  /// ECAM's base of bus 0.
  static var ecam: UInt64? { ACPI.find("MCFG").map { load64($0.address + 44) } }

  static func readECAM32(_ base: UInt64, _ function: Function, _ offset: UInt16) -> UInt32 {
    load32(base + UInt64(function.configAddress) << 4 + UInt64(offset & 0xffc))
  }

  /// Calls `body` with each function of bus 0 and its vendor and device ids.
  static func forEachFunction(_ body: (Function, UInt32) -> Void) {
    for device in 0..<UInt8(32) {
      let first = Function(bus: 0, device: device, function: 0)
      let id = read32(first, 0)
      if id & 0xffff == 0xffff { continue }
      body(first, id)
      if read32(first, 12) >> 16 & 0x80 == 0 { continue }
      for number in 1..<UInt8(8) {
        let function = Function(bus: 0, device: device, function: number)
        let id = read32(function, 0)
        if id & 0xffff != 0xffff { body(function, id) }
      }
    }
  }

  /// Calls `body` with the id and the offset of each capability.
  static func forEachCapability(_ function: Function, _ body: (UInt8, UInt8) -> Void) {
    if read32(function, 4) >> 16 & 0x10 == 0 { return }
    var offset = UInt8(truncatingIfNeeded: read32(function, 0x34)) & 0xfc
    var seen = 0
    while offset != 0 && seen < 48 {
      let head = read32(function, offset)
      body(UInt8(truncatingIfNeeded: head), offset)
      offset = UInt8(truncatingIfNeeded: head >> 8) & 0xfc
      seen += 1
    }
  }

  /// Where the next BAR goes that the firmware has left without an address below 4 GiB.
  nonisolated(unsafe) private static var nextBAR: UInt64 = 0xc000_0000

  /// The address of a memory BAR, which gets one where it has none that the page tables reach.
  static func memoryBAR(_ function: Function, _ index: UInt8) -> UInt64 {
    let offset = 0x10 + index * 4
    let low = read32(function, offset)
    let isWide = low >> 1 & 3 == 2
    let high = isWide ? read32(function, offset + 4) : 0
    if high == 0 && low & ~15 != 0 { return UInt64(low & ~15) }
    // Nothing may decode while addresses are all ones.
    let command = read32(function, 4) & 0xffff
    write32(function, 4, command & ~3)
    write32(function, offset, .max)
    let size = UInt64(~(read32(function, offset) & ~15)) + 1
    let address = (nextBAR + size - 1) & ~(size - 1)
    nextBAR = address + size
    write32(function, offset, UInt32(truncatingIfNeeded: address))
    if isWide { write32(function, offset + 4, 0) }
    write32(function, 4, command)
    return address
  }

  /// Memory and bus mastering on, the interrupt pin off.
  static func enable(_ function: Function) {
    write32(function, 4, read32(function, 4) & 0xffff | 0x406)
  }
}
