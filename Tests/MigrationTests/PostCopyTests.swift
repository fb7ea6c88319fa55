import Foundation
import GuestMemory
import Host
import StateTree
import Synchronization
import TestRelay
import Testing

@testable import Migration

private let hasFaults: Bool = {
  guard let memory = try? FakeDestination().memory else { return false }
  return (try? UserFaults(memory.regions[0].hostBase, count: 4096)) != nil
}()

/// Machines that go on at the destination before all of their pages are there.
@Suite(.enabled(if: hasFaults, "userfaultfd(2) is not to be had here"), .serialized)
struct PostCopyTests {
  private struct Outcome {
    var there: MigrationError?
    var here: MigrationError?
    var source: MigrationProgress.Snapshot
    var destination: MigrationProgress.Snapshot
  }

  private var parameters: MigrationParameters {
    var parameters = MigrationParameters()
    parameters.mayPostCopy = true
    return parameters
  }

  /// Runs a migration whose machine goes on there as soon as the first page has gone, or `early`, before that.
  private func migrate(
    _ source: FakeSource, _ destination: FakeDestination, at place: String, by path: String? = nil,
    _ parameters: MigrationParameters, begins: Bool = true,
    during: (MigrationSource, MigrationDestination) -> Void = { _, _ in }
  ) throws -> Outcome {
    let arriving = MigrationDestination(destination, on: try StreamListener(StreamEndpoint.unix(path: place)))
    let here = Condition<MigrationError??>(nil)
    let there = Condition<MigrationError??>(nil)
    let taking = try HostThread(name: "destination") {
      do throws(MigrationError) {
        try arriving.run()
        here.withLock { $0 = .some(nil) }
      } catch {
        here.withLock { $0 = .some(error) }
      }
    }
    let moving = MigrationSource(source, to: .unix(path: path ?? place), parameters)
    source.onClasses = { if begins { _ = moving.startPostCopy() } }
    let giving = try HostThread(name: "source") {
      do throws(MigrationError) {
        try moving.run()
        there.withLock { $0 = .some(nil) }
      } catch {
        there.withLock { $0 = .some(error) }
      }
    }
    during(moving, arriving)
    let outcome = Outcome(
      there: there.wait { $0 }, here: here.wait { $0 }, source: moving.progress.now, destination: arriving.progress.now)
    giving.join()
    taking.join()
    return outcome
  }

  private func expectAllOf(_ source: FakeSource, in destination: FakeDestination) {
    for page in 0..<source.pages where !FakeSource.ignored.contains(page) {
      #expect(source.page(page) == destination.page(page), "page \(page)")
    }
  }

  /// Every page that the machine touches while it runs there is as it was, and so are all in the end.
  @Test(arguments: [(1, 0), (2, 0), (3, 3)])
  func pagesComeWhenTheyAreTouched(way: (links: Int, level: Int)) throws {
    let folder = try TestFolder()
    let (source, destination) = (try FakeSource(), try FakeDestination())
    var parameters = parameters
    (parameters.links, parameters.compression) = (way.links, way.level)
    // What nobody asks for comes slowly.
    parameters.postCopyBandwidth = 4 << 20
    parameters.trace = folder.path + "/trace"
    let wrong = Mutex<[Int]>([])
    destination.onGoOn = {
      for page in (0..<source.pages).shuffled().prefix(100) where !FakeSource.ignored.contains(page) {
        if source.page(page) != destination.page(page) { wrong.withLock { $0.append(page) } }
      }
    }
    let writer = try source.startWriting()
    let outcome = try migrate(source, destination, at: folder.path + "/socket", parameters)
    writer.join()
    #expect(outcome.there == nil && outcome.here == nil, "\(outcome)")
    #expect(wrong.withLock { $0 } == [])
    #expect(source.state == .away && destination.state == .running)
    expectAllOf(source, in: destination)
    let postCopy = try #require(outcome.source.postCopy)
    #expect(postCopy.pages > 500 && postCopy.left == 0)
    #expect(postCopy.faults > 20 && postCopy.requests >= postCopy.faults, "\(postCopy)")
    #expect(outcome.destination.postCopy?.faults == postCopy.faults)
    #expect(outcome.source.status == .completed && outcome.destination.status == .completed)
    #expect(!destination.memory.isArriving)
    let trace = try String(contentsOfFile: folder.path + "/trace", encoding: .utf8)
    #expect(trace.contains("\"round\": 2"))
  }

  /// Without being told to, the machine goes on there only where the rounds lead nowhere.
  @Test func aGuestThatWritesTooFastGoesOnThere() throws {
    let folder = try TestFolder()
    let (source, destination) = (try FakeSource(), try FakeDestination())
    var parameters = parameters
    parameters.downtimeLimit = 1
    source.alwaysWritten = 2..<5
    let outcome = try migrate(source, destination, at: folder.path + "/socket", parameters, begins: false)
    #expect(outcome.there == nil && outcome.here == nil, "\(outcome)")
    #expect(outcome.source.postCopy != nil)
    expectAllOf(source, in: destination)
    let idle = (try FakeSource(), try FakeDestination())
    let calm = try migrate(idle.0, idle.1, at: folder.path + "/other", self.parameters, begins: false)
    #expect(calm.there == nil && calm.source.postCopy == nil)
    expectAllOf(idle.0, in: idle.1)
  }

