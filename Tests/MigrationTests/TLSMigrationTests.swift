import Foundation
import GuestMemory
import Host
import Synchronization
import TLS
import TestCertificates
import TestRelay
import Testing

@testable import Migration

private let hasFaults: Bool = {
  guard let memory = try? FakeDestination().memory else { return false }
  return (try? UserFaults(memory.regions[0].hostBase, count: 4096)) != nil
}()

/// Migrations by TLS, and sides that do not fit.
@Suite(.enabled(if: TestCertificates.canBeMade, "needs openssl"), .serialized)
struct TLSMigrationTests {
  private struct Outcome {
    var there: MigrationError?
    var here: MigrationError?
    var refusals: [MigrationError]
    var progress: MigrationProgress.Snapshot
  }

  /// Moves a machine. A destination that no source satisfies is ended by one that does.
  private func migrate(
    _ source: FakeSource, _ destination: FakeDestination, by way: StreamEndpoint, _ parameters: MigrationParameters,
    _ credentials: TLSCredentials?, through proxy: StreamEndpoint? = nil,
    thenEndedBy rescue: MigrationParameters? = nil
  ) throws -> Outcome {
    let listener = try StreamListener(way)
    let endpoint = listener.endpoint
    let refusals = Mutex<[MigrationError]>([])
    let arriving = MigrationDestination(
      destination, on: listener, credentials: credentials,
      onRefusal: { error in refusals.withLock { $0.append(error) } })
    let here = Condition<MigrationError??>(nil)
    let thread = try HostThread(name: "destination") {
      do throws(MigrationError) {
        try arriving.run()
        here.withLock { $0 = .some(nil) }
      } catch {
        here.withLock { $0 = .some(error) }
      }
    }
    let moving = MigrationSource(source, to: proxy ?? endpoint, parameters)
    source.onClasses = { if parameters.mayPostCopy { _ = moving.startPostCopy() } }
    var there: MigrationError?
    do throws(MigrationError) { try moving.run() } catch { there = error }
    if let rescue {
      #expect(source.state == .running && source.hasDisks && destination.state == .empty)
      try MigrationSource(source, to: endpoint, rescue).run()
    }
    let result = here.wait { $0 }
    thread.join()
    return Outcome(there: there, here: result, refusals: refusals.withLock { $0 }, progress: moving.progress.now)
  }

  private func parameters(
    _ certificates: TestCertificates?, as host: String? = nil, links: Int = 2
  ) throws -> MigrationParameters {
    var parameters = MigrationParameters()
    parameters.links = links
    if let certificates {
      parameters.tls = MigrationTLS(
        try TLSCredentials(directory: certificates.path, endpoint: .client), hostName: host)
    }
    return parameters
  }

  private func server(_ certificates: TestCertificates) throws -> TLSCredentials {
    try TLSCredentials(directory: certificates.path, endpoint: .server)
  }

  private func expectAllOf(_ source: FakeSource, in destination: FakeDestination) {
    for page in 0..<source.pages where !FakeSource.ignored.contains(page) {
      #expect(source.page(page) == destination.page(page), "page \(page)")
    }
  }

  private static let tcp = StreamEndpoint.tcp(host: "127.0.0.1", port: 0)

  /// Memory that is written all the time arrives, by each kind of socket; nothing of it can be read on the way.
  @Test(arguments: [(1, 0), (4, 0), (3, 3)])
  func memoryThatIsWrittenArrives(way: (links: Int, level: Int)) throws {
    let certificates = try TestCertificates()
    let folder = try TestFolder()
    for endpoint in [Self.tcp, .unix(path: folder.path + "/socket")] {
      let (source, destination) = (try FakeSource(), try FakeDestination())
      var parameters = try parameters(certificates, as: "localhost", links: way.links)
      parameters.compression = way.level
      let writer = try source.startWriting()
      let outcome = try migrate(source, destination, by: endpoint, parameters, server(certificates))
      writer.join()
      #expect(outcome.there == nil && outcome.here == nil && outcome.refusals == [], "\(outcome)")
      #expect(source.state == .away && destination.state == .running)
      expectAllOf(source, in: destination)
    }
  }

  /// Links of which one end sends while it receives.
  @Test(.enabled(if: hasFaults, "userfaultfd(2) is not to be had here"), arguments: [1, 3])
  func pagesComeWhenTheyAreTouched(links: Int) throws {
    let certificates = try TestCertificates()
    let (source, destination) = (try FakeSource(), try FakeDestination())
    var parameters = try parameters(certificates, links: links)
    parameters.mayPostCopy = true
    parameters.postCopyBandwidth = 8 << 20
    let wrong = Mutex<[Int]>([])
    destination.onGoOn = {
      for page in (0..<source.pages).shuffled().prefix(100) where !FakeSource.ignored.contains(page) {
        if source.page(page) != destination.page(page) { wrong.withLock { $0.append(page) } }
      }
    }
    let writer = try source.startWriting()
    let outcome = try migrate(source, destination, by: Self.tcp, parameters, server(certificates))
    writer.join()
    #expect(outcome.there == nil && outcome.here == nil && outcome.refusals == [], "\(outcome)")
    #expect(wrong.withLock { $0 } == [])
    expectAllOf(source, in: destination)
    #expect(outcome.progress.postCopy?.faults ?? 0 > 20, "\(outcome.progress)")
  }

