import GuestMemory
import PageClasses
import Testing

/// A guest's tables, made by hand.
struct Tables {
  let memory: GuestMemory

  static let present: UInt64 = 1
  static let writable: UInt64 = 2
  static let large: UInt64 = 1 << 7

  /// RAM from 0 on, and from 4 GiB on.
  init(pages: UInt64, high: UInt64 = 0) throws {
    var ranges = [try #require(GuestRange(start: GuestPhysicalAddress(0), size: pages << 12))]
    if high > 0 { ranges.append(try #require(GuestRange(start: GuestPhysicalAddress(1 << 32), size: high << 12))) }
    memory = try GuestMemory(ranges)
  }

  func set(_ table: UInt64, _ index: UInt64, _ entry: UInt64) throws {
    try memory.write(entry, to: GuestPhysicalAddress(table + index * 8))
  }

  func set32(_ table: UInt64, _ index: UInt64, _ entry: UInt32) throws {
    try memory.write(entry, to: GuestPhysicalAddress(table + index * 4))
  }

  static let long = PagingRegisters(cr0: 0x8001_0001, cr3: 0, cr4: 0x20, efer: 0x500)

  func readOnly(_ registers: PagingRegisters...) -> [Int] { readOnly(registers) }

  func readOnly(_ registers: [PagingRegisters]) -> [Int] {
    let map = PageClassMap(memory: memory, processors: registers)
    return (0..<map.count).filter { map[$0] == .readOnly }
  }
}

@Suite struct PageTableTests {
  private let present = Tables.present
  private let writable = Tables.writable
  private let large = Tables.large

  @Test func aPageIsReadOnlyWhereNothingMapsItForWriting() throws {
    let tables = try Tables(pages: 64)
    for (table, next): (UInt64, UInt64) in [(0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000)] {
      try tables.set(table, 0, next | present | writable)
    }
    try tables.set(0x3000, 0, 0x10000 | present)
    try tables.set(0x3000, 1, 0x11000 | present | writable)
    try tables.set(0x3000, 2, 0x12000 | present)
    try tables.set(0x3000, 3, 0x12000 | present | writable)
    try tables.set(0x3000, 4, 0x13000 | writable)
    // Outside of RAM.
    try tables.set(0x3000, 5, 0x40000 | present)
    // No execution changes nothing.
    try tables.set(0x3000, 6, 0x14000 | present | 1 << 63)
    #expect(tables.readOnly(Tables.long) == [0x10, 0x14])
  }

  @Test func rightsOfUpperLevelsCount() throws {
    let tables = try Tables(pages: 64)
    try tables.set(0, 0, 0x1000 | present | writable)
    try tables.set(0x1000, 0, 0x2000 | present | writable)
    try tables.set(0x2000, 0, 0x3000 | present)
    try tables.set(0x3000, 0, 0x10000 | present | writable)
    #expect(tables.readOnly(Tables.long) == [0x10])
    // The same table is reached for writing too.
    try tables.set(0x2000, 1, 0x3000 | present | writable)
    #expect(tables.readOnly(Tables.long) == [])
  }

  @Test func largePagesOfEverySizeAndBothRegions() throws {
    let tables = try Tables(pages: 1024, high: 1024)
    try tables.set(0, 0, 0x1000 | present | writable)
    // A GiB at 4 GiB, all that is there of it, but what another entry maps for writing.
    try tables.set(0x1000, 0, 1 << 32 | present | large)
    try tables.set(0x1000, 1, 0x2000 | present | writable)
    try tables.set(0x2000, 0, 1 << 32 | 0x20_0000 | present | writable | large)
    try tables.set(0x2000, 1, 0x20_0000 | present | large)
    #expect(tables.readOnly(Tables.long) == Array(512..<1024) + Array(1024..<1536))
  }

  @Test func fiveLevels() throws {
    let tables = try Tables(pages: 64)
    for (table, next): (UInt64, UInt64) in [(0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
      try tables.set(table, 511, next | present | writable)
    }
    try tables.set(0x4000, 511, 0x10000 | present)
    var registers = Tables.long
    registers.cr4 |= 1 << 12
    #expect(tables.readOnly(registers) == [0x10])
    #expect(tables.readOnly(Tables.long) == [])
  }

  @Test func physicalAddressExtension() throws {
    let tables = try Tables(pages: 1024)
    // The topmost table need not be at a page's beginning, and has no rights.
    try tables.set(0x1020, 3, 0x2000 | present)
    try tables.set(0x2000, 0, 0x20_0000 | present | large)
    try tables.set(0x2000, 1, 0x3000 | present | writable)
    try tables.set(0x3000, 0, 0x20_0000 | present | writable)
    let registers = PagingRegisters(cr0: 0x8000_0001, cr3: 0x1020, cr4: 0x20, efer: 0)
    #expect(tables.readOnly(registers) == Array(513..<1024))
  }

  @Test func thirtyTwoBits() throws {
    let tables = try Tables(pages: 2048, high: 1024)
    try tables.set32(0x1000, 0, 0x2000 | 3)
    try tables.set32(0x2000, 5, 0x10000 | 1)
    try tables.set32(0x2000, 1023, 0x11000 | 3)
    // 4 MiB, at 4 MiB and (PSE-36) at 4 GiB.
    try tables.set32(0x1000, 1, 0x40_0000 | 0x81)
    try tables.set32(0x1000, 2, 1 << 13 | 0x81)
    var registers = PagingRegisters(cr0: 0x8000_0001, cr3: 0x1000, cr4: 0x10, efer: 0)
    #expect(tables.readOnly(registers) == [0x10] + Array(1024..<3072))
    // Without CR4.PSE these are tables, of nothing.
    registers.cr4 = 0
    #expect(tables.readOnly(registers) == [0x10])
  }

  @Test func processorsThatDoNotTranslateSayNothingAndAllOthersCount() throws {
    let tables = try Tables(pages: 64)
    for (table, next): (UInt64, UInt64) in [(0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000)] {
      try tables.set(table, 0, next | present | writable)
    }
    try tables.set(0x3000, 0, 0x10000 | present)
    try tables.set(0x3000, 1, 0x11000 | present)
    try tables.set(0x4000, 0, 0x5000 | present | writable)
    try tables.set(0x5000, 0, 0x6000 | present | writable)
    try tables.set(0x6000, 0, 0x7000 | present | writable)
    try tables.set(0x7000, 0, 0x11000 | present | writable)
    let asleep = PagingRegisters(cr0: 0x6000_0010, cr3: 0, cr4: 0, efer: 0)
    var second = Tables.long
    second.cr3 = 0x4000
    #expect(tables.readOnly(Tables.long, asleep) == [0x10, 0x11])
    #expect(tables.readOnly(Tables.long, second) == [0x10])
    #expect(tables.readOnly(asleep) == [])
  }

  @Test func tablesThatNameThemselvesAndOneAnotherEnd() throws {
    let tables = try Tables(pages: 256)
    // Every entry of every page names some page: a walk without memory would take 512 to the fourth.
    for page: UInt64 in 0..<256 {
      for index: UInt64 in 0..<512 {
        try tables.set(page << 12, index, (page + index) % 256 << 12 | present | index & 2)
      }
    }
    #expect(tables.readOnly(Tables.long) == [])
    for index: UInt64 in 0..<512 { try tables.set(0, index, present) }
    #expect(tables.readOnly(Tables.long) == [0])
  }

  @Test func tablesThatAreTooManySayNothing() throws {
    // Each entry is a GiB, in 65,536 entries.
    let tables = try Tables(pages: 1 << 18)
    for table: UInt64 in 0..<128 {
      try tables.set(0, table, (table + 1) << 12 | present)
      for index: UInt64 in 0..<512 { try tables.set((table + 1) << 12, index, present | large) }
    }
    let map = PageClassMap(memory: tables.memory, processors: [Tables.long])
    #expect(!map.tablesAreComplete)
    #expect(map.counts[.readOnly] == 0)
  }

  /// Random tables against a walk as simple as can be.
  @Test func randomTablesAgreeWithAModel() throws {
    var random = SplitMix(state: 0x7ab1e5)
    for round in 0..<300 {
      let tables = try Tables(pages: 32)
      let memory = tables.memory
      for table: UInt64 in 0..<12 {
        for _ in 0..<random.next() % 6 {
          let place = random.next() % 8 == 0 ? random.next() : random.next() % 40 << 12
          let bits = random.next() & (present | writable | 1 << 63)
          let size = random.next() % 8 == 0 ? large : 0
          try tables.set(table << 12, random.next() % 512, place & ~0xfff | bits | size)
        }
      }
      var registers = [Tables.long, Tables.long]
      registers[1].cr3 = random.next() % 34 << 12 | random.next() & 0xfff
      if round % 2 == 0 { registers[0].cr4 |= 1 << 12 }
      var model = Model(memory)
      for register in registers {
        model.walk(register.cr3 & 0xf_ffff_ffff_f000, register.cr4 & 1 << 12 != 0 ? 5 : 4, true)
      }
      let expected = model.mapped.subtracting(model.writable).sorted()
      #expect(tables.readOnly(registers) == expected, "round \(round)")
    }
  }
}

/// A walk without bounds but the levels.
private struct Model {
  private let memory: GuestMemory
  var mapped: Set<Int> = []
  var writable: Set<Int> = []

  init(_ memory: GuestMemory) { self.memory = memory }

  mutating func walk(_ table: UInt64, _ level: Int, _ isWritable: Bool) {
    for index: UInt64 in 0..<512 {
      guard let entry = try? memory.read(GuestPhysicalAddress(table + index * 8), as: UInt64.self), entry & 1 != 0
      else { continue }
      let isWritable = isWritable && entry & 2 != 0
      let address = entry & 0xf_ffff_ffff_f000
      let isLeaf = level == 1 || (level <= 3 && entry & 0x80 != 0)
      guard isLeaf else {
        walk(address, level - 1, isWritable)
        continue
      }
      let size: UInt64 = 1 << UInt64(9 * (level - 1))
      let first = address >> 12 / size * size
      for page: UInt64 in 0..<32 where page >= first && page < first + size {
        mapped.insert(Int(page))
        if isWritable { writable.insert(Int(page)) }
      }
    }
  }
}

/// Splitmix64.
struct SplitMix {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
    return z ^ z >> 31
  }
}
