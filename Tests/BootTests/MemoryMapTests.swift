import GuestMemory
import Testing

@testable import Boot

@Suite struct MemoryMapTests {
  @Test func smallMachineHasOneRegionAndAHoleForTheBIOS() throws {
    let map = try MemoryMap(size: 64 << 20)
    #expect(map.ram == [GuestRange(start: GuestPhysicalAddress(0), size: 64 << 20)])
    #expect(map.highRAM == nil)
    #expect(map.usable.map(\.start.rawValue) == [0, 0x10_0000])
    #expect(map.usable.map(\.end.rawValue) == [0x9fc00, 64 << 20])
    #expect(map.end.rawValue == 1 << 32)
  }

  @Test func ramAbove3GiBGoesOnAt4GiB() throws {
    let map = try MemoryMap(size: 5 << 30)
    #expect(map.ram.map(\.start.rawValue) == [0, 1 << 32])
    #expect(map.ram.map(\.size) == [3 << 30, 2 << 30])
    #expect(map.end.rawValue == 6 << 30)
  }

  @Test(arguments: [1 << 20, 64 << 20, 3 << 30, (3 << 30) + 4096, 1 << 40] as [UInt64])
  func entriesRiseAndDoNotOverlap(size: UInt64) throws {
    let map = try MemoryMap(size: size)
    for (a, b) in zip(map.entries, map.entries.dropFirst()) { #expect(a.range.end <= b.range.start) }
    let usable = map.usable.reduce(0) { $0 + $1.size }
    #expect(usable == size - (0x10_0000 - 0x9fc00))
    #expect(map.e820.count == map.entries.count * 20)
    #expect(map.entries.count <= 128)
  }

  @Test(arguments: [0, 0xff000, (1 << 20) + 1, 1 << 47, UInt64.max] as [UInt64])
  func impossibleSizesAreErrors(size: UInt64) {
    #expect(throws: BootError.memorySize(size)) { try MemoryMap(size: size) }
  }

  @Test func aBootDiskIsReservedAtTheEndOfLowRAM() throws {
    let map = try MemoryMap(size: 4 << 30, bootDisk: 1_474_560)
    #expect(map.bootDisk?.end.rawValue == 3 << 30)
    #expect(map.bootDisk?.size == 1_474_560)
    #expect(map.usable.map(\.end.rawValue) == [0x9fc00, (3 << 30) - 1_474_560, 5 << 30])
    #expect(try MemoryMap(size: 2 << 20, bootDisk: 1).bootDisk?.size == 4096)
    #expect(try MemoryMap(size: 2 << 20, bootDisk: 1 << 20).usable.count == 1)
    for size in [(1 << 20) + 1, .max] as [UInt64] {
      #expect(try MemoryMap(size: 2 << 20, bootDisk: size).bootDisk == nil)
    }
  }

  @Test func e820HoldsBaseSizeAndType() throws {
    let bytes = try MemoryMap(size: 64 << 20).e820
    #expect(bytes.number(at: 0, as: UInt64.self) == 0)
    #expect(bytes.number(at: 8, as: UInt64.self) == 0x9fc00)
    #expect(bytes.number(at: 16, as: UInt32.self) == 1)
    #expect(bytes.number(at: 36, as: UInt32.self) == 2)
  }
}
