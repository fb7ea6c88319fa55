import CGuest

/// The page tables that entry.S has loaded: 4 GiB identity mapped, with whatever is changed here.
enum Paging {
  struct Flags: OptionSet {
    let rawValue: UInt64
    static let writable = Flags(rawValue: 1 << 1)
    static let user = Flags(rawValue: 1 << 2)
    static let uncached = Flags(rawValue: 3 << 3)
    static let noExecute = Flags(rawValue: 1 << 63)
  }

  static let present: UInt64 = 1
  static let accessed: UInt64 = 1 << 5
  static let dirty: UInt64 = 1 << 6
  private static let large: UInt64 = 1 << 7
  static let addressMask: UInt64 = 0x000f_ffff_ffff_f000

  /// Maps one page of 4 KiB, splitting the larger page that it may be part of.
  static func map(_ virtual: UInt64, to physical: UInt64, _ flags: Flags) {
    setEntry(virtual, physical & addressMask | flags.rawValue | present)
  }

  /// Maps 2 MiB by one entry.
  static func mapLarge(_ virtual: UInt64, to physical: UInt64, _ flags: Flags) {
    store64(entryAddress(virtual, shift: 21), physical & addressMask | flags.rawValue | large | present)
    invlpg(virtual)
  }

  static func unmap(_ virtual: UInt64) { setEntry(virtual, 0) }

  /// Writes the page-table entry of a 4 KiB page as it is.
  static func setEntry(_ virtual: UInt64, _ value: UInt64) {
    store64(entryAddress(virtual), value)
    invlpg(virtual)
  }

  /// Where the page-table entry of a page is, of 4 KiB or of 1 << `lowest` bytes; tables are made as needed.
  static func entryAddress(_ virtual: UInt64, shift lowest: UInt64 = 12) -> UInt64 {
    var table = page_tables_address()
    var shift: UInt64 = 39
    while shift > lowest {
      let slot = table + (virtual >> shift & 511) * 8
      let entry = load64(slot)
      if entry & present == 0 {
        table = newTable(at: slot)
      } else if entry & large != 0 {
        table = newTable(at: slot, splitting: entry, shift: shift)
      } else {
        table = entry & addressMask
      }
      shift -= 9
    }
    return table + (virtual >> lowest & 511) * 8
  }

  private static func newTable(at slot: UInt64) -> UInt64 {
    let table = guest_allocate(4096, 4096)
    fill64(table, 0, 512)
    store64(slot, table | Flags([.writable, .user]).rawValue | present)
    return table
  }

  private static func newTable(at slot: UInt64, splitting entry: UInt64, shift: UInt64) -> UInt64 {
    let table = guest_allocate(4096, 4096)
    let step: UInt64 = 1 << (shift - 9)
    var value = shift == 21 ? entry & ~large : entry
    var offset: UInt64 = 0
    while offset < 4096 {
      store64(table + offset, value)
      value &+= step
      offset += 8
    }
    store64(slot, table | Flags([.writable, .user]).rawValue | present)
    write_cr3(read_cr3())
    return table
  }
}
