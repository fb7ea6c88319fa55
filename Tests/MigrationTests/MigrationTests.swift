import Foundation
import GuestMemory
import Host
import PageClasses
import StateTree
import Synchronization
import TestRelay
import Testing

@testable import Migration

/// Sources and destinations over real sockets, with machines that are nothing but memory.
struct MigrationTests {
  /// Runs a migration from `source` to `destination`; `path` is the socket that the source connects to, if it is another one.
  private func migrate(
    _ source: FakeSource, _ destination: FakeDestination, at place: String, by path: String? = nil,
    _ parameters: MigrationParameters = MigrationParameters()
  ) throws -> (there: MigrationError?, here: MigrationError?, progress: MigrationProgress.Snapshot) {
    let arriving = MigrationDestination(destination, on: try StreamListener(StreamEndpoint.unix(path: place)))
    let here = Condition<MigrationError??>(nil)
    let thread = try HostThread(name: "destination") {
      do throws(MigrationError) {
        try arriving.run()
        here.withLock { $0 = .some(nil) }
      } catch {
        here.withLock { $0 = .some(error) }
      }
    }
    let moving = MigrationSource(source, to: .unix(path: path ?? place), parameters)
    var there: MigrationError?
    do throws(MigrationError) { try moving.run() } catch { there = error }
    let result = here.wait { $0 }
    thread.join()
    return (there, result, moving.progress.now)
  }

  /// Memory that is written all the time arrives as it is when the machine stops, in every order and way.
  @Test(arguments: PageOrders.names, [(1, 0), (2, 0), (3, 3)])
  func memoryThatIsWrittenArrives(order: String, way: (links: Int, level: Int)) throws {
    let folder = try TestFolder()
    let source = try FakeSource()
    let destination = try FakeDestination()
    var parameters = MigrationParameters()
    (parameters.order, parameters.links, parameters.compression) = (order, way.links, way.level)
    parameters.trace = folder.path + "/trace"
    let writer = try source.startWriting()
    let result = try migrate(source, destination, at: folder.path + "/socket", parameters)
    writer.join()
    #expect(result.there == nil && result.here == nil, "\(result)")
    #expect(result.progress.status == .completed)
    #expect(result.progress.rounds.count >= 2)
    #expect(source.state == .away && destination.state == .running)
    #expect(destination.received?.payload == [1, 2, 3])
    // What nobody needs and nobody has written need not be there.
    let ignored = order == "classed" ? FakeSource.ignored : 0..<0
    #expect(result.progress.ignored == ignored.count)
    for page in 0..<source.pages where !(ignored.contains(page) && !source.everWritten[page]) {
      #expect(source.page(page) == destination.page(page), "page \(page)")
    }
    let trace = try String(contentsOfFile: folder.path + "/trace", encoding: .utf8)
    #expect(trace.contains("\"class\": \"readOnly\""))
    if order == "classed" {
      let iterations = trace.split(separator: "\n").filter { $0.hasPrefix("{\"round\": 1,") }.map { line in
        line.split(separator: " ")[3]
      }
      #expect(iterations == iterations.sorted())
    }
  }

  /// A source that goes before it has made all of its links leaves the place to the next one.
  @Test func aSourceThatMakesHalfOfItsLinksIsForgotten() throws {
    let folder = try TestFolder()
    let place = StreamEndpoint.unix(path: folder.path + "/socket")
    let destination = try FakeDestination()
    let arriving = MigrationDestination(destination, on: try StreamListener(place), linkTime: 1)
    let thread = try HostThread(name: "destination") { try? arriving.run() }
    let half = try MigrationLink.connect(place)
    try half.send(MigrationGreeting(.move, link: 1, of: 2, session: [1, 2]).bytes)
    #expect(throws: MigrationError.self) { try half.receiveAnswer(.accept) }
    let source = try FakeSource()
    try MigrationSource(source, to: place, MigrationParameters()).run()
    thread.join()
    #expect(source.state == .away && destination.state == .running)
  }

  /// A page that is called ignored and is written during the migration arrives.
  @Test func anIgnoredPageThatIsWrittenArrives() throws {
    let folder = try TestFolder()
    let source = try FakeSource()
    let destination = try FakeDestination()
    let page = FakeSource.ignored.lowerBound
    // As soon as writes are recorded: before any page is sent.
    source.onClasses = { try? source.memory.write([UInt8](repeating: 7, count: 4096), to: source.address(page)) }
    let result = try migrate(source, destination, at: folder.path + "/socket")
    #expect(result.there == nil && result.here == nil, "\(result)")
    #expect(destination.page(page) == [UInt8](repeating: 7, count: 4096))
    #expect(destination.page(page + 1) != source.page(page + 1))
  }

