import Testing

@testable import Boot

/// A kernel on a disk for other machines' BIOS; that it starts there is GuestTests' to see.
@Suite struct BootDiskTests {
  private func kernel(at address: UInt64, size: UInt64) throws -> BootImage {
    let bytes = Images.elf(
      entry: address,
      segments: [
        Images.Segment(physical: address, bytes: Images.code, memory: size),
        Images.note(value: [0, 0, UInt8(truncatingIfNeeded: address >> 16), 0]),
      ])
    return try BootImage(path: "kernel", bytes: bytes)
  }

  @Test func theKernelFollowsItsStartInfoInWholeChunks() throws {
    let disk = try BootDisk.image(kernel: kernel(at: 0x10_0000, size: 0x3000), commandLine: "a=1")
    #expect(disk.count % (4 * 16 * 512) == 0)
    #expect(Array(disk[510..<512]) == [0x55, 0xaa])
    #expect(Array(disk[496..<506]) == [0, 0, 0x10, 0, 0, 0x0c, 0, 0, 1, 0])
    let info = Array(disk[512..<512 + 4096])
    #expect(Array(info[0..<8]) == [0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0])
    #expect(Array(info[24..<32]) == [0x40, 0, 1, 0, 0, 0, 0, 0])
    #expect(Array(info[64..<68]) == Array("a=1\0".utf8))
    let start = 512 + 4096
    #expect(Array(disk[start..<start + Images.code.count]) == Images.code)
    #expect(disk[(start + Images.code.count)...].allSatisfy { $0 == 0 })
  }

  @Test(arguments: [(0xf_0000, 0x1000), (0x10_0000, 0x7_f001), (0x10_0000, 0x1_0000_0000)] as [(UInt64, UInt64)])
  func whatTheFirstSectorCannotLoadIsRefused(address: UInt64, size: UInt64) throws {
    let image = try kernel(at: address, size: size)
    #expect(throws: BootError.self) { try BootDisk.image(kernel: image, commandLine: "") }
  }

  @Test func aCommandLineThatDoesNotFitIsRefused() throws {
    let image = try kernel(at: 0x10_0000, size: 0x3000)
    let line = String(repeating: "x", count: 4032)
    #expect(throws: BootError.commandLineLength(path: "kernel", count: 4032, limit: 4031)) {
      try BootDisk.image(kernel: image, commandLine: line)
    }
  }
}
