import Glibc
import Host
import Synchronization

/// Stands between two processes or threads and passes on what they send, until so many bytes have gone one way: the next one cuts all
/// connections, once. What has been cut does not come back; later connections go through.
public final class Relay: @unchecked Sendable {
  /// A way that bytes go.
  public enum Way: Sendable {
    /// From whoever connects.
    case forth
    /// To whoever connects.
    case back
  }

  /// Where to cut: the byte behind so many of one way is lost, and everything after it.
  public struct Cut: Sendable {
    /// Whose bytes count.
    public var way: Way
    /// Bytes that still pass.
    public var bytes: Int
    /// They count once so many have gone the other way.
    public var since: Int

    /// A cut.
    public init(_ way: Way, after bytes: Int, since: Int = 0) {
      (self.way, self.bytes, self.since) = (way, bytes, since)
    }
  }

  /// Where it listens.
  public var endpoint: StreamEndpoint { listener.endpoint }
  /// Bytes that came from whoever connected and were passed on.
  public var passed: Int { state.withLock { $0.forth } }
  /// Bytes that went the other way.
  public var answered: Int { state.withLock { $0.back } }
  /// What came from whoever connected, where nothing is cut.
  public var recorded: [UInt8] { state.withLock { $0.recorded } }
  /// Whether it has cut.
  public var isCut: Bool { state.withLock { $0.isCut } }

  private let listener: StreamListener
  private let target: StreamEndpoint
  private let cut: Cut?
  private let state = Mutex(State())

  private struct State {
    var forth = 0
    var back = 0
    /// Bytes that count for the cut.
    var counted = 0
    var recorded: [UInt8] = []
    var isCut = false
    var isStopped = false
    /// Each connection's two sockets, which are closed with the relay.
    var pairs: [Pair] = []
  }

  private final class Pair: Sendable {
    let client: FileDescriptor
    let server: FileDescriptor

    init(_ client: consuming FileDescriptor, _ server: consuming FileDescriptor) {
      self.client = client
      self.server = server
    }

    func shut() {
      for socket in [client.rawValue, server.rawValue] { shutdown(socket, Int32(SHUT_RDWR)) }
    }
  }

  /// Listens, and connects to `target` whenever somebody connects.
  public init(at endpoint: StreamEndpoint, to target: StreamEndpoint, cut: Cut? = nil) throws(HostError) {
    listener = try StreamListener(endpoint)
    self.target = target
    self.cut = cut
    // It holds itself until it is stopped.
    _ = try HostThread(name: "relay") { [self] in accept() }
  }

  /// Takes no more connections, and ends those that there are.
  public func stop() {
    shutdown(listener.descriptor.rawValue, Int32(SHUT_RDWR))
    state.withLock { state in
      state.isStopped = true
      for pair in state.pairs { pair.shut() }
    }
  }

  private func accept() {
    while let client = try? listener.accept() {
      guard let server = try? target.connect() else { continue }
      let pair = Pair(client, server)
      state.withLock { state in
        state.pairs.append(pair)
        if state.isStopped { pair.shut() }
      }
      for way in [Way.forth, .back] {
        _ = try? HostThread(name: "pass") { [self] in pass(pair, way) }
      }
    }
  }

  private func pass(_ pair: Pair, _ way: Way) {
    let isForth = way == .forth
    let (from, to) =
      isForth ? (pair.client.rawValue, pair.server.rawValue) : (pair.server.rawValue, pair.client.rawValue)
    var buffer = [UInt8](repeating: 0, count: 65536)
    while case let got = recv(from, &buffer, buffer.count, 0), got > 0 {
      let count = state.withLock { state in
        var count = got
        if let cut, cut.way == way, !state.isCut, (isForth ? state.back : state.forth) >= cut.since {
          count = min(got, cut.bytes - state.counted)
          state.counted += count
        }
        if isForth { state.forth += count } else { state.back += count }
        if isForth, cut == nil { state.recorded += buffer[..<count] }
        return count
      }
      // Nobody reads there any more: the other side is to see that, too.
      guard sendAll(to, buffer, count) else { return pair.shut() }
      guard count < got else { continue }
      state.withLock { state in
        state.isCut = true
        for pair in state.pairs { pair.shut() }
      }
    }
    shutdown(to, Int32(SHUT_WR))
  }

  private func sendAll(_ socket: Int32, _ bytes: [UInt8], _ count: Int) -> Bool {
    bytes.withUnsafeBytes { buffer in
      var done = 0
      while done < count, let start = buffer.baseAddress {
        let sent = send(socket, start + done, count - done, Int32(MSG_NOSIGNAL))
        guard sent > 0 else { return false }
        done += sent
      }
      return true
    }
  }
}
