import Foundation
import GuestMemory
import Host
import SavedMachine
import StateTree
import Testing

@Suite struct SavedMachineTests {
  private static let pages = 700
  private let folder = NSTemporaryDirectory() + "swiftvmm-saved-\(UUID().uuidString)"
  private var path: String { folder + "/machine" }

  init() throws { try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true) }

  private func makeMemory(pages: Int = pages) throws -> GuestMemory {
    let low = try #require(GuestRange(start: GuestPhysicalAddress(0), size: 4096 * 64))
    let high = try #require(GuestRange(start: GuestPhysicalAddress(1 << 32), size: UInt64(pages - 64) * 4096))
    return try GuestMemory([low, high])
  }

  private func address(page: Int) -> GuestPhysicalAddress {
    GuestPhysicalAddress(page < 64 ? UInt64(page) * 4096 : 1 << 32 + UInt64(page - 64) * 4096)
  }

  private func tree() -> StateNode {
    StateNode("saved", version: 1, children: [StateNode("part", version: 3) { $0.write("text") }]) {
      $0.write(UInt64(7))
    }
  }

  /// A saved machine with a byte in every third page.
  private func save(_ memory: GuestMemory) throws -> SaveReport {
    for page in stride(from: 0, to: Self.pages, by: 3) {
      try memory.write(
        UInt8(truncatingIfNeeded: page | 1), to: GuestPhysicalAddress(address(page: page).rawValue + 4095))
    }
    return try SavedMachine.write(tree(), memory, to: path)
  }

  private func check(_ memory: GuestMemory) throws {
    for page in 0..<Self.pages {
      let value: UInt8 = try memory.read(GuestPhysicalAddress(address(page: page).rawValue + 4095))
      #expect(value == (page % 3 == 0 ? UInt8(truncatingIfNeeded: page | 1) : 0))
    }
  }

  @Test func comesBackAsItWasSaved() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let report = try save(makeMemory())
    #expect(report.memoryBytes == UInt64((Self.pages + 2) / 3 * 4096))
    let saved = try SavedMachine(path: path)
    #expect(saved.state == tree())
    try saved.verifyMemory()
    let memory = try makeMemory()
    try saved.map(into: memory)
    try check(memory)
    // What is written then is not in the file, and can be saved again over it.
    try memory.write(UInt8(9), to: address(page: 1))
    let again = try SavedMachine.write(tree(), memory, to: path)
    #expect(again.memoryBytes == report.memoryBytes + 4096)
    let second = try makeMemory()
    try SavedMachine(path: path).map(into: second)
    try check(second)
    let value: UInt8 = try second.read(address(page: 1))
    #expect(value == 9)
  }

  @Test func zerosTakeNoRoom() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let report = try SavedMachine.write(tree(), makeMemory(pages: 70_000), to: path)
    #expect(report.memoryBytes == 0)
    var status = stat()
    #expect(stat(path, &status) == 0)
    #expect(status.st_size > 70_000 * 4096)
    #expect(status.st_blocks * 512 < 1 << 20)
  }

  @Test func otherSizesOfMemoryAreRefused() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    _ = try save(makeMemory())
    #expect(throws: SavedMachineError.memorySize(path: path, saved: 700 * 4096, here: 701 * 4096)) {
      let saved = try SavedMachine(path: path)
      try saved.map(into: makeMemory(pages: 701))
    }
  }

  @Test func versionsThatAreNotListedAreNamed() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    _ = try save(makeMemory())
    var bytes = try Data(contentsOf: URL(fileURLWithPath: path))
    bytes[8] = 9
    try bytes.write(to: URL(fileURLWithPath: path))
    #expect(throws: SavedMachineError.version(path: path, found: 9, known: [1, 2])) { _ = try SavedMachine(path: path) }
  }

  /// Every change of a byte outside RAM's zeros is found, and so is every cut; none traps.
  @Test func damageIsFound() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    _ = try save(makeMemory())
    let whole = try Data(contentsOf: URL(fileURLWithPath: path))
    let start = whole.count - Self.pages * 4096
    var random = Generator(state: UInt64(ProcessInfo.processInfo.environment["SWIFTVMM_SEED"] ?? "") ?? 20_261_123)
    for _ in 0..<400 {
      var bytes = whole
      switch Int.random(in: 0..<4, using: &random) {
      case 0: bytes = bytes.prefix(Int.random(in: 0..<whole.count, using: &random))
      case 1:
        let place = Int.random(in: 0..<96, using: &random)
        bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 2:
        let place = Int.random(in: 4096..<start, using: &random)
        // The padding before RAM means nothing.
        guard place < start - 4096 || whole[place] != 0 else { continue }
        bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      default:
        let place = Int.random(in: start..<whole.count, using: &random)
        bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      }
      try bytes.write(to: URL(fileURLWithPath: path))
      #expect(throws: SavedMachineError.self) {
        let saved = try SavedMachine(path: path)
        try saved.verifyMemory()
      }
    }
  }

  @Test func anotherFileIsNoSavedMachine() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    for bytes in [[], Array("SWVMSAV".utf8), Array("QFI\u{fb}, a disk".utf8)] as [[UInt8]] {
      try Data(bytes).write(to: URL(fileURLWithPath: path))
      #expect(throws: SavedMachineError.notASavedMachine(path: path)) { _ = try SavedMachine(path: path) }
    }
    #expect(throws: SavedMachineError.notASavedMachine(path: folder)) { _ = try SavedMachine(path: folder) }
    #expect(throws: SavedMachineError.self) { _ = try SavedMachine(path: folder + "/none") }
  }

  /// What a failed save leaves is what was there before.
  @Test func aFailedSaveLeavesNothing() throws {
    defer { try? FileManager.default.removeItem(atPath: folder) }
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    #expect(throws: SavedMachineError.self) { _ = try save(makeMemory()) }
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder) == ["machine"])
  }

  private struct Generator: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return state ^ state >> 29
    }
  }
}
