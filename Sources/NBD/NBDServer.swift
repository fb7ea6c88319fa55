import BlockLayer
import Glibc
import Host
import TLS

/// An NBD server for nodes of one `IOThread`. It belongs to that thread and does all of its work there: what a client
/// sends goes to the node, and what the node answers to the client, without a change of threads.
public final class NBDServer: @unchecked Sendable {
  /// What happens to a server's clients.
  public enum Event: Sendable {
    /// One more; so many are connected now.
    case connected(Int)
    /// One less.
    case disconnected(Int)
    /// One was turned away, for its TLS.
    case refused(TLSError)
  }

  /// How long a client may take for its options, nanoseconds.
  private static let handshakeTime: UInt64 = 10_000_000_000

  private let thread: IOThread
  private let listener: StreamListener
  /// Clients at a time; the next one waits until one has left. 0 for no limit.
  private let clientLimit: Int
  private let credentials: TLSCredentials?
  private let table = ExportTable()
  private let pool = BufferPool()
  private var connections: [NBDConnection] = []
  /// Connections that have something to send or have ended.
  private var ready: [NBDConnection] = []
  private var accepts = false
  private var isStopped = false
  private var isPumping = false
  private var onEvent: (Event) -> Void

  /// Serves clients of `listener` once `start` has been called; with `credentials`, by TLS only.
  ///
  /// `onEvent` is called on the thread.
  public init(
    _ listener: consuming StreamListener, on thread: IOThread, clientLimit: Int = 0, credentials: TLSCredentials? = nil,
    onEvent: @escaping (Event) -> Void = { _ in }
  ) throws(NBDError) {
    self.thread = thread
    self.clientLimit = clientLimit
    self.credentials = credentials
    self.onEvent = onEvent
    _ = fcntl(listener.descriptor.rawValue, F_SETFL, O_NONBLOCK)
    self.listener = listener
  }

  /// Where it listens.
  public var endpoint: StreamEndpoint { listener.endpoint }

  /// The exports, in the order in which they were added. On the thread.
  public var exports: [NBDExport] { table.exports }

  /// Clients that are connected. On the thread.
  public var clientCount: Int { connections.count }

  /// Takes clients from now on. On the thread, or before it runs.
  public func start() throws(NBDError) {
    thread.addObserver(self) { [unowned self] in pump() }
    setAccepting(true)
  }

  /// Offers a disk. On the thread, or before it runs.
  public func add(_ export: NBDExport) throws(NBDError) {
    guard table.export(named: export.name) == nil else { throw .exportExists(export.name) }
    table.exports.append(export)
  }

  /// How many clients use an export. On the thread.
  public func clientCount(of name: String) -> Int { connections.count { $0.session.export?.name == name } }

  /// Offers a disk no longer and drops its clients; returns when no request of theirs is under way. On the thread.
  public func remove(_ name: String) throws(NBDError) {
    guard let index = table.exports.firstIndex(where: { $0.name == name }) else { throw .exportUnknown(name) }
    table.exports.remove(at: index)
    end(connections.filter { $0.session.export?.name == name })
  }

  /// Drops every client and takes no more; returns when no request of theirs is under way. On the thread, or after it.
  public func stop() {
    isStopped = true
    setAccepting(false)
    thread.removeObserver(self)
    table.exports = []
    end(connections)
  }

  private func end(_ ending: [NBDConnection]) {
    let sessions = ending.map(\.session)
    for connection in ending { close(connection) }
    thread.queue.run { sessions.allSatisfy { $0.inFlight == 0 } }
  }

  // MARK: Clients

  private func setAccepting(_ wanted: Bool) {
    guard wanted != accepts, !wanted || !isStopped else { return }
    accepts = wanted
    if wanted {
      // A loop that cannot watch the listener has run out of memory: there are no new clients then.
      try? thread.loop.add(listener.descriptor.rawValue, .readable) { [weak self] _ in self?.accept() }
    } else {
      thread.loop.remove(listener.descriptor.rawValue)
    }
  }

