import CCompression
import Glibc
import GuestMemory

/// Takes records of pages from one link into RAM. Nothing in them is believed.
final class PageDecoder {
  private let link: MigrationLink
  private let memory: GuestMemory
  private let pages: UInt64
  private let buffer: UnsafeMutableRawPointer
  private let packed: UnsafeMutableRawPointer
  /// Where pages go that something may wait for; nil: into RAM.
  private let arriving: ArrivingPages?
  private let page: UnsafeMutableRawPointer
  private(set) var batches: UInt64 = 0

  init(_ link: MigrationLink, _ memory: GuestMemory, _ arriving: ArrivingPages? = nil) {
    self.link = link
    self.arriving = arriving
    self.memory = memory
    pages = memory.size >> 12
    buffer = .allocate(byteCount: PageBatch.limit, alignment: 64)
    packed = .allocate(byteCount: PageBatch.limit, alignment: 64)
    page = .allocate(byteCount: PageBatch.pageSize, alignment: PageBatch.pageSize)
  }

  deinit {
    buffer.deallocate()
    packed.deallocate()
    page.deallocate()
  }

  /// Takes the payload of a record of pages.
  func take(_ kind: MigrationRecord.Kind, count: Int) throws(MigrationError) {
    batches += 1
    guard kind == .compressedPages else {
      try link.receive(buffer, count)
      return try apply(count)
    }
    try link.receive(packed, count)
    guard count > 4 else { throw .malformed(.pages) }
    let size = Int(UInt32(littleEndian: packed.loadUnaligned(as: UInt32.self)))
    guard size <= PageBatch.limit else { throw .malformed(.pages) }
    let got = ZSTD_decompress(buffer, size, packed + 4, count - 4)
    guard ZSTD_isError(got) == 0, got == size else { throw .malformed(.pages) }
    try apply(size)
  }

  private func apply(_ count: Int) throws(MigrationError) {
    guard count >= PageBatch.headerSize else { throw .malformed(.pages) }
    var place = PageBatch.headerSize
    while place < count {
      guard count - place >= 8 else { throw .malformed(.pages) }
      let head = UInt64(littleEndian: (buffer + place).loadUnaligned(as: UInt64.self))
      place += 8
      let page = head >> 8
      guard page < pages, let entry = PageBatch.Entry(rawValue: UInt8(truncatingIfNeeded: head)) else {
        throw .malformed(.pages)
      }
      switch entry {
      case .zeros:
        guard count - place >= 4 else { throw .malformed(.pages) }
        let run = UInt64(UInt32(littleEndian: (buffer + place).loadUnaligned(as: UInt32.self)))
        place += 4
        guard run <= pages - page else { throw .malformed(.pages) }
        if let arriving { try arriving.putZeros(Int(page)..<Int(page + run)) } else { clear(page, run) }
      case .whole:
        guard count - place >= PageBatch.pageSize else { throw .malformed(.pages) }
        if let arriving {
          try arriving.put(buffer + place, Int(page))
        } else {
          memcpy(host(page), buffer + place, PageBatch.pageSize)
        }
        place += PageBatch.pageSize
      case .words:
        guard let arriving else {
          try change(host(page), &place, count)
          continue
        }
        memset(self.page, 0, PageBatch.pageSize)
        try change(self.page, &place, count)
        try arriving.put(self.page, Int(page))
      }
    }
  }

  private func change(
    _ host: UnsafeMutableRawPointer, _ place: inout Int, _ end: Int
  ) throws(MigrationError) {
    guard end - place >= 2 else { throw .malformed(.pages) }
    let words = Int(UInt16(littleEndian: (buffer + place).loadUnaligned(as: UInt16.self)))
    place += 2
    guard words <= PageBatch.wordsInPage, end - place >= words * 10 else { throw .malformed(.pages) }
    for _ in 0..<words {
      let index = Int(UInt16(littleEndian: (buffer + place).loadUnaligned(as: UInt16.self)))
      guard index < PageBatch.wordsInPage else { throw .malformed(.pages) }
      (host + index * 8).storeBytes(of: (buffer + place + 2).loadUnaligned(as: UInt64.self), as: UInt64.self)
      place += 10
    }
  }

  /// Pages that nobody has touched are zeros already, and stay without memory of the host's.
  private func clear(_ first: UInt64, _ count: UInt64) {
    var isResident = [UInt8](repeating: 0, count: 1024)
    var page = first
    while page < first + count {
      let run = Int(min(first + count - page, UInt64(isResident.count)))
      let isKnown = mincore(host(page), run * PageBatch.pageSize, &isResident) == 0
      for index in 0..<run where !isKnown || isResident[index] & 1 != 0 {
        memset(host(page + UInt64(index)), 0, PageBatch.pageSize)
      }
      page += UInt64(run)
    }
  }

  /// RAM is one mapping, whatever holes the guest sees.
  private func host(_ page: UInt64) -> UnsafeMutableRawPointer { memory.regions[0].hostBase + Int(page << 12) }
}
