import Glibc

/// Why a host facility failed. Every case carries the call, its subject and `errno` as it was right after the call.
public enum HostError: Error, Equatable, CustomStringConvertible {
  /// A system call on an object without a name failed.
  case systemCall(String, errno: Int32)
  /// A system call on a path failed.
  case path(String, path: String, errno: Int32)
  /// A thread could not be started.
  case thread(name: String, errno: Int32)

  /// One line: what failed, on what, and the system's reason.
  public var description: String {
    switch self {
    case .systemCall(let call, let code): "\(call) failed: \(Self.reason(code))"
    case .path(let call, let path, let code): "cannot \(call) \(path): \(Self.reason(code))"
    case .thread(let name, let code): "cannot start thread \(name): \(Self.reason(code))"
    }
  }

  /// The `errno` behind the failure.
  public var errno: Int32 {
    switch self {
    case .systemCall(_, let code), .path(_, _, let code), .thread(_, let code): code
    }
  }

  /// The system's text for an `errno` value (`strerror`).
  public static func reason(_ code: Int32) -> String {
    String(cString: strerror(code))
  }
}
