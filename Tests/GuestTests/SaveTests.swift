import Foundation
import Testing

/// Machines that go on from a file.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct SaveTests {
  static let engines: [String] = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]
  private static let records = "records=200 flush=10 sectors=16"

  private func image(_ folder: TemporaryFolder) throws -> String {
    let path = folder.path + "/disk.qcow2"
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", path, "32M").status == 0)
    return path
  }

  private func arguments(_ engine: String, cpus: Int, disk: String, queue: String = "split") -> [String] {
    [
      "disk", "--engine", engine, "--cpus", "\(cpus)", "--memory", "64M", "--time-limit", "300", "--disk", disk,
      "--append", "mode=rewrite passes=100000 \(Self.records) queue=\(queue)",
    ]
  }

  private func generation(_ machine: RunningVMM) throws -> String {
    let result = try #require(try machine.execute("query-vm-generation-id") as? [String: Any])
    return try #require(result["guid"] as? String)
  }

  /// A guest that writes checked records goes on where it was, from file to file; its disk is right at the end.
  @Test(arguments: engines, [1, 2])
  func aWritingGuestGoesOn(engine: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let disk = try image(folder)
    let file = folder.path + "/saved"
    let arguments = arguments(engine, cpus: cpus, disk: disk, queue: cpus == 1 ? "split" : "packed")
    var machine = try RunningVMM(arguments)
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    var last = ""
    for round in 0..<4 {
      let report = try #require(try machine.execute("x-swiftvmm-save", ["file": file, "stop": true]) as? [String: Any])
      #expect(try #require(report["memory"] as? Int) > 1 << 16)
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      last = machine.text
      machine = try RunningVMM(arguments + ["--restore", file] + (round % 2 == 0 ? ["--verify"] : []))
      #expect(machine.waitFor("flushed", count: 30), "after \(last.suffix(300)): \(machine.text)")
      #expect(!machine.text.contains("all passed") && !machine.text.contains("FAIL"), "\(machine.text.suffix(500))")
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    #expect(try hostTool("qemu-img", "check", disk).status == 0)
    let flushed = machine.text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      .last { $0.hasPrefix("flushed") }
    let words = try #require(flushed).split(separator: " ")
    let verified = try VMM.run([
      "run", "disk", "--engine", "soft", "--disk", disk, "--append",
      "mode=verify \(Self.records) expect=\(words[1]) generation=\(words[3])",
    ])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
  }

  /// Without `stop` the machine goes on, and a reset of a restored machine boots it again.
  @Test(arguments: engines)
  func theSavedMachineGoesOnToo(engine: String) throws {
    let folder = try TemporaryFolder()
    let file = folder.path + "/saved"
    let arguments = arguments(engine, cpus: 1, disk: try image(folder))
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let generation = try self.generation(machine)
    try machine.execute("x-swiftvmm-save", ["file": file])
    #expect(try self.generation(machine) == generation)
    let count = machine.text.components(separatedBy: "flushed").count
    #expect(machine.waitFor("flushed", count: count + 20), "\(machine.text.suffix(500))")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
    let restored = try RunningVMM(arguments + ["--restore", file, "--paused"])
    let copied = try self.generation(restored)
    #expect(copied != generation)
    try restored.execute("system_reset")
    try restored.execute("cont")
    #expect(restored.waitFor("disk 0: 65536 sectors"), "\(restored.text)")
    #expect(restored.waitFor("flushed"), "\(restored.text)")
    #expect(try self.generation(restored) == copied)
    restored.kill()
  }

  private func dirty(_ engine: String, _ options: String, memory: String) -> [String] {
    [
      "dirty", "--engine", engine, "--memory", memory, "--time-limit", "300", "--append",
      "set=4 seconds=0 jump=60000 skew=60000 \(options)",
    ]
  }

  /// The guest runs while its RAM is written, however long that takes, and the file is of the moment at which all of it has been.
  @Test(arguments: engines) func theGuestGoesOnWhileItIsSaved(engine: String) throws {
    let folder = try TemporaryFolder()
    let file = folder.path + "/saved"
    let arguments = dirty(engine, "fill=128", memory: "192M")
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    func allocated() -> Int {
      var status = stat()
      return stat(file + ".part", &status) == 0 ? Int(status.st_blocks) * 512 : 0
    }
    // The first save says which thread writes.
    let before = HeldThread.written(by: machine.identifier)
    try machine.execute("x-swiftvmm-save", ["file": file])
    let writer = try #require(HeldThread(of: machine.identifier, since: before))
    var pages = 0
    for _ in 0..<20 where pages == 0 {
      let save = try BackgroundProcess(["save", machine.socket, file])
      while save.isRunning, allocated() < 1 << 20 {}
      // It stops once the call is done that it is in.
      try #require(writer.stop(), "ptrace(2) is not allowed here")
      let isCaught = allocated() < 128 << 20 && save.isRunning
      try #require(writer.waitUntilStopped())
      if isCaught {
        let count = machine.text.components(separatedBy: "dirty: pass").count
        #expect(machine.waitFor("dirty: pass", count: count + 1), "\(machine.text)")
        #expect(save.isRunning)
        pages = self.pages(machine.text)
      }
      writer.release()
      #expect(save.waitUntilExit() == 0, "\(save.text)")
    }
    try #require(pages > 0, "the save was never seen while it wrote")
    try machine.execute("quit")
    let restored = try RunningVMM(arguments + ["--restore", file, "--verify"])
    #expect(restored.waitFor("dirty: pass", count: 2), "\(restored.text)")
    #expect(self.pages(restored.text) > pages && !restored.text.contains("FAIL"), "\(pages): \(restored.text)")
    restored.kill()
  }

  /// How many pages the guest says last that it has written.
  private func pages(_ text: String) -> Int {
    let lines = text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
    return lines.last { $0.hasPrefix("dirty: pass") }.flatMap { Int($0.split(separator: " ")[4]) } ?? 0
  }

  /// Each copy of a saved machine has an id of its own, of which its guest is told; the machine itself keeps its id, also where it moves.
  @Test(arguments: engines) func eachCopyIsToldOfItsID(engine: String) throws {
    let folder = try TemporaryFolder()
    let file = folder.path + "/saved"
    let arguments = dirty(engine, "generation=1", memory: "64M")
    /// What the guest sees, which is what the control socket says.
    func id(_ machine: RunningVMM, events: Int) throws -> String {
      #expect(machine.waitFor("after \(events) events\n", count: 2), "\(machine.text)")
      let line = machine.text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
        .last { $0.hasPrefix("generation") }
      let words = try #require(line).split(separator: " ")
      #expect(words[4] == "\(events)", "\(machine.text)")
      let guid = try generation(machine)
      let groups = guid.split(separator: "-").compactMap { UInt64($0, radix: 16) }
      try #require(groups.count == 5)
      #expect(UInt64(words[1].dropFirst(2), radix: 16) == groups[0] | groups[1] << 32 | groups[2] << 48)
      #expect(UInt64(words[2].dropFirst(2), radix: 16) == (groups[3] << 48 | groups[4]).byteSwapped)
      return guid
    }
    let machine = try RunningVMM(arguments)
    let own = try id(machine, events: 0)
    try machine.execute("x-swiftvmm-save", ["file": file])
    #expect(try id(machine, events: 0) == own)
    let uri = "unix:\(folder.path)/move"
    let next = try RunningVMM(arguments + ["--incoming", uri])
    #expect(try hostTool(VMM.path, "migrate", machine.socket, uri).status == 0)
    #expect(try id(next, events: 0) == own)
    let copies = try (0..<2).map { _ in try id(RunningVMM(arguments + ["--restore", file]), events: 1) }
    #expect(Set(copies + [own]).count == 3)
  }

  /// Each refusal is one line that names what is wrong, and status 66.
  @Test func whatDoesNotFitIsRefused() throws {
    let folder = try TemporaryFolder()
    let disk = try image(folder)
    let file = folder.path + "/saved"
    let arguments = arguments("soft", cpus: 1, disk: disk)
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let refused = try machine.refusal("x-swiftvmm-save", ["file": folder.path + "/none/saved"])
    #expect(refused.contains("cannot open \(folder.path)/none/saved.part"), "\(refused)")
    try machine.execute("x-swiftvmm-save", ["file": file, "stop": true])
    #expect(machine.waitUntilExit() == 0)
    func refusal(_ more: [String]) throws -> String {
      let run = try VMM.run(["run"] + more)
      #expect(run.status == 66, "\(more): \(run.status)")
      #expect(run.errors.split(separator: "\n").count == 1, "\(run.errors)")
      return run.errors
    }
    #expect(try refusal(arguments + ["--restore", file, "--cpus", "2"]).contains("--cpus 1, and this machine has 2"))
    #expect(try refusal(arguments + ["--restore", file, "--memory", "65M"]).contains("--memory 65536K"))
    #expect(try refusal(["disk", "--engine", "soft", "--memory", "64M", "--restore", file]).contains("the disks"))
    #expect(try refusal(arguments + ["--restore", disk]).contains("is no saved machine"))
    let handle = try #require(FileHandle(forUpdatingAtPath: file))
    try handle.seek(toOffset: 8)
    try handle.write(contentsOf: Data([9]))
    #expect(try refusal(arguments + ["--restore", file]).contains("version 9, and this program reads 1, 2"))
  }
}
