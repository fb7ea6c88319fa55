import Glibc
import Host

/// Asks a destination whether it has the machine, after the link was cut at the hand-over.
struct MigrationQuestion {
  enum Answer {
    case taken, notTaken, unknown
  }

  /// How long it is asked again, and how often.
  private static let attempts = 50
  private static let pause: UInt32 = 200_000

  private let endpoint: StreamEndpoint
  private let session: SIMD2<UInt64>
  private let tls: MigrationTLS?

  init(_ endpoint: StreamEndpoint, _ session: SIMD2<UInt64>, _ tls: MigrationTLS?) {
    self.endpoint = endpoint
    self.session = session
    self.tls = tls
  }

  func ask() -> Answer {
    for _ in 0..<Self.attempts {
      do throws(MigrationError) {
        let link = try MigrationLink.connect(endpoint, tls)
        try link.send(MigrationGreeting(.question, session: session).bytes)
        let kind = try link.receiveHeader().kind
        if kind == .taken { return .taken }
        if kind == .notTaken { return .notTaken }
      } catch {
        // On this machine nothing that it has sent can be lost: it has ended before it took the machine over.
        if case .host(let error) = error, case .unix = endpoint, [ECONNREFUSED, ENOENT].contains(error.errno) {
          return .notTaken
        }
      }
      usleep(Self.pause)
    }
    return .unknown
  }
}
