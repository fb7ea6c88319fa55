import Foundation
import Testing

/// `swiftvmm switch` from outside.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct SwitchCommandTests {
  private static let frame: [UInt8] =
    [255, 255, 255, 255, 255, 255, 0x52, 0x54, 0, 0, 0, 1, 0x88, 0xb5] + [UInt8](repeating: 7, count: 50)

  private func connect(_ path: String) throws -> FileHandle {
    let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    let handle = FileHandle(fileDescriptor: descriptor, closeOnDealloc: true)
    for _ in 0..<1000 {
      let status = withUnsafePointer(to: address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
          Foundation.connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
        }
      }
      if status == 0 { return handle }
      usleep(10_000)
    }
    throw CocoaError(.fileNoSuchFile)
  }

  @Test(arguments: [SIGINT, SIGTERM])
  func itForwardsReportsAndLeavesNothingBehind(signal: Int32) throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/s"
    let process = Process()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = [
      "switch", "unix:\(path)", "--pcap", folder.path + "/pcap", "--report", folder.path + "/report",
    ]
    let errors = Pipe()
    process.standardError = errors
    try process.run()
    let first = try connect(path)
    let second = try connect(path)
    let bytes = Data([0, 0, 0, 64] + Self.frame)
    // The second one's port may come after the frame: stations repeat themselves.
    var received = Data()
    for _ in 0..<1000 where received.isEmpty {
      first.write(bytes)
      var poll = pollfd(fd: second.fileDescriptor, events: Int16(POLLIN), revents: 0)
      if Foundation.poll(&poll, 1, 10) > 0 { received = second.readData(ofLength: bytes.count) }
    }
    #expect(received == bytes)
    kill(process.processIdentifier, SIGUSR1)
    let line = String(decoding: errors.fileHandleForReading.availableData, as: UTF8.self)
    #expect(line.hasPrefix("switch: 2 ports, 1 stations, "), "\(line)")
    kill(process.processIdentifier, signal)
    process.waitUntilExit()
    #expect(process.terminationReason == .exit && process.terminationStatus == 0)
    #expect(access(path, F_OK) < 0, "the socket is removed")
    let report = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: folder.path + "/report")))
    let total = try #require((report as? [String: Any])?["total"] as? [String: Int])
    let sent = try #require(total["sent"])
    #expect(sent >= 1 && total["sent-bytes"] == 64 * sent && total["dropped"] == 0)
    let pcap = try Data(contentsOf: URL(fileURLWithPath: folder.path + "/pcap"))
    #expect(pcap.count == 24 + (16 + 64) * (total["received"] ?? 0))
  }

  @Test(arguments: [
    (["--uplink", "lan"], Int32(64), "'lan' names no network: expected tap=NAME or switch=PATH"),
    (["--uplink", "tap=sixteen-letters!"], 64, "'sixteen-letters!' cannot be a network interface's name"),
    (["--uplink", "switch=/nowhere/s"], 69, "no switch at /nowhere/s: "),
    (["--pcap", "/nowhere/f"], 74, "cannot capture frames in /nowhere/f: "),
  ])
  func whatCannotBeIsOneLine(options: [String], status: Int32, text: String) throws {
    let folder = try TemporaryFolder()
    let result = try VMM.run(["switch", folder.path + "/s"] + options)
    #expect(result.status == status)
    #expect(result.errors.hasPrefix("swiftvmm: " + text), "\(result.errors)")
    #expect(result.errors.split(separator: "\n").count == 1)
    #expect(access(folder.path + "/s", F_OK) < 0)
  }

  @Test func aSocketThatAnotherSwitchHasIsRefused() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/s"
    let process = Process()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = ["switch", path]
    try process.run()
    defer {
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
    }
    _ = try connect(path)
    let result = try VMM.run("switch", path)
    #expect(result.status == 74)
    #expect(result.errors.contains("is in use by another process"))
  }
}