  /// Wherever the link is cut, the machine is in one place, and everything of it.
  @Test func aCutLinkLeavesOneMachine() throws {
    let folder = try TestFolder()
    let cuts = ProcessInfo.processInfo.environment["SWIFTVMM_CUTS"].flatMap { Int($0) } ?? 60
    let whole = try Relay(at: .unix(path: folder.path + "/w"), to: .unix(path: folder.path + "/whole"))
    var parameters = MigrationParameters()
    parameters.links = 1
    let first = try FakeSource()
    _ = try migrate(first, FakeDestination(), at: folder.path + "/whole", by: folder.path + "/w", parameters)
    let (length, answered) = (whole.passed, whole.answered)
    #expect(length > 100_000 && answered == 24)
    var ends: [String: Int] = [:]
    for index in 0..<cuts {
      // The last bytes there are those of the hand-over, and all bytes back are answers: each of them once.
      let cut =
        switch index {
        case ..<20: Relay.Cut(.forth, after: length - 1 - index)
        case ..<44: Relay.Cut(.back, after: index - 20)
        default: Relay.Cut(.forth, after: Int.random(in: 0..<length))
        }
      let (source, destination) = (try FakeSource(), try FakeDestination())
      let place = "\(folder.path)/d\(index)"
      let relay = try Relay(at: .unix(path: "\(folder.path)/p\(index)"), to: .unix(path: place), cut: cut)
      let result = try migrate(source, destination, at: place, by: "\(folder.path)/p\(index)", parameters)
      relay.stop()
      #expect(relay.isCut, "\(cut)")
      switch (source.state, destination.state) {
      case (.running, .empty), (.running, .arrived):
        ends["kept", default: 0] += 1
        #expect(result.there != nil && result.here != nil, "\(cut) of \(length): \(result)")
        #expect(source.hasDisks && !destination.hasDisks)
      case (.away, .running):
        ends["moved", default: 0] += 1
        #expect(!source.hasDisks && destination.hasDisks)
        #expect(
          (0..<source.pages).allSatisfy { FakeSource.ignored.contains($0) || source.page($0) == destination.page($0) })
      default: Issue.record("\(cut) of \(length): \(source.state) here, \(destination.state) there: \(result)")
      }
    }
    // The machine has gone where the last answer is all that was lost.
    #expect(ends["kept", default: 0] > 0 && ends["moved", default: 0] == min(cuts, 44) - min(cuts, 36), "\(ends)")
  }

  /// A destination that cannot open the disks gives the machine back.
  @Test func disksThatCannotBeOpenedAreARefusal() throws {
    let folder = try TestFolder()
    let (source, destination) = (try FakeSource(), try FakeDestination())
    destination.refusesDisks = true
    let result = try migrate(source, destination, at: folder.path + "/socket")
    #expect(result.there == .refused("no disks here"))
    #expect(result.here == .machine("no disks here"))
    #expect(source.state == .running && source.hasDisks)
    #expect(destination.state == .arrived)
  }

  /// What is no stream of a source's is one error, and nothing runs.
  @Test func malformedStreamsAreRefused() throws {
    let folder = try TestFolder()
    let recorder = try Relay(at: .unix(path: folder.path + "/w"), to: .unix(path: folder.path + "/whole"))
    var parameters = MigrationParameters()
    parameters.links = 1
    _ = try migrate(FakeSource(), FakeDestination(), at: folder.path + "/whole", by: folder.path + "/w", parameters)
    let stream = recorder.recorded
    var generator = SystemRandomNumberGenerator()
    var refused = 0
    for index in 0..<200 {
      var bytes = stream
      for _ in 0..<Int.random(in: 1...3, using: &generator) {
        // Mostly where records begin, seldom in the midst of pages.
        let place =
          index % 2 == 0
          ? Int.random(in: 0..<200, using: &generator) : Int.random(in: 0..<bytes.count, using: &generator)
        bytes[place] = UInt8.random(in: .min ... .max, using: &generator)
      }
      let destination = try FakeDestination()
      let place = "\(folder.path)/m\(index)"
      let arriving = MigrationDestination(destination, on: try StreamListener(StreamEndpoint.unix(path: place)))
      let socket = try StreamEndpoint.unix(path: place).connect()
      // A greeting that it does not take keeps it waiting for another one.
      guard (try? MigrationGreeting(Array(bytes[..<MigrationGreeting.size])))?.links == 1,
        bytes[12] == 0
      else { continue }
      let sender = try HostThread(name: "sender") { [bytes] in
        bytes.withUnsafeBytes { try? socket.sendAll($0) }
        shutdown(socket.rawValue, Int32(SHUT_WR))
      }
      do throws(MigrationError) {
        try arriving.run()
      } catch {
        refused += 1
        #expect(!error.description.contains("\n"))
        #expect(destination.state != .running)
      }
      sender.join()
    }
    #expect(refused > 20)
  }

  /// Rounds go on while they gain, and end where the guest would stand for no longer than it may.
  @Test func roundsEndWhereNothingIsGained() {
    var idle = Convergence(limit: 300_000_000, mayThrottle: false)
    #expect(idle.decide(.init(pages: 100_000, nanoseconds: 1_000_000_000, dirty: 10)) == .stop)
    var busy = Convergence(limit: 300_000_000, mayThrottle: false)
    #expect(busy.decide(.init(pages: 100_000, nanoseconds: 200_000_000, dirty: 16_000)) == .goOn(throttle: 0))
    #expect(busy.decide(.init(pages: 16_000, nanoseconds: 32_000_000, dirty: 16_000)) == .goOn(throttle: 0))
    #expect(busy.decide(.init(pages: 16_000, nanoseconds: 10_000_000, dirty: 16_000)) == .goOn(throttle: 0))
    #expect(busy.decide(.init(pages: 16_000, nanoseconds: 10_000_000, dirty: 16_000)) == .stop)
    // More is written than the links carry.
    var hopeless = Convergence(limit: 1_000_000, mayThrottle: true)
    var throttles: [Int] = []
    for _ in 0..<8 {
      guard case .goOn(let throttle) = hopeless.decide(.init(pages: 100, nanoseconds: 50_000_000, dirty: 100)) else {
        break
      }
      throttles.append(throttle)
    }
    #expect(throttles == [0, 0, 0, 20, 30, 40, 50, 60] || throttles == [0, 0, 20, 30, 40, 50, 60, 70], "\(throttles)")
    #expect(hopeless.stalled >= Convergence.patience)
  }
}
