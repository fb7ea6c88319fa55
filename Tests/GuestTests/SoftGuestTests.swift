import Foundation
import Testing

/// Every sample guest on the software CPU: no KVM is needed, and where there is one the consoles are compared.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct SoftGuestTests {
  private func run(_ guest: String, engine: String, cpus: Int, _ more: [String] = []) throws -> VMM {
    try VMM.run(["run", guest, "--engine", engine, "--cpus", "\(cpus)", "--time-limit", "120"] + more)
  }

  /// The console without the line that names the processor: the software CPU is another one than the host's.
  private func console(_ result: VMM) -> [Substring] {
    result.output.split(separator: "\n", omittingEmptySubsequences: false).filter { !$0.hasPrefix("cpu ") }
  }

  @Test(
    arguments: ["hello", "realmode", "services", "ticks", "smp", "memory", "ring3", "pci"], [1, 2, 4])
  func passesWithTheConsoleThatKVMGivesIt(_ guest: String, cpus: Int) throws {
    let soft = try run(guest, engine: "soft", cpus: cpus)
    #expect(soft.status == 0, "\(soft.output) \(soft.errors)")
    #expect(!soft.output.isEmpty)
    #expect(!soft.output.contains("FAIL"))
    guard VMM.hasKVM else {
      print("not compared with KVM: \(guest) with \(cpus) vCPUs: no /dev/kvm")
      return
    }
    // The same controllers and timers on both sides.
    let kvm = try run(guest, engine: "kvm", cpus: cpus, ["--kernel-irqchip", "off"])
    #expect(kvm.status == 0, "\(kvm.output) \(kvm.errors)")
    #expect(console(soft) == console(kvm))
  }

  @Test(arguments: ["exits", "cpu"]) func benchmarksRun(_ guest: String) throws {
    let result = try run(guest, engine: "soft", cpus: 1)
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(result.output.contains("\"nanoseconds\""))
  }

  @Test func reportsCountInstructions() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/report.json"
    let result = try run("hello", engine: "soft", cpus: 1, ["--report", path])
    #expect(result.status == 0)
    let data = try Data(contentsOf: URL(fileURLWithPath: path))
    let report = try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
    #expect(report["engine"] as? String == "soft")
    #expect((report["instructions"] as? Int ?? 0) > 1000)
  }

  @Test func aTripleFaultEndsWithACrashReport() throws {
    let folder = try TemporaryFolder()
    let image = try folder.file("crash.bin", [0x0f, 0x0b])
    let result = try run(image, engine: "soft", cpus: 1, ["--load-address", "0x100000"])
    #expect(result.status == 134)
    #expect(result.errors.contains("triple fault on vCPU 0"))
    #expect(result.errors.contains("ud2"))
  }

  @Test func autoRemembersHowFastRingZeroIs() throws {
    guard VMM.hasKVM else {
      print("skipped: autoRemembersHowFastRingZeroIs: no /dev/kvm")
      return
    }
    let folder = try TemporaryFolder()
    let boot = try String(contentsOfFile: "/proc/sys/kernel/random/boot_id", encoding: .utf8)
      .trimmingCharacters(in: .whitespacesAndNewlines)
    let memory = folder.path + "/swiftvmm-ring0"
    func engine() throws -> String {
      let report = folder.path + "/report.json"
      let result = try VMM.run(
        "run", "hello", "--report", report, "--time-limit", "60", environment: ["XDG_RUNTIME_DIR": folder.path])
      #expect(result.status == 0, "\(result.errors)")
      #expect(result.errors.contains("swiftvmm: engine "))
      let data = try Data(contentsOf: URL(fileURLWithPath: report))
      return try #require(
        (try JSONSerialization.jsonObject(with: data) as? [String: Any])?["engine"] as? String)
    }
    let measured = try engine()
    let text = try String(contentsOfFile: memory, encoding: .utf8)
    #expect(text.hasPrefix(boot + " "))
    #expect(try engine() == measured)
    // What is remembered decides, until the host boots again.
    try "\(boot) 5000\n".write(toFile: memory, atomically: true, encoding: .utf8)
    #expect(try engine() == "kvm")
    try "\(boot) 1\n".write(toFile: memory, atomically: true, encoding: .utf8)
    #expect(try engine() == "soft")
    try "another-boot \(measured == "kvm" ? 1 : 5000)\n".write(toFile: memory, atomically: true, encoding: .utf8)
    #expect(try engine() == measured)
  }
}
