import Boot
import Foundation
import Testing

private let canRun: Bool = VMM.hasKVM && VMM.isBuilt
private let why: Comment = "needs /dev/kvm, the release build and scripts/build-guests"

/// Every sample guest, through the real executable, on KVM.
@Suite(.enabled(if: canRun, why), .serialized)
struct SampleGuestTests {
  private func passes(_ guest: String, cpus: Int = 1, _ more: String...) throws {
    let result = try VMM.run(
      ["run", guest, "--engine", "kvm", "--cpus", "\(cpus)", "--time-limit", "120"] + more)
    #expect(result.status == 0, "\(guest): \(result.output) \(result.errors)")
    #expect(!result.output.contains("FAIL"))
    #expect(!result.output.isEmpty)
  }

  @Test func helloPrintsTheMachine() throws {
    let result = try VMM.run("run", "hello", "--engine", "kvm", "--append", "greeting=ahoy", "--time-limit", "60")
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(result.output.contains("hello from long mode"))
    #expect(result.output.contains("greeting=ahoy"))
  }

  @Test func realmodeBootsThroughTheFirmware() throws { try passes("realmode") }
  @Test func firmwareServicesAnswer() throws { try passes("services") }

  @Test func aKernelOnADiskStartsThroughTheFirmware() throws {
    let folder = try TemporaryFolder()
    let kernel = try BootImage(path: VMM.checkout + "/build/guests/hello.elf")
    let disk = try folder.file("disk.img", BootDisk.image(kernel: kernel, commandLine: "from=disk"))
    let result = try VMM.run("run", disk, "--engine", "kvm", "--time-limit", "60")
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(result.output.contains("hello from long mode"))
    #expect(result.output.contains("from=disk"))
  }
  @Test(arguments: [1, 2, 4]) func ticks(cpus: Int) throws { try passes("ticks", cpus: cpus) }
  @Test(arguments: [1, 2, 4, 16]) func smp(cpus: Int) throws { try passes("smp", cpus: cpus) }
  @Test func asManyCPUsAsThereCanBe() throws {
    let result = try VMM.run("run", "hello", "--engine", "kvm", "--cpus", "254", "--time-limit", "60")
    #expect(result.status == 0, "\(result.errors)")
    #expect(result.output.contains(", 254 in the MADT"))
  }

  @Test(arguments: [1, 2, 4]) func ring3(cpus: Int) throws { try passes("ring3", cpus: cpus) }
  @Test(arguments: [("64M", 1), ("256M", 2), ("5G", 4)])
  func memory(size: String, cpus: Int) throws { try passes("memory", cpus: cpus, "--memory", size) }
  @Test func pci() throws { try passes("pci") }

  @Test(arguments: ["off", "split"], [1, 2, 4])
  func interruptControllersInTheVMM(_ controllers: String, cpus: Int) throws {
    for guest in ["hello", "services", "ticks", "smp"] {
      try passes(guest, cpus: cpus, "--kernel-irqchip", controllers)
    }
  }
  @Test(arguments: ["on", "split", "off"], [8, 16])
  func manyProcessors(_ controllers: String, cpus: Int) throws {
    try passes("smp", cpus: cpus, "--kernel-irqchip", controllers)
  }

  @Test func aCheckThatFailsEndsWithStatusThree() throws {
    let result = try VMM.run("run", "exits", "--engine", "kvm", "--append", "count=0", "--time-limit", "60")
    #expect(result.status == 3)
    #expect(result.output.contains("FAIL count expected 1...100000 got 0"))
  }

  @Test func exits() throws { try passes("exits", cpus: 1, "--append", "count=200") }

  @Test func everyLoopOfCPUCountsAndChecksItself() throws {
    let result = try VMM.run("run", "cpu", "--engine", "kvm", "--time-limit", "120")
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    var instructions: [String: Int] = [:]
    for line in result.output.split(whereSeparator: \.isNewline) {
      let row = try #require(try JSONSerialization.jsonObject(with: Data(line.utf8)) as? [String: Any], "\(line)")
      guard let loop = row["loop"] as? String else { continue }
      #expect((row["nanoseconds"] as? Int ?? 0) > 0, "\(line)")
      #expect((row["cycles"] as? Int ?? 0) > 0, "\(line)")
      instructions[loop] = row["instructions"] as? Int
    }
    let expected = [
      "alu": 20009, "calls": 3948, "branchy": 15005, "chase": 1283, "copy": 12290, "rep-movsq": 3, "cr3": 5243,
    ]
    #expect(instructions == expected)
  }

