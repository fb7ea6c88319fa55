import Foundation
import Testing

private let gdb = "/usr/bin/gdb"
private let canRun = VMM.hasKVM && VMM.isBuilt && access(gdb, X_OK) == 0

/// Debian's gdb on guests that run on KVM.
@Suite(.enabled(if: canRun, "needs /dev/kvm, gdb, the release build and scripts/build-guests"), .serialized)
struct DebuggerTests {
  /// Starts a guest that waits for the debugger, and returns what gdb printed and how the run ended.
  private func debug(_ arguments: [String], _ commands: [String]) throws -> (gdb: String, status: Int32) {
    let folder = try TemporaryFolder()
    let socket = folder.path + "/gdb"
    let guest = Process()
    guest.executableURL = URL(fileURLWithPath: VMM.path)
    guest.arguments =
      ["run", "--engine", "kvm", "--paused", "--gdb", "unix:\(socket)", "--serial", "none", "--time-limit", "120"]
      + arguments
    guest.standardInput = FileHandle.nullDevice
    guest.standardError = FileHandle.nullDevice
    try guest.run()
    while access(socket, F_OK) != 0, guest.isRunning { usleep(20_000) }
    let debugger = Process()
    debugger.executableURL = URL(fileURLWithPath: gdb)
    debugger.arguments = ["-nx", "-batch"] + (["target remote \(socket)"] + commands).flatMap { ["-ex", $0] }
    let pipe = Pipe()
    debugger.standardInput = FileHandle.nullDevice
    debugger.standardOutput = pipe
    debugger.standardError = pipe
    try debugger.run()
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    debugger.waitUntilExit()
    guest.waitUntilExit()
    return (String(decoding: output, as: UTF8.self), guest.terminationStatus)
  }

  private func expect(_ output: String, has lines: [String], location: SourceLocation = #_sourceLocation) {
    for line in lines { #expect(output.contains(line), "\(line) is not in:\n\(output)", sourceLocation: location) }
  }

  @Test func breaksAndStepsOnEveryCPU() throws {
    let file = VMM.checkout + "/build/guests/smp.elf"
    let (output, status) = try debug(
      ["smp", "--cpus", "2"],
      [
        "file \(file)", "p $pc == (long)&guest_entry32", "p $cr0", "info threads", "stepi", "stepi", "x/i $pc",
        "break *(long)&ap_long_mode", "continue", "thread", "p $efer", "p $cs", "set scheduler-locking on", "stepi",
        "p $pc > (long)&ap_long_mode", "thread 1", "set $r15 = 0x1122334455667788", "p/x $r15", "monitor exits",
        "delete",
        "set scheduler-locking off", "continue",
      ])
    expect(
      output,
      has: [
        "$1 = 1", "[ PE ET ]", "(vCPU 1 at 0xfff0)", "<guest_entry32+", "hit Breakpoint 1", "Current thread is 2",
        "LMA", "$5 = 1", "= 0x1122334455667788", "debug ", "exited normally",
      ])
    #expect(status == 0)
  }

  /// Registers that gdb writes are there, in general and in extended state, and the guest's status reaches gdb.
  @Test func seesTheExitStatus() throws {
    // mov al, bl; out 0xf4, al; jmp $
    var sector = [UInt8](repeating: 0, count: 512)
    sector.replaceSubrange(0..<6, with: [0x88, 0xd8, 0xe6, 0xf4, 0xeb, 0xfe])
    sector.replaceSubrange(510..<512, with: [0x55, 0xaa])
    let folder = try TemporaryFolder()
    let (output, status) = try debug(
      [try folder.file("status", sector)],
      [
        "hbreak *0x7c00", "continue", "set $xmm1.v2_int64[1] = 0x1234", "set $rbx = 0x10", "p $xmm1.v2_int64[1]",
        "p $rbx", "p/x $pc", "continue",
      ])
    expect(output, has: ["$1 = 4660", "$2 = 16", "$3 = 0x7c00", "exited with code 041"])
    #expect(status == 33)
  }

  /// The debugger stops at the instruction that a triple fault comes from.
  @Test func looksAtACrash() throws {
    var sector = [UInt8](repeating: 0, count: 512)
    sector.replaceSubrange(
      0..<28,
      with: [
        0xfa,  // cli
        0x0f, 0x01, 0x16, 0x30, 0x7c,  // lgdt [0x7c30]
        0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0,  // cr0.PE = 1
        0xea, 0x13, 0x7c, 0x08, 0x00,  // jmp 8:0x7c13
        0x0f, 0x01, 0x1d, 0x28, 0x7c, 0x00, 0x00,  // lidt [0x7c28]: of no entries
        0x0f, 0x0b,  // ud2
      ])
    sector.replaceSubrange(0x30..<0x36, with: [0x0f, 0x00, 0x38, 0x7c, 0x00, 0x00])
    sector.replaceSubrange(0x40..<0x48, with: [0xff, 0xff, 0x00, 0x00, 0x00, 0x9a, 0xcf, 0x00])
    sector.replaceSubrange(510..<512, with: [0x55, 0xaa])
    let folder = try TemporaryFolder()
    let (output, status) = try debug(
      [try folder.file("crash", sector)],
      ["hbreak *0x7c00", "continue", "p/x $cs", "x/2xb 0x7c00", "continue", "p/x $pc", "p $cr0", "kill"])
    expect(
      output, has: ["Breakpoint 1, 0x0000000000007c00", "0x7c00:\t0xfa\t0x0f", "SIGABRT", "= 0x7c1a", "[ PE "])
    // `kill` ends the run as `quit` does.
    #expect(status == 0)
  }
}
