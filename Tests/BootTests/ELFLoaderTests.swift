import Accelerator
import GuestMemory
import Testing

@testable import Boot

@Suite struct ELFLoaderTests {
  @Test func plainELF64StartsInLongMode() throws {
    let machine = try TestMachine()
    let entry = try machine.boot(Images.elf()) {
      $0.commandLine = "one two"
      $0.acpiRSDP = GuestPhysicalAddress(0xe0000)
    }
    #expect(entry.kind == .elf64)
    #expect(entry.general.rip == 0x20_0000)
    #expect(entry.general.rflags == 2)
    #expect(entry.general.rsp & 15 == 0)
    #expect(entry.system.cs == .code64(selector: 0x10))
    #expect(entry.system.efer == 0x500)
    #expect(entry.system.cr0 == 0x8000_0011)
    #expect(entry.system.cr4 == 0x20)
    #expect(!entry.partsOverlap)
    #expect(try machine.bytes(0x20_0000, Images.code.count) == Images.code)
    #expect(try machine.bytes(0x20_0000 + 64, 0x3000 - 64).allSatisfy { $0 == 0 })
    #expect(try machine.read(0x20_3000, as: UInt8.self) == 0xcc)
    // The page tables map an address to itself.
    let cr3 = entry.system.cr3
    for address in [0, 0x20_0000, 0xfee0_0000, 0xffff_f000] as [UInt64] {
      let top: UInt64 = try machine.read(cr3 + (address >> 39) * 8)
      let pointer: UInt64 = try machine.read((top & ~0xfff) + (address >> 30 & 511) * 8)
      let leaf: UInt64 = try machine.read((pointer & ~0xfff) + (address >> 21 & 511) * 8)
      #expect(top & 3 == 3 && pointer & 3 == 3 && leaf & 0x83 == 0x83)
      #expect((leaf & ~0x1f_ffff) + (address & 0x1f_ffff) == address)
    }
    // The selectors' descriptors are in the GDT.
    let gdt = entry.system.gdt
    #expect(gdt.limit == 31)
    #expect(try machine.read(gdt.base + 0x10, as: UInt64.self) == 0x00af_9b00_0000_ffff)
    #expect(try machine.read(gdt.base + 0x18, as: UInt64.self) == 0x00cf_9300_0000_ffff)
    // Both structures lead to the command line.
    let info = entry.general.rdi
    #expect(info == entry.general.rbx)
    #expect(try machine.string(machine.read(info + 24)) == "one two")
    #expect(try machine.string(UInt64(machine.read(entry.general.rsi + 0x228, as: UInt32.self))) == "one two")
    #expect(try machine.read(entry.general.rsi + 0x70, as: UInt64.self) == 0xe0000)
  }

  @Test func pvhStartsFlatWithStartInfo() throws {
    let machine = try TestMachine()
    let disk = [UInt8](repeating: 0xd1, count: 5000)
    let module = [UInt8](repeating: 0xe2, count: 3)
    let diskImage = try BootImage(path: "disk.img", bytes: disk)
    let moduleImage = try BootImage(path: "module", bytes: module)
    let entry = try machine.boot(Images.pvh()) {
      $0.commandLine = "console=ttyS0"
      $0.initialRAMDisk = diskImage
      $0.modules = [BootModule(image: moduleImage, string: "the module")]
      $0.acpiRSDP = GuestPhysicalAddress(0xe0000)
    }
    #expect(entry.kind == .pvh)
    #expect(entry.general.rip == 0x20_0010)
    #expect(entry.system.cs == .code32(selector: 0x10))
    #expect(entry.system.ds == .data(selector: 0x18))
    #expect(entry.system.cr0 == 0x11)
    #expect(entry.system.cr4 == 0)
    #expect(entry.system.efer == 0)
    #expect(!entry.partsOverlap)
    let info = entry.general.rbx
    #expect(try machine.read(info, as: UInt32.self) == 0x336e_c578)
    #expect(try machine.read(info + 4, as: UInt32.self) == 1)
    #expect(try machine.read(info + 12, as: UInt32.self) == 2)
    #expect(try machine.string(machine.read(info + 24)) == "console=ttyS0")
    #expect(try machine.read(info + 32, as: UInt64.self) == 0xe0000)
    let list: UInt64 = try machine.read(info + 16)
    let first: UInt64 = try machine.read(list)
    #expect(first & 0xfff == 0)
    #expect(try machine.read(list + 8, as: UInt64.self) == 5000)
    #expect(try machine.bytes(first, 5000) == disk)
    #expect(try machine.string(machine.read(list + 16)) == "disk.img")
    #expect(try machine.bytes(machine.read(list + 32), 3) == module)
    #expect(try machine.string(machine.read(list + 48)) == "the module")
    let map: UInt64 = try machine.read(info + 40)
    let count: UInt32 = try machine.read(info + 48)
    #expect(Int(count) == machine.map.entries.count)
    for (index, expected) in machine.map.entries.enumerated() {
      #expect(try machine.read(map + UInt64(index) * 24, as: UInt64.self) == expected.range.start.rawValue)
      #expect(try machine.read(map + UInt64(index) * 24 + 8, as: UInt64.self) == expected.range.size)
      #expect(try machine.read(map + UInt64(index) * 24 + 16, as: UInt32.self) == expected.kind.rawValue)
    }
  }

  @Test func pvhNoteMayHaveFourBytesAndAnELF32Around() throws {
    let entry = try TestMachine().boot(Images.pvh(entry: [0x10, 0, 0x20, 0], is64Bit: false))
    #expect(entry.kind == .pvh)
    #expect(entry.general.rip == 0x20_0010)
  }

