import Accelerator
import GuestMemory
import Testing

@testable import Boot

@Suite struct CatalogueTests {
  private func kind(_ bytes: [UInt8], loadAddress: UInt64? = nil) throws -> BootKind {
    try BootCatalogue.kind(of: BootImage(path: "guest", bytes: bytes), loadAddress: loadAddress)
  }

  @Test func kindsAreReadFromTheBytes() throws {
    #expect(try kind(Images.linux()) == .linux)
    #expect(try kind(Images.pvh()) == .pvh)
    #expect(try kind(Images.multiboot()) == .multiboot)
    #expect(try kind(Images.kludge()) == .multiboot)
    #expect(try kind(Images.elf()) == .elf64)
    #expect(try kind(Images.bootSector()) == .bootSector)
    #expect(try kind(Images.bootSector(count: 1 << 20)) == .bootSector)
    #expect(try kind([0xf4], loadAddress: 0x7c00) == .flat)
    #expect(try kind(Images.bootSector(), loadAddress: 0x7c00) == .flat)
    #expect(throws: BootError.unknownKind(path: "guest")) { try kind([0xf4]) }
    #expect(throws: BootError.unknownKind(path: "guest")) { try kind(Array(Images.bootSector().dropLast())) }
  }

  @Test func aDiskWithAMultibootLoaderOnItIsADisk() throws {
    var disk = Images.bootSector(count: 4096)
    disk.replaceSubrange(1024..<1044, with: Images.multibootHeader(flags: 0x1_0000, addresses: [0, 0]))
    #expect(try kind(disk) == .bootSector)
  }

