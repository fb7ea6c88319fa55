import CDirty
import CGuest

/// The guest's memory, apart from itself.
struct Areas {
  static let names: InlineArray<4, StaticString> = ["set", "fill", "readonly", "free"]

  private var areas = InlineArray<4, dirty_area>(repeating: dirty_area(first: 0, address: 0, pages: 0, generations: 0))
  private let pool: UInt64

  /// Lays the areas out behind this guest; ends the guest where RAM below 3 GiB has no room.
  init() {
    let sizes: InlineArray<4, UInt64> = [
      StartInfo.number("set", default: 16), StartInfo.number("fill", default: 0),
      StartInfo.number("readonly", default: 0), StartInfo.number("free", default: 0),
    ]
    var total: UInt64 = 0
    for area in 0..<4 { total += min(sizes[area], 4096) }
    expect("megabytes of all areas", total, in: 1...3072)
    pool = guest_allocate(UInt64(DIRTY_POOL_WORDS) * 8, 4096)
    Self.share(pool, UInt64(DIRTY_POOL_WORDS) * 8)
    var generations = guest_allocate(total * 1024, 4096)
    Self.share(generations, total * 1024)
    // Behind this guest, and what it still allocates.
    let start = (max(guest_allocate(0, 4096) + 0x20_0000, 0x80_0000) + 0x1f_ffff) & ~0x1f_ffff
    var next = start
    for area in 0..<4 {
      let pages = sizes[area] * 256
      areas[area] = dirty_area(
        first: UInt64(area + 1) << 32, address: next, pages: pages, generations: generations)
      generations += pages * 4
      next += (sizes[area] + 1) / 2 * 0x20_0000
    }
    if !Self.isRAM(start, next) {
      say("FAIL \(total) MiB at \(hex: start) are not all RAM below 3 GiB: give the machine more memory")
      Power.fail()
    }
    map(start, next, [.user, .writable])
  }

  func pages(_ area: Int) -> UInt64 { areas[area].pages }

  /// The number of an area's first page, and how many it has.
  func place(_ area: Int) -> (first: UInt64, pages: UInt64) { (areas[area].address / 4096, areas[area].pages) }

  func describe(to worker: UnsafeMutablePointer<dirty_worker>) {
    worker.pointee.area = (areas[0], areas[1], areas[2], areas[3])
    worker.pointee.pool = pool
  }

  static func area(_ number: Int, of worker: UnsafeMutablePointer<dirty_worker>) -> dirty_area {
    switch number {
    case 0: worker.pointee.area.0
    case 1: worker.pointee.area.1
    case 2: worker.pointee.area.2
    default: worker.pointee.area.3
    }
  }

  /// Has the page tables forbid writes to what is read only from now on.
  func protect() {
    let area = areas[Int(DIRTY_READ_ONLY)]
    map(area.address, area.address + area.pages * 4096, [.user])
  }

  private func map(_ start: UInt64, _ end: UInt64, _ flags: Paging.Flags) {
    var address = start
    while address < end {
      Paging.mapLarge(address, to: address, flags)
      address += 0x20_0000
    }
  }

  private static func share(_ start: UInt64, _ size: UInt64) {
    var page = start
    while page < start + size {
      User.share(page)
      page += 4096
    }
  }

  private static func isRAM(_ start: UInt64, _ end: UInt64) -> Bool {
    for index in 0..<StartInfo.regionCount {
      let region = StartInfo.region(index)
      if region.type == 1 && region.base <= start && end <= region.end { return true }
    }
    return false
  }
}
