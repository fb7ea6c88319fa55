import Accelerator
import GuestMemory
import Testing

@testable import Boot

@Suite struct MultibootTests {
  @Test(arguments: [false, true]) func elfStartsFlatWithInformation(is64Bit: Bool) throws {
    let machine = try TestMachine()
    let moduleImage = try BootImage(path: "environment", bytes: Array("A=1\n".utf8))
    let entry = try machine.boot(Images.multiboot(is64Bit: is64Bit, flags: 3)) {
      $0.commandLine = "a b"
      $0.modules = [BootModule(image: moduleImage, string: "environment")]
    }
    #expect(entry.kind == .multiboot)
    #expect(entry.general.rip == 0x20_000c)
    #expect(entry.general.rax == 0x2bad_b002)
    #expect(entry.system.cs == .code32(selector: 0x10))
    #expect(entry.system.cr0 == 0x11)
    #expect(!entry.partsOverlap)
    let info = entry.general.rbx
    #expect(try machine.read(info, as: UInt32.self) == 0x24d)
    #expect(try machine.read(info + 4, as: UInt32.self) == 639)
    #expect(try machine.read(info + 8, as: UInt32.self) == 63 << 10)
    func pointer(_ address: UInt64) throws -> UInt64 { UInt64(try machine.read(address, as: UInt32.self)) }
    #expect(try machine.string(pointer(info + 16)) == "guest a b")
    #expect(try machine.read(info + 20, as: UInt32.self) == 1)
    let module = try pointer(info + 24)
    let start = try pointer(module)
    #expect(try start >= 0x20_3000 && start & 0xfff == 0 && pointer(module + 4) == start + 4)
    #expect(try machine.bytes(start, 4) == Array("A=1\n".utf8))
    #expect(try machine.string(pointer(module + 8)) == "environment")
    let length = try pointer(info + 44)
    var address = try pointer(info + 48)
    let end = address + length
    var seen: [UInt64] = []
    while address < end {
      seen.append(try machine.read(address + 4))
      address += try pointer(address) + 4
    }
    #expect(address == end)
    #expect(seen == machine.map.entries.map(\.range.start.rawValue))
    #expect(try machine.string(pointer(info + 64)) == "swiftvmm")
  }

  @Test func withoutACommandLineThereIsThePath() throws {
    let machine = try TestMachine()
    let entry = try machine.boot(Images.multiboot())
    #expect(try machine.string(UInt64(machine.read(entry.general.rbx + 16, as: UInt32.self))) == "guest")
  }

  @Test func addressesInTheHeaderSayWhatIsLoaded() throws {
    let machine = try TestMachine()
    let image = Images.kludge()
    let entry = try machine.boot(image)
    #expect(entry.kind == .multiboot)
    #expect(entry.general.rip == 0x20_0060)
    #expect(try machine.bytes(0x20_0000, image.count) == image)
    #expect(try machine.bytes(0x20_0000 + UInt64(image.count), 0x2000 - image.count).allSatisfy { $0 == 0 })
    #expect(try machine.read(0x20_2000, as: UInt8.self) == 0xcc)
    // Loading may begin after the file's first byte, and end before its last.
    let part = Images.kludge(load: 0x20_0020, loadEnd: 0x20_0070, bssEnd: 0)
    _ = try machine.boot(part)
    #expect(try machine.bytes(0x20_0020, 0x50) == Array(part[0x20..<0x70]))
  }

  @Test func wrongAddressesAreErrors() throws {
    let machine = try TestMachine()
    for image in [
      Images.kludge(header: 0x1f_0000), Images.kludge(header: 0x20_0080), Images.kludge(loadEnd: 0x1f_ffff),
      Images.kludge(bssEnd: 0x20_0001), Images.kludge(header: 0xffff_ffff, load: 0),
    ] {
      guard case .malformed(_, .multibootAddresses)? = try machine.error(image) else {
        Issue.record("\(String(describing: try machine.error(image)))")
        continue
      }
    }
    #expect(
      try machine.error(Images.kludge(entry: 0x20_2000)) == .malformed(path: "guest", .entryOutside(0x20_2000)))
    #expect(try machine.error(Images.kludge(loadEnd: 0x20_2000)) != nil)
    #expect(
      try machine.error(Images.kludge(bssEnd: 0xffff_ffff))
        == .outsideMemory(path: "guest", part: .kernel, address: 0x20_0000, size: 0xffdf_ffff))
    let image = Images.kludge(header: 0xffff_fff0, load: 0xffff_ffb0, bssEnd: 0)
    guard case .outsideMemory? = try machine.error(image) else {
      Issue.record("\(String(describing: try machine.error(image)))")
      return
    }
    #expect(try machine.error(Array(Images.kludge().prefix(64 + 20))) != nil)
  }

  @Test(arguments: [4, 8, 0x8000] as [UInt32]) func requirementsThatCannotBeMetAreErrors(flags: UInt32) throws {
    #expect(
      try TestMachine().error(Images.multiboot(flags: flags | 3))
        == .malformed(path: "guest", .multibootRequirements(flags | 3)))
  }

  @Test func aWrongChecksumIsNoHeader() throws {
    var image = Images.multiboot(is64Bit: true)
    let header = try #require(image.indices.first { image.number(at: $0, as: UInt32.self) == 0x1bad_b002 })
    image[header + 8] ^= 1
    #expect(try TestMachine().boot(image).kind == .elf64)
  }
}