  @Test func everyKindHasOneLoader() {
    #expect(
      BootCatalogue.loaders.map(\.kind).sorted { $0.rawValue < $1.rawValue }
        == BootKind.allCases.sorted { $0.rawValue < $1.rawValue })
  }

  @Test func inputsThatAGuestHasNoPlaceForAreRefused() throws {
    let machine = try TestMachine()
    let disk = try BootImage(path: "disk", bytes: [1])
    func unused(_ kind: BootKind, _ input: BootInput) -> BootError {
      .unusedInput(path: "guest", kind: kind, input: input)
    }
    #expect(try machine.error(Images.bootSector()) { $0.commandLine = "x" } == unused(.bootSector, .commandLine))
    #expect(try machine.error(Images.bootSector()) { $0.initialRAMDisk = disk } == unused(.bootSector, .initialRAMDisk))
    #expect(try machine.error(Images.elf()) { $0.loadAddress = 0x1000 } == unused(.elf64, .loadAddress))
    #expect(
      try machine.error(Images.linux()) { $0.modules = [BootModule(image: disk, string: "")] }
        == unused(.linux, .modules))
    #expect(try machine.error(Images.elf()) { $0.commandLine = "a\0b" } == .stringWithNUL(path: "guest"))
    #expect(
      try machine.error(Images.elf()) { $0.commandLine = String(repeating: "x", count: 65537) }
        == .commandLineLength(path: "guest", count: 65537, limit: 65536))
    #expect(
      unused(.bootSector, .commandLine).description
        == "guest is of kind boot sector, which does not take --append: leave it out")
  }

  @Test func nothingIsNothingToBoot() throws {
    let machine = try TestMachine()
    let request = BootRequest(image: nil, memoryMap: machine.map)
    #expect(throws: BootError.nothingToBoot) { try BootCatalogue.check(request) }
    #expect(throws: BootError.nothingToBoot) { try BootCatalogue.boot(request, into: machine.memory) }
  }

  @Test func bootSectorStartsAt7C00() throws {
    let machine = try TestMachine()
    let sector = Images.bootSector(count: 2048)
    let entry = try machine.boot(sector)
    #expect(entry.general.rip == 0x7c00)
    #expect(entry.general.rdx == 0x80)
    #expect(entry.system.cs == .real(selector: 0, code: true))
    #expect(entry.system.cr0 & 1 == 0)
    #expect(try machine.bytes(0x7c00, 512) == Array(sector.prefix(512)))
    #expect(try machine.read(0x7e00, as: UInt8.self) == 0)
  }

  @Test func bootSectorStartsAtTheResetVectorWithAROM() throws {
    let machine = try TestMachine()
    try BootImageTests.withScratch { directory in
      let path = directory + "/rom"
      let rom = try BootROMTests.rom(path, count: 65536)
      let entry = try machine.boot(Images.bootSector()) { $0.firmware = rom }
      #expect(entry.general == VCPUState().general)
      #expect(entry.system == VCPUState().system)
      #expect(try machine.read(0x7dfe, as: UInt16.self) == 0xaa55)
      #expect(try machine.read(0x9fc10, as: UInt32.self) == 0x424d_5653)
      #expect(try machine.read(0x9fc28, as: UInt64.self) == 0)
      let disk = Images.bootSector(count: 512 * 7 + 100)
      let range = try #require(machine.boot(disk) { $0.firmware = rom }.range(.disk))
      #expect(try machine.bytes(range.start.rawValue, disk.count) == disk)
      #expect(try machine.read(0x9fc28, as: UInt32.self) == UInt32(range.start.rawValue))
      #expect(try machine.read(0x9fc2c, as: UInt32.self) == 7)
      let size = try BootCatalogue.bootDiskSize(of: BootImage(path: "disk", bytes: disk))
      #expect(size == UInt64(disk.count))
      let roomy = try MemoryMap(size: 64 << 20, bootDisk: size)
      let placed = try #require(
        machine.boot(disk) {
          $0.firmware = rom; $0.memoryMap = roomy
        }.range(.disk))
      #expect(placed.start == roomy.bootDisk?.start)
      #expect(!roomy.usable.contains { $0.overlaps(placed) })
      var alone = BootRequest(image: nil, memoryMap: machine.map)
      alone.firmware = rom
      #expect(try BootCatalogue.boot(alone, into: machine.memory).general.rip == 0xfff0)
    }
  }

  @Test(
    arguments: [
      (0x7c00, 0, 0x7c00, 0, 0x7c00), (0x10000, 0x1000, 0, 0, 0), (0x12345, 0x1000, 0x2345, 0x1000, 0x2345),
      (0, 0, 0, 0x9000, 0xfc00),
    ] as [(UInt64, UInt16, UInt64, UInt16, UInt64)])
  func flatBinariesBelow1MiBStartInRealMode(
    address: UInt64, cs: UInt16, ip: UInt64, ss: UInt16, sp: UInt64
  ) throws {
    let machine = try TestMachine()
    let entry = try machine.boot(Images.code) { $0.loadAddress = address }
    #expect(entry.kind == .flat)
    #expect(entry.system.cs == .real(selector: cs, code: true))
    #expect(entry.system.ds == .real(selector: cs))
    #expect(entry.general.rip == ip)
    #expect(entry.system.ss.selector == ss)
    #expect(entry.general.rsp == sp)
    #expect(try machine.bytes(address, Images.code.count) == Images.code)
  }

  @Test func flatBinariesFrom1MiBStartFlat() throws {
    let machine = try TestMachine()
    let entry = try machine.boot(Images.code) { $0.loadAddress = 0x10_0000 }
    #expect(entry.general.rip == 0x10_0000)
    #expect(entry.system.cs == .code32(selector: 0x10))
    #expect(entry.range(.stack)?.end.rawValue == entry.general.rsp)
    for address in [0x9fbff, 0xe0000, 64 << 20, 0x1_0000_0000, UInt64.max] as [UInt64] {
      #expect(
        try machine.error(Images.code) { $0.loadAddress = address }
          == .outsideMemory(path: "guest", part: .flatBinary, address: address, size: 64))
    }
  }
}
