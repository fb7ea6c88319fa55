import GuestMemory

/// Linux's boot_params, the zero page (Linux, Documentation/arch/x86/zero-page.rst and boot.rst).
struct BootParameters {
  /// Offset of the setup header, in the zero page and in a bzImage alike.
  static let headerOffset = 0x1f1
  /// The end of the room for the setup header.
  static let headerEnd = 0x290

  private var table = TableBytes(zeros: 4096)

  var bytes: [UInt8] { table.bytes }

  /// Memory map and RSDP, and the fields of a setup header that a kernel without one of its own looks at.
  init(_ request: BootRequest) {
    let map = request.memoryMap
    table.store(request.acpiRSDP?.rawValue ?? 0, at: 0x70)
    table.store(UInt8(map.entries.count), at: 0x1e8)
    table.store(map.e820, at: 0x2d0)
    table.store(UInt16(0xaa55), at: 0x1fe)
    table.store(UInt32(0x5372_6448), at: 0x202)  // "HdrS"
    table.store(UInt8(0xff), at: 0x210)  // type_of_loader: none that is registered
  }

  /// Puts a bzImage's own setup header, from 0x1f1 on, in place.
  mutating func setHeader(_ header: [UInt8]) {
    table.store(Array(header.prefix(Self.headerEnd - Self.headerOffset)), at: Self.headerOffset)
    table.store(UInt8(0xff), at: 0x210)
  }

  mutating func setCodeStart(_ address: UInt64) {
    table.store(UInt32(truncatingIfNeeded: address), at: 0x214)
  }

  mutating func setCommandLine(_ address: UInt64) {
    table.store(UInt32(truncatingIfNeeded: address), at: 0x228)
    table.store(UInt32(truncatingIfNeeded: address >> 32), at: 0xc8)
  }

  mutating func setInitialRAMDisk(_ range: GuestRange) {
    table.store(UInt32(truncatingIfNeeded: range.start.rawValue), at: 0x218)
    table.store(UInt32(truncatingIfNeeded: range.size), at: 0x21c)
    table.store(UInt32(truncatingIfNeeded: range.start.rawValue >> 32), at: 0xc0)
    table.store(UInt32(truncatingIfNeeded: range.size >> 32), at: 0xc4)
  }
}