  /// Wherever the link is cut, there is one machine.
  @Test func aCutLinkLeavesOneMachine() throws {
    let certificates = try TestCertificates()
    let folder = try TestFolder()
    let parameters = try parameters(certificates, as: "localhost", links: 1)
    var length = 0
    var ends: [String: Int] = [:]
    for cut in 0..<40 {
      let (source, destination) = (try FakeSource(), try FakeDestination())
      let place = "\(folder.path)/\(cut)"
      // The first one goes through; then each part of the hand-over is cut off, and anything after the greeting.
      let limit = cut == 0 ? nil : cut < 30 ? length - cut * 2 : Int.random(in: 8192..<length)
      let relay = try Relay(
        at: .unix(path: place + "p"), to: .unix(path: place), cut: limit.map { Relay.Cut(.forth, after: $0) })
      let outcome = try migrate(
        source, destination, by: .unix(path: place), parameters, server(certificates), through: .unix(path: place + "p")
      )
      relay.stop()
      if cut == 0 { length = relay.passed }
      switch (source.state, destination.state) {
      case (.running, .empty), (.running, .arrived):
        ends["kept", default: 0] += 1
        #expect(outcome.there != nil && outcome.here != nil && source.hasDisks && !destination.hasDisks, "\(outcome)")
      case (.away, .running):
        ends["moved", default: 0] += 1
        expectAllOf(source, in: destination)
      default: Issue.record("cut at \(limit ?? 0): \(source.state) here, \(destination.state) there: \(outcome)")
      }
    }
    #expect(ends["kept", default: 0] > 0 && ends["moved", default: 0] > 0, "\(ends)")
  }

  // MARK: Sides that do not fit

  /// Each is one error on either side, and both go on: the machine there, the destination waiting for the right one.
  @Test func whoDoesNotFitIsTurnedAway() throws {
    let (certificates, other) = (try TestCertificates(), try TestCertificates())
    let anonymous = try TestCertificates()
    try anonymous.copy("ca-cert.pem", from: certificates)
    try anonymous.remove("client-cert.pem", "client-key.pem")
    let stranger = try TestCertificates()
    let strange = try TLSCredentials(directory: stranger.path, endpoint: .client, verifiesPeer: false)
    var unknown = MigrationParameters()
    unknown.tls = MigrationTLS(strange)
    let right = try parameters(certificates)
    let folder = try TestFolder()
    for isUnix in [false, true] {
      let name = isUnix ? "localhost" : nil
      // A destination answers questions for a while: each has a place of its own.
      var place: StreamEndpoint { isUnix ? .unix(path: "\(folder.path)/\(UUID().uuidString.prefix(8))") : Self.tcp }
      func turnedAway(_ parameters: MigrationParameters) throws -> Outcome {
        try migrate(
          FakeSource(), FakeDestination(), by: place, parameters, server(certificates),
          thenEndedBy: self.parameters(certificates, as: name))
      }
      let otherCA = try turnedAway(parameters(other, as: name))
      #expect(otherCA.there == .tls(.peerCertificate(.server, .unknownCA)))
      #expect(otherCA.refusals == [.tls(.refused(alert: "unknown CA"))])
      let unknownClient = try turnedAway(unknown)
      #expect(unknownClient.there == .tls(.refused(alert: "unknown CA")))
      #expect(unknownClient.refusals.contains(.tls(.peerCertificate(.client, .unknownCA))))
      let nobody = try turnedAway(parameters(anonymous, as: name))
      #expect(nobody.there == .tls(.refused(alert: "certificate required")))
      #expect(nobody.refusals.contains(.tls(.noPeerCertificate)))
      let elsewhere = try turnedAway(parameters(certificates, as: "elsewhere"))
      #expect(elsewhere.there == .tls(.peerCertificate(.server, .hostName(wanted: "elsewhere"))))
      let plain = try turnedAway(parameters(nil))
      #expect(plain.there == .refused("it takes machines by TLS alone: use migrate with --tls-creds"))
      #expect(plain.refusals.contains(.tls(.notTLS)))
      if isUnix { #expect(try turnedAway(right).there == .tls(.noHostName)) }
      let reverse = try migrate(
        FakeSource(), FakeDestination(), by: place, parameters(certificates, as: "localhost"), nil,
        thenEndedBy: MigrationParameters())
      #expect(reverse.there == .tls(.closedInHandshake))
      #expect(reverse.refusals == [.wantsTLS])
    }
  }
}
