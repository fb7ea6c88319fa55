import CGuest

/// What the loader says of the machine: PVH's hvm_start_info (Xen, arch-x86/hvm/start_info.h). Without one there is no command
/// line and no memory map, and ACPI's tables are searched for.
enum StartInfo {
  private static let magic: UInt32 = 0x336e_c578

  static var address: UInt64? {
    let address = start_info_address()
    return address != 0 && address < 1 << 32 && load32(address) == magic ? address : nil
  }

  static var rsdp: UInt64? {
    guard let address else { return nil }
    let rsdp = load64(address + 32)
    return rsdp == 0 ? nil : rsdp
  }

  static var commandLine: Bytes {
    guard let address, load64(address + 24) != 0 else { return Bytes(address: 0, count: 0) }
    let text = load64(address + 24)
    var length: UInt64 = 0
    while length < 4096 && load8(text + length) != 0 { length += 1 }
    return Bytes(address: text, count: length)
  }

  /// The value of `key=value` on the command line; a bare `key` has an empty value.
  static func option(_ key: StaticString) -> Bytes? {
    let line = commandLine
    let length = key.utf8CodeUnitCount
    var start: UInt64 = 0
    while start < line.count {
      var end = start
      while end < line.count && load8(line.address + end) != 32 { end += 1 }
      let word = Bytes(address: line.address + start, count: end - start)
      if word.starts(with: key) {
        if word.count == length { return Bytes(address: word.address + word.count, count: 0) }
        if load8(word.address + UInt64(length)) == 61 { return word.dropping(length + 1) }
      }
      start = end + 1
    }
    return nil
  }

  static func number(_ key: StaticString, default value: UInt64) -> UInt64 { option(key)?.number ?? value }

  /// True for `key` and `key=1`.
  static func flag(_ key: StaticString) -> Bool {
    guard let value = option(key) else { return false }
    return value.count == 0 || value.number != 0
  }

  /// Boot modules, in the order of the command line.
  static var moduleCount: Int {
    guard let address else { return 0 }
    return Int(load32(address + 12))
  }

  static func module(_ index: Int) -> Bytes {
    let entry = load64(start_info_address() + 16) + UInt64(index) * 32
    return Bytes(address: load64(entry), count: load64(entry + 8))
  }

  struct Region {
    var base: UInt64
    var size: UInt64
    /// E820's types: 1 RAM, 2 reserved, 3 ACPI reclaimable, 4 ACPI NVS.
    var type: UInt32
    var end: UInt64 { base &+ size }
  }

  static var regionCount: Int {
    guard let address, load32(address + 4) >= 1 else { return 0 }
    return Int(load32(address + 48))
  }

  static func region(_ index: Int) -> Region {
    let entry = load64(start_info_address() + 40) + UInt64(index) * 24
    return Region(base: load64(entry), size: load64(entry + 8), type: load32(entry + 16))
  }
}
