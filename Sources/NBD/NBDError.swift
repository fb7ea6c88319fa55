import Host

/// Why the NBD server cannot do what its owner asks.
public enum NBDError: Error, Equatable, CustomStringConvertible {
  /// A name or description that the protocol has no room for.
  case textTooLong(bytes: Int, limit: Int)
  /// An export of that name is there.
  case exportExists(String)
  /// No export has that name.
  case exportUnknown(String)
  /// The host refuses a socket or a descriptor.
  case host(HostError)

  /// One line: what failed, which value, what to do.
  public var description: String {
    switch self {
    case .textTooLong(let bytes, let limit):
      "an export's name or description has \(bytes) bytes and the NBD protocol allows \(limit)"
    case .exportExists(let name): "the NBD server has an export called '\(name)' already; choose another name"
    case .exportUnknown(let name): "the NBD server has no export called '\(name)'"
    case .host(let error): "\(error)"
    }
  }
}
