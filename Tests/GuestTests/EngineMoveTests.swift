import Foundation
import Testing

/// Machines that change engines: by migration, and from a file. `SWIFTVMM_MOVES` sets how often.
@Suite(
  .enabled(if: VMM.isBuilt && VMM.hasKVM, "needs the release build, scripts/build-guests and /dev/kvm"), .serialized)
struct EngineMoveTests {
  private static let moves = ProcessInfo.processInfo.environment["SWIFTVMM_MOVES"].flatMap { Int($0) } ?? 4
  private static let records = "records=200 flush=10 sectors=16"
  /// In turns. KVM has the local APICs, or the VMM.
  private static let engines = [
    ["--engine", "kvm"], ["--engine", "soft"], ["--engine", "kvm", "--kernel-irqchip", "off"], ["--engine", "soft"],
  ]

  /// Without VMX and SVM KVM shows the least.
  private static let emulatesRing0: Bool = {
    let text = (try? String(contentsOfFile: "/proc/cpuinfo", encoding: .utf8)) ?? ""
    return !text.contains(" vmx") && !text.contains(" svm")
  }()

  private func dirty(cpus: Int) -> [String] {
    [
      "dirty", "--cpu", "common", "--cpus", "\(cpus)", "--memory", "96M", "--time-limit", "600", "--append",
      "set=16 fill=16 readonly=4 free=4 reuse=50 pattern=hot seconds=0 jump=20000 skew=20000",
    ]
  }

  private func disk(_ image: String, cpus: Int, mode: String = "mode=rewrite passes=100000") -> [String] {
    [
      "disk", "--cpu", "common", "--cpus", "\(cpus)", "--memory", "64M", "--time-limit", "600", "--disk", image,
      "--append", "\(mode) \(Self.records) queue=\(cpus == 1 ? "split" : "packed")",
    ]
  }

  private func image(_ folder: TemporaryFolder) throws -> String {
    let path = folder.path + "/disk.qcow2"
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", path, "32M").status == 0)
    return path
  }

