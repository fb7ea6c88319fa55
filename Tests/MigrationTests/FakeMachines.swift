import Foundation
import GuestMemory
import Host
import MemoryViews
import PageClasses
import StateTree
import Synchronization

@testable import Migration

private func makeMemory() throws -> GuestMemory {
  let ranges = [(0, 1 << 20), (4 << 20, 3 << 20)].compactMap { start, size in
    GuestRange(start: GuestPhysicalAddress(UInt64(start)), size: UInt64(size))
  }
  return try GuestMemory(ranges)
}

private func bytes(_ memory: GuestMemory, _ page: Int) -> [UInt8] {
  Array(UnsafeRawBufferPointer(start: memory.regions[0].hostBase + page << 12, count: 4096))
}

/// A machine of memory alone, on its way.
final class FakeSource: MigratingMachine, @unchecked Sendable {
  enum State { case running, stopped, away }

  /// Pages that are not needed, by the agent's word.
  static let ignored = 800..<900

  let memory: GuestMemory
  private(set) var state = State.running
  private(set) var hasDisks = true
  private(set) var everWritten: [Bool]
  /// Words of pages that are found written whenever somebody looks.
  var alwaysWritten = 0..<0
  var onClasses: () -> Void = {}
  private let mayWrite = Atomic(true)
  private let isIdle = Condition(true)

  init() throws {
    memory = try makeMemory()
    everWritten = [Bool](repeating: false, count: Int(memory.size >> 12))
    // Every third page is random, every third sparse, every third never touched.
    for page in 0..<pages where page % 3 != 2 || Self.ignored.contains(page) {
      var content: [UInt8] = []
      content.reserveCapacity(4096)
      var word = UInt64.random(in: 1...UInt64.max)
      for _ in 0..<(page % 3 == 0 ? 512 : 1) {
        word = word &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
        withUnsafeBytes(of: word) { content.append(contentsOf: $0) }
      }
      content[0] = 1
      try memory.write(content, to: address(page))
    }
  }

  var pages: Int { Int(memory.size >> 12) }
  func page(_ page: Int) -> [UInt8] { bytes(memory, page) }

  func address(_ page: Int) -> GuestPhysicalAddress {
    GuestPhysicalAddress(UInt64(page < 256 ? page << 12 : 4 << 20 + (page - 256) << 12))
  }

  /// Writes single words of some pages until the machine stops.
  func startWriting() throws -> HostThread {
    try HostThread(name: "writer") { [self] in
      while true {
        isIdle.withLock { $0 = false }
        guard mayWrite.load(ordering: .sequentiallyConsistent) else { break }
        for page in 600..<700 {
          everWritten[page] = true
          try? memory.write(UInt64.random(in: .min ... .max), to: address(page) + UInt64.random(in: 0..<512) * 8)
        }
        isIdle.withLock { $0 = true }
        usleep(200)
      }
      isIdle.withLock { $0 = true }
    }
  }

  func description() -> StateNode { StateNode("fake", version: 1) }
  func startDirtyTracking() { memory.dirty.setTracking(true) }
  func takeDirtyPages() -> [UInt64] {
    var pages = memory.dirty.take()
    for word in alwaysWritten where word < pages.count { pages[word] = .max }
    return pages
  }
  func stopDirtyTracking() { memory.dirty.setTracking(false) }
  func throttle(_ percent: Int) {}

  func pageClasses(hintWait: UInt64) -> PageClassMap {
    onClasses()
    let view = MemoryView(number: 1)
    if let range = GuestRange(start: GuestPhysicalAddress(0), size: 16 << 12) {
      view.set([.read, .execute], for: range)
    }
    let first = address(Self.ignored.lowerBound).rawValue >> 12
    return PageClassMap(
      memory: memory, processors: [], views: [view],
      hints: [PageHint(firstPage: first, count: UInt64(Self.ignored.count), kind: .ignored)])
  }

  func leave() -> (state: StateNode, ran: Bool) {
    mayWrite.store(false, ordering: .sequentiallyConsistent)
    isIdle.wait { $0 ? () : nil }
    state = .stopped
    return (StateNode("fake", version: 1) { for value in [1, 2, 3] as [UInt8] { $0.write(value) } }, true)
  }

  func releaseDisks() { hasDisks = false }

  func comeBack(_ ran: Bool) {
    hasDisks = true
    state = .running
  }

  func stayAway() { state = .away }
}

/// A machine of memory alone that is to be filled.
final class FakeDestination: ArrivingMachine, @unchecked Sendable {
  enum State { case empty, arrived, running }

  let memory: GuestMemory
  var refusesDisks = false
  /// Called once it runs.
  var onGoOn: () -> Void = {}
  private(set) var state = State.empty
  private(set) var hasDisks = false
  private(set) var received: StateNode?

  init() throws { memory = try makeMemory() }

  func page(_ page: Int) -> [UInt8] { bytes(memory, page) }
  func check(_ description: StateNode) throws(MigrationError) {
    guard description.name == "fake" else { throw .machine("it is no fake") }
  }
  func arrive(_ state: StateNode) {
    received = state
    self.state = .arrived
  }
  func takeDisks() throws(MigrationError) {
    if refusesDisks { throw .machine("no disks here") }
    hasDisks = true
  }
  func goOn(_ ran: Bool) {
    state = .running
    onGoOn()
  }
}

/// A folder for sockets, whose paths are short.
final class TestFolder {
  let path: String

  init() throws {
    path = "/tmp/swiftvmm-test-" + UUID().uuidString.prefix(8)
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }
}
