import Foundation
import Testing

private let gdb = "/usr/bin/gdb"
private let canRun = VMM.isBuilt && access(gdb, X_OK) == 0
private let engines = VMM.hasKVM ? ["kvm", "soft"] : ["soft"]

/// Debian's gdb on guests that run on KVM and on the software engine.
@Suite(.enabled(if: canRun, "needs gdb, the release build and scripts/build-guests"), .serialized)
struct DebuggerTests {
  /// Starts a guest that waits for the debugger, and returns what gdb printed and how the run ended.
  private func debug(
    _ engine: String, _ arguments: [String], _ commands: [String]
  ) throws -> (gdb: String, status: Int32) {
    let folder = try TemporaryFolder()
    let socket = folder.path + "/gdb"
    let guest = Process()
    guest.executableURL = URL(fileURLWithPath: VMM.path)
    guest.arguments =
      ["run", "--engine", engine, "--paused", "--gdb", "unix:\(socket)", "--serial", "none", "--time-limit", "120"]
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

  /// A boot sector that begins with `code`, with `data` at offset 0x40.
  private func sector(_ code: [UInt8], data: [UInt8] = [], in folder: TemporaryFolder) throws -> String {
    var sector = [UInt8](repeating: 0, count: 512)
    sector.replaceSubrange(0..<code.count, with: code)
    sector.replaceSubrange(0x40..<0x40 + data.count, with: data)
    sector.replaceSubrange(510..<512, with: [0x55, 0xaa])
    return try folder.file("sector", sector)
  }

  @Test(arguments: engines) func breaksAndStepsOnEveryCPU(engine: String) throws {
    let file = VMM.checkout + "/build/guests/smp.elf"
    let (output, status) = try debug(
      engine, ["smp", "--cpus", "2"],
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
  @Test(arguments: engines) func seesTheExitStatus(engine: String) throws {
    let folder = try TemporaryFolder()
    // mov al, bl; out 0xf4, al; jmp $
    let (output, status) = try debug(
      engine, [try sector([0x88, 0xd8, 0xe6, 0xf4, 0xeb, 0xfe], in: folder)],
      [
        "hbreak *0x7c00", "continue", "set $xmm1.v2_int64[1] = 0x1234", "set $rbx = 0x10", "p $xmm1.v2_int64[1]",
        "p $rbx", "p/x $pc", "continue",
      ])
    expect(output, has: ["$1 = 4660", "$2 = 16", "$3 = 0x7c00", "exited with code 041"])
    #expect(status == 33)
  }

  /// The debugger stops at the instruction that a triple fault comes from.
  @Test(arguments: engines) func looksAtACrash(engine: String) throws {
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
      engine, [try folder.file("crash", sector)],
      ["hbreak *0x7c00", "continue", "p/x $cs", "x/2xb 0x7c00", "continue", "p/x $pc", "p $cr0", "kill"])
    expect(
      output, has: ["Breakpoint 1, 0x0000000000007c00", "0x7c00:\t0xfa\t0x0f", "SIGABRT", "= 0x7c1a", "[ PE "])
    // `kill` ends the run as `quit` does.
    #expect(status == 0)
  }

  /// Reads, writes and accesses, and more breakpoints at once than a processor has registers for.
  @Test func watchesEverythingOnTheSoftwareEngine() throws {
    let folder = try TemporaryFolder()
    let image = try sector(
      [
        0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
        0xa0, 0x40, 0x7c,  // 7c06: mov al, [0x7c40]
        0xfe, 0xc0,  // 7c09: inc al
        0xa2, 0x40, 0x7c,  // 7c0b: mov [0x7c40], al
        0xa2, 0x42, 0x7c,  // 7c0e: mov [0x7c42], al
        0xa0, 0x44, 0x7c,  // 7c11: mov al, [0x7c44]
        0xa2, 0x44, 0x7c,  // 7c14: mov [0x7c44], al
        0xe6, 0xf4, 0xeb, 0xfe,  // 7c17: out 0xf4, al
      ], data: [7, 0, 1, 0, 3], in: folder)
    let (output, status) = try debug(
      "soft", [image],
      (0..<6).map { "\($0 % 2 == 0 ? "break" : "hbreak") *0x7c0\($0)" }
        + ["rwatch *(char*)0x7c40", "watch *(char*)0x7c42", "awatch *(char*)0x7c44"]
        + (0..<6).flatMap { ["continue", "echo place \($0)", "p/x $pc"] }
        + (6..<10).flatMap { ["continue", "echo place \($0)", "p/x $pc"] } + ["info breakpoints", "continue"])
    for place in 0..<6 {
      expect(
        output,
        has: ["Breakpoint \(place + 1), 0x0000000000007c0\(place)", "place \(place)$\(place + 1) = 0x7c0\(place)"])
    }
    expect(
      output,
      has: [
        "Hardware read watchpoint 7: *(char*)0x7c40\n\nValue = 7", "place 6$7 = 0x7c09",
        "Hardware watchpoint 8: *(char*)0x7c42\n\nOld value = 1 '\\001'\nNew value = 8", "place 7$8 = 0x7c11",
        "Hardware access (read/write) watchpoint 9: *(char*)0x7c44\n\nValue = 3", "place 8$9 = 0x7c14",
        "place 9$10 = 0x7c17", "exited with code 07",
      ])
    #expect(status == 7)
  }

  /// x87 and AVX registers are the guest's own, in both directions; so are descriptor tables and segments' bases.
  @Test func seesEveryRegisterOnTheSoftwareEngine() throws {
    let folder = try TemporaryFolder()
    let image = try sector(
      [
        0xb8, 0x00, 0x10, 0x8e, 0xd8,  // mov ds, 0x1000
        0x0f, 0x01, 0x16, 0x40, 0x7c,  // lgdt [0x7c40]: of what is at 0x17c40
        0xd9, 0xe8,  // fld1
        0xdf, 0x1e, 0x50, 0x00,  // 7c0c: fistp word [0x50]
        0xa0, 0x50, 0x00,  // 7c10: mov al, [0x50]
        0xe6, 0xf4, 0xeb, 0xfe,
      ], in: folder)
    let (output, status) = try debug(
      "soft", [image],
      [
        "break *0x7c00", "continue", "set *(unsigned short*)0x17c40 = 0x37", "set *(unsigned int*)0x17c42 = 0x123456",
        "break *0x7c0c", "continue", "p/x $ds_base", "p/x $gdt_base", "p/x $gdt_limit", "p $st0", "p/x $ftag",
        "set $st0 = 21", "set $ymm5.v4_int64[3] = 0x7777", "set $xmm5.v2_int64[0] = 0x5555", "set $mxcsr = 0x1fa0",
        "set $fs_base = 0x4000", "set $r9 = 99", "stepi", "p/x $pc", "p/x $ymm5.v4_int64", "p $mxcsr", "p/x $fs_base",
        "p $r9",
        "x/1hd 0x10050", "info registers cr0 cr4 efer cs tr", "continue",
      ])
    expect(
      output,
      has: [
        "$1 = 0x10000", "$2 = 0x123456", "$3 = 0x37", "$4 = 1", "$5 = 0x3fff", "$6 = 0x7c10",
        "$7 = {0x5555, 0x0, 0x0, 0x7777}", "$8 = [ PE IM DM ZM OM UM PM ]", "$9 = 0x4000", "$10 = 99", "0x10050:\t21",
        "[ ET NW CD ]", "exited with code 053",
      ])
    #expect(status == 43)
  }

  /// Code that gdb changes is what is executed next, though it has been executed before.
  @Test(arguments: engines) func changesCode(engine: String) throws {
    let folder = try TemporaryFolder()
    // mov cx, 2; mov al, 5; loop; out 0xf4, al
    let image = try sector([0xb9, 2, 0, 0xb0, 5, 0xe2, 0xfc, 0xe6, 0xf4, 0xeb, 0xfe], in: folder)
    let (output, status) = try debug(
      engine, [image],
      [
        "hbreak *0x7c07", "continue", "p/x $rax & 0xff", "set *(unsigned char*)0x7c04 = 8", "set $rip = 0x7c00",
        "continue",
        "p/x $rax & 0xff", "continue",
      ])
    expect(output, has: ["$1 = 0x5", "$2 = 0x8", "exited with code 021"])
    #expect(status == 17)
  }

  @Test(arguments: engines) func tellsOfViews(engine: String) throws {
    let (output, status) = try debug(
      engine, ["hello", "--cpus", "2"], ["monitor help", "monitor views", "monitor nothing", "kill"])
    expect(output, has: ["views: each vCPU's memory view", "help: this list", "no command 'nothing'"])
    expect(output, has: ["vCPU 0: no view: all of memory, rwx\nvCPU 1: no view: all of memory, rwx\n"])
    #expect(status == 0)
    let folder = try TemporaryFolder()
    let protected = #"{"name": "low", "start": "0x9000", "size": "0x2000", "rights": "r--"}"#
    let policy = try folder.file("policy.json", Array(#"{"version": 1, "protect": [\#(protected)]}"#.utf8))
    let hardened = try debug(
      engine, ["loader", "--cpus", "2", "--harden", policy], ["monitor views", "kill"])
    for vcpu in 0..<2 {
      expect(
        hardened.gdb, has: ["vCPU \(vcpu): view 1\n  0x9000-0xafff r--\n  everything else rwx\n"])
    }
  }
}
