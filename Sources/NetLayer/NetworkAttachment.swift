/// Where a network device or a switch's port is attached to, as the command line names it.
public enum NetworkAttachment: Equatable, Sendable, CustomStringConvertible {
  /// A TAP interface.
  case tap(name: String)
  /// The unix socket of a switch, or of QEMU's `-netdev stream`.
  case stream(path: String)

  /// Reads `tap=NAME`, `switch=PATH` or `switch=unix:PATH`.
  public init(_ text: String) throws(NetworkError) {
    if text.hasPrefix("tap=") {
      self = .tap(name: String(text.dropFirst(4)))
    } else if text.hasPrefix("switch=") {
      let path = text.dropFirst(7)
      self = .stream(path: String(path.hasPrefix("unix:") ? path.dropFirst(5) : path))
    } else {
      throw .attachment(text)
    }
  }

  /// As the command line has it.
  public var description: String {
    switch self {
    case .tap(let name): "tap=\(name)"
    case .stream(let path): "switch=\(path)"
    }
  }

  /// The backend of a device that is attached there.
  public func makeBackend() throws(NetworkError) -> any NetworkBackend {
    switch self {
    case .tap(let name): try TapBackend(name: name)
    case .stream(let path): StreamBackend(path: path)
    }
  }
}
