import Glibc
import GuestMemory
import Host
import Synchronization
import Testing

private func range(_ start: UInt64, _ size: UInt64) -> GuestRange {
  GuestRange(start: GuestPhysicalAddress(start), size: size)!
}

@Suite struct GuestRanges {
  @Test func neverWrap() {
    #expect(GuestRange(start: GuestPhysicalAddress(.max), size: 1) == nil)
    #expect(GuestRange(start: GuestPhysicalAddress(.max - 1), size: 1) != nil)
    #expect(GuestRange(start: GuestPhysicalAddress(0x1000), size: .max - 0xfff) == nil)
  }

  @Test func containAndOverlap() {
    let middle = range(0x1000, 0x1000)
    #expect(!middle.contains(GuestPhysicalAddress(0xfff)))
    #expect(middle.contains(GuestPhysicalAddress(0x1000)))
    #expect(middle.contains(GuestPhysicalAddress(0x1fff)))
    #expect(!middle.contains(GuestPhysicalAddress(0x2000)))
    #expect(!range(0x1000, 0).contains(GuestPhysicalAddress(0x1000)))
    #expect(!middle.overlaps(range(0, 0x1000)))
    #expect(!middle.overlaps(range(0x2000, 0x1000)))
    #expect(middle.overlaps(range(0x1fff, 1)))
    #expect(middle.overlaps(range(0, 0x1001)))
  }

  @Test func printAsInIomem() {
    #expect("\(range(0x1000, 0x1000))" == "0x1000-0x1fff")
    #expect("\(range(0x1000, 0))" == "empty at 0x1000")
    #expect(GuestPhysicalAddress(0x1234).page == GuestPhysicalAddress(0x1000))
    #expect(GuestPhysicalAddress(.max) + 2 == GuestPhysicalAddress(1))
  }
}

/// RAM of 16 KiB at 0, 16 KiB that adjoins it, and 16 KiB above 4 GiB, in three regions with a hole.
@Suite struct GuestMemories {
  private static let high: UInt64 = 1 << 32
  private let memory: GuestMemory

  init() throws {
    memory = try GuestMemory([range(Self.high, 0x4000), range(0x4000, 0x4000), range(0, 0x4000)])
  }

  @Test func areMadeOfTheirRegions() {
    #expect(memory.regions.map(\.range) == [range(0, 0x4000), range(0x4000, 0x4000), range(Self.high, 0x4000)])
    #expect(memory.regions.map(\.fileOffset) == [0, 0x4000, 0x8000])
    #expect(memory.size == 0xc000)
    #expect(memory.dirty.pages == 12)
  }

