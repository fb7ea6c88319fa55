import Foundation
import GuestMemory
import Testing

@testable import Boot

@Suite struct BootROMTests {
  /// A ROM file whose bytes are their offset's fourth.
  static func rom(_ path: String, count: Int) throws -> BootROM {
    let bytes = (0..<count).map { UInt8(truncatingIfNeeded: $0 >> 12) }
    try Data(bytes).write(to: URL(fileURLWithPath: path))
    return try BootROM(path: path)
  }

  @Test func aROMEndsAt4GiBAndAgainAt1MiB() throws {
    try BootImageTests.withScratch { directory in
      let small = try Self.rom(directory + "/small", count: 4096)
      #expect(small.range.start.rawValue == 0xffff_f000)
      #expect(small.alias.start.rawValue == 0xff000)
      let large = try Self.rom(directory + "/large", count: 256 << 10)
      #expect(large.range.start.rawValue == 0xfffc_0000)
      #expect(large.range.end.rawValue == 1 << 32)
      #expect(large.alias.start.rawValue == 0xe0000)
      #expect(large.hostBase.load(fromByteOffset: 0x3f000, as: UInt8.self) == 0x3f)
      let machine = try TestMachine()
      try large.copyAlias(into: machine.memory)
      #expect(try machine.read(0xe0000, as: UInt8.self) == 32)
      #expect(try machine.read(0xfffff, as: UInt8.self) == 63)
      #expect(try machine.read(0xdffff, as: UInt8.self) == 0)
    }
  }

  @Test(arguments: [1, 4095, 4097, (16 << 20) + 4096]) func otherSizesAreErrors(count: Int) throws {
    try BootImageTests.withScratch { directory in
      let path = directory + "/rom"
      #expect(throws: BootError.firmwareSize(path: path, size: UInt64(count))) { try Self.rom(path, count: count) }
    }
  }

  @Test func theBuiltInROMHasAROMsSize() throws {
    guard let rom = try BootROM.builtIn() else {
      print("skipped: this build has no boot ROM")
      return
    }
    #expect(rom.range.end.rawValue == 1 << 32)
  }
}
