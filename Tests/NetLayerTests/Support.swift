import Foundation
import Host
import Testing

@testable import NetLayer

/// A folder that goes away with its owner.
final class TemporaryFolder {
  let path: String

  init() throws {
    path = NSTemporaryDirectory() + "net-\(UUID().uuidString.prefix(8))"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }
}

func isInstalled(_ tools: String...) -> Bool {
  tools.allSatisfy { access("/usr/bin/" + $0, X_OK) == 0 }
}

/// A program of the host, run to its end; standard output and error together.
func hostTool(_ arguments: [String]) throws -> String {
  let process = Process()
  process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
  process.arguments = ["timeout", "60"] + arguments
  process.standardInput = FileHandle.nullDevice
  let pipe = Pipe()
  process.standardOutput = pipe
  process.standardError = pipe
  try process.run()
  let bytes = pipe.fileHandleForReading.readDataToEndOfFile()
  process.waitUntilExit()
  let output = String(decoding: bytes, as: UTF8.self)
  try #require(process.terminationStatus == 0, "\(arguments.joined(separator: " ")): \(output)")
  return output
}

/// Waits until something is so, for ten seconds at most.
func eventually(_ what: Comment, _ isSo: () throws -> Bool) rethrows {
  for _ in 0..<2000 {
    if try isSo() { return }
    usleep(5000)
  }
  Issue.record("never came: \(what)")
}

/// An event loop with its thread, which a test has do things.
final class TestLoop {
  let loop: EventLoop
  private let thread: HostThread

  /// `prepare` runs first on the thread.
  init(prepare: @escaping @Sendable () -> Void = {}) throws {
    let loop = try EventLoop()
    self.loop = loop
    thread = try HostThread(name: "net-test") {
      prepare()
      loop.run()
    }
  }

  deinit {
    loop.stop()
    thread.join()
  }

  /// Runs `body` on the loop's thread and returns what it returns.
  func sync<Result>(_ body: @escaping () throws -> Result) throws -> Result {
    let done = Condition<Swift.Result<Result, any Error>?>(nil)
    nonisolated(unsafe) let body = body
    loop.execute {
      nonisolated(unsafe) let result = Swift.Result { try body() }
      done.withLock { $0 = result }
    }
    return try done.wait { $0 }.get()
  }
}

/// A frame from one station to another.
func makeFrame(
  from source: UInt64, to destination: UInt64, type: UInt16 = 0x88b5, _ payload: [UInt8] = [1, 2, 3]
) -> [UInt8] {
  MACAddress(rawValue: destination).bytes + MACAddress(rawValue: source).bytes
    + [UInt8(type >> 8), UInt8(type & 255)] + payload
}

/// As it is in a stream.
func framed(_ frame: [UInt8]) -> [UInt8] {
  withUnsafeBytes(of: UInt32(frame.count).bigEndian) { Array($0) } + frame
}

/// The other end of a stream, as the test speaks for it: blocking, with a limit of time.
final class TestPeer: @unchecked Sendable {
  let socket: FileDescriptor
  private var bytes: [UInt8] = []

  convenience init(_ path: String) throws {
    try self.init(StreamEndpoint("unix:" + path).connect())
  }

  init(_ socket: consuming FileDescriptor) {
    self.socket = socket
  }

  private func limit(_ milliseconds: Int) {
    var time = timeval(tv_sec: milliseconds / 1000, tv_usec: milliseconds % 1000 * 1000)
    setsockopt(socket.rawValue, SOL_SOCKET, SO_RCVTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
  }

  func send(_ frame: [UInt8]) throws { try write(framed(frame)) }

  func write(_ bytes: [UInt8]) throws {
    try bytes.withUnsafeBytes { try socket.sendAll($0) }
  }

  /// The next frame; nil where none comes within the time, or the stream has ended.
  func receive(within milliseconds: Int = 10_000) throws -> [UInt8]? {
    limit(milliseconds)
    while true {
      if bytes.count >= 4 {
        let length = bytes[..<4].reduce(0) { $0 << 8 | Int($1) }
        if bytes.count >= 4 + length {
          defer { bytes.removeFirst(4 + length) }
          return Array(bytes[4..<4 + length])
        }
      }
      var chunk = [UInt8](repeating: 0, count: 65536)
      let count = try chunk.withUnsafeMutableBytes { try socket.read(into: $0) }
      guard let count, count > 0 else { return nil }
      bytes += chunk[..<count]
    }
  }

  /// Whether the stream has ended, once everything before has been read.
  func isAtEnd() throws -> Bool {
    limit(10_000)
    var chunk = [UInt8](repeating: 0, count: 65536)
    while true {
      // A peer that goes with bytes unread resets the stream.
      guard let count = try? chunk.withUnsafeMutableBytes({ try socket.read(into: $0) }) else { return errno != EAGAIN }
      if count == 0 { return true }
    }
  }
}

/// A switch with its socket.
final class TestSwitch {
  let loop: TestLoop
  let path: String
  let `switch`: VirtualSwitch
  let messages = Condition<[NetworkError]>([])

  init(in folder: TemporaryFolder, name: String = "switch", _ configuration: VirtualSwitch.Configuration = .init())
    throws
  {
    loop = try TestLoop()
    path = folder.path + "/" + name
    `switch` = VirtualSwitch(on: loop.loop, configuration)
    `switch`.onMessage = { [messages] message in messages.withLock { $0.append(message) } }
    let listener = try StreamListener(.unix(path: path))
    try `switch`.listen(listener)
  }

  deinit { close() }

  func close() { try? loop.sync { [`switch`] in `switch`.close() } }

  var total: SwitchCounters { get throws { try loop.sync { [`switch`] in `switch`.total } } }
  var ports: [SwitchPortReport] { get throws { try loop.sync { [`switch`] in `switch`.portReports } } }

  /// Peers that have ports, in this order.
  func connect(_ count: Int) throws -> [TestPeer] {
    try (0..<count).map { _ in
      let before = try total.connectedPorts
      let peer = try TestPeer(path)
      try eventually("a port") { try total.connectedPorts > before }
      return peer
    }
  }
}
