import CCompression
import Glibc
import Host

/// Makes records of pages for one link. The guest may change the pages while it reads: each word is read once, and what is
/// sent is what it remembers.
final class PageEncoder {
  struct Counts: Sendable {
    var pages = 0
    var zeros = 0
    var whole = 0
    var changed = 0
    var bytes: UInt64 = 0

    static func += (left: inout Counts, right: Counts) {
      left.pages += right.pages
      left.zeros += right.zeros
      left.whole += right.whole
      left.changed += right.changed
      left.bytes += right.bytes
    }

    static func - (left: Counts, right: Counts) -> Counts {
      Counts(
        pages: left.pages - right.pages, zeros: left.zeros - right.zeros, whole: left.whole - right.whole,
        changed: left.changed - right.changed, bytes: left.bytes - right.bytes)
    }
  }

  private let link: MigrationLink
  private let compression: Int32
  private let buffer: UnsafeMutableRawPointer
  private let compressed: UnsafeMutableRawPointer
  private let context: OpaquePointer?
  private var used = PageEncoder.start
  /// Pages that are not zeros on the other side.
  private var isThere: [UInt64]
  private let copies: PageCopies
  private(set) var counts = Counts()
  private var batches: UInt64 = 0
  /// Pages of zeros that follow one another and stand in no entry yet.
  private var zeroRun = 0..<0

  /// Before the entries: the record's header and the batch's.
  private static let start = 8 + PageBatch.headerSize
  private static let capacity = start + PageBatch.limit

  init(_ link: MigrationLink, pages: Int, copies: Int, compression: Int) throws(MigrationError) {
    self.link = link
    self.compression = Int32(compression)
    do { self.copies = try PageCopies(pages: pages, bytes: copies) } catch { throw .host(error) }
    buffer = .allocate(byteCount: Self.capacity, alignment: 64)
    compressed = .allocate(byteCount: Self.capacity, alignment: 64)
    context = compression > 0 ? ZSTD_createCCtx() : nil
    isThere = [UInt64](repeating: 0, count: (pages + 63) / 64)
  }

  deinit {
    buffer.deallocate()
    compressed.deallocate()
    if let context { ZSTD_freeCCtx(context) }
  }

  /// Begins pages of another iteration or class.
  func begin(iteration: Int, class value: UInt8) throws(MigrationError) {
    try flush()
    (buffer + 8).storeBytes(of: UInt32(iteration).littleEndian, as: UInt32.self)
    (buffer + 12).storeBytes(of: UInt32(value).littleEndian, as: UInt32.self)
  }

  /// Pages that nobody has touched.
  func addZeros(_ pages: Range<Int>) throws(MigrationError) {
    counts.pages += pages.count
    counts.zeros += pages.count
    if zeroRun.upperBound == pages.lowerBound, !zeroRun.isEmpty {
      zeroRun = zeroRun.lowerBound..<pages.upperBound
    } else {
      try endZeroRun()
      zeroRun = pages
    }
  }

  /// A page as it is now; `isAgain` where it was written after it was sent, or is likely to be.
  func add(_ page: Int, _ host: UnsafeRawPointer, isAgain: Bool) throws(MigrationError) {
    let (word, bit) = (page >> 6, UInt64(1) << UInt64(page & 63))
    let wasThere = isThere[word] & bit != 0
    let base = wasThere ? copies[page] : copies.zeros
    if let base, let changed = putChanges(page, host, base, isCopy: wasThere) {
      if changed == 0, !wasThere { return try addZeros(page..<(page + 1)) }
      counts.pages += 1
      counts.changed += 1
      // It was written with what it held.
      if changed == 0 { return }
      isThere[word] |= bit
      return try flushIfFull()
    }
    try endZeroRun()
    counts.pages += 1
    counts.whole += 1
    isThere[word] |= bit
    put(page, .whole)
    memcpy(buffer + used, host, PageBatch.pageSize)
    if isAgain || copies[page] != nil { copies.keep(page, buffer + used) }
    used += PageBatch.pageSize
    try flushIfFull()
  }

