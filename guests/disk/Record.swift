import CGuest

/// What a record is on a disk: sectors that each say whose they are, so that a piece of another record, another write or
/// another disk shows.
///
/// A sector of 512 bytes is little-endian words of 64 bits: the mark "DISKREC1"; the record's number; its generation
/// (bits 0 to 31), the sector's place in the record (32 to 47) and the disk's number (48 to 63); a checksum of these; then
/// the checksum 60 times. Filled and compared by string instructions, because ring 0 may be emulated.
enum Record {
  private static let mark: UInt64 = 0x3143_4552_4b53_4944
  private static let payload: UInt64 = 60

  /// What a sector holds.
  enum Content {
    case nothing
    case generation(UInt32)
    case wrong
  }

  private static func checksum(_ number: UInt64, _ place: UInt64) -> UInt64 {
    let mixed = number &* 0x9e37_79b9_7f4a_7c15 ^ place &* 0xbf58_476d_1ce4_e5b9
    return mixed ^ mixed >> 29 ^ mark
  }

  private static func place(_ generation: UInt32, _ sector: UInt64, _ disk: Int) -> UInt64 {
    UInt64(generation) | sector << 32 | UInt64(disk) << 48
  }

  static func fill(_ buffer: UInt64, number: UInt64, generation: UInt32, disk: Int, sectors: UInt64) {
    for sector in 0..<sectors {
      let address = buffer + sector * 512
      let place = place(generation, sector, disk)
      let sum = checksum(number, place)
      store64(address, mark)
      store64(address + 8, number)
      store64(address + 16, place)
      fill64(address + 24, sum, payload + 1)
    }
  }

  static func content(_ buffer: UInt64, number: UInt64, sector: UInt64, disk: Int) -> Content {
    let address = buffer + sector * 512
    if load64(address) == 0 { return all_words64(address, 0, 64) != 0 ? .nothing : .wrong }
    let generation = UInt32(truncatingIfNeeded: load64(address + 16))
    let place = place(generation, sector, disk)
    guard load64(address) == mark, load64(address + 8) == number, load64(address + 16) == place,
      all_words64(address + 24, checksum(number, place), payload + 1) != 0
    else { return .wrong }
    return .generation(generation)
  }
}
