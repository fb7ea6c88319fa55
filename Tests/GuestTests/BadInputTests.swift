import Foundation
import Testing

/// Everything a user can get wrong: one clear line, the right status, nothing left behind.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"))
struct BadInputTests {
  /// One line on standard error that names what is wrong.
  private func fails(
    _ arguments: [String], status: Int32, naming text: String, location: SourceLocation = #_sourceLocation
  ) throws {
    let result = try VMM.run(arguments)
    #expect(result.status == status, "\(arguments): \(result.errors)", sourceLocation: location)
    let lines = result.errors.split(separator: "\n").filter { !$0.hasPrefix("swiftvmm: engine ") }
    #expect(lines.count == 1, "\(result.errors)", sourceLocation: location)
    #expect(result.errors.contains(text), "\(result.errors)", sourceLocation: location)
    #expect(result.output.isEmpty, sourceLocation: location)
  }

  @Test func missingFile() throws {
    try fails(["run", "/nonexistent/kernel"], status: 66, naming: "/nonexistent/kernel")
  }

  @Test func unknownGuest() throws { try fails(["run", "helo"], status: 66, naming: "hello") }

  @Test func directory() throws { try fails(["run", "/tmp/"], status: 66, naming: "/tmp/") }

  @Test func emptyFile() throws {
    let folder = try TemporaryFolder()
    let path = try folder.file("empty", [])
    try fails(["run", path], status: 66, naming: path)
  }

  @Test func unknownKind() throws {
    let folder = try TemporaryFolder()
    let path = try folder.file("text", Array("neither a kernel nor a boot sector".utf8))
    try fails(["run", path], status: 66, naming: path)
  }

  @Test func truncatedELF() throws {
    let folder = try TemporaryFolder()
    let path = try folder.file("elf", [0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0])
    try fails(["run", path], status: 66, naming: path)
  }

  @Test func unreadable() throws {
    let folder = try TemporaryFolder()
    let path = try folder.file("secret", bootSector([0xf4]))
    chmod(path, 0)
    guard getuid() == 0 else { return try fails(["run", path], status: 66, naming: path) }
    // Root can read everything, so somebody without rights runs a copy that everybody may run.
    chmod(folder.path, 0o755)
    let program = folder.path + "/swiftvmm"
    try FileManager.default.copyItem(atPath: VMM.path, toPath: program)
    let process = Process()
    let errors = Pipe()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/setpriv")
    process.arguments = ["--reuid=65534", "--regid=65534", "--clear-groups", program, "run", path]
    process.standardError = errors
    try process.run()
    let text = String(decoding: errors.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    #expect(process.terminationStatus == 66)
    #expect(text.split(separator: "\n").count == 1 && text.contains("\(path): Permission denied"), "\(text)")
  }

  @Test func missingInitialRAMDisk() throws {
    try fails(["run", "hello", "--initrd", "/nonexistent/initrd"], status: 66, naming: "/nonexistent/initrd")
  }

  @Test(.enabled(if: VMM.hasKVM, "no usable /dev/kvm")) func moreMemoryThanTheHostHas() throws {
    try fails(["run", "hello", "--memory", "4000G", "--engine", "kvm"], status: 69, naming: "--memory")
  }

  @Test func memoryThatIsNoSize() throws {
    try fails(["run", "hello", "--memory", "lots"], status: 64, naming: "--memory lots")
    try fails(["run", "hello", "--memory", "99999999999G"], status: 64, naming: "99999999999G")
  }

  @Test(.enabled(if: VMM.hasKVM, "no usable /dev/kvm"), arguments: ["0", "300"])
  func impossibleNumberOfCPUs(cpus: String) throws {
    try fails(["run", "hello", "--cpus", cpus, "--engine", "kvm"], status: 64, naming: "\(cpus) vCPUs")
  }

  @Test func serialAndTraceThatMeanNothing() throws {
    try fails(["run", "hello", "--serial", "carrier:pigeon"], status: 64, naming: "carrier:pigeon")
    try fails(["run", "hello", "--trace", "dreams:/tmp/x"], status: 64, naming: "dreams")
    try fails(["run", "hello", "--serial", "file:/nonexistent/log"], status: 74, naming: "/nonexistent/log")
  }

  @Test(.enabled(if: VMM.hasKVM, "no usable /dev/kvm")) func controlSocketInUse() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/control"
    let first = Process()
    first.executableURL = URL(fileURLWithPath: VMM.path)
    first.arguments = ["run", "hello", "--engine", "kvm", "--paused", "--control", "unix:\(path)", "--serial", "none"]
    first.standardError = FileHandle.nullDevice
    try first.run()
    defer {
      first.terminate()
      first.waitUntilExit()
    }
    for _ in 0..<600 where access(path, F_OK) != 0 { usleep(50_000) }
    try fails(
      ["run", "hello", "--engine", "kvm", "--control", "unix:\(path)", "--serial", "none"], status: 74, naming: path)
    #expect(access(path, F_OK) == 0, "the first machine's socket must stay")
  }

  @Test func disks() throws {
    let folder = try TemporaryFolder()
    let image = try folder.file("disk.raw", [UInt8](repeating: 0, count: 4096))
    func disk(_ option: String, _ status: Int32, _ text: String) throws {
      try fails(["run", "hello", "--engine", "soft", "--disk", option], status: status, naming: text)
    }
    try disk(folder.path + "/missing.qcow2", 66, "missing.qcow2")
    try disk("", 64, "FILE first")
    try disk(image + ",size=4", 64, "size=4")
    try disk(image + ",readonly", 64, "readonly")
    try disk(image + ",format=vmdk", 64, "raw, qcow2")
    try disk(image + ",cache=fast", 64, "writeback, none, unsafe")
    try disk(image + ",id=4/4", 64, "4/4")
    try disk(image + ",format=qcow2", 66, "disk.raw")
    try fails(
      [
        "run", "hello", "--engine", "soft", "--disk", "\(image),id=a,readonly=on", "--disk",
        "\(image),id=a,readonly=on",
      ],
      status: 64, naming: "two disks are called a")
    // The same image twice, written to: as QEMU's locks say.
    try fails(
      ["run", "hello", "--engine", "soft", "--disk", image, "--disk", image], status: 74, naming: "disk.raw")
  }
}
