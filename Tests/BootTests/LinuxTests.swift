import Accelerator
import GuestMemory
import Testing

@testable import Boot

@Suite struct LinuxTests {
  @Test func a64BitKernelStartsInLongMode() throws {
    let machine = try TestMachine()
    let disk = (0..<5000).map { UInt8(truncatingIfNeeded: $0) }
    let diskImage = try BootImage(path: "disk", bytes: disk)
    let image = Images.linux()
    let entry = try machine.boot(image) {
      $0.commandLine = "console=ttyS0"
      $0.initialRAMDisk = diskImage
      $0.acpiRSDP = GuestPhysicalAddress(0xe0000)
    }
    #expect(entry.kind == .linux)
    #expect(entry.general.rip == 0x100_0200)
    #expect(entry.system.cs == .code64(selector: 0x10))
    #expect(entry.system.ds == .data(selector: 0x18))
    #expect(entry.system.efer == 0x500)
    #expect(!entry.partsOverlap)
    #expect(entry.range(.kernel)?.size == 0x20_0000)
    #expect(try machine.bytes(0x100_0000, 4096) == Array(image[1024...]))
    let page = entry.general.rsi
    #expect(page & 0xfff == 0)
    #expect(try machine.bytes(page + 0x1f1, 0x1f) == Array(image[0x1f1..<0x210]))
    #expect(try machine.read(page + 0x70, as: UInt64.self) == 0xe0000)
    #expect(try machine.read(page + 0x1e8, as: UInt8.self) == UInt8(machine.map.entries.count))
    #expect(try machine.bytes(page + 0x2d0, machine.map.e820.count) == machine.map.e820)
    #expect(try machine.read(page + 0x210, as: UInt8.self) == 0xff)
    #expect(try machine.read(page + 0x214, as: UInt32.self) == 0x100_0000)
    #expect(try machine.string(UInt64(machine.read(page + 0x228, as: UInt32.self))) == "console=ttyS0")
    let address = UInt64(try machine.read(page + 0x218, as: UInt32.self))
    #expect(address & 0xfff == 0)
    #expect(try machine.read(page + 0x21c, as: UInt32.self) == 5000)
    #expect(try machine.bytes(address, 5000) == disk)
    // Linux's decompressor clears the last pages below the BIOS area.
    #expect(entry.placements.allSatisfy { $0.range.end.rawValue <= 0x8_0000 || $0.range.start.rawValue >= 0x10_0000 })
    // Nothing of the file past the header.
    #expect(try machine.bytes(page + 0x268, 0x290 - 0x268).allSatisfy { $0 == 0 })
  }

  @Test func a32BitKernelStartsFlat() throws {
    let machine = try TestMachine()
    let entry = try machine.boot(Images.linux { $0.store(UInt16(0), at: 0x236) })
    #expect(entry.general.rip == 0x100_0000)
    #expect(entry.system.cs == .code32(selector: 0x10))
    #expect(entry.system.cr0 == 0x11)
    #expect(entry.general.rsi == entry.range(.bootParameters)?.start.rawValue)
    #expect(entry.general.rbx == 0 && entry.general.rbp == 0 && entry.general.rdi == 0)
  }

  @Test func anOldProtocolHasNoPreferredAddress() throws {
    let machine = try TestMachine()
    let entry = try machine.boot(
      Images.linux {
        $0.store(UInt16(0x206), at: 0x206)
        $0.store(UInt8(0x3a), at: 0x201)
        $0.store(UInt8(0), at: 0x1f1)
        $0.store(UInt32(0), at: 0x1f4)
      })
    #expect(entry.general.rip == 0x10_0000)
    // No setup sectors stand for four.
    #expect(try machine.read(0x10_0000, as: UInt8.self) == UInt8(512 * 3 & 0xff) ^ 0x5a)
  }

