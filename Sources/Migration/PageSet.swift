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

  mutating func formIntersection(_ other: PageSet) {
    for index in words.indices { words[index] &= index < other.words.count ? other.words[index] : 0 }
  }

  /// Runs of pages that follow one another, as long as they are.
  func forEachRun<Failure: Error>(_ body: (Range<Int>) throws(Failure) -> Void) throws(Failure) {
    var run = 0..<0
    for (index, word) in words.enumerated() where word != 0 {
      var rest = word
      while rest != 0 {
        let first = rest.trailingZeroBitCount
        let count = (~(rest >> UInt64(first))).trailingZeroBitCount
        rest = first + count == 64 ? 0 : rest & (UInt64.max << UInt64(first + count))
        let start = index << 6 + first
        if start != run.upperBound {
          if !run.isEmpty { try body(run) }
          run = start..<start
        }
        run = run.lowerBound..<start + count
      }
    }
    if !run.isEmpty { try body(run) }
  }

  /// As it stands in a record.
  var bytes: [UInt8] {
    words.map(\.littleEndian).withUnsafeBytes { Array($0) }
  }

  /// What a record has said of so many pages; anything beyond them is left out.
  init(_ bytes: [UInt8], pages: Int) throws(MigrationError) {
    self.init(pages: pages)
    guard bytes.count == words.count * 8 else { throw .malformed(.pages) }
    for index in words.indices {
      words[index] = UInt64(littleEndian: bytes[index * 8..<index * 8 + 8])
    }
    if pages & 63 != 0 { words[words.count - 1] &= 1 << UInt64(pages & 63) - 1 }
  }
}