  /// Puts an entry of the words in which a page differs, and tells how many; nil, and nothing put, where they are too many.
  private func putChanges(
    _ page: Int, _ host: UnsafeRawPointer, _ base: UnsafeMutableRawPointer, isCopy: Bool
  ) -> Int? {
    // Room for the run of zeros that may stand before.
    let start = used + 12
    var place = start + 10
    var count = 0
    for block in 0..<64 {
      let new = (host + block * 64).loadUnaligned(as: SIMD8<UInt64>.self)
      let old = (base + block * 64).loadUnaligned(as: SIMD8<UInt64>.self)
      let difference = new ^ old
      let half = difference.lowHalf | difference.highHalf
      let quarter = half.lowHalf | half.highHalf
      if quarter.x | quarter.y == 0 { continue }
      guard count <= PageBatch.mostWords - 8 else { return nil }
      for lane in 0..<8 where new[lane] != old[lane] {
        (buffer + place).storeBytes(of: UInt16(block * 8 + lane).littleEndian, as: UInt16.self)
        (buffer + place + 2).storeBytes(of: new[lane].littleEndian, as: UInt64.self)
        place += 10
        count += 1
      }
      if isCopy { (base + block * 64).storeBytes(of: new, as: SIMD8<UInt64>.self) }
    }
    if count == 0 { return 0 }
    if !zeroRun.isEmpty {
      putZeroRun()
    } else {
      // What was made 12 bytes further on moves down.
      memmove(buffer + used + 10, buffer + start + 10, place - start - 10)
    }
    put(page, .words)
    (buffer + used).storeBytes(of: UInt16(count).littleEndian, as: UInt16.self)
    used += 2 + count * 10
    return count
  }

  private func put(_ page: Int, _ entry: PageBatch.Entry) {
    let head = UInt64(page) << 8 | UInt64(entry.rawValue)
    (buffer + used).storeBytes(of: head.littleEndian, as: UInt64.self)
    used += 8
  }

  private func putZeroRun() {
    put(zeroRun.lowerBound, .zeros)
    (buffer + used).storeBytes(of: UInt32(zeroRun.count).littleEndian, as: UInt32.self)
    used += 4
    zeroRun = 0..<0
  }

  private func endZeroRun() throws(MigrationError) {
    guard !zeroRun.isEmpty else { return }
    putZeroRun()
    try flushIfFull()
  }

  private func flushIfFull() throws(MigrationError) {
    if used >= PageBatch.size { try send() }
  }

  /// Sends what has been put.
  func flush() throws(MigrationError) {
    if !zeroRun.isEmpty { putZeroRun() }
    if used > Self.start { try send() }
  }

  private func send() throws(MigrationError) {
    var (start, count, kind) = (buffer, used - 8, MigrationRecord.Kind.pages)
    if let context {
      let size = ZSTD_compressCCtx(context, compressed + 12, Self.capacity - 12, buffer + 8, count, compression)
      if ZSTD_isError(size) == 0, size + 4 < count {
        (compressed + 8).storeBytes(of: UInt32(count).littleEndian, as: UInt32.self)
        (start, count, kind) = (compressed, size + 4, .compressedPages)
      }
    }
    start.storeBytes(of: kind.rawValue.littleEndian, as: UInt32.self)
    (start + 4).storeBytes(of: UInt32(count).littleEndian, as: UInt32.self)
    try link.send(start, count + 8)
    counts.bytes += UInt64(count + 8)
    batches += 1
    used = Self.start
  }

  /// Says that no pages follow.
  func end() throws(MigrationError) {
    try flush()
    try link.send(.endOfPages, withUnsafeBytes(of: batches.littleEndian) { Array($0) })
  }
}

/// What was sent of pages that are written again and again, as long as there is room.
final class PageCopies {
  private let mapping: MemoryMapping
  private var places: [Int32]
  private var next: Int32 = 0
  private let limit: Int32
  /// A page of zeros; never written.
  let zeros: UnsafeMutableRawPointer

  init(pages: Int, bytes: Int) throws(HostError) {
    limit = Int32(clamping: bytes / PageBatch.pageSize)
    places = [Int32](repeating: -1, count: pages)
    // Pages that are never touched take no memory.
    mapping = try MemoryMapping(anonymous: (Int(limit) + 1) * PageBatch.pageSize)
    zeros = mapping.base + Int(limit) * PageBatch.pageSize
  }

  /// The copy of a page that is up to date.
  subscript(page: Int) -> UnsafeMutableRawPointer? {
    let place = places[page]
    return place < 0 ? nil : mapping.base + Int(place) * PageBatch.pageSize
  }

  func keep(_ page: Int, _ bytes: UnsafeRawPointer) {
    if places[page] < 0 {
      guard next < limit else { return }
      places[page] = next
      next += 1
    }
    memcpy(mapping.base + Int(places[page]) * PageBatch.pageSize, bytes, PageBatch.pageSize)
  }
}
