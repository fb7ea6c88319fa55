import COpenSSL
import Glibc
import Host
import Synchronization

/// TLS 1.2 or 1.3 over a connected stream socket, which its owner keeps open for as long.
///
/// One thread may send while another receives: the library's own object is behind a lock that nobody holds while it waits for
/// the socket. Whoever waits ends where the socket is shut down. For an event loop there are `read`, `encrypt` and `flush`,
/// which never wait.
public final class TLSSession: @unchecked Sendable {
  /// Seconds that a handshake may take, unless told.
  public static let handshakeTime = 10

  /// Bytes that are encrypted before they are sent.
  private static let piece = 128 << 10

  private struct State: @unchecked Sendable {
    let ssl: OpaquePointer
    let wire: Wire
    var isEstablished = false
    /// Why nothing goes on.
    var failure: TLSError?
    /// Bytes since the key was new.
    var encrypted: UInt64 = 0
  }

  private struct Spare: @unchecked Sendable {
    var buffer = CipherBuffer()
  }

  private let socket: Int32
  private let credentials: TLSCredentials
  private let host: String
  private let rekeyAfter: UInt64
  private let state: Mutex<State>
  /// Held by whoever sends: records go in the order in which they were made.
  private let sending = Mutex(Spare())
  private let patience = Atomic<Int>(0)

  /// A session that begins with a handshake over a connected stream socket. `hostName` is the name or address that a server's
  /// certificate must have; `rekeyAfter` is how many bytes one key encrypts (RFC 8446, 5.5, allows ten times as many).
  public init(
    _ credentials: TLSCredentials, over socket: Int32, hostName: String? = nil, rekeyAfter: UInt64 = 32 << 30
  ) throws(TLSError) {
    let wire = Wire(socket)
    guard let ssl = SSL_new(credentials.context), let bio = wire.makeBIO() else { throw OpenSSL.failure() }
    SSL_set_bio(ssl, bio, bio)
    self.socket = socket
    self.credentials = credentials
    self.rekeyAfter = rekeyAfter
    host = hostName ?? ""
    state = Mutex(State(ssl: ssl, wire: wire))
    if credentials.endpoint == .server {
      SSL_set_accept_state(ssl)
    } else {
      SSL_set_connect_state(ssl)
      guard Self.expect(host, ssl) || !credentials.verifiesPeer else { throw .noHostName }
    }
  }

  deinit { state.withLock { SSL_free($0.ssl) } }

