import Glibc
import Host

/// One connection of a migration, blocking; `shut` ends whatever waits on it, from any thread.
public final class MigrationLink: @unchecked Sendable {
  /// Seconds without any progress after which a link counts as cut.
  public static let patience = 60

  /// Where pages that are pushed may be waited for.
  static let postCopyRoom: Int32 = 256 << 10

  private let socket: FileDescriptor

  /// A link over a connected stream socket.
  public init(_ socket: consuming FileDescriptor, patience: Int = MigrationLink.patience) {
    // A link on which nothing has to be said must be seen to be cut, too.
    var numbers: [(Int32, Int32, Int32)] = [(SOL_SOCKET, SO_KEEPALIVE, 1)]
    numbers += [(TCP_KEEPIDLE, 10), (TCP_KEEPINTVL, 5), (TCP_KEEPCNT, 6)].map { (Int32(IPPROTO_TCP), $0, $1) }
    for (level, option, var value) in numbers {
      setsockopt(socket.rawValue, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
    }
    self.socket = socket
    setPatience(patience)
    setRoom(4 << 20)
  }

  /// How many bytes may be on their way: a few batches, so that the two sides work at the same time; fewer where somebody
  /// waits for what comes behind them.
  func setRoom(_ bytes: Int32) {
    var size = bytes
    for option in [SO_RCVBUF, SO_SNDBUF] {
      setsockopt(socket.rawValue, SOL_SOCKET, option, &size, socklen_t(MemoryLayout<Int32>.size))
    }
  }

  /// Changes the seconds without any progress after which it counts as cut.
  func setPatience(_ seconds: Int) {
    var limit = timeval(tv_sec: seconds, tv_usec: 0)
    for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
      setsockopt(socket.rawValue, SOL_SOCKET, option, &limit, socklen_t(MemoryLayout<timeval>.size))
    }
  }

  /// Waits until little of what was sent is still on its way, or for a tenth of a second: what is sent next is there soon.
  func settle() {
    var left: Int32 = 0
    for _ in 0..<1000 where ioctl(socket.rawValue, UInt(TIOCOUTQ), &left) == 0 && left > Self.little { usleep(100) }
  }

  private static let little: Int32 = 64 << 10

  /// Sends bytes that are no record.
  func send(_ bytes: [UInt8]) throws(MigrationError) {
    let outcome = bytes.withUnsafeBytes { buffer in
      Result { () throws(MigrationError) in
        if let start = buffer.baseAddress { try send(start, buffer.count) }
      }
    }
    try outcome.get()
  }

  /// Connects.
  public static func connect(_ endpoint: StreamEndpoint) throws(MigrationError) -> MigrationLink {
    do { return MigrationLink(try endpoint.connect()) } catch { throw .host(error) }
  }

  /// Ends the connection for both directions.
  public func shut() { _ = shutdown(socket.rawValue, Int32(SHUT_RDWR)) }

  /// Sends all of the bytes.
  func send(_ start: UnsafeRawPointer, _ count: Int) throws(MigrationError) {
    var done = 0
    while done < count {
      let sent = Glibc.send(socket.rawValue, start + done, count - done, Int32(MSG_NOSIGNAL))
      if sent < 0 {
        switch errno {
        case EINTR: continue
        case EAGAIN: throw .stalled(seconds: Self.patience)
        case EPIPE, ECONNRESET: throw .closed
        default: throw .host(.systemCall("send", errno: errno))
        }
      }
      done += sent
    }
  }

  /// Receives exactly so many bytes.
  func receive(_ start: UnsafeMutableRawPointer, _ count: Int) throws(MigrationError) {
    var done = 0
    while done < count {
      let got = recv(socket.rawValue, start + done, count - done, 0)
      if got < 0 {
        switch errno {
        case EINTR: continue
        case EAGAIN: throw .stalled(seconds: Self.patience)
        case ECONNRESET: throw .closed
        default: throw .host(.systemCall("recv", errno: errno))
        }
      }
      guard got > 0 else { throw .closed }
      done += got
    }
  }

  /// Sends a record.
  func send(_ kind: MigrationRecord.Kind, _ payload: [UInt8] = []) throws(MigrationError) {
    try send(MigrationRecord.header(kind, count: payload.count) + payload)
  }

  /// Receives the next record's kind and length, which its kind allows.
  func receiveHeader() throws(MigrationError) -> (kind: MigrationRecord.Kind, count: Int) {
    var words: (UInt32, UInt32) = (0, 0)
    let outcome = withUnsafeMutableBytes(of: &words) { buffer in
      Result { () throws(MigrationError) in
        if let start = buffer.baseAddress { try receive(start, buffer.count) }
      }
    }
    try outcome.get()
    guard let kind = MigrationRecord.Kind(rawValue: UInt32(littleEndian: words.0)) else { throw .malformed(.record) }
    let count = Int(UInt32(littleEndian: words.1))
    guard count <= kind.limit else { throw .malformed(.record) }
    return (kind, count)
  }

  /// Receives a payload.
  func receive(count: Int) throws(MigrationError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    let outcome = bytes.withUnsafeMutableBytes { buffer in
      Result { () throws(MigrationError) in
        if let start = buffer.baseAddress { try receive(start, buffer.count) }
      }
    }
    try outcome.get()
    return bytes
  }

  /// Receives an answer of the destination; a refusal is thrown.
  func receiveAnswer(_ wanted: MigrationRecord.Kind) throws(MigrationError) { _ = try receivePayload(of: wanted) }

  /// Receives a record of the destination's; a refusal is thrown.
  func receivePayload(of wanted: MigrationRecord.Kind) throws(MigrationError) -> [UInt8] {
    let (kind, count) = try receiveHeader()
    guard kind == wanted || kind == .refuse else { throw .malformed(.order) }
    let payload = try receive(count: count)
    if kind == .refuse { throw .refused(String(decoding: payload, as: UTF8.self)) }
    return payload
  }
}
