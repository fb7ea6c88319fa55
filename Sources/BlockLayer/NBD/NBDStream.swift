import CLinux
import Glibc
import Host
import TLS

/// A client's connection, which waits: plain, or by TLS from `startTLS` on. One thread may send while another receives.
final class NBDStream: @unchecked Sendable {
  private let socket: FileDescriptor
  private let path: String
  /// Set before a second thread has the stream.
  private var tls: TLSSession?

  /// A connected socket; `path` is what errors name.
  init(_ socket: consuming FileDescriptor, path: String) {
    self.socket = socket
    self.path = path
  }

  /// How long each transfer may wait, in seconds; 0 for as long as it takes.
  func setPatience(_ seconds: Int) {
    var limit = timeval(tv_sec: seconds, tv_usec: 0)
    for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
      setsockopt(socket.rawValue, SOL_SOCKET, option, &limit, socklen_t(MemoryLayout<timeval>.size))
    }
    tls?.setPatience(seconds)
  }

  /// Goes on by TLS.
  func startTLS(_ credentials: TLSCredentials, hostName: String?) throws(TLSError) {
    let session = try TLSSession(credentials, over: socket.rawValue, hostName: hostName)
    try session.handshake()
    tls = session
  }

  /// Ends the connection for whoever waits.
  func shut() { shutdown(socket.rawValue, Int32(SHUT_RDWR)) }

  /// The same, having said so to a server with TLS.
  func end() {
    tls?.sayGoodbye()
    shut()
  }

  func send(_ bytes: [UInt8]) throws(BlockError) {
    let outcome = bytes.withUnsafeBytes { buffer in
      var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: buffer.baseAddress), iov_len: buffer.count)
      return Result { () throws(BlockError) in try send(&vector, 1) }
    }
    try outcome.get()
  }

  /// Sends all of the vectors, which it may change.
  func send(_ vectors: UnsafeMutablePointer<iovec>, _ count: Int) throws(BlockError) {
    if let tls {
      do throws(TLSError) { try tls.send(vectors: vectors, count) } catch { throw failure(error, "write to") }
    } else {
      let socket = socket.rawValue
      let code = Self.transfer(vectors, count) { sendmsg(socket, $0, Int32(MSG_NOSIGNAL)) }
      if code != 0 { throw failure(code, "write to") }
    }
  }

  func receive(_ count: Int) throws(BlockError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    let outcome = bytes.withUnsafeMutableBytes { buffer in
      var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
      return Result { () throws(BlockError) in try receive(&vector, 1) }
    }
    try outcome.get()
    return bytes
  }

  /// Fills all of the vectors, which it may change.
  func receive(_ vectors: UnsafeMutablePointer<iovec>, _ count: Int) throws(BlockError) {
    if let tls {
      do throws(TLSError) {
        for vector in UnsafeBufferPointer(start: vectors, count: count) {
          if let base = vector.iov_base { try tls.receive(base, vector.iov_len) }
        }
      } catch {
        throw failure(error, "read from")
      }
    } else {
      let socket = socket.rawValue
      let code = Self.transfer(vectors, count) { recvmsg(socket, $0, 0) }
      if code != 0 { throw failure(code, "read from") }
    }
  }

  private func failure(_ error: TLSError, _ call: String) -> BlockError {
    switch error {
    case .closed: failure(ECONNRESET, call)
    case .stalled: failure(EAGAIN, call)
    case .socket(let error): failure(error.errno, call)
    default: .remote(uri: path, .tls(error))
    }
  }

  private func failure(_ code: Int32, _ call: String) -> BlockError {
    switch code {
    case ECONNRESET, EPIPE: .remote(uri: path, .closed)
    case EAGAIN: .io(call: call, path: path, errno: ETIMEDOUT)
    default: .io(call: call, path: path, errno: code)
    }
  }

  /// Moves all of the vectors' bytes; returns 0 or an `errno`.
  private static func transfer(
    _ vectors: UnsafeMutablePointer<iovec>, _ count: Int, _ body: (UnsafeMutablePointer<msghdr>) -> Int
  ) -> Int32 {
    var index = 0
    while index < count {
      if vectors[index].iov_len == 0 {
        index += 1
        continue
      }
      var message = msghdr()
      message.msg_iov = vectors + index
      message.msg_iovlen = min(count - index, 1024)
      var moved = body(&message)
      if moved < 0 {
        if errno == EINTR { continue }
        return errno
      }
      // Something was asked for: nothing means that the peer is gone.
      if moved == 0 { return ECONNRESET }
      while moved > 0 {
        let part = min(moved, vectors[index].iov_len)
        vectors[index].iov_base = vectors[index].iov_base.map { $0 + part }
        vectors[index].iov_len -= part
        moved -= part
        if vectors[index].iov_len == 0 { index += 1 }
      }
    }
    return 0
  }
}
