import Glibc

/// Why a host facility failed. Every case carries the call, its subject and `errno` as it was right after the call.
public enum HostError: Error, Equatable, CustomStringConvertible {
  /// A system call on an object without a name failed.
  case systemCall(String, errno: Int32)
  /// A system call on a path failed.
  case path(String, path: String, errno: Int32)
  /// A thread could not be started.
  case thread(name: String, errno: Int32)
  /// Text that names no endpoint.
  case endpoint(String)
  /// A unix socket's path that the kernel has no room for.
  case socketPathTooLong(path: String, limit: Int)
  /// Another server answers there.
  case socketInUse(StreamEndpoint)
  /// The path of a unix socket to be made is a file of another kind.
  case notASocket(path: String)
  /// A host's name or address means nothing.
  case lookup(host: String, reason: String)

  /// One line: what failed, on what, and the system's reason.
  public var description: String {
    switch self {
    case .systemCall(let call, let code): "\(call) failed: \(Self.reason(code))"
    case .path(let call, let path, let code): "cannot \(call) \(path): \(Self.reason(code))"
    case .thread(let name, let code): "cannot start thread \(name): \(Self.reason(code))"
    case .endpoint(let text): "'\(text)' is neither unix:PATH nor HOST:PORT"
    case .socketPathTooLong(let path, let limit):
      "the path \(path) has \(path.utf8.count) bytes and a unix socket's at most \(limit); use a shorter one"
    case .socketInUse(let endpoint): "\(endpoint) is in use by another process; choose another or end that one"
    case .notASocket(let path): "\(path) exists and is not a socket; remove it or choose another path"
    case .lookup(let host, let reason): "cannot find host \(host): \(reason)"
    }
  }

  /// The `errno` behind the failure.
  public var errno: Int32 {
    switch self {
    case .systemCall(_, let code), .path(_, _, let code), .thread(_, let code): code
    case .endpoint: EINVAL
    case .socketPathTooLong: ENAMETOOLONG
    case .socketInUse: EADDRINUSE
    case .notASocket: ENOTSOCK
    case .lookup: EADDRNOTAVAIL
    }
  }

  /// The system's text for an `errno` value (`strerror`).
  public static func reason(_ code: Int32) -> String {
    String(cString: strerror(code))
  }
}