  @Test func oneLoopOfCPUAlone() throws {
    let append = "loop=calls calls=5 milliseconds=20"
    let result = try VMM.run("run", "cpu", "--engine", "kvm", "--append", append, "--time-limit", "120")
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(result.output.contains("\"checksum\":\"0x5\""))
    #expect(!result.output.contains("alu"))
  }

  @Test func twoHundredStartsWithoutOneFailure() throws {
    for round in 0..<200 {
      let result = try VMM.run("run", "hello", "--engine", "kvm", "--memory", "64M", "--time-limit", "60")
      #expect(result.status == 0, "round \(round): \(result.output) \(result.errors)")
      if result.status != 0 { break }
    }
  }

  @Test func theReportTellsOfTheRun() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/report.json"
    let result = try VMM.run(
      "run", "hello", "--engine", "kvm", "--cpus", "2", "--report", path, "--trace", "exits:\(folder.path)/trace",
      "--time-limit", "60")
    #expect(result.status == 0)
    let data = try Data(contentsOf: URL(fileURLWithPath: path))
    let report = try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
    #expect(report["outcome"] as? String == "powered-off")
    #expect(report["cpus"] as? Int == 2)
    let boot = try #require(report["boot"] as? [String: Any])
    #expect(boot["kind"] as? String == "PVH")
    #expect((boot["entry"] as? String)?.hasPrefix("0x") == true)
    let placements = try #require(boot["placements"] as? [[String: Any]])
    #expect(placements.first?["part"] as? String == "segment 0")
    #expect(placements.contains { $0["part"] as? String == "start info" })
    #expect(placements.allSatisfy { ($0["bytes"] as? Int ?? 0) > 0 && $0["address"] is String })
    let exits = try #require(report["exits"] as? [String: Int])
    #expect((exits["port-out"] ?? 0) > 10)
    let trace = try String(contentsOfFile: folder.path + "/trace", encoding: .utf8)
    let lines = trace.split(separator: "\n")
    #expect(lines.count == exits.values.reduce(0, +))
    for line in lines.prefix(100) { _ = try JSONSerialization.jsonObject(with: Data(line.utf8)) }
  }

  @Test func aTimeLimitEndsAGuestThatDoesNot() throws {
    let folder = try TemporaryFolder()
    let loop = try folder.file("loop.img", bootSector([0xeb, 0xfe]))
    let result = try VMM.run("run", loop, "--engine", "kvm", "--time-limit", "0.3")
    #expect(result.status == 124)
    #expect(result.errors.contains("time limit"))
  }

  @Test func theDebugExitPortChoosesTheStatus() throws {
    let folder = try TemporaryFolder()
    // mov al, 0x21; out 0xf4, al
    let image = try folder.file("exit.img", bootSector([0xb0, 0x21, 0xe6, 0xf4, 0xeb, 0xfe]))
    #expect(try VMM.run("run", image, "--engine", "kvm", "--time-limit", "60").status == 0x43)
  }

  @Test func aTripleFaultEndsWithACrashReport() throws {
    let folder = try TemporaryFolder()
    // ud2, in protected mode with the empty IDT that a flat binary starts with
    let image = try folder.file("crash.bin", [0x0f, 0x0b])
    let result = try VMM.run(
      "run", image, "--load-address", "0x100000", "--engine", "kvm", "--time-limit", "60")
    #expect(result.status == 134)
    #expect(result.errors.contains("triple fault on vCPU 0"))
    #expect(result.errors.contains("RAX"))
    #expect(result.errors.contains("ud2"))
  }
}

/// A boot sector of `code`.
func bootSector(_ code: [UInt8]) -> [UInt8] {
  code + [UInt8](repeating: 0, count: 510 - code.count) + [0x55, 0xaa]
}
