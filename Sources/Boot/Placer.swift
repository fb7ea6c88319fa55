import GuestMemory

/// Hands out guest RAM to the parts of a boot: no part outside usable RAM, no two parts on the same bytes.
struct Placer {
  /// Which end of the free RAM a part goes to.
  enum Preference {
    case lowest
    case highest
  }

  private(set) var placements: [BootPlacement] = []

  private let path: String
  private let memory: GuestMemory
  private let usable: [GuestRange]
  private let memoryIsZero: Bool

  init(path: String, memory: GuestMemory, map: MemoryMap, memoryIsZero: Bool) {
    self.path = path
    self.memory = memory
    self.memoryIsZero = memoryIsZero
    // The boot disk is the only part that goes to the highest place of all, so it finds its own range.
    usable = (map.usable + (map.bootDisk.map { [$0] } ?? [])).sorted { $0.start < $1.start }
  }

  /// The first address after everything that has been placed, at least 1 MiB.
  var end: UInt64 { max(Platform.oneMiB, placements.map(\.range.end.rawValue).max() ?? 0) }

  /// Whether `size` bytes at `address` are usable RAM and free.
  func isFree(_ address: UInt64, size: UInt64) -> Bool {
    guard let range = GuestRange(start: GuestPhysicalAddress(address), size: size), isUsable(range) else {
      return false
    }
    return !placements.contains { $0.range.overlaps(range) }
  }

  /// Takes the addresses that a part insists on.
  @discardableResult
  mutating func claim(_ part: BootPart, at address: UInt64, size: UInt64) throws(BootError) -> GuestRange {
    guard size > 0, let range = GuestRange(start: GuestPhysicalAddress(address), size: size), isUsable(range) else {
      throw .outsideMemory(path: path, part: part, address: address, size: size)
    }
    if let other = placements.first(where: { $0.range.overlaps(range) }) {
      throw .overlap(path: path, part: part, range, other: other.part, other.range)
    }
    placements.append(BootPlacement(part: part, range: range))
    return range
  }

  /// Finds free addresses for a part that may go anywhere between two addresses.
  mutating func reserve(
    _ part: BootPart, size: UInt64, alignment: UInt64 = 16, from lowest: UInt64, below limit: UInt64,
    prefer: Preference
  ) throws(BootError) -> GuestRange {
    for range in prefer == .lowest ? usable : usable.reversed() {
      let low = max(range.start.rawValue, lowest)
      let high = min(range.end.rawValue, limit)
      guard low < high, size > 0, size <= high - low else { continue }
      let address =
        prefer == .lowest
        ? lowestFree(low, high, size, alignment) : highestFree(low, high, size, alignment)
      if let address { return try claim(part, at: address, size: size) }
    }
    throw .noRoom(path: path, part: part, size: size)
  }

  /// Places a table at the end of the first 512 KiB where there is room, else anywhere below 4 GiB.
  ///
  /// Kernels use the low end of memory early (start-up code of other processors), and what begins at 1 MiB; Linux's
  /// decompressor clears the last pages below the BIOS area while it still runs on the loader's page tables.
  mutating func place(
    _ part: BootPart, size: UInt64, alignment: UInt64 = 16
  ) throws(BootError) -> GuestRange {
    do {
      return try reserve(part, size: size, alignment: alignment, from: 0x1000, below: 0x8_0000, prefer: .highest)
    } catch {
      return try reserve(
        part, size: size, alignment: alignment, from: 0x8_0000, below: Platform.fourGiB, prefer: .highest)
    }
  }

  /// Places a table and writes it.
  mutating func place(_ part: BootPart, _ bytes: [UInt8], alignment: UInt64 = 16) throws(BootError) -> GuestRange {
    let range = try place(part, size: UInt64(bytes.count), alignment: alignment)
    try write(bytes, at: range.start)
    return range
  }

  /// Takes `range.size` bytes at `offset` of an image into guest memory.
  func copy(_ image: BootImage, _ part: BootPart, at offset: UInt64, to range: GuestRange) throws(BootError) {
    try image.copy(part, at: offset, into: memory, range: range)
  }

  /// Writes bytes, or little-endian words, into a part that was placed.
  func write<T: FixedWidthInteger>(_ values: [T], at address: GuestPhysicalAddress) throws(BootError) {
    do {
      try values.withUnsafeBytes { buffer in
        Result { () throws(GuestMemoryError) in try memory.write(buffer, to: address) }
      }.get()
    } catch { throw .memory(error) }
  }

  /// Zeroes RAM, which costs a page fault a page unless it is known to be zero.
  func clear(_ address: GuestPhysicalAddress, size: UInt64) throws(BootError) {
    if memoryIsZero { return }
    do { try memory.fill(address, count: Int(clamping: size), with: 0) } catch { throw .memory(error) }
  }

  private func isUsable(_ range: GuestRange) -> Bool {
    usable.contains { $0.start <= range.start && range.end <= $0.end }
  }

  private func lowestFree(_ low: UInt64, _ high: UInt64, _ size: UInt64, _ alignment: UInt64) -> UInt64? {
    var address = low
    while true {
      let (sum, overflow) = address.addingReportingOverflow(alignment - 1)
      address = sum & ~(alignment - 1)
      guard !overflow, address <= high, size <= high - address else { return nil }
      guard let blocker = blocker(address, size) else { return address }
      address = blocker.end.rawValue
    }
  }

  private func highestFree(_ low: UInt64, _ high: UInt64, _ size: UInt64, _ alignment: UInt64) -> UInt64? {
    var top = high
    while true {
      guard top >= low, size <= top - low else { return nil }
      let address = (top - size) & ~(alignment - 1)
      guard address >= low else { return nil }
      guard let blocker = blocker(address, size) else { return address }
      top = blocker.start.rawValue
    }
  }

  private func blocker(_ address: UInt64, _ size: UInt64) -> GuestRange? {
    placements.first { $0.range.start.rawValue < address + size && address < $0.range.end.rawValue }?.range
  }
}