  private func accept() {
    let socket: FileDescriptor
    do throws(HostError) {
      socket = try listener.accept()
    } catch {
      if error.errno != EAGAIN { restAccepting() }
      return
    }
    let connection = NBDConnection(
      socket, ServerSession(table: table, pool: pool, requiresTLS: credentials != nil))
    connection.session.onOutput = { [unowned self, unowned connection] in note(connection) }
    let deadline = thread.loop.makeTimer { [weak self, weak connection] in
      guard let self, let connection, !connection.session.isNegotiated else { return }
      close(connection)
    }
    deadline.arm(at: monotonicNanoseconds() + Self.handshakeTime)
    connection.deadline = deadline
    do throws(HostError) {
      try thread.loop.add(connection.socket.rawValue, .readable) { [weak self, weak connection] what in
        guard let self, let connection else { return }
        serve(connection, what)
      }
    } catch {
      return
    }
    connections.append(connection)
    onEvent(.connected(connections.count))
    if clientLimit > 0, connections.count >= clientLimit { setAccepting(false) }
    note(connection)
    pump()
  }

  /// A host that is out of descriptors would call for every turn of the loop.
  private func restAccepting() {
    setAccepting(false)
    let timer = thread.loop.makeTimer { [weak self] in
      guard let self else { return }
      if clientLimit == 0 || connections.count < clientLimit { setAccepting(true) }
    }
    timer.arm(at: monotonicNanoseconds() + 100_000_000)
  }

  private func note(_ connection: NBDConnection) {
    guard !connection.isReady else { return }
    connection.isReady = true
    ready.append(connection)
  }

  private func serve(_ connection: NBDConnection, _ what: EventLoop.Interest) {
    if what.contains(.writable) || connection.session.isOver { note(connection) }
    if !what.isDisjoint(with: [.readable, .failed]) {
      // A hang-up is told for ever: one whose requests are not wanted now is no use waiting for.
      let isGone = !what.isDisjoint(with: .failed) && !connection.wantsInput
      if isGone || !receive(connection) { connection.session.drop() }
      note(connection)
    }
    // Completes what can be done at once, and sends it.
    thread.poll()
    pump()
  }

  private func receive(_ connection: NBDConnection) -> Bool {
    do throws(TLSError) {
      return try connection.receive()
    } catch {
      if !connection.isEncrypted { onEvent(.refused(error)) }
      return false
    }
  }

  /// Sends what is there, which lets waiting requests begin, until nothing can go on.
  private func pump() {
    guard !isPumping else { return }
    isPumping = true
    while let connection = ready.popLast() {
      connection.isReady = false
      if !connection.send() || !startTLS(connection) { connection.session.drop() }
      if connection.isOver {
        close(connection)
      } else {
        watch(connection)
      }
      if ready.isEmpty { thread.queue.poll() }
    }
    isPumping = false
  }

  /// False where it cannot be.
  private func startTLS(_ connection: NBDConnection) -> Bool {
    guard let credentials, connection.session.wantsTLS, connection.tls == nil else { return true }
    connection.tls = try? TLSSession(credentials, over: connection.socket.rawValue)
    return connection.tls != nil
  }

  private func watch(_ connection: NBDConnection) {
    var interest: EventLoop.Interest = []
    if connection.wantsInput { interest.insert(.readable) }
    if connection.hasOutput { interest.insert(.writable) }
    if connection.wantsInput, connection.mayHaveMore, !connection.isExpected {
      // The socket will not tell of what has been read from it already.
      connection.isExpected = true
      thread.loop.execute { [weak self, weak connection] in
        guard let self, let connection else { return }
        connection.isExpected = false
        serve(connection, .readable)
      }
    }
    guard interest != connection.interest else { return }
    connection.interest = interest
    try? thread.loop.modify(connection.socket.rawValue, interest)
  }

