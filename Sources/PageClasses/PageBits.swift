import GuestMemory

/// One bit a page of RAM, by the flat numbers of `DirtyBitmap`: a region's pages follow those of the region below.
struct PageBits {
  private(set) var words: [UInt64]

  init(pages: Int) { words = [UInt64](repeating: 0, count: (pages + 63) / 64) }

  subscript(page: Int) -> Bool { words[page >> 6] >> UInt64(page & 63) & 1 != 0 }

  /// Puts pages in, a word at a time; tells how many words that took.
  @discardableResult
  mutating func insert(_ pages: Range<Int>) -> Int {
    change(pages) { word, mask in word |= mask }
  }

  /// Takes pages out; see `insert`.
  @discardableResult
  mutating func remove(_ pages: Range<Int>) -> Int {
    change(pages) { word, mask in word &= ~mask }
  }

  private mutating func change(_ pages: Range<Int>, _ body: (inout UInt64, UInt64) -> Void) -> Int {
    var page = pages.lowerBound
    var count = 0
    while page < pages.upperBound {
      let bit = page & 63
      let length = min(64 - bit, pages.upperBound - page)
      let mask = (UInt64.max >> UInt64(64 - length)) << UInt64(bit)
      body(&words[page >> 6], mask)
      page += length
      count += 1
    }
    return count
  }

  mutating func subtract(_ other: PageBits) {
    for index in words.indices { words[index] &= ~other.words[index] }
  }

  mutating func formUnion(_ other: PageBits) {
    for index in words.indices { words[index] |= other.words[index] }
  }

  mutating func formIntersection(_ other: PageBits) {
    for index in words.indices { words[index] &= other.words[index] }
  }
}

/// Where guest-physical pages are in the flat numbering.
struct PageNumbers {
  private struct Region {
    var first: UInt64
    var count: UInt64
    var flat: Int
  }

  private let regions: [Region]
  let total: Int

  init(_ memory: GuestMemory) {
    regions = memory.regions.map {
      Region(first: $0.range.start.rawValue >> 12, count: $0.range.size >> 12, flat: Int($0.fileOffset >> 12))
    }
    total = Int(memory.size >> 12)
  }

  /// Calls `body` with the flat numbers of those of `count` pages from `first` on that are RAM, whatever the numbers are.
  func forEachRun(first: UInt64, count: UInt64, _ body: (Range<Int>) -> Void) {
    let (sum, overflow) = first.addingReportingOverflow(count)
    let end = overflow ? UInt64.max : sum
    for region in regions {
      let start = max(first, region.first)
      let stop = min(end, region.first + region.count)
      guard start < stop else { continue }
      let flat = region.flat + Int(start - region.first)
      body(flat..<flat + Int(stop - start))
    }
  }
}
