import Host
import StateTree
import TLS

/// Why a machine did not get to another process.
public enum MigrationError: Error, Equatable, CustomStringConvertible {
  /// The host's sockets, memory or threads failed.
  case host(HostError)
  /// The other side has ended the connection.
  case closed
  /// Nothing moved for so long.
  case stalled(seconds: Int)
  /// There is no TLS with the other side.
  case tls(TLSError)
  /// A source that wants TLS has come to a destination without.
  case wantsTLS
  /// What has connected, or answers, does not speak this protocol.
  case notAMigration
  /// The other side speaks another version.
  case version(found: UInt32, known: UInt32)
  /// The other side sent what no source or destination sends.
  case malformed(Part)
  /// The other side has refused, and says why.
  case refused(String)
  /// This machine cannot do it, and says why.
  case machine(String)
  /// A state that cannot be read.
  case state(StateError)
  /// The kernel does not let this process serve its own page faults.
  case needsFaults
  /// It was asked to end.
  case cancelled
  /// The link was cut in the one moment in which nobody can tell which side has the machine.
  case unknownOutcome(StreamEndpoint)

  /// What of a stream is malformed.
  public enum Part: String, Sendable {
    case greeting, record, pages, state, order
  }

  /// One line: what failed, and what to do.
  public var description: String {
    switch self {
    case .host(let error): "\(error)"
    case .closed: "the other side has ended the connection"
    case .stalled(let seconds): "nothing could be sent or received for \(seconds) s: is the other side stopped?"
    case .tls(let error): "\(error)"
    case .wantsTLS: "the source wants TLS, which this destination has not: use --tls-creds on both sides or on none"
    case .notAMigration: "what is on the other side does not speak swiftvmm's migration protocol"
    case .version(let found, let known):
      "the other side speaks version \(found) of the migration protocol, and this program \(known): use one swiftvmm for both"
    case .malformed(let part): "the other side has sent a malformed \(part.rawValue)"
    case .refused(let reason): "the destination refuses: \(reason)"
    case .machine(let reason): reason
    case .state(let error): "\(error)"
    case .needsFaults:
      "post-copy needs userfaultfd(2), which this process may not use: run it as root, or set vm.unprivileged_userfaultfd to 1"
    case .cancelled: "the migration was cancelled"
    case .unknownOutcome(let endpoint):
      "the link to \(endpoint) was cut at the hand-over, and the machine may run there: it stays stopped here; "
        + "if it does not run there, use x-swiftvmm-migrate-reclaim"
    }
  }
}