  /// Wherever all links are cut, once: before the hand-over the machine is here, after it there, and with all of its pages.
  @Test func aCutLinkIsMendedOrTheMachineIsHere() throws {
    let folder = try TestFolder()
    let cuts = ProcessInfo.processInfo.environment["SWIFTVMM_CUTS"].flatMap { Int($0) } ?? 24
    let whole = try Relay(at: .unix(path: folder.path + "/w"), to: .unix(path: folder.path + "/whole"))
    var parameters = parameters
    parameters.links = 1
    _ = try migrate(FakeSource(), FakeDestination(), at: folder.path + "/whole", by: folder.path + "/w", parameters)
    let (length, answered) = (whole.passed, whole.answered)
    var ends: [String: Int] = [:]
    for index in 0..<cuts {
      // The first bytes are those of greetings and of the hand-over, which is done before pages go. Without a whole greeting
      // the destination goes on waiting for one.
      let cut =
        switch index % 4 {
        case 0: Relay.Cut(.forth, after: Int.random(in: MigrationGreeting.size..<length))
        case 1: Relay.Cut(.back, after: Int.random(in: 0..<answered))
        default: Relay.Cut(.forth, after: Int.random(in: MigrationGreeting.size..<1200))
        }
      let (source, destination) = (try FakeSource(), try FakeDestination())
      destination.onGoOn = { _ = destination.page(3) == source.page(3) }
      let place = "\(folder.path)/d\(index)"
      let relay = try Relay(at: .unix(path: "\(folder.path)/p\(index)"), to: .unix(path: place), cut: cut)
      let outcome = try migrate(source, destination, at: place, by: "\(folder.path)/p\(index)", parameters)
      relay.stop()
      switch (source.state, destination.state) {
      case (.running, .empty), (.running, .arrived):
        ends["kept", default: 0] += 1
        #expect(outcome.there != nil && outcome.here != nil, "\(cut) of \(length): \(outcome)")
        #expect(source.hasDisks && !destination.memory.isArriving)
      case (.away, .running):
        ends["moved", default: 0] += 1
        #expect(outcome.there == nil && outcome.here == nil, "\(cut) of \(length): \(outcome)")
        expectAllOf(source, in: destination)
      default: Issue.record("\(cut) of \(length): \(source.state) here, \(destination.state) there: \(outcome)")
      }
    }
    #expect(ends["kept", default: 0] > 0 && ends["moved", default: 0] > 0, "\(ends)")
  }

  /// Links that somebody cuts stay cut until somebody connects them again, at another address if need be.
  @Test func aPauseLastsUntilItIsEnded() throws {
    let folder = try TestFolder()
    let (source, destination) = (try FakeSource(), try FakeDestination())
    var parameters = parameters
    parameters.postCopyBandwidth = 1 << 20
    let outcome = try migrate(source, destination, at: folder.path + "/socket", parameters) { moving, arriving in
      while arriving.progress.now.status != .postCopyActive || !moving.pausePostCopy() { usleep(1000) }
      while moving.progress.now.status != .postCopyPaused { usleep(1000) }
      while arriving.progress.now.status != .postCopyPaused { usleep(1000) }
      #expect(!moving.cancel())
      #expect(destination.memory.isArriving)
      usleep(1_500_000)
      #expect(moving.progress.now.status == .postCopyPaused)
      let other = StreamEndpoint.unix(path: folder.path + "/other")
      #expect(throws: Never.self) { try arriving.listenAgain(at: other) }
      #expect(moving.resumePostCopy(other))
    }
    #expect(outcome.there == nil && outcome.here == nil, "\(outcome)")
    expectAllOf(source, in: destination)
  }

  /// A destination that cannot open the disks gives the machine back, whose pages it has asked for already.
  @Test func disksThatCannotBeOpenedAreARefusal() throws {
    let folder = try TestFolder()
    let (source, destination) = (try FakeSource(), try FakeDestination())
    destination.refusesDisks = true
    let outcome = try migrate(source, destination, at: folder.path + "/socket", parameters)
    #expect(outcome.there == .refused("no disks here"))
    #expect(outcome.here == .machine("no disks here"))
    #expect(source.state == .running && source.hasDisks && destination.state == .arrived)
  }

  /// What is no source's or destination's is one error.
  @Test func malformedRecordsAreRefused() throws {
    #expect(throws: MigrationError.malformed(.pages)) { try PageSet([1, 2, 3], pages: 64) }
    let set = try PageSet([UInt8](repeating: 255, count: 16), pages: 70)
    #expect(set.count == 70)
    var runs: [Range<Int>] = []
    set.forEachRun { runs.append($0) }
    #expect(runs == [0..<70])
    var holes = PageSet(pages: 200)
    for run in [3..<7, 60..<130, 191..<192] { holes.insert(run) }
    runs = []
    holes.forEachRun { runs.append($0) }
    #expect(runs == [3..<7, 60..<130, 191..<192])
    // Whoever comes for pages of a migration that is not there is told so.
    let folder = try TestFolder()
    let place = StreamEndpoint.unix(path: folder.path + "/socket")
    let arriving = MigrationDestination(try FakeDestination(), on: try StreamListener(place))
    let thread = try HostThread(name: "destination") { try? arriving.run() }
    let link = try MigrationLink.connect(place)
    try link.send(MigrationGreeting(.postCopy, link: 0, of: 2, session: SIMD2(1, 2)).bytes)
    #expect(throws: MigrationError.refused("no machine of this migration has come here")) {
      try link.receivePayload(of: .wanted)
    }
    let other = try MigrationLink.connect(place)
    try other.send(MigrationGreeting(.move, session: SIMD2(1, 2)).bytes)
    other.shut()
    thread.join()
  }
}
