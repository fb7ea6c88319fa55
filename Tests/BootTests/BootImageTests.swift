import Foundation
import GuestMemory
import Host
import Testing

@testable import Boot

@Suite struct BootImageTests {
  /// A path in a directory of its own, gone afterwards.
  static func withScratch(_ body: (String) throws -> Void) throws {
    let path = NSTemporaryDirectory() + "boot-" + UUID().uuidString
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(atPath: path) }
    try body(path)
  }

  @Test func filesThatCannotBeReadAreErrorsThatNameThem() throws {
    try Self.withScratch { directory in
      let missing = directory + "/missing"
      #expect(throws: BootError.unreadable(path: missing, .path("open", path: missing, errno: ENOENT))) {
        try BootImage(path: missing)
      }
      #expect(throws: BootError.directory(path: directory)) { try BootImage(path: directory) }
      try Data().write(to: URL(fileURLWithPath: directory + "/empty"))
      #expect(throws: BootError.empty(path: directory + "/empty")) { try BootImage(path: directory + "/empty") }
      let text = BootError.unreadable(path: missing, .path("open", path: missing, errno: ENOENT)).description
      #expect(text == "cannot read \(missing): No such file or directory")
    }
    #expect(throws: BootError.empty(path: "none")) { try BootImage(path: "none", bytes: []) }
    #expect(throws: BootError.empty(path: "/dev/null")) { try BootImage(path: "/dev/null") }
  }

  @Test func pipesAreReadWhole() throws {
    try Self.withScratch { directory in
      let path = directory + "/pipe"
      #expect(mkfifo(path, 0o600) == 0)
      let bytes = (0..<200_000).map { UInt8(truncatingIfNeeded: $0 / 3) }
      let writer = Thread {
        try? FileHandle(forWritingTo: URL(fileURLWithPath: path)).write(contentsOf: Data(bytes))
      }
      writer.start()
      let image = try BootImage(path: path)
      #expect(image.size == 200_000)
      #expect(try image.bytes(.kernel, at: 0, count: 200_000) == bytes)
    }
  }

  @Test func readsPastTheEndAreTruncation() throws {
    let image = try BootImage(path: "x", bytes: [UInt8](repeating: 7, count: 100))
    #expect(try image.bytes(.kernel, at: 90, count: 10).count == 10)
    for (offset, count) in [(91, 10), (101, 0), (UInt64.max, 10)] as [(UInt64, Int)] {
      #expect(throws: BootError.truncated(path: "x", part: .kernel, offset: offset, count: UInt64(count), size: 100)) {
        try image.bytes(.kernel, at: offset, count: count)
      }
    }
  }

  @Test func aFileThatShrinksIsAnErrorNotAFault() throws {
    try Self.withScratch { directory in
      let path = directory + "/kernel"
      try Data(count: 1 << 20).write(to: URL(fileURLWithPath: path))
      let image = try BootImage(path: path)
      #expect(truncate(path, 4096) == 0)
      let machine = try TestMachine()
      let range = try #require(GuestRange(start: GuestPhysicalAddress(1 << 20), size: 1 << 20))
      #expect(throws: BootError.truncated(path: path, part: .kernel, offset: 0, count: 1 << 20, size: 4096)) {
        try image.copy(.kernel, at: 0, into: machine.memory, range: range)
      }
    }
  }

  @Test func copiesOutsideMemoryAreErrors() throws {
    let image = try BootImage(path: "x", bytes: [UInt8](repeating: 7, count: 8192))
    let machine = try TestMachine(size: 1 << 20, pattern: false)
    let range = try #require(GuestRange(start: GuestPhysicalAddress(0xff000), size: 8192))
    #expect(throws: BootError.memory(.outside(range.start, count: 8192))) {
      try image.copy(.kernel, at: 0, into: machine.memory, range: range)
    }
  }
}
