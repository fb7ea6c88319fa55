import Foundation
import Host
import JSON
import Monitor
import Synchronization
import Testing

private let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
  .deletingLastPathComponent()

/// Whether a tool is there; where not, says that its test is skipped.
private func isInstalled(_ path: String, for test: String) -> Bool {
  let isThere = FileManager.default.isExecutableFile(atPath: path)
  if !isThere { print("skipped: \(test) needs \(path); scripts/setup installs it") }
  return isThere
}

/// The PyPI client `qemu.qmp` against our server.
@Suite struct PythonClient {
  static let python = root.path + "/build/venv/bin/python"

  static let script = """
    import asyncio, sys
    from qemu.qmp import QMPClient, ExecuteError

    async def main():
        client = QMPClient('test')
        await client.connect(sys.argv[1])
        assert client._greeting.QMP.version['package'] == 'swiftvmm test', client._greeting
        with client.listener() as events:
            assert (await client.execute('query-status'))['status'] == 'prelaunch'
            await client.execute('cont')
            assert (await events.get())['event'] == 'RESUME'
            await client.execute('stop')
            event = await events.get()
            assert event['event'] == 'STOP' and event['timestamp']['seconds'] > 1_000_000_000, event
        names = [command['name'] for command in await client.execute('query-commands')]
        assert 'system_reset' in names, names
        try:
            await client.execute('no-such-command')
            raise AssertionError('an unknown command must fail')
        except ExecuteError as error:
            assert error.error_class == 'CommandNotFound', error
        replies = await asyncio.gather(*[client.execute('query-cpus-fast') for _ in range(100)])
        assert all(len(reply) == 2 for reply in replies)
        await client.execute('quit')
        await client.disconnect()
        print('passed')

    asyncio.run(main())
    """

  @Test(.enabled(if: isInstalled(python, for: "the PyPI client qemu.qmp")))
  func speaksToTheServer() throws {
    let path = temporaryPath()
    let target = FakeTarget()
    let server = try MonitorServer(
      StreamListener(.unix(path: path)), target: target, package: "swiftvmm test", log: { _ in })
    defer { server.close() }
    target.onEvent.withLock { $0 = { [weak server] event in server?.emit(event) } }
    let output = try run(Self.python, ["-c", Self.script, path])
    #expect(output.hasSuffix("passed\n"), "\(output)")
    #expect(target.calls == ["resume", "pause", "quit"])
  }

  private func run(_ program: String, _ arguments: [String]) throws -> String {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: program)
    process.arguments = arguments
    let pipe = Pipe()
    process.standardOutput = pipe
    process.standardError = pipe
    try process.run()
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return String(decoding: output, as: UTF8.self)
  }
}

/// Our client against QEMU, and QEMU's answers against ours.
@Suite struct QEMUAsOracle {
  static let qemu = "/usr/bin/qemu-system-x86_64"

  /// Requests that both must answer alike, error texts included.
  static let requests = [
    #"{"execute": "qmp_capabilities", "id": 1}"#, #"{"execute": "qmp_capabilities", "id": {"a": [1]}}"#,
    #"{"execute": "no-such", "id": null}"#, "[]", "1", #""text""#, "{}", #"{"execute": 1}"#, #"{"id": 5}"#,
    #"{"execute": "stop", "arguments": 1}"#, #"{"execute": "stop", "arguments": {"x": 1}}"#,
    #"{"execute": "stop", "other": 1, "id": 6}"#, #"{"execute": "human-monitor-command"}"#,
    #"{"execute": "human-monitor-command", "arguments": {"command-line": 1}}"#,
    #"{"execute": "human-monitor-command", "arguments": {"command-line": "", "cpu-index": "x"}}"#,
    #"{"execute": "query-status", "id": 7, "arguments": {}}"#,
  ]

  @Test(.enabled(if: isInstalled(qemu, for: "QEMU as oracle")))
  func answersAlike() throws {
    let path = temporaryPath()
    let process = try start(path)
    defer {
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
      unlink(path)
    }
    let oracle = try RawClient(.unix(path: path))
    _ = try oracle.receive()
    var session = QMPSession(.init(target: FakeTarget(), commands: QMPCommand.standard, package: ""))
    for request in Self.requests {
      try oracle.send(request + "\n")
      var theirs = try #require(try oracle.receive())
      var ours = try #require((request + "\n").utf8.compactMap { session.receive($0) }.first)
      // QEMU 7.2 has one member of StatusInfo more, which later ones have removed.
      if theirs["return"]?["status"] != nil { (theirs, ours) = (theirs["id"] ?? nil, ours["id"] ?? nil) }
      #expect(ours == theirs, "\(request)")
    }
  }

  @Test(.enabled(if: isInstalled(qemu, for: "QEMU as server of our client")))
  func servesOurClient() throws {
    let path = temporaryPath()
    let process = try start(path)
    var client = try QMPClient.connect(to: .unix(path: path))
    #expect(try client.execute("query-status")["status"] == "prelaunch")
    _ = try client.execute("cont")
    #expect(try client.execute("query-status")["running"] == true)
    try client.quit()
    process.waitUntilExit()
    #expect(process.terminationStatus == 0)
  }

  private func start(_ path: String) throws -> Process {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: Self.qemu)
    process.arguments = ["-M", "none", "-display", "none", "-S", "-qmp", "unix:\(path),server=on,wait=off"]
    try process.run()
    while (try? StreamEndpoint.unix(path: path).connect()) == nil, process.isRunning { usleep(10_000) }
    return process
  }
}