  @Test func aKernelThatCanMoveGoesWhereThereIsRoom() throws {
    let small = try TestMachine(size: 8 << 20)
    let entry = try small.boot(Images.linux())
    #expect(entry.range(.kernel)?.start.rawValue == 0x20_0000)
    #expect(entry.general.rip == 0x20_0200)
    #expect(try small.read(entry.general.rsi + 0x214, as: UInt32.self) == 0x20_0000)
    let fixed = Images.linux { $0.store(UInt8(0), at: 0x234) }
    #expect(
      try small.error(fixed)
        == .outsideMemory(path: "guest", part: .kernel, address: 0x100_0000, size: 0x20_0000))
    let huge = Images.linux { $0.store(UInt32.max, at: 0x260) }
    #expect(try small.error(huge) == .noRoom(path: "guest", part: .kernel, size: 0xffff_ffff))
  }

  @Test func theInitialRAMDiskStaysBelowItsLimit() throws {
    let machine = try TestMachine()
    let disk = try BootImage(path: "disk", bytes: [UInt8](repeating: 9, count: 5000))
    let entry = try machine.boot(Images.linux { $0.store(UInt32(0x1ff_ffff), at: 0x22c) }) { $0.initialRAMDisk = disk }
    #expect(entry.range(.initialRAMDisk)?.start.rawValue == 0x1ff_e000)
    for limit in [0, 0xfffff, 0x10_0fff] as [UInt32] {
      let image = Images.linux { $0.store(limit, at: 0x22c) }
      #expect(
        try machine.error(image) { $0.initialRAMDisk = disk }
          == .noRoom(path: "guest", part: .initialRAMDisk, size: 5000))
    }
  }

  @Test func theCommandLineHasTheKernelsLimit() throws {
    let machine = try TestMachine()
    let longest = String(repeating: "x", count: 2047)
    #expect(try machine.error(Images.linux()) { $0.commandLine = longest } == nil)
    #expect(
      try machine.error(Images.linux()) { $0.commandLine = longest + "x" }
        == .commandLineLength(path: "guest", count: 2048, limit: 2047))
    #expect(
      try machine.error(Images.linux { $0.store(UInt32(0), at: 0x238) }) { $0.commandLine = longest }
        == .commandLineLength(path: "guest", count: 2047, limit: 255))
  }

  @Test func malformedHeadersAreErrors() throws {
    let machine = try TestMachine()
    func defect(_ change: (inout TableBytes) -> Void) throws -> ImageDefect? {
      guard case .malformed("guest", let defect)? = try machine.error(Images.linux(change)) else { return nil }
      return defect
    }
    #expect(try defect { $0.store(UInt16(0x205), at: 0x206) } == .linuxProtocol(0x205))
    #expect(try defect { $0.store(UInt8(0), at: 0x211) } == .linuxLoadedLow)
    #expect(try defect { $0.store(UInt8(0x20), at: 0x201) } == .linuxHeaderLength(0x31))
    #expect(try defect { $0.store(UInt32(0x30_0000), at: 0x230) } == .linuxAlignment(0x30_0000))
    #expect(try defect { $0.store(UInt32(0), at: 0x230) } == .linuxAlignment(0))
    #expect(try defect { $0.store(UInt8(200), at: 0x1f1) } == .linuxNoKernel)
    #expect(
      try machine.error(
        Images.linux {
          $0.store(UInt64.max - 5, at: 0x258); $0.store(UInt8(0), at: 0x234)
        })
        == .outsideMemory(path: "guest", part: .kernel, address: .max - 5, size: 0x20_0000))
    #expect(
      try machine.error(Array(Images.linux().dropLast(100)))
        == .truncated(path: "guest", part: .kernel, offset: 1024, count: 4096, size: 5020))
    for size in [0x206, 0x230, 0x250, 1024] {
      guard case .malformed? = try machine.error(Array(Images.linux().prefix(size))) else {
        Issue.record(
          "a bzImage cut at \(size): \(String(describing: try machine.error(Array(Images.linux().prefix(size)))))")
        continue
      }
    }
  }
}
