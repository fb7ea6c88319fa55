import Foundation
import Testing

/// Debian's kernel and its busybox initramfs, as `scripts/fetch-linux` leaves them.
private let kernel = VMM.checkout + "/build/linux/vmlinuz"
private let initramfs = VMM.checkout + "/build/linux/initramfs.gz"
private let isFetched: Bool = access(kernel, R_OK) == 0 && access(initramfs, R_OK) == 0

/// A version without the software engine says so with 69; anything else is for the tests to judge.
private let hasSoftwareEngine: Bool =
  VMM.isBuilt && (try? VMM.run("run", "hello", "--engine", "soft", "--time-limit", "60"))?.status != 69

/// A real operating system through the real executable, unmodified, on the software engine.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: hasSoftwareEngine, "needs the release build, scripts/build-guests and an executable with --engine soft"),
  .serialized)
struct LinuxTests {
  private func boot(_ append: String, cpus: Int = 1, _ more: String...) throws -> VMM {
    try VMM.run(
      [
        "run", kernel, "--initrd", initramfs, "--engine", "soft", "--cpus", "\(cpus)", "--time-limit", "300",
        "--append", "console=ttyS0 \(append)",
      ] + more)
  }

  @Test(arguments: [1, 2]) func bootsToUserlandRunsCommandsAndPowersOff(cpus: Int) throws {
    let commands = [
      "grep -c ^processor /proc/cpuinfo | sed s/^/processors:/", "cat /proc/interrupts",
      "sleep 0.2 && echo slept", "cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
      "ls /sys/bus/pci/devices | sed s/^/pci:/", "dmesg | grep -i acpi | head -n 30",
      "head -n 60 /proc/timer_list", "echo $((6 * 7)) | md5sum", "ls -l / | wc -l", "echo LAST",
    ]
    let result = try boot("run=\"\(commands.joined(separator: "; "))\"", cpus: cpus)
    #expect(result.status == 0, "\(result.output.suffix(4000)) \(result.errors)")
    let text = result.output
    #expect(text.contains("HELLO-FROM-INIT"))
    #expect(text.contains("processors:\(cpus)\r\n"), "\(text.suffix(6000))")
    #expect(text.contains("slept"))
    #expect(text.contains("pci:0000:00:00.0"))
    #expect(text.contains("ACPI: RSDP"))
    #expect(text.contains("ACPI: Interpreter enabled"))
    #expect(text.contains("Timer List Version"))
    #expect(text.contains("50a2fabfdd276f573ff97ace8b11c5f4"), "md5 of 42 and a newline")
    #expect(text.contains("LAST"))
    // Local APIC timer interrupts, on every CPU.
    let timer = text.split(whereSeparator: \.isNewline).last { $0.contains("LOC:") }
    let counts = try #require(timer, "no LOC line: \(text.suffix(4000))").split(separator: " ").dropFirst().prefix(cpus)
    #expect(counts.count == cpus)
    #expect(counts.allSatisfy { (Int($0) ?? 0) > 0 }, "\(counts)")
  }

  @Test func aShellOnTheConsoleTakesCommands() throws {
    let process = Process()
    let input = Pipe()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = [
      "run", kernel, "--initrd", initramfs, "--engine", "soft", "--time-limit", "300", "--append",
      "console=ttyS0 quiet shell",
    ]
    process.standardInput = input
    process.standardOutput = output
    process.standardError = FileHandle.nullDevice
    try process.run()
    var text = ""
    // What comes before the prompt, the kernel throws away when it opens the port.
    for command in ["echo $((123 * 456))", "uname -m", "exit"] {
      let seen = text.count
      while !text.dropFirst(seen).contains("# ") {
        let data = output.fileHandleForReading.availableData
        if data.isEmpty { break }
        text += String(decoding: data, as: UTF8.self)
      }
      try input.fileHandleForWriting.write(contentsOf: Data((command + "\n").utf8))
    }
    text += String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    #expect(process.terminationStatus == 0, "\(text.suffix(4000))")
    #expect(text.contains("56088"), "\(text.suffix(4000))")
    #expect(text.contains("x86_64"))
  }

  @Test func aPanicEndsWithItsMessageAndAReport() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/report.json"
    // panic=-1 reboots at once, and reboot=t does it by a triple fault, which is where a machine of ours ends.
    let result = try boot("panic=-1 reboot=t rdinit=/nonexistent", cpus: 1, "--report", path)
    #expect(result.output.contains("Kernel panic - not syncing"), "\(result.output.suffix(4000)) \(result.errors)")
    #expect(result.status == 134, "\(result.errors)")
    #expect(result.errors.contains("triple fault on vCPU 0"), "\(result.errors)")
    #expect(result.errors.contains("long mode, ring 0"), "\(result.errors)")
    let report = try #require(
      try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: path))) as? [String: Any])
    #expect(report["outcome"] as? String == "crashed")
  }
}
