import Glibc

/// Where a server listens or a client connects: a unix socket's path, or a TCP host and port.
public enum StreamEndpoint: Equatable, Sendable, CustomStringConvertible {
  /// The longest path of a unix socket in bytes: `sun_path` less its terminator.
  public static let longestPath = 107

  /// A unix socket.
  case unix(path: String)
  /// A TCP port; the host is a name or a numeric address, IPv6 without its brackets.
  case tcp(host: String, port: UInt16)

  /// Reads `unix:PATH`, `tcp:HOST:PORT` or `HOST:PORT`; a HOST left out is the loopback address, `[HOST]` is IPv6.
  ///
  /// - Throws: `HostError.endpoint` for anything else.
  public init(_ text: String) throws(HostError) {
    if text.hasPrefix("unix:") {
      let path = String(text.dropFirst(5))
      guard !path.isEmpty, !path.utf8.contains(0) else { throw .endpoint(text) }
      guard path.utf8.count <= Self.longestPath else { throw .socketPathTooLong(path: path, limit: Self.longestPath) }
      self = .unix(path: path)
      return
    }
    let rest = text.hasPrefix("tcp:") ? text.dropFirst(4) : text[...]
    guard let colon = rest.lastIndex(of: ":"), let port = UInt16(rest[rest.index(after: colon)...]) else {
      throw .endpoint(text)
    }
    var host = rest[..<colon]
    if host.hasPrefix("["), host.hasSuffix("]") {
      host = host.dropFirst().dropLast()
    } else if host.contains(":") {
      throw .endpoint(text)
    }
    self = .tcp(host: host.isEmpty ? "127.0.0.1" : String(host), port: port)
  }

  /// As the command line has it.
  public var description: String {
    switch self {
    case .unix(let path): "unix:\(path)"
    case .tcp(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
    }
  }

  /// Connects a new blocking stream socket.
  public func connect() throws(HostError) -> FileDescriptor {
    switch self {
    case .unix(let path):
      let socket = try Self.makeSocket(AF_UNIX)
      var address = sockaddr_un(path: path)
      let result = withSocketAddress(&address) { pointer, length in Glibc.connect(socket.rawValue, pointer, length) }
      guard result == 0 else { throw .path("connect to", path: path, errno: errno) }
      return socket
    case .tcp:
      return try eachAddress { (family, address, length) throws(HostError) in
        let socket = try Self.makeSocket(family)
        guard Glibc.connect(socket.rawValue, address, length) == 0 else {
          throw .path("connect to", path: description, errno: errno)
        }
        disableDelay(socket)
        return socket
      }
    }
  }

  /// Connects a new non-blocking stream socket to a unix socket's server, or fails at once; EAGAIN where too many wait there.
  public func connectAtOnce() throws(HostError) -> FileDescriptor {
    guard case .unix(let path) = self else { throw .endpoint(description) }
    let socket = try Self.makeSocket(AF_UNIX)
    _ = try check("fcntl(F_SETFL)", fcntl(socket.rawValue, F_SETFL, O_NONBLOCK))
    var address = sockaddr_un(path: path)
    let result = withSocketAddress(&address) { pointer, length in Glibc.connect(socket.rawValue, pointer, length) }
    guard result == 0 else { throw .path("connect to", path: path, errno: errno) }
    return socket
  }

  static func makeSocket(_ family: Int32) throws(HostError) -> FileDescriptor {
    FileDescriptor(
      owning: try check("socket", socket(family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)))
  }

  /// Tries `body` on each address of a TCP endpoint until one does not throw; the last error is thrown.
  func eachAddress(
    _ body: (Int32, UnsafePointer<sockaddr>, socklen_t) throws(HostError) -> FileDescriptor
  ) throws(HostError) -> FileDescriptor {
    guard case .tcp(let host, let port) = self else { throw .endpoint(description) }
    var hints = addrinfo()
    hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
    hints.ai_flags = AI_NUMERICSERV
    var list: UnsafeMutablePointer<addrinfo>?
    let code = getaddrinfo(host, String(port), &hints, &list)
    guard code == 0 else { throw .lookup(host: host, reason: String(cString: gai_strerror(code))) }
    defer { freeaddrinfo(list) }
    var failure = HostError.lookup(host: host, reason: "no address")
    var next = list
    while let entry = next {
      next = entry.pointee.ai_next
      guard let address = entry.pointee.ai_addr else { continue }
      do throws(HostError) {
        return try body(entry.pointee.ai_family, address, entry.pointee.ai_addrlen)
      } catch {
        failure = error
      }
    }
    throw failure
  }
}

/// Sends small packets at once: the debugger's protocol is a conversation.
func disableDelay(_ socket: borrowing FileDescriptor) {
  var on: Int32 = 1
  setsockopt(socket.rawValue, Int32(IPPROTO_TCP), TCP_NODELAY, &on, socklen_t(MemoryLayout<Int32>.size))
}

extension sockaddr_un {
  /// The address of a path, which `StreamEndpoint` has checked to fit.
  init(path: String) {
    self.init()
    sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &sun_path) { $0.copyBytes(from: path.utf8.prefix(StreamEndpoint.longestPath)) }
  }
}

func withSocketAddress<Address, Result>(
  _ address: inout Address, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result
) -> Result {
  withUnsafePointer(to: &address) { pointer in
    pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(MemoryLayout<Address>.size)) }
  }
}
