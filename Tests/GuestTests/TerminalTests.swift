import Foundation
import Testing

/// The console on a real terminal (a pseudo-terminal pair), and hosts without a usable KVM.
@Suite(.enabled(if: VMM.hasKVM && VMM.isBuilt, "needs /dev/kvm, the release build and scripts/build-guests"))
struct TerminalTests {
  /// A pseudo-terminal: what is written to `master` is typed, `slave` is the terminal.
  private func openTerminal() throws -> (master: FileHandle, slave: FileHandle) {
    // Linux's own calls behind unlockpt(3) and ptsname(3), which do not import: TIOCSPTLCK and TIOCGPTN.
    let master = open("/dev/ptmx", O_RDWR | O_NOCTTY)
    var locked: Int32 = 0
    var number: Int32 = -1
    #expect(ioctl(master, 0x4004_5431, &locked) == 0 && ioctl(master, 0x8004_5430, &number) == 0)
    let slave = open("/dev/pts/\(number)", O_RDWR | O_NOCTTY)
    try #require(master >= 0 && slave >= 0)
    return (
      FileHandle(fileDescriptor: master, closeOnDealloc: true), FileHandle(fileDescriptor: slave, closeOnDealloc: true)
    )
  }

  private func settings(_ terminal: FileHandle) -> termios {
    var settings = termios()
    tcgetattr(terminal.fileDescriptor, &settings)
    return settings
  }

  /// Starts a guest that loops, waits for raw mode, lets `end` end it, and checks that the terminal is as before.
  private func run(status: Int32, end: (Process, FileHandle) throws -> Void) throws {
    let folder = try TemporaryFolder()
    let loop = try folder.file("loop.img", bootSector([0xeb, 0xfe]))
    let (master, slave) = try openTerminal()
    let before = settings(slave)
    try #require(before.c_lflag & tcflag_t(ICANON) != 0)
    let process = Process()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = ["run", loop, "--engine", "kvm", "--time-limit", "120"]
    process.standardInput = slave
    process.standardOutput = slave
    process.standardError = FileHandle.nullDevice
    try process.run()
    for _ in 0..<1200 where settings(slave).c_lflag & tcflag_t(ICANON) != 0 { usleep(50_000) }
    #expect(settings(slave).c_lflag & tcflag_t(ICANON | ECHO) == 0, "raw mode")
    try end(process, master)
    process.waitUntilExit()
    #expect(process.terminationStatus == status)
    let after = settings(slave)
    #expect(after.c_lflag == before.c_lflag && after.c_iflag == before.c_iflag && after.c_oflag == before.c_oflag)
  }

  @Test func controlAThenXEndsTheRun() throws {
    try run(status: 0) { _, keyboard in try keyboard.write(contentsOf: [0x01, UInt8(ascii: "x")]) }
  }

  @Test func aSignalGivesTheTerminalBack() throws {
    try run(status: 130) { process, _ in kill(process.processIdentifier, SIGTERM) }
  }

  @Test func aFatalSignalGivesTheTerminalBack() throws {
    try run(status: SIGSEGV) { process, _ in kill(process.processIdentifier, SIGSEGV) }
  }

  /// Runs a shell in a mount namespace of its own, where `setup` has changed /dev.
  private func runIsolated(_ setup: String, _ command: String) throws -> (status: Int32, errors: String) {
    let process = Process()
    let errors = Pipe()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/unshare")
    process.arguments = ["--mount", "/bin/sh", "-c", "set -e; \(setup); \(command)"]
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = FileHandle.nullDevice
    process.standardError = errors
    try process.run()
    let text = String(decoding: errors.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    return (process.terminationStatus, text)
  }

  @Test(.enabled(if: getuid() == 0, "only root can hide /dev/kvm")) func noKVM() throws {
    let result = try runIsolated(
      "mount -t tmpfs none /dev; mknod /dev/null c 1 3", "exec \(VMM.path) run hello --engine kvm")
    #expect(result.status == 69)
    #expect(result.errors.split(separator: "\n").count == 1, "\(result.errors)")
    #expect(result.errors.contains("/dev/kvm") && result.errors.contains("No such file"), "\(result.errors)")
  }

  @Test(.enabled(if: getuid() == 0, "only root can become somebody without rights")) func noPermissionOnKVM() throws {
    let folder = try TemporaryFolder()
    chmod(folder.path, 0o755)
    let program = folder.path + "/swiftvmm"
    try FileManager.default.copyItem(atPath: VMM.path, toPath: program)
    let image = try folder.file("image", bootSector([0xf4]))
    chmod(image, 0o644)
    let result = try runIsolated(
      "mount -t tmpfs none /dev; mknod -m 600 /dev/kvm c 10 232; mknod -m 666 /dev/null c 1 3",
      "exec setpriv --reuid=65534 --regid=65534 --clear-groups \(program) run \(image) --engine kvm")
    #expect(result.status == 69)
    #expect(result.errors.split(separator: "\n").count == 1, "\(result.errors)")
    #expect(result.errors.contains("no permission to open /dev/kvm"), "\(result.errors)")
  }
}