  private func close(_ connection: NBDConnection) {
    guard let index = connections.firstIndex(where: { $0 === connection }) else { return }
    connections.remove(at: index)
    connection.deadline?.cancel()
    connection.session.onOutput = {}
    connection.session.drop()
    thread.loop.remove(connection.socket.rawValue)
    connection.tls?.sayGoodbye()
    // The peer learns of it now, even where requests under way keep the connection's memory.
    shutdown(connection.socket.rawValue, Int32(SHUT_RDWR))
    onEvent(.disconnected(connections.count))
    if clientLimit == 0 || connections.count < clientLimit { setAccepting(true) }
  }
}

/// A client's socket and session.
private final class NBDConnection: @unchecked Sendable {
  /// Bytes that one turn reads, so that a client that always sends leaves others their turn.
  private static let turn = 1 << 20
  private static let vectors = 64

  let socket: FileDescriptor
  let session: ServerSession
  var interest: EventLoop.Interest = .readable
  var isReady = false
  var deadline: EventLoop.Timer?
  /// From the moment in which its handshake may begin.
  var tls: TLSSession?
  /// Bytes that have come may lie in `tls`.
  private(set) var mayHaveMore = false
  /// It will be served soon, whatever the socket says.
  var isExpected = false
  private(set) var isEncrypted = false

  init(_ socket: consuming FileDescriptor, _ session: ServerSession) {
    // Room for several replies of the usual 256 KiB: each change from one side to the other costs more than the bytes.
    var size: Int32 = 2 << 20
    setsockopt(socket.rawValue, SOL_SOCKET, SO_SNDBUF, &size, socklen_t(MemoryLayout<Int32>.size))
    self.socket = socket
    self.session = session
  }

  var wantsInput: Bool { tls != nil && !isEncrypted || session.wantsInput }

  var hasOutput: Bool { tls?.hasOutput ?? false || !session.output.isEmpty }

  /// Whether it is to be closed.
  var isOver: Bool { session.isOver && (session.isDropped || !hasOutput) }

  /// Takes what the client has sent; false where it is gone.
  func receive() throws(TLSError) -> Bool {
    if let tls { return try receive(tls) }
    var taken = 0
    while session.wantsInput, taken < Self.turn {
      let space = session.space
      let count = recv(socket.rawValue, space.baseAddress, space.count, Int32(MSG_DONTWAIT))
      if count < 0 {
        if errno == EINTR { continue }
        return errno == EAGAIN
      }
      if count == 0 { return false }
      session.received(count)
      taken += count
      if count < space.count { break }
    }
    return true
  }

  private func receive(_ tls: TLSSession) throws(TLSError) -> Bool {
    if !isEncrypted, !session.isDropped {
      do throws(TLSError) {
        isEncrypted = try tls.advanceHandshake()
      } catch {
        // The client is to know why.
        _ = try? tls.flush()
        throw error
      }
      guard isEncrypted else { return true }
      session.startEncrypted()
    }
    var taken = 0
    mayHaveMore = true
    while session.wantsInput, taken < Self.turn {
      let space = session.space
      guard let start = space.baseAddress else { return false }
      guard let count = try tls.read(start, space.count) else {
        mayHaveMore = false
        break
      }
      if count == 0 { return false }
      session.received(count)
      taken += count
    }
    return true
  }

  private func send(_ tls: TLSSession) -> Bool {
    withUnsafeTemporaryAllocation(of: iovec.self, capacity: Self.vectors) { vectors in
      guard let start = vectors.baseAddress else { return false }
      do throws(TLSError) {
        while try tls.flush(), isEncrypted, !session.output.isEmpty {
          session.sent(try tls.encrypt(start, session.output.fill(vectors)))
        }
        return true
      } catch {
        return false
      }
    }
  }

  /// Sends as much as the socket takes; false where the client is gone.
  func send() -> Bool {
    if let tls { return send(tls) }
    return withUnsafeTemporaryAllocation(of: iovec.self, capacity: Self.vectors) { vectors in
      while !session.output.isEmpty {
        var message = msghdr()
        message.msg_iov = vectors.baseAddress
        message.msg_iovlen = session.output.fill(vectors)
        let count = sendmsg(socket.rawValue, &message, Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
        if count < 0 {
          if errno == EINTR { continue }
          return errno == EAGAIN
        }
        session.sent(count)
      }
      return true
    }
  }
}
