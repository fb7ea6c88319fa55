import Foundation
import Testing

/// A machine that runs while a test talks to it by QMP. It is killed with its owner.
final class RunningVMM {
  private let process = Process()
  private let folder: TemporaryFolder
  private let collected = Collected()
  private var client: QMP?
  /// The control socket's path.
  let socket: String

  /// Starts `run` with these arguments and a control socket.
  init(_ arguments: [String]) throws {
    folder = try TemporaryFolder()
    socket = folder.path + "/qmp"
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = ["run"] + arguments + ["--control", "unix:\(socket)"]
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = output
    process.standardError = output
    try process.run()
    let collected = collected
    Thread.detachNewThread {
      while case let data = output.fileHandleForReading.availableData, !data.isEmpty { collected.append(data) }
      collected.finish()
    }
    // The socket is there before the guest runs.
    for _ in 0..<1000 where client == nil {
      client = QMP(socket)
      if client == nil { usleep(10_000) }
    }
    try #require(client != nil, "no control socket: \(text)")
  }

  deinit {
    if process.isRunning { process.terminate() }
  }

  /// Its process.
  var identifier: Int32 { process.processIdentifier }

  /// Whether its process has not ended.
  var isRunning: Bool { process.isRunning }

  /// What it has printed so far.
  var text: String { collected.text }

  /// Waits until it has printed `part` `count` times, or has ended.
  func waitFor(_ part: String, count: Int = 1) -> Bool {
    collected.wait { text in text.components(separatedBy: part).count > count }
  }

  /// Runs a command and returns what it returns; a refusal is an issue of the test.
  @discardableResult
  func execute(_ command: String, _ arguments: [String: Any] = [:]) throws -> Any {
    let client = try #require(client)
    let reply = client.execute(command, arguments)
    if let error = reply["error"] { Issue.record("\(command): \(error)") }
    return reply["return"] ?? [:]
  }

  /// Runs a command that is to be refused, and returns what it says.
  func refusal(_ command: String, _ arguments: [String: Any] = [:]) throws -> String {
    let client = try #require(client)
    let reply = client.execute(command, arguments)
    return (reply["error"] as? [String: Any])?["desc"] as? String ?? "not refused: \(reply)"
  }

  /// Waits for an event and takes it; those before it stay.
  func event(_ name: String, where isMeant: ([String: Any]) -> Bool = { _ in true }) throws -> [String: Any] {
    let client = try #require(client)
    let event = client.event(name, isMeant)
    return try #require(event, "\(name) did not come: \(text.suffix(2000))")
  }

  func signal(_ number: Int32) { Foundation.kill(process.processIdentifier, number) }

  /// Kills it.
  func kill() {
    Foundation.kill(process.processIdentifier, SIGKILL)
    process.waitUntilExit()
  }

  /// Waits for its end.
  func waitUntilExit() -> Int32 {
    _ = collected.wait { _ in false }
    process.waitUntilExit()
    return process.terminationReason == .exit ? process.terminationStatus : 128 + process.terminationStatus
  }

  private final class Collected: @unchecked Sendable {
    private var data = Data()
    private var isOver = false
    private let condition = NSCondition()

    var text: String {
      condition.lock()
      defer { condition.unlock() }
      return String(decoding: data, as: UTF8.self)
    }

    func append(_ more: Data) {
      condition.lock()
      data += more
      condition.broadcast()
      condition.unlock()
    }

    func finish() {
      condition.lock()
      isOver = true
      condition.broadcast()
      condition.unlock()
    }

    func wait(until isDone: (String) -> Bool) -> Bool {
      condition.lock()
      defer { condition.unlock() }
      while !isDone(String(decoding: data, as: UTF8.self)) {
        if isOver { return false }
        condition.wait()
      }
      return true
    }
  }
}

/// A QMP client over a unix socket that keeps the events.
private final class QMP {
  private let descriptor: Int32
  private var buffer = Data()
  private var events: [[String: Any]] = []

  init?(_ path: String) {
    descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    let status = withUnsafePointer(to: address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
      }
    }
    // A machine that does not answer ends the test, not the test run.
    var limit = timeval(tv_sec: 60, tv_usec: 0)
    setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    guard status == 0, message() != nil else { return nil }
    _ = execute("qmp_capabilities", [:])
  }

  deinit { close(descriptor) }

  func execute(_ command: String, _ arguments: [String: Any]) -> [String: Any] {
    let request: [String: Any] = ["execute": command, "arguments": arguments]
    guard var line = try? JSONSerialization.data(withJSONObject: request) else { return ["error": "no JSON"] }
    line.append(10)
    let sent = line.withUnsafeBytes { send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
    guard sent == line.count else { return ["error": "the socket is closed"] }
    while let message = message() {
      if message["event"] == nil { return message }
      events.append(message)
    }
    return ["error": "no answer"]
  }

  func event(_ name: String, _ isMeant: ([String: Any]) -> Bool) -> [String: Any]? {
    func isSought(_ event: [String: Any]) -> Bool {
      event["event"] as? String == name && isMeant(event["data"] as? [String: Any] ?? [:])
    }
    if let index = events.firstIndex(where: isSought) {
      return events.remove(at: index)["data"] as? [String: Any] ?? [:]
    }
    while let message = message() {
      if isSought(message) { return message["data"] as? [String: Any] ?? [:] }
      if message["event"] != nil { events.append(message) }
    }
    return nil
  }

  private func message() -> [String: Any]? {
    while true {
      if let end = buffer.firstIndex(of: 10) {
        let line = buffer[buffer.startIndex..<end]
        buffer = buffer[buffer.index(after: end)...]
        return (try? JSONSerialization.jsonObject(with: Data(line))) as? [String: Any]
      }
      var bytes = [UInt8](repeating: 0, count: 65536)
      let count = read(descriptor, &bytes, bytes.count)
      guard count > 0 else { return nil }
      buffer += bytes[..<count]
    }
  }
}
