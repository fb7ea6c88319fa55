import Glibc
import Host
import TLS

/// How the links of a migration are encrypted and who is on their other side.
public struct MigrationTLS: Sendable {
  /// This side's certificates.
  public var credentials: TLSCredentials
  /// Of a source: the name that the destination's certificate must have; nil for its host's.
  public var hostName: String?

  /// What a side uses for all links.
  public init(_ credentials: TLSCredentials, hostName: String? = nil) {
    self.credentials = credentials
    self.hostName = hostName
  }
}

/// One connection of a migration, blocking; `shut` ends whatever waits on it, from any thread.
public final class MigrationLink: @unchecked Sendable {
  /// Seconds without any progress after which a link counts as cut.
  public static let patience = 60

  /// Where pages that are pushed may be waited for.
  static let postCopyRoom: Int32 = 256 << 10

  private let socket: FileDescriptor
  /// Set before a second thread has the link.
  private var tls: TLSSession?

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
    tls?.setPatience(seconds)
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
  public static func connect(
    _ endpoint: StreamEndpoint, _ tls: MigrationTLS? = nil
  ) throws(MigrationError) -> MigrationLink {
    let link: MigrationLink
    do { link = MigrationLink(try endpoint.connect()) } catch { throw .host(error) }
    guard let tls else { return link }
    var host = tls.hostName
    if host == nil, case .tcp(let name, _) = endpoint { host = name }
    try link.startTLS(tls.credentials, hostName: host, within: TLSSession.handshakeTime)
    link.setPatience(patience)
    return link
  }

  /// Takes a source, by TLS alone: one that comes without is told so.
  func accept(_ credentials: TLSCredentials, within seconds: Int) throws(MigrationError) {
    var first: UInt8 = 0
    if recv(socket.rawValue, &first, 1, Int32(MSG_PEEK)) == 1, first == MigrationGreeting.magic[0] {
      try turnAway("it takes machines by TLS alone: use migrate with --tls-creds")
      throw .tls(.notTLS)
    }
    try startTLS(credentials, hostName: nil, within: seconds)
    setPatience(seconds)
  }

  private func startTLS(
    _ credentials: TLSCredentials, hostName: String?, within seconds: Int
  ) throws(MigrationError) {
    do throws(TLSError) {
      let session = try TLSSession(credentials, over: socket.rawValue, hostName: hostName)
      try session.handshake(within: seconds)
      tls = session
    } catch {
      throw Self.failure(error)
    }
  }

  /// Refuses, and waits a moment for the other side to have read it: what a closed socket has not read would cut it off.
  private func turnAway(_ reason: String) throws(MigrationError) {
    try send(.refuse, Array(reason.utf8))
    shutdown(socket.rawValue, Int32(SHUT_WR))
    setPatience(1)
    var rest = [UInt8](repeating: 0, count: 4096)
    while recv(socket.rawValue, &rest, rest.count, 0) > 0 {}
  }

  private static func failure(_ error: TLSError) -> MigrationError {
    switch error {
    case .closed: .closed
    case .stalled(let seconds): .stalled(seconds: seconds)
    case .socket(let error): .host(error)
    default: .tls(error)
    }
  }

  /// Ends the connection for both directions.
  public func shut() { _ = shutdown(socket.rawValue, Int32(SHUT_RDWR)) }

  /// Sends all of the bytes.
  func send(_ start: UnsafeRawPointer, _ count: Int) throws(MigrationError) {
    if let tls {
      do throws(TLSError) { return try tls.send(start, count) } catch { throw Self.failure(error) }
    }
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
    if let tls {
      do throws(TLSError) { return try tls.receive(start, count) } catch { throw Self.failure(error) }
    }
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
