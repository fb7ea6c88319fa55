import Glibc
import Host
import JSON

/// A blocking QMP client for one conversation.
public struct QMPClient: ~Copyable {
  private let socket: FileDescriptor
  private let endpoint: StreamEndpoint
  private let seconds: Int
  private var parser = JSONParser(limits: .init(bytes: 64 << 20))
  private var input: ArraySlice<UInt8> = []

  private init(_ socket: consuming FileDescriptor, _ endpoint: StreamEndpoint, _ seconds: Int) {
    self.socket = socket
    self.endpoint = endpoint
    self.seconds = seconds
  }

  /// Connects, waits for the greeting and ends the negotiation. The client waits `seconds` for each answer.
  public static func connect(to endpoint: StreamEndpoint, timeout seconds: Int = 10) throws(MonitorError) -> QMPClient {
    var client = QMPClient(try open(endpoint), endpoint, seconds)
    // A server that does not read must not hold a client for ever.
    var limit = timeval(tv_sec: seconds, tv_usec: 0)
    setsockopt(client.socket.rawValue, SOL_SOCKET, SO_SNDTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    guard try client.receive(by: client.deadline())["QMP"] != nil else { throw .notQMP(endpoint) }
    _ = try client.execute(QMPCommand.negotiation)
    return client
  }

  /// Executes a command; events that come before its reply are dropped.
  ///
  /// - Returns: What the reply's `return` holds.
  /// - Throws: `reply` with the server's error, or why there is no reply.
  public mutating func execute(_ command: String, _ arguments: JSONObject = [:]) throws(MonitorError) -> JSONValue {
    var request: JSONObject = ["execute": .string(command)]
    if arguments.count > 0 { request["arguments"] = .object(arguments) }
    let text = Array((JSONValue.object(request).serialized() + "\n").utf8)
    let sent = text.withUnsafeBytes { bytes in
      do throws(HostError) {
        try socket.sendAll(bytes)
        return true
      } catch {
        return false
      }
    }
    guard sent else { throw .closed(endpoint) }
    let deadline = deadline()
    while true {
      let message = try receive(by: deadline)
      if let value = message["return"] { return value }
      if let error = message["error"] {
        throw .reply(
          errorClass: error["class"]?.stringValue ?? "GenericError", text: error["desc"]?.stringValue ?? "no text")
      }
      guard message["event"] != nil else { throw .notQMP(endpoint) }
    }
  }

  /// Waits until the server ends the connection.
  ///
  /// - Returns: Whether it did within `seconds`.
  public mutating func waitForEnd(seconds: Int) throws(MonitorError) -> Bool {
    let deadline = monotonicNanoseconds() &+ UInt64(clamping: seconds) &* 1_000_000_000
    while true {
      do throws(MonitorError) {
        _ = try receive(by: deadline)
      } catch .closed {
        return true
      } catch .timeout {
        return false
      } catch {
        throw error
      }
    }
  }

  private static func open(_ endpoint: StreamEndpoint) throws(MonitorError) -> FileDescriptor {
    do throws(HostError) {
      return try endpoint.connect()
    } catch {
      throw .unreachable(endpoint, error)
    }
  }

  /// Tells the machine to end, and waits until it has.
  public mutating func quit() throws(MonitorError) {
    do throws(MonitorError) {
      _ = try execute("quit")
    } catch .closed {
      return
    } catch {
      throw error
    }
    guard try waitForEnd(seconds: seconds) else { throw .stillRunning(endpoint, seconds: seconds) }
  }

  private func deadline() -> UInt64 {
    monotonicNanoseconds() &+ UInt64(clamping: seconds) &* 1_000_000_000
  }

  private mutating func receive(by deadline: UInt64) throws(MonitorError) -> JSONValue {
    while true {
      while let byte = input.popFirst() {
        do throws(JSONError) {
          if let value = try parser.feed(byte) { return value }
        } catch {
          throw .notQMP(endpoint)
        }
      }
      try fill(by: deadline)
    }
  }

  private mutating func fill(by deadline: UInt64) throws(MonitorError) {
    while true {
      let now = monotonicNanoseconds()
      guard now < deadline else { throw .timeout(endpoint, seconds: seconds) }
      var events = pollfd(fd: socket.rawValue, events: Int16(POLLIN), revents: 0)
      guard poll(&events, 1, Int32(clamping: (deadline - now) / 1_000_000 + 1)) > 0 else { continue }
      var bytes = [UInt8](repeating: 0, count: 65536)
      let count = recv(socket.rawValue, &bytes, bytes.count, 0)
      if count < 0, errno == EINTR { continue }
      guard count > 0 else { throw .closed(endpoint) }
      input = bytes[..<count]
      return
    }
  }
}
