/// Pages of RAM, a bit each.
struct PageSet: Sendable {
  private(set) var words: [UInt64]

  init(pages: Int) { words = [UInt64](repeating: 0, count: (pages + 63) / 64) }
  init(_ words: [UInt64]) { self.words = words }

  var count: Int { words.reduce(0) { $0 + $1.nonzeroBitCount } }
  var isEmpty: Bool { words.allSatisfy { $0 == 0 } }

  subscript(page: Int) -> Bool { words[page >> 6] >> UInt64(page & 63) & 1 != 0 }

  mutating func insert(_ pages: Range<Int>) {
    for page in pages { words[page >> 6] |= 1 << UInt64(page & 63) }
  }

  mutating func remove(_ pages: Range<Int>) {
    for page in pages { words[page >> 6] &= ~(1 << UInt64(page & 63)) }
  }

  mutating func formUnion(_ other: [UInt64]) {
    for index in words.indices where index < other.count { words[index] |= other[index] }
  }
}
