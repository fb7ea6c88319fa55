import Glibc
import Host
import Testing

@Suite struct StreamEndpoints {
  @Test(
    arguments: [
      ("unix:/tmp/a:b", .unix(path: "/tmp/a:b")), ("127.0.0.1:1234", .tcp(host: "127.0.0.1", port: 1234)),
      ("tcp:localhost:1", .tcp(host: "localhost", port: 1)), (":80", .tcp(host: "127.0.0.1", port: 80)),
      ("[::1]:9", .tcp(host: "::1", port: 9)),
    ] as [(String, StreamEndpoint)])
  func areRead(_ text: String, _ endpoint: StreamEndpoint) throws {
    #expect(try StreamEndpoint(text) == endpoint)
    #expect(try StreamEndpoint("\(endpoint)") == endpoint)
  }

  @Test(arguments: [
    "", "unix:", "unix:a\0b", "host", "host:", "host:65536", "host:-1", "host:x", "::1:9", "/tmp/socket",
  ])
  func areRefused(_ text: String) {
    #expect(throws: HostError.endpoint(text)) { try StreamEndpoint(text) }
  }

  @Test func haveShortPaths() {
    let path = "/" + String(repeating: "x", count: StreamEndpoint.longestPath)
    #expect(throws: HostError.socketPathTooLong(path: path, limit: 107)) { try StreamEndpoint("unix:" + path) }
  }
}

@Suite struct StreamListeners {
  @Test func exchangeBytes() throws {
    for endpoint in [StreamEndpoint.unix(path: temporaryPath()), .tcp(host: "127.0.0.1", port: 0)] {
      let listener = try StreamListener(endpoint)
      let client = try listener.endpoint.connect()
      let server = try listener.accept()
      try Array("ping".utf8).withUnsafeBytes { try client.sendAll($0) }
      var buffer = [UInt8](repeating: 0, count: 16)
      let count = try buffer.withUnsafeMutableBytes { try server.read(into: $0) }
      #expect(buffer.prefix(count ?? 0) == ArraySlice("ping".utf8))
    }
  }

  @Test func keepTheirFileToTheUserAndRemoveIt() throws {
    let path = temporaryPath()
    var status = stat()
    do {
      let listener = try StreamListener(.unix(path: path))
      #expect(lstat(path, &status) == 0)
      #expect(status.st_mode & 0o777 == 0o600)
      #expect(listener.endpoint == .unix(path: path))
    }
    #expect(lstat(path, &status) == -1)
  }

  @Test func refuseASocketInUseAndReplaceAStaleOne() throws {
    let path = temporaryPath()
    let first = try StreamListener(.unix(path: path))
    #expect(throws: HostError.socketInUse(.unix(path: path))) { _ = try StreamListener(.unix(path: path)) }
    // What a process leaves that is killed: a socket's file without a socket.
    let stale = path + "-stale"
    #expect(link(path, stale) == 0)
    _ = consume first
    let second = try StreamListener(.unix(path: stale))
    _ = try second.endpoint.connect()
  }

  @Test func leaveAnothersFileAlone() throws {
    let path = temporaryPath()
    let first = try StreamListener(.unix(path: path))
    unlink(path)
    let second = try StreamListener(.unix(path: path))
    _ = consume first
    _ = try second.endpoint.connect()
  }

  @Test func refuseAFileThatIsNoSocket() throws {
    let path = temporaryPath()
    _ = try FileDescriptor.open(path, O_CREAT | O_WRONLY)
    defer { unlink(path) }
    #expect(throws: HostError.notASocket(path: path)) { _ = try StreamListener(.unix(path: path)) }
  }

  @Test func sayWhyTheyCannotListen() throws {
    #expect(throws: HostError.path("listen on", path: "/nonexistent/socket", errno: ENOENT)) {
      _ = try StreamListener(.unix(path: "/nonexistent/socket"))
    }
    let listener = try StreamListener(.tcp(host: "127.0.0.1", port: 0))
    #expect(throws: HostError.socketInUse(listener.endpoint)) { _ = try StreamListener(listener.endpoint) }
  }

  private func temporaryPath() -> String {
    "/tmp/swiftvmm-test-\(getpid())-\(UInt64.random(in: 0...UInt64.max)).socket"
  }
}