  /// Moves a machine to a new process with `arguments`; the old one ends.
  private func move(
    _ machine: RunningVMM, _ folder: TemporaryFolder, to arguments: [String], isPostCopy: Bool = false
  ) throws -> RunningVMM {
    // A destination listens for a while after its machine has come.
    let uri = "unix:\(folder.path)/\(UUID().uuidString.prefix(8))"
    let next = try RunningVMM(arguments + ["--incoming", uri])
    if isPostCopy {
      try machine.execute(
        "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": true]]])
    }
    try machine.execute("migrate", ["uri": uri])
    if isPostCopy { try machine.execute("migrate-start-postcopy") }
    while true {
      let state = try #require(try machine.execute("query-migrate") as? [String: Any])
      let status = state["status"] as? String ?? "none"
      if ["setup", "active", "device", "postcopy-active"].contains(status) {
        usleep(5000)
        continue
      }
      try #require(status == "completed", "\(state) \(machine.text) \(next.text)")
      break
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    return next
  }

  /// Checksums and clocks are right after every change, interrupts and processors go on.
  @Test(arguments: [1, 2], [false, true]) func aBusyGuestChangesEngines(cpus: Int, isPostCopy: Bool) throws {
    if isPostCopy, !PostCopyHost.hasFaults {
      print("skipped: post-copy between engines: userfaultfd(2) is not to be had here")
      return
    }
    let folder = try TemporaryFolder()
    var machine = try RunningVMM(dirty(cpus: cpus) + ["--engine", "soft"])
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    for index in 0..<Self.moves {
      machine = try move(
        machine, folder, to: dirty(cpus: cpus) + Self.engines[index % Self.engines.count], isPostCopy: isPostCopy)
      #expect(machine.waitFor("dirty: pass", count: 2), "move \(index): \(machine.text)")
      try #require(!machine.text.contains("FAIL"), "move \(index): \(machine.text)")
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }

  /// What the guest was told is durable is on the disk after every change.
  @Test(arguments: [1, 2]) func aWritingGuestChangesEngines(cpus: Int) throws {
    let folder = try TemporaryFolder()
    let image = try image(folder)
    var machine = try RunningVMM(disk(image, cpus: cpus) + ["--engine", "soft"])
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    for index in 0..<Self.moves {
      machine = try move(machine, folder, to: disk(image, cpus: cpus) + Self.engines[index % Self.engines.count])
      #expect(machine.waitFor("flushed", count: 20), "move \(index): \(machine.text)")
      try #require(!machine.text.contains("FAIL"), "move \(index): \(machine.text)")
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    try verify(image, machine.text)
  }

  /// From file to file, in one engine and the other.
  @Test(arguments: [1, 2]) func aFileGoesOnInEitherEngine(cpus: Int) throws {
    let folder = try TemporaryFolder()
    let image = try image(folder)
    let file = folder.path + "/saved"
    var machine = try RunningVMM(disk(image, cpus: cpus) + ["--engine", "soft"])
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    for index in 0..<4 {
      try machine.execute("x-swiftvmm-save", ["file": file, "stop": true])
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      machine = try RunningVMM(disk(image, cpus: cpus) + Self.engines[index] + ["--restore", file])
      #expect(machine.waitFor("flushed", count: 20), "file \(index): \(machine.text)")
      try #require(!machine.text.contains("FAIL"), "file \(index): \(machine.text)")
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    try verify(image, machine.text)
  }

  private func verify(_ image: String, _ text: String) throws {
    let flushed = text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      .last { $0.hasPrefix("flushed") }
    let words = try #require(flushed).split(separator: " ")
    let mode = "mode=verify expect=\(words[1]) generation=\(words[3])"
    let verified = try VMM.run(["run"] + disk(image, cpus: 1, mode: mode) + ["--engine", "soft"])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
  }

  /// Each timer's interrupts go on in the other engine, as periodic as before.
  @Test func timersGoOn() throws {
    let folder = try TemporaryFolder()
    let arguments = [
      "ticks", "--cpu", "common", "--cpus", "2", "--memory", "16M", "--time-limit", "300", "--append",
      "rounds=1000 tsc=0",
    ]
    var machine = try RunningVMM(arguments + ["--engine", "soft"])
    let lines = [
      "pit periodic through pic", "pit periodic through ioapic", "local apic periodic", "local apic one-shot",
    ]
    for index in 0..<Self.moves {
      #expect(machine.waitFor(lines[index % lines.count], count: 2), "\(machine.text)")
      machine = try move(machine, folder, to: arguments + Self.engines[index % Self.engines.count])
    }
    #expect(machine.waitFor("hpet counter: ok", count: 2), "\(machine.text)")
    #expect(machine.isRunning && !machine.text.contains("FAIL"), "\(machine.text)")
    machine.kill()
  }

  /// Processors that do nothing but interrupt one another, in either mode of their APICs: no interrupt is lost, and none comes twice.
  @Test(arguments: [0, 1]) func interruptsBetweenProcessorsGoOn(x2apic: Int) throws {
    let folder = try TemporaryFolder()
    let arguments = [
      "smp", "--cpu", "common", "--cpus", "2", "--memory", "16M", "--time-limit", "600", "--append",
      "rounds=1000000 x2apic=\(x2apic)",
    ]
    var machine = try RunningVMM(arguments + ["--engine", "soft"])
    for index in 0..<Self.moves {
      #expect(machine.waitFor("interprocessor interrupts: ok", count: 2), "move \(index): \(machine.text)")
      machine = try move(
        machine, folder, to: arguments + Self.engines[index % Self.engines.count],
        isPostCopy: index % 8 >= 4 && PostCopyHost.hasFaults)
    }
    #expect(machine.waitFor("interprocessor interrupts: ok", count: 2), "\(machine.text)")
    #expect(machine.isRunning && !machine.text.contains("FAIL"), "\(machine.text)")
    machine.kill()
  }

  /// One line names everything that the guest has seen and would miss.
  @Test func whatIsLackingIsNamed() throws {
    let folder = try TemporaryFolder()
    func guest(_ more: [String]) -> [String] { ["dirty", "--memory", "64M", "--append", "seconds=0"] + more }
    func refusal(_ here: [String], _ there: [String]) throws -> (moved: String, restored: String) {
      let file = folder.path + "/saved"
      let machine = try RunningVMM(guest(here))
      #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
      let uri = "unix:\(folder.path)/\(UUID().uuidString.prefix(8))"
      let next = try RunningVMM(guest(there) + ["--incoming", uri])
      let moved = try hostTool(VMM.path, "migrate", machine.socket, uri)
      #expect(moved.status == 74, "\(moved.output)")
      #expect(next.waitUntilExit() == 74)
      // It goes on where it is.
      let count = machine.text.components(separatedBy: "dirty: pass").count
      #expect(machine.waitFor("dirty: pass", count: count + 1), "\(machine.text)")
      try machine.execute("x-swiftvmm-save", ["file": file, "stop": true])
      #expect(machine.waitUntilExit() == 0)
      let restored = try VMM.run(["run"] + guest(there) + ["--restore", file])
      #expect(restored.status == 66)
      return (moved.output, restored.errors.split(separator: "\n").last.map(String.init) ?? "")
    }
    let soft = ["--engine", "soft"]
    let kvm = ["--engine", "kvm"]
    // The software CPU has what this KVM cannot show, or shows another vendor's.
    for text in try [refusal(soft, kvm)].flatMap({ [$0.moved, $0.restored] }) {
      #expect(text.contains("lacks what") && text.contains("--cpu common"), "\(text)")
      #expect(text.contains("a time-stamp counter of 1000000 kHz") || text.contains("vendor"), "\(text)")
      if Self.emulatesRing0 {
        for name in ["fsgsbase", "smep", "popcnt", "xsave", "pdpe1gb", "rdtscp"] {
          #expect(text.contains(name), "\(name): \(text)")
        }
      }
    }
    for text in try [refusal(kvm, soft)].flatMap({ [$0.moved, $0.restored] }) {
      #expect(text.contains("vme") && text.contains("kvmclock") && text.contains("mce"), "\(text)")
    }
    let common = ["--cpu", "common"]
    for text in try [refusal(kvm + common + ["--kernel-irqchip", "on"], soft + common)]
      .flatMap({ [$0.moved, $0.restored] })
    {
      #expect(text.contains("seen: interrupt controllers inKernel"), "\(text)")
      #expect(text.contains("--kernel-irqchip split or off"), "\(text)")
    }
    for text in try [refusal(soft + common, soft)].flatMap({ [$0.moved, $0.restored] }) {
      #expect(text.contains("--cpu common (not host)"), "\(text)")
    }
  }
}
