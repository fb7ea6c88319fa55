import Foundation
import Host
import JSON
import Monitor
import Synchronization
import Testing

/// A client that sees every message, events too.
final class RawClient {
  let socket: FileDescriptor
  private var parser = JSONParser()
  private var input: ArraySlice<UInt8> = []

  init(_ endpoint: StreamEndpoint) throws {
    socket = try endpoint.connect()
  }

  func send(_ text: String) throws {
    try Array(text.utf8).withUnsafeBytes { try socket.sendAll($0) }
  }

  /// The next message; nil at the end.
  func receive() throws -> JSONValue? {
    while true {
      while let byte = input.popFirst() {
        if let value = try parser.feed(byte) { return value }
      }
      var bytes = [UInt8](repeating: 0, count: 65536)
      let count = try bytes.withUnsafeMutableBytes { try socket.read(into: $0) } ?? 0
      if count == 0 { return nil }
      input = bytes[..<count]
    }
  }

  func negotiate() throws {
    _ = try receive()
    try send("{\"execute\":\"qmp_capabilities\"}\n")
    _ = try receive()
  }
}

@Suite struct MonitorServers {
  let target = FakeTarget()
  let endpoint = StreamEndpoint.unix(path: temporaryPath())

  func serve(log: @escaping @Sendable (String) -> Void = { _ in }) throws -> MonitorServer {
    let server = try MonitorServer(StreamListener(endpoint), target: target, package: "swiftvmm test", log: log)
    target.onEvent.withLock { $0 = { [weak server] event in server?.emit(event) } }
    return server
  }

  @Test func serveTheClient() throws {
    let server = try serve()
    defer { server.close() }
    var client = try QMPClient.connect(to: endpoint)
    #expect(try client.execute("query-status")["status"] == "prelaunch")
    _ = try client.execute("cont")
    #expect(try client.execute("query-status") == ["running": true, "status": "running"])
    #expect(throws: MonitorError.reply(errorClass: "CommandNotFound", text: "The command nope has not been found")) {
      try client.execute("nope")
    }
    #expect(throws: MonitorError.reply(errorClass: "GenericError", text: "Parameter 'x' is unexpected")) {
      try client.execute("stop", ["x": 1])
    }
    #expect(try client.execute("query-qmp-schema").arrayValue?.isEmpty == false)
    #expect(try !client.waitForEnd(seconds: 0))
  }

  @Test func sendEventsToEveryNegotiatedClientInOrder() throws {
    let server = try serve()
    defer { server.close() }
    let clients = try (0..<3).map { _ in try RawClient(endpoint) }
    let silent = try RawClient(endpoint)
    for client in clients { try client.negotiate() }
    try clients[0].send("{\"execute\":\"cont\"}{\"execute\":\"stop\"}")
    // A command's events precede its reply.
    let messages = try (0..<4).map { _ in try clients[0].receive() }
    #expect(messages.map { $0?["event"]?.stringValue ?? "return" } == ["RESUME", "return", "STOP", "return"])
    DispatchQueue.concurrentPerform(iterations: 4) { _ in
      for _ in 0..<25 { server.emit(.powerDown) }
    }
    server.emit(.shutdown(.guestShutdown))
    server.close()
    for client in clients {
      var events: [JSONValue] = []
      while let message = try client.receive() { events.append(message) }
      if client !== clients[0] { #expect(events.prefix(2).map { $0["event"] } == ["RESUME", "STOP"]) }
      #expect(events.suffix(101).prefix(100).allSatisfy { $0["event"] == "POWERDOWN" })
      #expect(events.last?["event"] == "SHUTDOWN")
      #expect(events.last?["data"] == ["guest": true, "reason": "guest-shutdown"])
      let times = events.compactMap { event -> Int64? in
        guard let seconds = event["timestamp"]?["seconds"]?.integerValue else { return nil }
        return event["timestamp"]?["microseconds"]?.integerValue.map { seconds * 1_000_000 + $0 }
      }
      #expect(times.count == events.count)
      #expect(times == times.sorted())
    }
    // Before the negotiation there are no events.
    #expect(try silent.receive()?["QMP"] != nil)
    #expect(try silent.receive() == nil)
  }

  @Test func goOnAfterAMalformedLine() throws {
    let server = try serve()
    defer { server.close() }
    let client = try RawClient(endpoint)
    try client.negotiate()
    try client.send("{\"execute\" \"stop\"}\n{\"execute\":\"query-kvm\",\"id\":1}\n")
    #expect(try client.receive()?["error"]?["class"] == "GenericError")
    #expect(try client.receive()?["id"] == 1)
  }

  @Test func dropAClientThatDoesNotRead() throws {
    let lines = Mutex<[String]>([])
    let server = try serve { line in lines.withLock { $0.append(line) } }
    defer { server.close() }
    let client = try RawClient(endpoint)
    try client.negotiate()
    var other = try QMPClient.connect(to: endpoint)
    // The server reads no more from a client that it has dropped, so that the sending ends in an error.
    #expect(throws: HostError.self) {
      while true { try client.send("{\"execute\":\"query-qmp-schema\"}") }
    }
    #expect(try other.execute("query-kvm")["enabled"] == true)
    #expect(lines.withLock { $0.count } == 1)
  }

  @Test func refuseOneClientTooMany() throws {
    let server = try serve()
    defer { server.close() }
    let clients = try (0..<MonitorServer.clientLimit).map { _ in
      let client = try RawClient(endpoint)
      try client.negotiate()
      return client
    }
    let extra = try RawClient(endpoint)
    #expect(try extra.receive() == nil)
    #expect(clients.count == MonitorServer.clientLimit)
  }

  @Test func leaveNothingBehind() throws {
    let before = try FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").count
    for _ in 0..<100 {
      let server = try serve()
      var client = try QMPClient.connect(to: endpoint)
      server.close()
      #expect(try client.waitForEnd(seconds: 10))
    }
    guard case .unix(let path) = endpoint else { return }
    #expect(!FileManager.default.fileExists(atPath: path))
    // Other suites open and close descriptors meanwhile; a leak here would be 100 at least.
    #expect(try FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").count < before + 100)
  }

  @Test func tellClientsWhatIsWrong() throws {
    #expect(
      throws: MonitorError.unreachable(endpoint, .path("connect to", path: pathOfEndpoint, errno: ENOENT))
    ) {
      _ = try QMPClient.connect(to: endpoint)
    }
    let listener = try StreamListener(endpoint)
    #expect(throws: MonitorError.timeout(endpoint, seconds: 1)) { _ = try QMPClient.connect(to: endpoint, timeout: 1) }
    let liar = try HostThread(name: "liar") {
      // The first connection is the one that timed out.
      _ = try? listener.accept()
      guard let client = try? listener.accept() else { return }
      try? Array("SSH-2.0-OpenSSH\r\n".utf8).withUnsafeBytes { try client.sendAll($0) }
    }
    #expect(throws: MonitorError.notQMP(endpoint)) { _ = try QMPClient.connect(to: endpoint) }
    liar.join()
  }

  private var pathOfEndpoint: String { String("\(endpoint)".dropFirst(5)) }
}
