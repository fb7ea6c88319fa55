import Accelerator
import Foundation
import GuestMemory
import Testing

@testable import Boot

/// Debian's kernel as `scripts/fetch-linux` leaves it.
@Suite struct GoldenTests {
  private static func image(_ name: String) throws -> BootImage? {
    let path = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent().appendingPathComponent("build/linux/" + name).path
    guard FileManager.default.fileExists(atPath: path) else {
      print("skipped: build/linux/\(name) is not there; run scripts/fetch-linux")
      return nil
    }
    return try BootImage(path: path)
  }

  @Test func debiansBzImageIsLaidOutAsItAsks() throws {
    guard let image = try Self.image("vmlinuz") else { return }
    let machine = try TestMachine(size: 256 << 20, pattern: false)
    var request = BootRequest(image: image, memoryMap: machine.map)
    request.commandLine = "console=ttyS0"
    request.initialRAMDisk = try BootImage(path: "disk", bytes: [UInt8](repeating: 3, count: 10_000))
    let entry = try BootCatalogue.boot(request, into: machine.memory)
    #expect(entry.kind == .linux)
    let header = try LinuxSetupHeader(image)
    #expect(header.is64Bit && header.isRelocatable)
    #expect(header.preferredAddress == 0x100_0000)
    #expect(header.commandLineLimit == 2047)
    #expect(entry.general.rip == 0x100_0200)
    let kernel = try #require(entry.range(.kernel))
    #expect(kernel.size == header.unpackedSize && kernel.size > 32 << 20)
    #expect(
      try machine.bytes(0x100_0000, 4096) == image.bytes(.kernel, at: header.kernelOffset, count: 4096))
    let disk = try #require(entry.range(.initialRAMDisk))
    #expect(disk.end.rawValue <= 256 << 20 && disk.end.rawValue > 255 << 20)
    #expect(!entry.partsOverlap)
  }

  @Test func debiansVmlinuxStartsByItsPVHNote() throws {
    guard let image = try Self.image("vmlinux") else { return }
    let machine = try TestMachine(size: 256 << 20, pattern: false)
    let entry = try BootCatalogue.boot(BootRequest(image: image, memoryMap: machine.map), into: machine.memory)
    #expect(entry.kind == .pvh)
    let kernel = try #require(entry.range(.segment(0)))
    #expect(kernel.start.rawValue == 0x100_0000)
    #expect(kernel.contains(GuestPhysicalAddress(entry.general.rip)))
    #expect(!entry.partsOverlap)
  }
}
