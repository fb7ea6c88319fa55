import CLinux
import Glibc

/// A listening stream socket. A unix socket's file is this process's user's alone (mode 0600) and goes with its owner.
public struct StreamListener: ~Copyable, Sendable {
  /// The listening socket, blocking, close-on-exec.
  public let descriptor: FileDescriptor
  /// Where it listens; a TCP port of 0 has become the one the kernel chose.
  public let endpoint: StreamEndpoint
  private let file: (device: dev_t, inode: ino_t)?

  /// Listens.
  ///
  /// A unix socket's file that no server answers on any more is replaced.
  /// - Throws: `socketInUse` where a server answers, `notASocket` where the path is a file of another kind.
  public init(_ endpoint: StreamEndpoint) throws(HostError) {
    let socket: FileDescriptor
    switch endpoint {
    case .unix(let path): socket = try Self.bind(path)
    case .tcp:
      socket = try endpoint.eachAddress { (family, address, length) throws(HostError) in
        let socket = try StreamEndpoint.makeSocket(family)
        var on: Int32 = 1
        setsockopt(socket.rawValue, SOL_SOCKET, SO_REUSEADDR, &on, socklen_t(MemoryLayout<Int32>.size))
        guard Glibc.bind(socket.rawValue, address, length) == 0 else {
          throw errno == EADDRINUSE ? .socketInUse(endpoint) : .path("listen on", path: "\(endpoint)", errno: errno)
        }
        return socket
      }
    }
    _ = try check("listen", listen(socket.rawValue, 16))
    self.endpoint = endpoint.withPort(of: socket)
    file = Self.file(endpoint)
    descriptor = socket
  }

  deinit {
    guard case .unix(let path) = endpoint, let file, let now = Self.file(endpoint), now == file else { return }
    unlink(path)
  }

  /// Waits for a client.
  public borrowing func accept() throws(HostError) -> FileDescriptor {
    while true {
      let client = clinux_accept(descriptor.rawValue)
      if client >= 0 {
        let client = FileDescriptor(owning: client)
        if case .tcp = endpoint { disableDelay(client) }
        return client
      }
      if errno != EINTR && errno != ECONNABORTED { throw .systemCall("accept", errno: errno) }
    }
  }

  private static func bind(_ path: String) throws(HostError) -> FileDescriptor {
    let socket = try StreamEndpoint.makeSocket(AF_UNIX)
    // The mode of the socket before bind is the mode of the file: it is never open to others, not even for a moment.
    _ = try check("fchmod", fchmod(socket.rawValue, 0o600))
    var code = bind(socket, path)
    if code == EADDRINUSE {
      var status = stat()
      if lstat(path, &status) == 0 {
        guard status.st_mode & S_IFMT == S_IFSOCK else { throw .notASocket(path: path) }
        guard try isStale(path) else { throw .socketInUse(.unix(path: path)) }
        unlink(path)
      }
      code = bind(socket, path)
    }
    guard code == 0 else { throw .path("listen on", path: path, errno: code) }
    return socket
  }

  /// Whether nobody listens on the socket; one whose queue is full is alive.
  private static func isStale(_ path: String) throws(HostError) -> Bool {
    let socket = try StreamEndpoint.makeSocket(AF_UNIX)
    _ = try check("fcntl(F_SETFL)", fcntl(socket.rawValue, F_SETFL, O_NONBLOCK))
    var address = sockaddr_un(path: path)
    let descriptor = socket.rawValue
    return withSocketAddress(&address) { connect(descriptor, $0, $1) < 0 && errno == ECONNREFUSED }
  }

  /// 0 or `errno`.
  private static func bind(_ socket: borrowing FileDescriptor, _ path: String) -> Int32 {
    var address = sockaddr_un(path: path)
    let descriptor = socket.rawValue
    return withSocketAddress(&address) { Glibc.bind(descriptor, $0, $1) == 0 ? 0 : errno }
  }

  private static func file(_ endpoint: StreamEndpoint) -> (device: dev_t, inode: ino_t)? {
    guard case .unix(let path) = endpoint else { return nil }
    var status = stat()
    return lstat(path, &status) == 0 ? (status.st_dev, status.st_ino) : nil
  }
}

extension StreamEndpoint {
  /// A TCP endpoint with the port that its socket has.
  fileprivate func withPort(of socket: borrowing FileDescriptor) -> StreamEndpoint {
    guard case .tcp(let host, _) = self else { return self }
    var address = sockaddr_storage()
    var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
    let descriptor = socket.rawValue
    let result = withUnsafeMutablePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(descriptor, $0, &length) }
    }
    guard result == 0 else { return self }
    // The port is at the same place in sockaddr_in and sockaddr_in6.
    let port = withUnsafeBytes(of: &address) { UInt16(bigEndian: $0.load(fromByteOffset: 2, as: UInt16.self)) }
    return .tcp(host: host, port: port)
  }
}
