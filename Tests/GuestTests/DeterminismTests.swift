import Foundation
import Testing

private let kernel = VMM.checkout + "/build/linux/vmlinuz"
private let initramfs = VMM.checkout + "/build/linux/initramfs.gz"

/// `--deterministic`: two runs are one.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct DeterminismTests {
  /// What of a run must repeat itself: all of the report but the host's time.
  private struct Run: Equatable {
    var status: Int32
    var output: String
    var report: NSDictionary
    /// Exceptions and interrupts, a line each.
    var events: String
  }

  private func run(_ arguments: [String], input: String? = nil) throws -> Run {
    let folder = try TemporaryFolder()
    let path = folder.path + "/report.json"
    let process = Process()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments =
      [
        "run", "--engine", "soft", "--deterministic", "--time-limit", "300", "--report", path, "--trace",
        "exceptions:\(path).exceptions", "--trace", "interrupts:\(path).interrupts",
      ] + arguments
    let output = Pipe()
    process.standardOutput = output
    process.standardError = FileHandle.nullDevice
    let file = try folder.file("input", Array((input ?? "").utf8))
    process.standardInput = try FileHandle(forReadingFrom: URL(fileURLWithPath: file))
    try process.run()
    let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    var report = try #require(
      try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: path))) as? [String: Any])
    #expect(report.removeValue(forKey: "wall-seconds") != nil)
    #expect((report["instructions"] as? Int ?? 0) > 0)
    let events = try ["exceptions", "interrupts"].map { try String(contentsOfFile: "\(path).\($0)", encoding: .utf8) }
    return Run(
      status: process.terminationStatus, output: text, report: report as NSDictionary, events: events.joined())
  }

  @Test(
    arguments: ["hello", "realmode", "services", "ticks", "smp", "memory", "ring3", "pci"], [1, 2, 4])
  func sampleGuestsRepeatThemselves(_ guest: String, cpus: Int) throws {
    let first = try run([guest, "--cpus", "\(cpus)"])
    #expect(first.status == 0, "\(first.output)")
    #expect(!first.output.contains("FAIL"))
    #expect(try run([guest, "--cpus", "\(cpus)"]) == first)
  }

  @Test(arguments: ["split", "packed"], [1, 2]) func disksRepeatThemselves(_ queue: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let runs = try (0..<2).map { round in
      let disk = folder.path + "/disk\(round)"
      try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "16M").status == 0)
      return try run([
        "disk", "--cpus", "\(cpus)", "--disk", disk, "--append", "mode=write queue=\(queue) records=200 depth=16",
      ])
    }
    #expect(runs[0].status == 0, "\(runs[0].output)")
    #expect(runs[0].output.contains("disk: all passed"), "\(runs[0].output)")
    #expect(runs[0] == runs[1])
  }

  /// Idle time costs nothing: a second of it passes at once, and is a second for the guest all the same.
  @Test func virtualTimeIsInTheReport() throws {
    let run = try run(["ticks"])
    let time = try #require(run.report["virtual-nanoseconds"] as? Int)
    let instructions = try #require(run.report["instructions"] as? Int)
    #expect(time > instructions)
  }

  @Test(.enabled(if: access(kernel, R_OK) == 0 && access(initramfs, R_OK) == 0, "needs scripts/fetch-linux"))
  func linuxRepeatsItself() throws {
    let commands = "cat /proc/interrupts; date; head -c 16 /dev/urandom | md5sum; sleep 5; cat /proc/uptime; echo LAST"
    let arguments = [
      kernel, "--initrd", initramfs, "--cpus", "2", "--append", "console=ttyS0 run=\"\(commands)\"",
    ]
    let first = try run(arguments)
    #expect(first.status == 0, "\(first.output.suffix(2000))")
    #expect(first.output.contains("LAST"))
    #expect(first.output.contains("2026"), "the fixed epoch: \(first.output.suffix(2000))")
    let second = try run(arguments)
    #expect(second.output == first.output)
    #expect(second == first)
    #expect(first.events.utf8.count > 100_000)
  }

  @Test(.enabled(if: access(kernel, R_OK) == 0 && access(initramfs, R_OK) == 0, "needs scripts/fetch-linux"))
  func linuxReadsAFileAtTheSameInstructionsEveryTime() throws {
    let arguments = [kernel, "--initrd", initramfs, "--append", "console=ttyS0 quiet shell"]
    // What comes before the prompt, the kernel throws away when it opens the port.
    let input = String(repeating: "\n", count: 200) + "echo $((123 * 456))\nexit\n"
    let first = try run(arguments, input: input)
    #expect(first.status == 0, "\(first.output.suffix(2000))")
    #expect(first.output.contains("56088"), "\(first.output.suffix(2000))")
    #expect(try run(arguments, input: input) == first)
  }

  @Test(arguments: ["smp", "ticks", "services"], [1, 2, 4])
  func turnsWithoutVirtualTimePass(_ guest: String, cpus: Int) throws {
    let result = try VMM.run(
      "run", guest, "--engine", "soft", "--smp-threads", "off", "--cpus", "\(cpus)", "--time-limit", "120")
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(!result.output.contains("FAIL"))
  }

  @Test(
    arguments: [
      (["--engine", "kvm", "--deterministic"], "--deterministic: engine kvm cannot do that; use --engine soft"),
      (["--engine", "kvm", "--smp-threads", "off"], "--smp-threads off: engine kvm cannot do that; use --engine soft"),
      (
        ["--engine", "soft", "--deterministic", "--smp-threads", "on"],
        "--deterministic and --smp-threads on exclude each other: leave one of them out"
      ),
    ])
  func whatCannotBeHadIsSaidInOneLine(_ arguments: [String], error: String) throws {
    let result = try VMM.run(["run", "hello"] + arguments)
    #expect(result.status == 64)
    #expect(result.errors == "swiftvmm: \(error)\n")
  }
}
