import Accelerator
import Foundation
import GDBStub
import Host
import Synchronization
import Testing

private func isInstalled(_ path: String) -> Bool {
  let isThere = FileManager.default.isExecutableFile(atPath: path)
  if !isThere { print("skipped: the tests with gdb need \(path); scripts/setup installs it") }
  return isThere
}

/// Debian's gdb against a machine in miniature.
@Suite(.enabled(if: isInstalled("/usr/bin/gdb"))) struct DebianGDB {
  let target = FakeTarget()

  /// What gdb prints; each command after a line `# COMMAND`.
  func gdb(_ endpoint: StreamEndpoint, _ commands: [String]) throws -> String {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/gdb")
    let address = "\(endpoint)".replacing("unix:", with: "")
    let all = ["set architecture i386:x86-64", "set remotetimeout 30", "target remote \(address)"] + commands
    process.arguments =
      ["-nx", "-batch"] + all.flatMap { ["-ex", "echo # \($0.replacing("$", with: ""))\\n", "-ex", $0] }
    let pipe = Pipe()
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = pipe
    process.standardError = pipe
    try process.run()
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return String(decoding: output, as: UTF8.self)
  }

  func unixEndpoint() -> StreamEndpoint {
    .unix(path: "/tmp/swiftvmm-test-\(getpid())-\(UInt64.random(in: 0...UInt64.max)).gdb")
  }

  @Test func readsAndWrites() throws {
    let server = try GDBServer(StreamListener(unixEndpoint()), target: target)
    defer {
      server.close()
      target.stopAll()
    }
    let output = try gdb(
      server.endpoint,
      [
        "p/x $rax", "p/x $rsp", "p $eflags", "p/x $cs", "p $cr0", "p/x $cr3", "p $efer", "p/x $fs_base",
        "p/x $k_gs_base",
        "p $st0", "p/x $fctrl", "p/x $ftag", "p/x $mxcsr", "p/x $xmm0.uint128", "p/x $ymm0.v8_int32", "x/2xb 0x1020",
        "set $rax = 0x1234", "p/x $rax", "set $xmm3.v4_int32[1] = 77", "p $xmm3.v4_int32", "set $cr3 = 0x5000",
        "set *(int*)0x1040 = 0x11223344", "x/xw 0x1040", "x/xb 0x4000", "monitor greet gdb", "info threads", "thread 2",
        "p/x $rax", "detach",
      ])
    for line in [
      "= 0x1111222233334444", "= 0x100000001", "[ PF ZF IF ]", "= 0x10", "[ PE MP ET NE WP AM PG ]", "= 0xabc000",
      "[ SCE LME LMA NXE ]", "= 0x7fff0000", "= 0xffff888000000000", "= 1\n", "= 0x37f", "= 0x3fff", "= 0x1f80",
      "= 0xf0e0d0c0b0a09080706050403020100", "0x13121110, 0x17161514", "0x1020:\t0xf4\t0x90", "= 0x1234",
      "= {0, 77, 0, 0}",
      "0x1040:\t0x11223344", "Cannot access memory at address 0x4000", "hello gdb", "(vCPU 1 at rest)",
      "= 0x1111222233334445",
      "detached",
    ] { #expect(output.contains(line), "\(line) is not in:\n\(output)") }
    #expect(target.state.withLock { $0.registers[0].system.cr3 } == 0x5000)
    #expect(target.state.withLock { $0.registers[0].extended[512] } & 3 == 3)
  }

  @Test func breaksStepsAndWatches() throws {
    let server = try GDBServer(StreamListener(.tcp(host: "127.0.0.1", port: 0)), target: target)
    defer {
      server.close()
      target.stopAll()
    }
    let output = try gdb(
      server.endpoint,
      [
        "set scheduler-locking on", "break *0x1010", "continue", "p/x $rip", "stepi", "p/x $rip", "hbreak *0x1030",
        "continue",
        "info registers rip", "delete", "watch *(long*)0x2000", "continue", "x/xg 0x2000", "thread 2", "p/x $rip",
        "delete", "set scheduler-locking off", "break *0x1800", "continue", "kill",
      ])
    for line in [
      "Breakpoint 1, 0x0000000000001010", "= 0x1010", "= 0x1011", "Breakpoint 2, 0x0000000000001030",
      "New value = 1229801703532086340", "0x2000:\t0x1111222233334444", "= 0x1000\n",
      "Breakpoint 4, 0x0000000000001800",
    ] { #expect(output.contains(line), "\(line) is not in:\n\(output)") }
    #expect(target.state.withLock { $0.hasQuit && $0.breakpoints.isEmpty })
  }

  @Test func interruptsAndReturns() throws {
    let server = try GDBServer(StreamListener(unixEndpoint()), target: target)
    // The machine runs when the first debugger has left, stops when the second comes, and says how it ended.
    #expect(try gdb(server.endpoint, ["detach"]).contains("detached"))
    #expect(target.state.withLock { $0.actions } == [.run, .run])
    let client = try server.endpoint.connect()
    let requests = ["QStartNoAckMode", "?", "c"].map(Conversation.frame).joined() + "\u{3}"
    try Array(requests.utf8).withUnsafeBytes { try client.sendAll($0) }
    let paused = Conversation.frame("T02thread:1;")
    #expect(try read(client, until: paused + paused) == "+" + Conversation.frame("OK") + paused + paused)
    try Array(Conversation.frame("c").utf8).withUnsafeBytes { try client.sendAll($0) }
    // A report that comes while the server closes is told before the connection ends.
    while !target.state.withLock({ $0.resumes == 3 }) { usleep(1000) }
    target.report(.exited(status: 3))
    server.close()
    let exited = Conversation.frame("W03")
    #expect(try read(client, until: exited) == exited)
    target.stopAll()
  }

  private func read(_ client: borrowing FileDescriptor, until end: String) throws -> String {
    var text = ""
    var buffer = [UInt8](repeating: 0, count: 4096)
    while !text.contains(end) {
      let count = try buffer.withUnsafeMutableBytes { try client.read(into: $0) } ?? 0
      if count == 0 { break }
      text += String(decoding: buffer[..<count], as: UTF8.self)
    }
    return text
  }
}
