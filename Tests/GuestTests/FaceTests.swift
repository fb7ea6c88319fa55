import Foundation
import Host
import Testing

/// A running machine's faces, from outside: gdb, and the control socket's commands.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"))
struct FaceTests {
  /// A machine that runs while `body` does.
  private func withMachine<Result>(
    _ arguments: [String], engine: String = "kvm", _ body: (Process) throws -> Result
  ) throws -> Result {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = ["run", "--engine", engine, "--time-limit", "120"] + arguments
    if !arguments.contains("--serial") { process.arguments? += ["--serial", "none"] }
    process.standardInput = FileHandle.nullDevice
    process.standardError = FileHandle.nullDevice
    try process.run()
    defer {
      process.terminate()
      process.waitUntilExit()
    }
    return try body(process)
  }

  private func waitForFile(_ path: String) {
    for _ in 0..<1200 where access(path, F_OK) != 0 { usleep(50_000) }
  }

  @Test(
    .enabled(if: access("/usr/bin/gdb", X_OK) == 0, "gdb is not installed"),
    arguments: VMM.hasKVM ? ["kvm", "soft"] : ["soft"])
  func gdbStopsStepsAndContinues(engine: String) throws {
    let folder = try TemporaryFolder()
    let socket = folder.path + "/gdb"
    let image = VMM.checkout + "/build/guests/hello.elf"
    try withMachine(["hello", "--paused", "--cpus", "2", "--gdb", "unix:\(socket)"], engine: engine) { process in
      waitForFile(socket)
      let gdb = Process()
      let pipe = Pipe()
      gdb.executableURL = URL(fileURLWithPath: "/usr/bin/gdb")
      gdb.arguments = ["-nx", "-batch"]
      let script = [
        "set confirm off", "target remote \(socket)", "info threads", "stepi", "print/x $rip", "print/x $cr0",
        "hbreak *long_mode", "continue", "print $rip == (unsigned long)&long_mode",
        "x/1xb (char *)&long_mode", "delete", "continue",
      ]
      for line in script { gdb.arguments?.append(contentsOf: ["-ex", line]) }
      gdb.arguments?.append(image)
      gdb.standardOutput = pipe
      gdb.standardError = pipe
      try gdb.run()
      let text = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
      gdb.waitUntilExit()
      #expect(text.contains("vCPU 1"), "\(text)")
      #expect(text.contains("= 0x11"), "protected mode without paging: \(text)")
      #expect(text.contains("Breakpoint 1, "), "\(text)")
      #expect(text.contains("= 1\n"), "RIP is the breakpoint's address: \(text)")
      #expect(text.contains("exited normally"), "\(text)")
      process.waitUntilExit()
      #expect(process.terminationStatus == 0)
    }
  }

  @Test(.enabled(if: VMM.hasKVM, "needs /dev/kvm")) func controlCommandsReachTheMachine() throws {
    let folder = try TemporaryFolder()
    let socket = folder.path + "/control"
    let loop = try folder.file("loop.img", bootSector([0xeb, 0xfe]))
    try withMachine([loop, "--control", "unix:\(socket)"]) { process in
      waitForFile(socket)
      #expect(try VMM.run("pause", socket).status == 0)
      #expect(try VMM.run("status", socket).output.contains("paused"))
      #expect(try VMM.run("resume", socket).status == 0)
      #expect(try VMM.run("status", socket).output.contains("running"))
      let kvm = try VMM.run("ctl", socket, "query-kvm")
      #expect(kvm.output.contains("\"enabled\": true"), "\(kvm.output)")
      let unknown = try VMM.run("ctl", socket, "no-such-command")
      #expect(unknown.status == 1)
      #expect(unknown.errors.contains("no-such-command"))
      #expect(try VMM.run("stop", socket, "--now").status == 0)
      process.waitUntilExit()
      #expect(process.terminationStatus == 0)
      #expect(access(socket, F_OK) != 0, "the socket's file goes with the machine")
      #expect(try VMM.run("status", socket).status == 69)
    }
  }

  @Test(.enabled(if: VMM.hasKVM, "needs /dev/kvm")) func signalsEndTheRunInGoodOrder() throws {
    let folder = try TemporaryFolder()
    let socket = folder.path + "/control"
    let loop = try folder.file("loop.img", bootSector([0xeb, 0xfe]))
    try withMachine([loop, "--control", "unix:\(socket)"]) { process in
      waitForFile(socket)
      kill(process.processIdentifier, SIGINT)
      process.waitUntilExit()
      #expect(process.terminationReason == .exit)
      #expect(process.terminationStatus == 130)
      #expect(access(socket, F_OK) != 0)
    }
  }

  @Test(.enabled(if: VMM.hasKVM, "needs /dev/kvm")) func serialPortOnAUnixSocket() throws {
    let folder = try TemporaryFolder()
    let socket = folder.path + "/serial"
    // Echoes one key and exits with status 3; the loop before it waits for the client.
    let code: [UInt8] = [
      0xb4, 0, 0xcd, 0x16, 0xb4, 0x0e, 0xcd, 0x10, 0xb0, 1, 0xe6, 0xf4, 0xeb, 0xfe,
    ]
    let image = try folder.file("echo.img", bootSector(code))
    try withMachine([image, "--serial", "unix:\(socket)"]) { process in
      waitForFile(socket)
      let client = try StreamEndpoint("unix:\(socket)").connect()
      let sent = [UInt8(ascii: "k")]
      _ = write(client.rawValue, sent, 1)
      var answer = [UInt8](repeating: 0, count: 1)
      #expect(Foundation.read(client.rawValue, &answer, 1) == 1)
      #expect(answer == sent)
      process.waitUntilExit()
      #expect(process.terminationStatus == 3)
    }
  }

  @Test(.enabled(if: VMM.hasKVM, "needs /dev/kvm")) func keysReachTheGuest() throws {
    // The boot ROM's keyboard service is COM1: echo three keys, then exit with status 3.
    let folder = try TemporaryFolder()
    // mov cx,3; l: mov ah,0; int 16h; mov ah,0eh; int 10h; loop l; mov al,1; out 0xf4,al
    let code: [UInt8] = [
      0xb9, 3, 0, 0xb4, 0, 0xcd, 0x16, 0xb4, 0x0e, 0xcd, 0x10, 0xe2, 0xf6, 0xb0, 1, 0xe6, 0xf4, 0xeb, 0xfe,
    ]
    let image = try folder.file("echo.img", bootSector(code))
    let result = try VMM.run(["run", image, "--engine", "kvm", "--time-limit", "60"], input: "xyz")
    #expect(result.output == "xyz")
    #expect(result.status == 3)
  }
}