  /// Has the server's certificate be compared with a name or an address.
  private static func expect(_ host: String, _ ssl: OpaquePointer) -> Bool {
    guard !host.isEmpty else { return false }
    // False where it is no address.
    if X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host) == 1 { return true }
    SSL_set_hostflags(ssl, UInt32(X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS))
    return copenssl_set_server_name(ssl, host) == 1 && SSL_set1_host(ssl, host) == 1
  }

  /// Seconds without any progress after which sending or receiving fails; 0 for as long as it takes.
  public func setPatience(_ seconds: Int) { patience.store(seconds, ordering: .relaxed) }

  /// As `TLSv1.3`; for people.
  public var version: String { state.withLock { String(cString: SSL_get_version($0.ssl)) } }

  // MARK: Without waiting

  /// Goes on with the handshake; true once it is done. What it has to say is sent by `flush`.
  public func advanceHandshake() throws(TLSError) -> Bool {
    try state.withLock { state throws(TLSError) in
      if let failure = state.failure { throw failure }
      ERR_clear_error()
      let result = SSL_do_handshake(state.ssl)
      if result == 1 {
        state.isEstablished = true
        return true
      }
      _ = try outcome(result, &state)
      return false
    }
  }

  /// Receives some bytes; nil where there are none now, 0 where the other side has said that there are no more.
  public func read(_ start: UnsafeMutableRawPointer, _ count: Int) throws(TLSError) -> Int? {
    try state.withLock { state throws(TLSError) in
      if let failure = state.failure { throw failure }
      ERR_clear_error()
      let got = SSL_read(state.ssl, start, Int32(clamping: count))
      return got > 0 ? Int(got) : try outcome(got, &state)
    }
  }

  /// Encrypts as much of the vectors as is good to send at a time; returns how many bytes.
  public func encrypt(_ vectors: UnsafePointer<iovec>, _ count: Int) throws(TLSError) -> Int {
    try state.withLock { state throws(TLSError) in try encrypt(vectors, count, from: 0, &state) }
  }

  /// Whether something waits to be sent.
  public var hasOutput: Bool { state.withLock { !$0.wire.output.isEmpty } }

  /// Sends as much as the socket takes; true where nothing is left.
  @discardableResult
  public func flush() throws(TLSError) -> Bool {
    try state.withLock { state throws(TLSError) in try push(state.wire.output) }
  }

  /// Says that nothing more will be sent, if the socket takes it now.
  public func sayGoodbye() {
    state.withLock { state in
      if state.failure == nil, state.isEstablished { SSL_shutdown(state.ssl) }
      _ = try? push(state.wire.output)
    }
  }

  // MARK: Waiting

  /// Goes through the handshake.
  public func handshake(within seconds: Int = TLSSession.handshakeTime) throws(TLSError) {
    let deadline = monotonicNanoseconds() + UInt64(seconds) * 1_000_000_000
    func waitUntilDeadline(_ event: Int32) throws(TLSError) {
      let now = monotonicNanoseconds()
      guard now < deadline, try wait(event, milliseconds: Int32((deadline - now) / 1_000_000) + 1) else {
        throw .handshakeTime(seconds: seconds)
      }
    }
    do throws(TLSError) {
      while true {
        let isDone = try advanceHandshake()
        while try !flush() { try waitUntilDeadline(POLLOUT) }
        if isDone { return }
        try waitUntilDeadline(POLLIN)
      }
    } catch {
      if error == .closed {
        let reason = lastWord()
        throw reason == .closed ? .closedInHandshake : reason
      }
      // The other side is to know why.
      _ = try? flush()
      throw error
    }
  }

  /// Sends all of the bytes.
  public func send(_ start: UnsafeRawPointer, _ count: Int) throws(TLSError) {
    var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: start), iov_len: count)
    try send(vectors: &vector, 1)
  }

  /// Sends all bytes of the vectors.
  public func send(vectors: UnsafePointer<iovec>, _ count: Int) throws(TLSError) {
    let total = (0..<count).reduce(0) { $0 + vectors[$1].iov_len }
    try sending.withLock { spare throws(TLSError) in
      var done = 0
      while done < total {
        try state.withLock { state throws(TLSError) in
          done += try encrypt(vectors, count, from: done, &state)
          swap(&state.wire.output, &spare.buffer)
        }
        do throws(TLSError) {
          while try !push(spare.buffer) { try waitForProgress(POLLOUT) }
        } catch {
          throw error == .closed ? lastWord() : error
        }
      }
    }
  }

  /// Who ends a connection may have said why.
  private func lastWord() -> TLSError {
    state.withLock { state in
      var byte: UInt8 = 0
      ERR_clear_error()
      let got = state.failure == nil ? SSL_peek(state.ssl, &byte, 1) : 1
      if got <= 0 { _ = try? outcome(got, &state) }
      return state.failure ?? .closed
    }
  }

  /// Receives exactly so many bytes.
  public func receive(_ start: UnsafeMutableRawPointer, _ count: Int) throws(TLSError) {
    var done = 0
    while done < count {
      guard let got = try read(start + done, count - done) else {
        try waitForProgress(POLLIN)
        continue
      }
      guard got > 0 else { throw .closed }
      done += got
    }
  }

  private func waitForProgress(_ event: Int32) throws(TLSError) {
    let seconds = patience.load(ordering: .relaxed)
    guard try wait(event, milliseconds: seconds == 0 ? -1 : Int32(clamping: seconds * 1000)) else {
      throw .stalled(seconds: seconds)
    }
  }

  /// False where nothing has happened.
  private func wait(_ event: Int32, milliseconds: Int32) throws(TLSError) -> Bool {
    var entry = pollfd(fd: socket, events: Int16(event), revents: 0)
    while true {
      let count = poll(&entry, 1, milliseconds)
      if count >= 0 { return count > 0 }
      if errno != EINTR { throw .socket(.systemCall("poll", errno: errno)) }
    }
  }

  // MARK: Records

  private func encrypt(
    _ vectors: UnsafePointer<iovec>, _ count: Int, from first: Int, _ state: inout State
  ) throws(TLSError) -> Int {
    if let failure = state.failure { throw failure }
    var skip = first
    var done = 0
    for index in 0..<count {
      let length = vectors[index].iov_len
      guard skip < length, let base = vectors[index].iov_base else {
        skip -= length
        continue
      }
      var place = skip
      skip = 0
      while place < length {
        if done >= Self.piece { return done }
        ERR_clear_error()
        let wrote = SSL_write(state.ssl, base + place, Int32(min(length - place, Self.piece - done)))
        guard wrote > 0 else {
          // What is written is only collected: nothing makes it wait.
          _ = try outcome(wrote, &state)
          throw .library(reason: "a record could not be made")
        }
        place += Int(wrote)
        done += Int(wrote)
        renewKey(&state, Int(wrote))
      }
    }
    return done
  }

  private func renewKey(_ state: inout State, _ count: Int) {
    state.encrypted += UInt64(count)
    guard state.encrypted >= rekeyAfter, SSL_version(state.ssl) == TLS1_3_VERSION else { return }
    state.encrypted = 0
    SSL_key_update(state.ssl, SSL_KEY_UPDATE_NOT_REQUESTED)
  }

  /// Sends without waiting; true where nothing is left.
  private func push(_ buffer: CipherBuffer) throws(TLSError) -> Bool {
    while !buffer.isEmpty {
      let sent = Glibc.send(socket, buffer.first, buffer.count, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
      if sent < 0 {
        switch errno {
        case EINTR: continue
        case EAGAIN: return false
        case EPIPE, ECONNRESET: throw .closed
        default: throw .socket(.systemCall("send", errno: errno))
        }
      }
      buffer.removeFirst(sent)
    }
    return true
  }

  /// What a call that has not done its work means: nil to try again, 0 for the end.
  private func outcome(_ result: Int32, _ state: inout State) throws(TLSError) -> Int? {
    switch SSL_get_error(state.ssl, result) {
    case SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE: return nil
    case SSL_ERROR_ZERO_RETURN: return 0
    case SSL_ERROR_SYSCALL:
      let code = state.wire.errno
      let isClosed = [0, EAGAIN, ECONNRESET, EPIPE].contains(code)
      throw fail(isClosed ? closed(state) : .socket(.systemCall("recv", errno: code)), &state)
    default: throw fail(fault(state), &state)
    }
  }

  private func fail(_ error: TLSError, _ state: inout State) -> TLSError {
    state.failure = error
    return error
  }

  private func closed(_ state: State) -> TLSError { state.isEstablished ? .closed : .closedInHandshake }

  private func fault(_ state: State) -> TLSError {
    let code = ERR_peek_error()
    let reason = Int32(ERR_GET_REASON(code))
    switch reason {
    case SSL_R_UNEXPECTED_EOF_WHILE_READING: return closed(state)
    case SSL_R_CERTIFICATE_VERIFY_FAILED:
      let peer: TLSCredentials.Endpoint = credentials.endpoint == .client ? .server : .client
      return .peerCertificate(peer, OpenSSL.certificateFault(SSL_get_verify_result(state.ssl), host: host))
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE: return .noPeerCertificate
    case SSL_R_UNSUPPORTED_PROTOCOL, SSL_R_TLSV1_ALERT_PROTOCOL_VERSION: return .version
    case SSL_AD_REASON_OFFSET..<(SSL_AD_REASON_OFFSET + 256):
      return .refused(alert: OpenSSL.alert(reason - SSL_AD_REASON_OFFSET))
    case SSL_R_WRONG_VERSION_NUMBER, SSL_R_HTTP_REQUEST, SSL_R_HTTPS_PROXY_REQUEST, SSL_R_PACKET_LENGTH_TOO_LONG,
      SSL_R_BAD_RECORD_TYPE:
      return state.isEstablished ? .malformed(reason: OpenSSL.reason(code)) : .notTLS
    default: return .malformed(reason: OpenSSL.reason(code))
    }
  }
}
