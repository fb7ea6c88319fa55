import Foundation
import Host
import Synchronization
import TestCertificates
import Testing

@testable import TLS

/// Two ends of a socket.
final class Pair: Sendable {
  let client: FileDescriptor
  let server: FileDescriptor

  init() throws {
    var ends: [Int32] = [-1, -1]
    try #require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
    client = FileDescriptor(owning: ends[0])
    server = FileDescriptor(owning: ends[1])
  }
}

/// Sessions over real sockets.
@Suite(.enabled(if: TestCertificates.canBeMade, "needs openssl"))
struct SessionTests {
  private typealias Outcome = Result<TLSSession, TLSError>

  private func session(
    _ credentials: TLSCredentials, over socket: Int32, _ host: String? = nil, rekeyAfter: UInt64 = 32 << 30
  ) -> Outcome {
    Result { () throws(TLSError) in
      let session = try TLSSession(credentials, over: socket, hostName: host, rekeyAfter: rekeyAfter)
      try session.handshake()
      return session
    }
  }

  /// Both ends after a handshake; a client that the server refuses learns of it with the first byte.
  private func shake(
    _ server: TLSCredentials, _ client: TLSCredentials, as host: String? = "localhost", _ pair: Pair,
    rekeyAfter: UInt64 = 32 << 30
  ) throws -> (client: Outcome, server: Outcome) {
    let there = Mutex<Outcome?>(nil)
    let thread = try HostThread(name: "server") { [self] in
      var outcome = session(server, over: pair.server.rawValue, rekeyAfter: rekeyAfter)
      if case .success(let session) = outcome {
        outcome = Result { () throws(TLSError) in
          var byte: UInt8 = 7
          try session.send(&byte, 1)
          return session
        }
      }
      if case .failure = outcome { shutdown(pair.server.rawValue, Int32(SHUT_RDWR)) }
      there.withLock { [outcome] in $0 = outcome }
    }
    var here = session(client, over: pair.client.rawValue, host, rekeyAfter: rekeyAfter)
    if case .success(let session) = here {
      here = Result { () throws(TLSError) in
        var byte: UInt8 = 0
        try session.receive(&byte, 1)
        #expect(byte == 7)
        return session
      }
    }
    if case .failure = here { shutdown(pair.client.rawValue, Int32(SHUT_RDWR)) }
    thread.join()
    return (here, try #require(there.withLock { $0 }))
  }

  private func credentials(
    _ certificates: TestCertificates, _ endpoint: TLSCredentials.Endpoint, verifies: Bool = true
  ) throws -> TLSCredentials {
    try TLSCredentials(directory: certificates.path, endpoint: endpoint, verifiesPeer: verifies)
  }

  private func failure(_ outcome: Outcome) -> TLSError? {
    if case .failure(let error) = outcome { error } else { nil }
  }

  private func established(_ pair: Pair, rekeyAfter: UInt64 = 32 << 30) throws -> (TLSSession, TLSSession) {
    let certificates = try TestCertificates()
    let outcome = try shake(
      credentials(certificates, .server), credentials(certificates, .client), pair, rekeyAfter: rekeyAfter)
    return (try outcome.client.get(), try outcome.server.get())
  }

  // MARK: Who is who

  @Test(arguments: ["localhost", "127.0.0.1", "::1"])
  func bothEndsAreVerified(host: String) throws {
    let certificates = try TestCertificates()
    let outcome = try shake(
      credentials(certificates, .server), credentials(certificates, .client), as: host, Pair())
    #expect(try outcome.client.get().version == "TLSv1.3")
    #expect(failure(outcome.server) == nil)
  }

  @Test(arguments: ["example.org", "127.0.0.2", "localhost.example.org"])
  func anotherNameIsRefused(host: String) throws {
    let certificates = try TestCertificates()
    let outcome = try shake(credentials(certificates, .server), credentials(certificates, .client), as: host, Pair())
    #expect(failure(outcome.client) == .peerCertificate(.server, .hostName(wanted: host)))
    #expect(failure(outcome.server) == .refused(alert: "bad certificate"))
  }

  @Test func withoutANameNothingBegins() throws {
    let certificates = try TestCertificates()
    let pair = try Pair()
    let client = try credentials(certificates, .client)
    #expect(failure(session(client, over: pair.client.rawValue)) == .noHostName)
    // But where nobody wants to know who it is.
    let blind = try credentials(certificates, .client, verifies: false)
    let outcome = try shake(credentials(certificates, .server), blind, as: nil, Pair())
    #expect(failure(outcome.client) == nil && failure(outcome.server) == nil)
  }

  @Test func aServerOfAnotherCAIsRefused() throws {
    let (here, there) = (try TestCertificates(), try TestCertificates())
    let outcome = try shake(credentials(there, .server), credentials(here, .client), Pair())
    #expect(failure(outcome.client) == .peerCertificate(.server, .unknownCA))
    #expect(failure(outcome.server) == .refused(alert: "unknown CA"))
  }

  /// In TLS 1.3 the client has finished before the server has looked: it is told later, and why.
  @Test func aClientOfAnotherCAIsRefused() throws {
    let (here, there) = (try TestCertificates(), try TestCertificates())
    let client = try credentials(here, .client, verifies: false)
    let outcome = try shake(credentials(there, .server), client, Pair())
    #expect(failure(outcome.server) == .peerCertificate(.client, .unknownCA))
    #expect(failure(outcome.client) == .refused(alert: "unknown CA"))
    let blind = try shake(credentials(there, .server, verifies: false), client, Pair())
    #expect(failure(blind.client) == nil && failure(blind.server) == nil)
  }

  @Test func aClientWithoutACertificateIsRefused() throws {
    let certificates = try TestCertificates()
    let server = try credentials(certificates, .server)
    try certificates.remove("client-cert.pem", "client-key.pem")
    let outcome = try shake(server, credentials(certificates, .client), Pair())
    #expect(failure(outcome.server) == .noPeerCertificate)
    #expect(failure(outcome.client) == .refused(alert: "certificate required"))
  }

  @Test func aRevokedClientIsRefused() throws {
    let certificates = try TestCertificates()
    let client = try credentials(certificates, .client)
    try certificates.revoke("client")
    let outcome = try shake(credentials(certificates, .server), client, Pair())
    #expect(failure(outcome.server) == .peerCertificate(.client, .revoked))
    #expect(failure(outcome.client) == .refused(alert: "certificate revoked"))
  }

  // MARK: What is no TLS

  @Test(arguments: ["SWVMMIGR and more", "GET / HTTP/1.0", "NBDMAGICIHAVEOPT", "000000000000"])
  func whoSpeaksSomethingElseIsTold(text: String) throws {
    let certificates = try TestCertificates()
    for endpoint in [TLSCredentials.Endpoint.client, .server] {
      let pair = try Pair()
      let bytes = Array(text.utf8)
      #expect(send(pair.server.rawValue, bytes, bytes.count, 0) == bytes.count)
      shutdown(pair.server.rawValue, Int32(SHUT_WR))
      let outcome = session(try credentials(certificates, endpoint), over: pair.client.rawValue, "localhost")
      #expect(failure(outcome) == .notTLS, "\(endpoint)")
    }
  }

  @Test func whoHangsUpOrSaysNothingIsNotWaitedFor() throws {
    let certificates = try TestCertificates()
    for endpoint in [TLSCredentials.Endpoint.client, .server] {
      let pair = try Pair()
      let session = try TLSSession(
        credentials(certificates, endpoint), over: pair.client.rawValue, hostName: "localhost")
      let started = monotonicNanoseconds()
      #expect(throws: TLSError.handshakeTime(seconds: 1)) { try session.handshake(within: 1) }
      #expect(monotonicNanoseconds() - started < 5_000_000_000)
      shutdown(pair.server.rawValue, Int32(SHUT_RDWR))
      let late = try TLSSession(credentials(certificates, endpoint), over: pair.client.rawValue, hostName: "localhost")
      #expect(throws: TLSError.self) { try late.handshake() }
    }
  }

  /// Whatever comes instead of a handshake, or in its midst: an error at once.
  @Test func garbageInAHandshakeIsAnError() throws {
    let certificates = try TestCertificates()
    let server = try credentials(certificates, .server)
    var generator = SystemRandomNumberGenerator()
    for round in 0..<200 {
      let pair = try Pair()
      let client = try TLSSession(credentials(certificates, .client), over: pair.client.rawValue, hostName: "localhost")
      #expect(try !client.advanceHandshake())
      try client.flush()
      var hello = [UInt8](repeating: 0, count: 4096)
      let count = recv(pair.server.rawValue, &hello, hello.count, 0)
      try #require(count > 50)
      hello.removeSubrange(count...)
      // The record's header stays in half of the rounds.
      for _ in 0..<3 { hello[Int.random(in: (round % 2 * 5)..<count, using: &generator)] ^= UInt8.random(in: 1...255) }
      let fresh = try Pair()
      _ = send(fresh.client.rawValue, hello, Int.random(in: 1...count), 0)
      shutdown(fresh.client.rawValue, Int32(SHUT_WR))
      let session = try TLSSession(server, over: fresh.server.rawValue)
      #expect(throws: TLSError.self) { try session.handshake(within: 5) }
    }
  }

  // MARK: Sending and receiving

  /// Both ways at once, each end with a thread that sends and one that receives, over many keys.
  @Test(arguments: [UInt64(32 << 30), 100_000])
  func muchGoesBothWaysAtOnce(rekeyAfter: UInt64) throws {
    let pair = try Pair()
    let (client, server) = try established(pair, rekeyAfter: rekeyAfter)
    let total = 8 << 20
    let failures = Mutex<[String]>([])
    var threads: [HostThread] = []
    for (index, session) in [client, server].enumerated() {
      threads.append(
        try HostThread(name: "send") {
          var generator = SystemRandomNumberGenerator()
          var place = 0
          while place < total {
            let count = min(total - place, Int.random(in: 1...300_000, using: &generator))
            let bytes = (place..<(place + count)).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 >> 11 &+ index) }
            do throws(TLSError) { try session.send(bytes, count) } catch {
              return failures.withLock { $0.append("send \(error)") }
            }
            place += count
          }
        })
      threads.append(
        try HostThread(name: "receive") {
          var generator = SystemRandomNumberGenerator()
          var place = 0
          var bytes = [UInt8](repeating: 0, count: 300_000)
          while place < total {
            let count = min(total - place, Int.random(in: 1...300_000, using: &generator))
            do throws(TLSError) { try session.receive(&bytes, count) } catch {
              return failures.withLock { $0.append("receive \(error)") }
            }
            for offset in 0..<count {
              let at = place + offset
              guard bytes[offset] == UInt8(truncatingIfNeeded: at &* 31 &+ at >> 11 &+ (1 - index)) else {
                return failures.withLock { $0.append("byte \(at)") }
              }
            }
            place += count
          }
        })
    }
    for thread in threads { thread.join() }
    #expect(failures.withLock { $0 } == [])
  }

  /// The message that says so goes before what the new key encrypts.
  @Test func keysAreRenewed() throws {
    let pair = try Pair()
    let (client, _) = try established(pair, rekeyAfter: 2)
    var record = [UInt8](repeating: 0, count: 200)
    let sizes = try (0..<4).map { _ in
      try client.send(&record, 1)
      return recv(pair.server.rawValue, &record, record.count, Int32(MSG_DONTWAIT))
    }
    #expect(sizes[0] > 20 && sizes[1] == sizes[0] && sizes[2] > sizes[1] + 20 && sizes[3] == sizes[0], "\(sizes)")
  }

  @Test func vectorsArriveInOrder() throws {
    let pair = try Pair()
    let (client, server) = try established(pair)
    let bytes = (0..<400_000).map { UInt8(truncatingIfNeeded: $0 >> 3) }
    var arrived = [UInt8](repeating: 0, count: bytes.count)
    let thread = try HostThread(name: "send") {
      bytes.withUnsafeBytes { buffer in
        var vectors: [iovec] = []
        var place = 0
        for size in [0, 28, 4096, 0, 1, 300_000, 95_875] {
          vectors.append(iovec(iov_base: UnsafeMutableRawPointer(mutating: buffer.baseAddress! + place), iov_len: size))
          place += size
        }
        try? client.send(vectors: vectors, vectors.count)
      }
    }
    try server.receive(&arrived, arrived.count)
    thread.join()
    #expect(arrived == bytes)
  }

  /// An event loop's way: nothing waits, whatever the socket takes.
  @Test func nothingWaitsWhereNothingMay() throws {
    let pair = try Pair()
    let (client, server) = try established(pair)
    var bytes = [UInt8](repeating: 5, count: 8 << 20)
    var byte: UInt8 = 0
    #expect(try server.read(&byte, 1) == nil)
    var (sent, got) = (0, 0)
    try bytes.withUnsafeMutableBytes { buffer in
      var piece = [UInt8](repeating: 0, count: 1 << 20)
      while got < buffer.count {
        while try client.flush(), sent < buffer.count {
          var vector = iovec(iov_base: buffer.baseAddress! + sent, iov_len: buffer.count - sent)
          sent += try client.encrypt(&vector, 1)
        }
        while let count = try server.read(&piece, piece.count) {
          #expect(piece[..<count].allSatisfy { $0 == 5 })
          got += count
        }
      }
    }
    #expect(sent == 8 << 20 && got == sent && !client.hasOutput)
  }

  // MARK: The end

  @Test func goodbyeIsAnEndAndHangingUpIsNone() throws {
    var byte: UInt8 = 0
    let pair = try Pair()
    let (client, server) = try established(pair)
    client.sayGoodbye()
    #expect(try server.read(&byte, 1) == 0)
    #expect(throws: TLSError.closed) { try server.receive(&byte, 1) }
    let other = try Pair()
    let (_, cut) = try established(other)
    shutdown(other.client.rawValue, Int32(SHUT_RDWR))
    #expect(throws: TLSError.closed) { try cut.read(&byte, 1) }
    #expect(throws: TLSError.closed) { try cut.send(&byte, 1) }
  }

  @Test func whoWaitsEndsWithTheSocket() throws {
    let pair = try Pair()
    let (client, server) = try established(pair)
    let failures = Mutex<[TLSError]>([])
    let receiver = try HostThread(name: "receive") {
      var byte: UInt8 = 0
      do throws(TLSError) { try server.receive(&byte, 1) } catch { failures.withLock { $0.append(error) } }
    }
    let sender = try HostThread(name: "send") {
      let bytes = [UInt8](repeating: 0, count: 16 << 20)
      do throws(TLSError) { try server.send(bytes, bytes.count) } catch { failures.withLock { $0.append(error) } }
    }
    usleep(100_000)
    shutdown(pair.server.rawValue, Int32(SHUT_RDWR))
    receiver.join()
    sender.join()
    #expect(failures.withLock { $0 } == [.closed, .closed])
    withExtendedLifetime(client) {}
  }

  @Test func whoSaysNothingForTooLongIsGone() throws {
    let pair = try Pair()
    let (client, server) = try established(pair)
    server.setPatience(1)
    var byte: UInt8 = 0
    #expect(throws: TLSError.stalled(seconds: 1)) { try server.receive(&byte, 1) }
    let bytes = [UInt8](repeating: 0, count: 16 << 20)
    #expect(throws: TLSError.stalled(seconds: 1)) { try server.send(bytes, bytes.count) }
    withExtendedLifetime(client) {}
  }

  /// A record that is cut, changed, repeated or left out is an error; what came before is right.
  @Test(arguments: ["cut", "changed", "repeated", "missing", "garbage", "plain"])
  func recordsThatAreNotOfTheSessionAreErrors(how: String) throws {
    let pair = try Pair()
    let (client, server) = try established(pair)
    var records: [[UInt8]] = []
    for number in 0..<3 {
      var byte = UInt8(number)
      try client.send(&byte, 1)
      var record = [UInt8](repeating: 0, count: 100)
      let count = recv(pair.server.rawValue, &record, record.count, Int32(MSG_DONTWAIT))
      try #require(count > 20)
      records.append(Array(record[..<count]))
    }
    switch how {
    case "cut": records = [records[0], Array(records[1].dropLast())]
    case "changed": records[1][10] ^= 1
    case "repeated": records[1] = records[0]
    case "missing": records.remove(at: 1)
    case "garbage": records[1] = records[1].map { ~$0 }
    default: records[1] = Array("SWVMMIGR and more of the like".utf8)
    }
    for record in records { try #require(send(pair.client.rawValue, record, record.count, 0) == record.count) }
    shutdown(pair.client.rawValue, Int32(SHUT_WR))
    var byte: UInt8 = 9
    try server.receive(&byte, 1)
    #expect(byte == 0)
    for _ in 0..<2 {
      do throws(TLSError) {
        try server.receive(&byte, 1)
        Issue.record("it was taken")
      } catch {
        if how == "cut" {
          #expect(error == .closed)
        } else if case .malformed = error {
        } else {
          Issue.record("\(error)")
        }
      }
    }
  }
}