  @Test func virtualEntryPointsBecomePhysical() throws {
    let segment = Images.Segment(physical: 0x20_0000, virtual: 0xffff_ffff_8020_0000, bytes: Images.code)
    let entry = try TestMachine().boot(Images.elf(entry: 0xffff_ffff_8020_0004, segments: [segment]))
    #expect(entry.general.rip == 0x20_0004)
  }

  @Test func resetZeroesAgainUnlessMemoryIsKnownToBeZero() throws {
    let machine = try TestMachine()
    _ = try machine.boot(Images.elf()) { $0.memoryIsZero = true }
    #expect(try machine.read(0x20_1000, as: UInt8.self) == 0xcc)
    _ = try machine.boot(Images.elf())
    #expect(try machine.read(0x20_1000, as: UInt8.self) == 0)
  }

  @Test func malformedFilesAreErrors() throws {
    let machine = try TestMachine()
    typealias Segment = Images.Segment
    func defect(_ bytes: [UInt8]) throws -> ImageDefect? {
      guard case .malformed(_, let defect)? = try machine.error(bytes) else { return nil }
      return defect
    }
    #expect(try defect(Images.elf(machine: 183)) == .elfTarget(machine: 183, type: 2))
    #expect(try defect(Images.elf(type: 1)) == .elfTarget(machine: 62, type: 1))
    #expect(try defect(Images.elf(is64Bit: false)) == .elf32WithoutHeader)
    #expect(try defect(Images.elf(entry: 0x30_0000)) == .entryOutside(0x30_0000))
    #expect(try defect(Images.elf(entry: 0x20_3000)) == .entryOutside(0x20_3000))
    #expect(try defect(Images.elf(entry: .max)) == .entryOutside(.max))
    #expect(try defect(Images.elf(prefix: [0], segments: [])) == .noSegments)
    #expect(
      try defect(Images.elf(segments: [Segment(physical: 0x20_0000, bytes: Images.code, memory: 1)]))
        == .segmentSizes(0, file: 64, memory: 1))
    #expect(try defect(Images.pvh(entry: [1, 2, 3])) == .noteSize(3))
    #expect(try defect(Images.pvh(entry: [0, 0, 0x20, 0, 1, 0, 0, 0])) == .entryOutside(0x1_0020_0000))
    #expect(try defect(Images.pvh(entry: [0, 0, 0x50, 0])) == .entryOutside(0x50_0000))
    let many = [Segment](repeating: Segment(physical: 0x20_0000, bytes: []), count: 300)
    #expect(try defect(Images.elf(segments: many)) == .segmentCount(300, limit: 256))
    for size in 4..<64 {
      let result = try machine.error(Array(Images.elf().prefix(size)))
      guard case .malformed(_, .elf)? = result else {
        Issue.record("an ELF header cut at \(size) gives \(String(describing: result))")
        continue
      }
    }
  }

  @Test func segmentsOutsideMemoryOrOnTopOfEachOtherAreErrors() throws {
    let machine = try TestMachine()
    func error(_ segments: [Images.Segment]) throws -> BootError? { try machine.error(Images.elf(segments: segments)) }
    func outside(_ address: UInt64, _ size: UInt64) -> BootError {
      .outsideMemory(path: "guest", part: .segment(0), address: address, size: size)
    }
    let code = Images.code
    for (address, size) in [
      (64 << 20, 64), ((64 << 20) - 63, 64), (0x9fc00, 64), (0xa0000, 64), (0xf0000, 0x20000), (UInt64.max - 10, 64),
      (0xe000_0000, 64), (0x20_0000, UInt64.max), (0x20_0000, 0xffff_ffff_ffdf_ffff), (1 << 63, 1 << 63),
    ] as [(UInt64, UInt64)] {
      let elf = Images.elf(entry: address, segments: [.init(physical: address, bytes: code, memory: size)])
      #expect(try machine.error(elf) == outside(address, size) || address >= 1 << 32)
      #expect(try machine.error(elf) != nil)
    }
    let overlap = try error([
      .init(physical: 0x20_0000, bytes: code, memory: 0x1001), .init(physical: 0x20_1000, bytes: code),
    ])
    guard case .overlap("guest", .segment(1), _, .segment(0), _)? = overlap else {
      Issue.record("\(String(describing: overlap))")
      return
    }
    let truncated = Array(Images.elf().dropLast(10))
    #expect(
      try machine.error(truncated)
        == .truncated(path: "guest", part: .segment(0), offset: 120, count: 64, size: UInt64(truncated.count)))
  }

  @Test func segmentsInLowMemoryKeepTheTablesAway() throws {
    let machine = try TestMachine()
    let segment = Images.Segment(physical: 0x1000, bytes: Images.code, memory: 0x9fc00 - 0x1000)
    let entry = try machine.boot(Images.elf(entry: 0x1000, segments: [segment]))
    #expect(!entry.partsOverlap)
    #expect(entry.general.rsp > 0x10_0000)
  }

  @Test func noRoomIsAnError() throws {
    let machine = try TestMachine(size: 1 << 20, pattern: false)
    let segment = Images.Segment(physical: 0x1000, bytes: Images.code, memory: 0x9fc00 - 0x1000)
    let error = try machine.error(Images.elf(entry: 0x1000, segments: [segment]))
    guard case .noRoom("guest", _, _)? = error else {
      Issue.record("\(String(describing: error))")
      return
    }
    let disk = try BootImage(path: "disk", bytes: [UInt8](repeating: 1, count: 1 << 20))
    let small = Images.elf(entry: 0x8000, segments: [.init(physical: 0x8000, bytes: Images.code)])
    #expect(
      try machine.error(small) { $0.initialRAMDisk = disk }
        == .noRoom(path: "guest", part: .module(0), size: 1 << 20))
  }
}