  @Test func refuseWrongRegions() {
    for wrong in [range(0x800, 0x1000), range(0, 0x800), range(0x1000, 0)] {
      #expect(throws: GuestMemoryError.unaligned(wrong)) { _ = try GuestMemory([wrong]) }
    }
    #expect(throws: GuestMemoryError.overlap(range(0, 0x2000), range(0x1000, 0x2000))) {
      _ = try GuestMemory([range(0x1000, 0x2000), range(0, 0x2000)])
    }
    #expect(throws: GuestMemoryError.self) { _ = try GuestMemory([]) }
    let host = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) << 12
    #expect(throws: GuestMemoryError.exceedsHost(requested: host + 0x1000, host: host)) {
      _ = try GuestMemory([range(0, host + 0x1000)])
    }
    #expect(throws: GuestMemoryError.self) {
      _ = try GuestMemory([range(0, 1 << 63), range(1 << 63, 1 << 63 - 0x1000)])
    }
  }

  @Test func checkBoundsAtEveryEdge() throws {
    let end = Self.high + 0x4000
    for (address, count) in [
      (0, 1), (0, 0x4000), (0x3fff, 1), (0x4000, 0x4000), (Self.high, 0x4000), (end - 1, 1), (end - 8, 8),
    ] as [(UInt64, Int)] {
      let pointer = try #require(memory.hostPointer(GuestPhysicalAddress(address), count: count))
      #expect(memory.regions.contains { pointer >= $0.hostBase && pointer + count <= $0.hostBase + Int($0.range.size) })
    }
    for (address, count) in [
      (0, 0x4001), (0x3fff, 2), (0x7fff, 2), (0x8000, 1), (Self.high - 1, 1), (Self.high - 1, 2), (end, 1),
      (end - 7, 8),
      (.max, 1), (.max, 2), (.max - 6, 8), (0, .max), (0, -1), (0x1000, .min), (Self.high, .max),
    ] as [(UInt64, Int)] {
      #expect(memory.hostPointer(GuestPhysicalAddress(address), count: count) == nil)
    }
    #expect(memory.hostPointer(GuestPhysicalAddress(0x4000), count: 0) == memory.regions[1].hostBase)
  }

  @Test func readAndWriteIntegers() throws {
    let address = GuestPhysicalAddress(0x123)
    try memory.write(UInt64(0x8877_6655_4433_2211), to: address)
    #expect(try memory.read(address, as: UInt8.self) == 0x11)
    #expect(try memory.read(address, as: UInt16.self) == 0x2211)
    #expect(try memory.read(address, as: UInt32.self) == 0x4433_2211)
    #expect(try memory.read(address, as: UInt64.self) == 0x8877_6655_4433_2211)
    #expect(try memory.read(address + 7, as: Int8.self) == -0x78)
    try memory.write(Int16(-2), to: address)
    #expect(try memory.read(address, as: UInt32.self) == 0x4433_fffe)
    // An integer does not cross regions, also where they adjoin.
    let edge = GuestPhysicalAddress(0x3ffe)
    #expect(throws: GuestMemoryError.outside(edge, count: 4)) { try memory.read(edge, as: UInt32.self) }
    #expect(throws: GuestMemoryError.outside(edge, count: 8)) { try memory.write(UInt64(0), to: edge) }
  }

  @Test func readAndWriteWideIntegers() throws {
    let address = GuestPhysicalAddress(0x201)
    let value: UInt128 = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff
    try memory.write(value, to: address)
    #expect(try memory.read(address, as: UInt64.self) == 0x8899_aabb_ccdd_eeff)
    #expect(try memory.read(address + 8, as: UInt64.self) == 0x0011_2233_4455_6677)
    #expect(try memory.read(address, as: UInt128.self) == value)
    #expect(try memory.read(address + 1, as: Int128.self) == Int128(value >> 8))
    let edge = GuestPhysicalAddress(0x3ff8)
    #expect(throws: GuestMemoryError.outside(edge, count: 16)) { try memory.read(edge, as: UInt128.self) }
  }

  @Test func copyAcrossAdjoiningRegions() throws {
    let pattern = (0..<0x1000).map { UInt8(truncatingIfNeeded: $0 &* 7) }
    let address = GuestPhysicalAddress(0x3800)
    try memory.write(pattern, to: address)
    #expect(try memory.bytes(address, count: pattern.count) == pattern)
    #expect(try memory.read(GuestPhysicalAddress(0x4000), as: UInt8.self) == pattern[0x800])
    try memory.fill(address, count: pattern.count, with: 9)
    #expect(try memory.bytes(address, count: pattern.count).allSatisfy { $0 == 9 })
    #expect(try memory.read(GuestPhysicalAddress(0x4800), as: UInt8.self) == 0)
    #expect(try memory.bytes(GuestPhysicalAddress(0), count: 0x8000).count == 0x8000)
  }

  @Test func writeNothingWhereNotAllFits() throws {
    let address = GuestPhysicalAddress(0x7ff0)
    #expect(throws: GuestMemoryError.outside(address, count: 32)) {
      try memory.write([UInt8](repeating: 1, count: 32), to: address)
    }
    #expect(throws: GuestMemoryError.outside(address, count: 32)) { try memory.fill(address, count: 32, with: 1) }
    #expect(try memory.bytes(address, count: 16) == [UInt8](repeating: 0, count: 16))
  }

  @Test func refuseHostileSizes() {
    for (address, count) in [
      (0, .max), (0, 0x8001), (0x8000, 1), (Self.high, .max), (.max, 1), (.max - 1, 4), (0, -1), (Self.high, .min),
    ] as [(UInt64, Int)] {
      let start = GuestPhysicalAddress(address)
      #expect(throws: GuestMemoryError.outside(start, count: count)) { try memory.bytes(start, count: count) }
      #expect(throws: GuestMemoryError.outside(start, count: count)) { try memory.fill(start, count: count, with: 1) }
    }
    #expect(throws: Never.self) { try memory.write([], to: GuestPhysicalAddress(.max)) }
  }

  @Test func markWhatTheVMMWrites() throws {
    try memory.write(UInt8(1), to: GuestPhysicalAddress(0x1000))
    #expect(memory.dirty.take() == [0])
    memory.dirty.setTracking(true)
    try memory.write(UInt8(1), to: GuestPhysicalAddress(0x1fff))
    try memory.write([1, 2], to: GuestPhysicalAddress(0x3fff))
    try memory.fill(GuestPhysicalAddress(Self.high + 0x1800), count: 0x1000, with: 1)
    _ = try memory.bytes(GuestPhysicalAddress(0), count: 0x8000)
    #expect(memory.dirty.take() == [0b0110_0001_1010])
    #expect(memory.dirty.take() == [0])
    memory.dirty.setTracking(false)
    try memory.write(UInt8(1), to: GuestPhysicalAddress(0))
    #expect(memory.dirty.take() == [0])
  }
}

@Suite struct DirtyBitmaps {
  @Test func haveABitAPage() throws {
    let bitmap = try DirtyBitmap(pages: 130)
    bitmap.mark(firstPage: 63, lastPage: 64)
    bitmap.mark(firstPage: 129, lastPage: 129)
    #expect(bitmap.take() == [1 << 63, 1, 2])
    #expect(try DirtyBitmap(pages: 0).take().isEmpty)
    bitmap.mark(firstPage: 5, lastPage: 5)
    bitmap.setTracking(true)
    #expect(bitmap.isTracking)
    #expect(bitmap.take() == [0, 0, 0])
  }

  /// Every mark is found exactly in one of the takes, however they fall together.
  @Test func loseNoMark() throws {
    let bitmap = try DirtyBitmap(pages: 4096)
    let finished = Atomic(0)
    let threads = try (0..<4).map { thread in
      try HostThread(name: "marker") {
        for page in 0..<1024 { bitmap.mark(firstPage: page * 4 + thread, lastPage: page * 4 + thread) }
        finished.add(1, ordering: .sequentiallyConsistent)
      }
    }
    var found = 0
    var isLast = false
    repeat {
      isLast = finished.load(ordering: .sequentiallyConsistent) == 4
      for word in bitmap.take() { found += word.nonzeroBitCount }
    } while !isLast
    for thread in threads { thread.join() }
    #expect(found == 4096)
  }
}
