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
}
