import Glibc
import Host
import Synchronization

/// The remote serial protocol's server: one thread, one debugger at a time, and the next when it has gone.
public final class GDBServer: Sendable {
  /// Seconds that a debugger may leave our output unread before it is dropped.
  private static let patience = 10

  private struct State {
    var stops: [DebugStop] = []
    var isClosed = false
  }

  /// Where it listens.
  public let endpoint: StreamEndpoint
  private let listener: Mutex<StreamListener?>
  private let socket: Int32
  private let target: any DebugTarget
  private let wake: EventNotifier
  private let state = Mutex(State())
  private let thread = Mutex<HostThread?>(nil)

  /// Serves `target` on a socket; its thread starts at once, and the machine stops when a debugger connects.
  public init(_ listener: consuming StreamListener, target: any DebugTarget) throws(HostError) {
    endpoint = listener.endpoint
    socket = listener.descriptor.rawValue
    // A client that leaves between poll and accept must not make accept wait.
    _ = try check("fcntl(F_SETFL)", fcntl(socket, F_SETFL, O_NONBLOCK))
    wake = try EventNotifier()
    self.target = target
    self.listener = Mutex(listener)
    target.observeStops { [weak self] stop in self?.report(stop) }
    let thread = try HostThread(name: "gdb") { [self] in serve() }
    self.thread.withLock { $0 = thread }
  }

  /// Tells the debugger what the target reported before, ends the connection and the thread, and removes a unix socket's
  /// file. Not to be called on the server's own thread, so not by the target.
  public func close() {
    state.withLock { $0.isClosed = true }
    wake.signal()
    thread.withLock { $0.take() }?.join()
    listener.withLock { $0 = nil }
  }

  private func report(_ stop: DebugStop) {
    state.withLock { $0.stops.append(stop) }
    wake.signal()
  }

  private func serve() {
    while waitForInput(socket) {
      _ = takeStops()
      do {
        talk(to: try accept())
      } catch {
        // Without descriptors, for one, the client stays in the queue and poll says so at once, again and again.
        if error.errno != EAGAIN { usleep(100_000) }
      }
    }
  }

  private func accept() throws(HostError) -> FileDescriptor {
    try listener.withLock { (listener: inout StreamListener?) throws(HostError) in
      guard let client = try listener?.accept() else { throw .systemCall("accept", errno: EAGAIN) }
      return client
    }
  }

  private func talk(to client: borrowing FileDescriptor) {
    var limit = timeval(tv_sec: Self.patience, tv_usec: 0)
    setsockopt(client.rawValue, SOL_SOCKET, SO_SNDTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    var session = GDBSession(target)
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      let isOpen = waitForInput(client.rawValue)
      for stop in takeStops() {
        guard send(session.stopped(stop), to: client) else { return session.disconnect() }
      }
      guard isOpen else { return session.disconnect() }
      let count = recv(client.rawValue, &buffer, buffer.count, Int32(MSG_DONTWAIT))
      if count < 0, errno == EAGAIN || errno == EINTR { continue }
      guard count > 0 else { return session.disconnect() }
      let output = session.receive(buffer[..<count])
      guard send(output, to: client) else { return session.disconnect() }
      if output.isOver { return }
    }
  }

  private func send(_ output: GDBSession.Output, to client: borrowing FileDescriptor) -> Bool {
    output.bytes.withUnsafeBytes { bytes in
      do throws(HostError) {
        try client.sendAll(bytes)
        return true
      } catch {
        return false
      }
    }
  }

  private func takeStops() -> [DebugStop] {
    state.withLock { state in
      defer { state.stops = [] }
      return state.stops
    }
  }

  /// Waits for input or for a report; false when the server is to close.
  private func waitForInput(_ descriptor: Int32) -> Bool {
    if state.withLock({ $0.isClosed }) { return false }
    var events = [
      pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: wake.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
    ]
    _ = poll(&events, nfds_t(events.count), -1)
    wake.drain()
    return !state.withLock { $0.isClosed }
  }
}
