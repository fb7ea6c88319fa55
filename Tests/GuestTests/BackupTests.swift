import Foundation
import Testing

/// `swiftvmm backup` below a guest that writes, whole and cut off.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct BackupTests {
  static let engines: [String] = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]
  static let options = "records=200 flush=10 sectors=16"

  /// Two disks and a guest that writes to them for ever.
  final class Writer {
    let folder: TemporaryFolder
    let images: [String]
    private let place: String
    private(set) var machine: RunningVMM
    private let arguments: [String]

    /// `place`: where the disks are, if not in the folder.
    init(
      _ engine: String, formats: [String] = ["qcow2", "qcow2"], rate: Int = 0, depth: Int = 8, in place: String? = nil
    ) throws {
      let folder = try TemporaryFolder()
      self.folder = folder
      let place = place ?? folder.path
      self.place = place
      images = try formats.enumerated().map { index, format in
        let path = "\(place)/d\(index).\(format)"
        try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", format, path, "32M").status == 0)
        return path
      }
      let disks = images.enumerated().flatMap { ["--disk", "\($1),id=d\($0)"] }
      arguments =
        ["disk", "--engine", engine, "--time-limit", "300"] + disks + [
          "--append",
          "mode=rewrite passes=100000 disks=\(images.count) rate=\(rate) depth=\(depth) \(BackupTests.options)",
        ]
      machine = try RunningVMM(arguments)
      #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    }

    /// The same machine again.
    func start() throws {
      machine = try RunningVMM(arguments)
      #expect(machine.waitFor("flushed"), "\(machine.text)")
    }

    var socket: String { machine.socket }

    /// Waits until the guest has flushed something that it wrote after this call.
    func goesOn() {
      let count = machine.text.components(separatedBy: "flushed").count
      #expect(machine.waitFor("flushed", count: count + 1), "\(machine.text.suffix(2000))")
    }

    /// Records, with the generations before, that the guest has flushed.
    var flushed: Int { BackupTests.position(of: machine.text, "flushed") }

    /// Waits for the backup's second layer, the one that it is read from.
    func waitForTheSnapshot() throws {
      for _ in 0..<1000 {
        let answer = try machine.execute("x-swiftvmm-query-snapshots", ["all": true]) as? [String: Any]
        let kinds = (answer?["temporary"] as? [[String: Any]] ?? []).compactMap { $0["kind"] as? String }
        if kinds.count(where: { $0 == "backup-temporary" }) == images.count { return }
        usleep(5_000)
      }
      Issue.record("no temporary snapshots")
    }

    func hashes() throws -> [String] { try images.map { try hostTool("sha256sum", $0).output } }

    func depths() throws -> [Int] {
      let blocks = try #require(try machine.execute("query-block") as? [[String: Any]])
      return blocks.map { ($0["inserted"] as? [String: Any])?["backing_file_depth"] as? Int ?? -1 }
    }

    /// What a backup has left beside the disks.
    var leftovers: [String] {
      let names = (try? FileManager.default.contentsOfDirectory(atPath: place)) ?? []
      return names.filter { $0.contains(".backup-") }
    }

    @discardableResult
    func backUp(_ more: String...) throws -> VMM { try VMM.run(["backup", socket, "-q"] + more) }

    func end() throws -> String {
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
      return machine.text
    }
  }

  /// The last whole line that begins so: its record, behind those of all generations before.
  static func position(of text: String, _ beginning: String) -> Int {
    let lines = text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
    let numbers = lines.last { $0.hasPrefix(beginning) }?.split(separator: " ").compactMap { Int($0) } ?? []
    guard numbers.count >= 2 else { return 0 }
    return numbers[numbers.count - 1] * 200 + numbers[numbers.count - 2]
  }

  /// The records of a writer that was cut off at any moment, on these disks.
  ///
  /// - Returns: The last one's `position`.
  @discardableResult
  static func verify(_ images: [String], flushed text: String? = nil, wasKilled: Bool = false, more: String = "")
    throws -> Int
  {
    for image in images {
      let checked = try hostTool("qemu-img", "check", image)
      let isSound = [0, 63].contains(checked.status) || wasKilled && checked.status == 3
      #expect(isSound, "\(image): \(checked.output)")
    }
    var expectation = ""
    let lines = (text ?? "").split(separator: "\n", omittingEmptySubsequences: false).dropLast()
    if let last = lines.last(where: { $0.hasPrefix("flushed") }) {
      let words = last.split(separator: " ")
      expectation = "expect=\(words[1]) generation=\(words[3])"
    }
    let disks = images.flatMap { ["--disk", $0] }
    let verified = try VMM.run(
      ["run", "disk", "--engine", "soft"] + disks + [
        "--append", "mode=verify disks=\(images.count) \(options) \(expectation) \(more)",
      ])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
    return position(of: verified.output.replacing(",", with: ""), "found")
  }

  /// Restores a backup and returns its disks.
  static func restore(_ source: String, _ folder: TemporaryFolder, _ name: String, id: String? = nil) throws
    -> [String]
  {
    let into = "\(folder.path)/\(name)"
    let restored = try VMM.run(["restore-backup", source, "--into", into, "-q"] + (id.map { ["--backup", $0] } ?? []))
    #expect(restored.status == 0, "\(restored.errors)")
    let configuration = try Data(contentsOf: URL(fileURLWithPath: into + "/configuration.json"))
    let read = try #require(try JSONSerialization.jsonObject(with: configuration) as? [String: Any])
    #expect((read["arguments"] as? [String])?.first == "run")
    return ["\(into)/d0.qcow2", "\(into)/d1.qcow2"]
  }

  /// Full, then twice what has changed: each is of one instant, and not older than what was flushed before it.
  @Test(arguments: engines)
  func backupsBelowAWriter(engine: String) throws {
    let writer = try Writer(engine)
    let target = writer.folder.path + "/backups/"
    for round in 0..<3 {
      let before = writer.machine.text
      let made = try writer.backUp("--target", target, round > 0 ? "--incremental" : "--json")
      #expect(made.status == 0 && made.errors.isEmpty, "\(made.errors)")
      #expect(try writer.depths() == [0, 0])
      #expect(writer.leftovers.isEmpty)
      writer.goesOn()
      try Self.verify(Self.restore(target, writer.folder, "again\(round)"), flushed: before)
    }
    let listed = try VMM.run("restore-backup", target, "--into", "x", "--list")
    #expect(listed.output.components(separatedBy: "incremental").count == 5, "\(listed.output)")
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text)
  }

  /// The cut is one instant for both disks. A guest with one request at a time a disk leaves at most two records before the last one
  /// unfinished: all that it had been told of is there, and nothing that it began later. While the copy is read and the guest writes on,
  /// no byte of the volumes changes.
  @Test(arguments: engines)
  func theCutIsOneInstant(engine: String) throws {
    let writer = try Writer(engine, depth: 1)
    for round in 0..<2 {
      let target = "\(writer.folder.path)/\(round)/"
      let before = writer.machine.text
      let backup = try BackgroundProcess(["backup", writer.socket, "-q", "--target", target, "-r", "1M"])
      try writer.waitForTheSnapshot()
      backup.signal(SIGSTOP)
      try writer.waitForTheSnapshot()
      let latest = writer.flushed + 10
      let hashes = try writer.hashes()
      while writer.flushed < latest + 40, writer.machine.isRunning { usleep(5_000) }
      #expect(try writer.hashes() == hashes)
      backup.signal(SIGCONT)
      #expect(backup.waitUntilExit() == 0, "\(backup.text)")
      let found = try Self.verify(
        Self.restore(target, writer.folder, "again\(round)"), flushed: before, more: "window=2")
      #expect((Self.position(of: before, "flushed")...latest).contains(found), "\(found)")
    }
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text, more: "window=2")
  }

  /// The restored disks run by the command that `restore-backup` prints.
  @Test func theRestoredMachineRuns() throws {
    let writer = try Writer("soft")
    let target = writer.folder.path + "/b/"
    #expect(try writer.backUp("--target", target).status == 0)
    _ = try writer.end()
    let restored = try VMM.run("restore-backup", target, "--into", writer.folder.path + "/again")
    let command = try #require(restored.output.split(separator: "\n").last { $0.hasPrefix("swiftvmm run ") })
    let again = try RunningVMM(
      hostTool("sh", "-c", "printf '%s\\n' \(command)").output.split(separator: "\n").dropFirst(2).map(String.init))
    let found = Self.position(of: again.waitFor("flushed") ? again.text.replacing(",", with: "") : "", "found")
    #expect(found > 200, "\(again.text)")
    for _ in 0..<1000 where Self.position(of: again.text, "flushed") < found + 200 { usleep(10_000) }
    #expect(Self.position(of: again.text, "flushed") >= found + 200, "\(again.text)")
    try again.execute("quit")
    #expect(again.waitUntilExit() == 0)
  }

  /// Bitmaps outlive the machine; raw disks have none and are copied whole.
  @Test func incrementsGoOnAfterARestart() throws {
    let writer = try Writer("soft", formats: ["qcow2", "raw"], rate: 400)
    let target = writer.folder.path + "/backups/"
    #expect(try writer.backUp("--target", target).status == 0)
    _ = try writer.end()
    try writer.start()
    let made = try writer.backUp("--target", target, "--incremental", "--json")
    #expect(made.status == 0 && made.errors.contains("d1: nothing says what has changed"), "\(made.errors)")
    let json = try #require(try JSONSerialization.jsonObject(with: Data(made.output.utf8)) as? [String: Any])
    let disks = try #require(json["disks"] as? [[String: Any]])
    #expect(disks.map { $0["incremental"] as? Bool } == [true, false])
    try Self.verify(Self.restore(target, writer.folder, "again"))
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text)
  }

  /// One disk into one file, or into another program's export.
  @Test func otherTargets() throws {
    let writer = try Writer("soft")
    let file = writer.folder.path + "/one.qcow2"
    #expect(try writer.backUp("--target", file).errors.contains("2 disks do not fit"))
    #expect(try writer.backUp("--target", file, "--disk", "d7").errors.contains("it has d0, d1"))
    #expect(try writer.backUp("--target", file, "--disk", "d1", "--incremental").status == 64)
    #expect(try writer.backUp("--target", file, "--disk", "d1").status == 0)
    #expect(try writer.backUp("--target", file, "--disk", "d1").errors.contains("is there already"))
    let checked = try hostTool("qemu-img", "check", file)
    #expect(checked.status == 0, "\(checked.output)")
    let raw = writer.folder.path + "/export.raw"
    try #require(hostTool("qemu-img", "create", "-q", "-f", "raw", raw, "32M").status == 0)
    let socket = writer.folder.path + "/nbd"
    let server = try BackgroundProcess(["-t", "-f", "raw", "-k", socket, raw], tool: "/usr/bin/qemu-nbd")
    defer { server.signal(SIGTERM) }
    for _ in 0..<1000 where !FileManager.default.fileExists(atPath: socket) { usleep(10_000) }
    let uri = "nbd+unix:///?socket=\(socket)"
    try writer.machine.execute("stop")
    let exported = try writer.backUp("--target", uri, "--disk", "d1")
    #expect(exported.status == 0, "\(exported.errors)")
    try writer.machine.execute("cont")
    writer.goesOn()
    #expect(writer.leftovers.isEmpty)
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text)
  }

  /// A second machine gets the disk as it was at the cut, writes to it, and the first one's disk does not change.
  @Test(arguments: engines)
  func theStateIsPluggedIntoAnotherMachine(engine: String) throws {
    let writer = try Writer(engine)
    let appliance = try RunningVMM([
      "disk", "--engine", engine, "--time-limit", "300", "--append",
      "mode=plugged plugs=2 records=60 flush=10 sectors=4",
    ])
    #expect(appliance.waitFor("waiting for a disk"))
    let backup = try BackgroundProcess(["backup", writer.socket, "-q", "--disk", "d1", "--to-vm", appliance.socket])
    // What the writer has put there is no record of this guest's: it says so, and ends.
    _ = appliance.waitUntilExit()
    #expect(appliance.text.contains("FAIL disk 0 record"), "\(appliance.text)")
    #expect(backup.waitUntilExit() == 0, "\(backup.text)")
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty)
    writer.goesOn()
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text)
  }

  /// Whoever gets the snapshots may write there: a machine finishes what the writer was cut off in, and writes on. No byte of the
  /// volumes changes, and neither does anything for the first machine's guest.
  @Test(arguments: engines)
  func aComponentWritesToItsOwnLayer(engine: String) throws {
    let writer = try Writer(engine, formats: ["qcow2"])
    let appliance = try RunningVMM([
      "disk", "--engine", engine, "--time-limit", "300", "--append", "mode=plugged \(Self.options)",
    ])
    #expect(appliance.waitFor("waiting for a disk"))
    let before = writer.flushed
    let backup = try BackgroundProcess(["backup", writer.socket, "-q", "--to-vm", appliance.socket])
    try writer.waitForTheSnapshot()
    let hashes = try writer.hashes()
    #expect(appliance.waitFor("flushed", count: 30), "\(appliance.text) \(backup.text)")
    #expect(Self.position(of: appliance.text.replacing(",", with: ""), "found") >= before, "\(appliance.text)")
    writer.goesOn()
    #expect(try writer.depths() == [1])
    #expect(try writer.hashes() == hashes)
    try appliance.execute("device_del", ["id": "backup-d0"])
    #expect(appliance.waitUntilExit() == 0, "\(appliance.text)")
    #expect(backup.waitUntilExit() == 0, "\(backup.text)")
    #expect(try writer.depths() == [0])
    #expect(writer.leftovers.isEmpty)
    writer.goesOn()
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text)
  }

  /// A target that fails, and a wish to end: the guest goes on, the chains are short again.
  @Test func whatFailsIsUndone() throws {
    let writer = try Writer("soft")
    let full = try writer.backUp("--target", "nbd+unix:///?socket=\(writer.folder.path)/nobody", "--disk", "d0")
    #expect(full.status == 74 && full.errors.contains("nobody") && full.errors.contains("given up"), "\(full.errors)")
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty)
    let target = writer.folder.path + "/backups/"
    let backup = try BackgroundProcess(["backup", writer.socket, "-q", "--target", target, "-r", "64K"])
    for _ in 0..<1000 where try writer.depths() != [1, 1] { usleep(10_000) }
    usleep(200_000)
    let second = try writer.backUp("--target", target)
    #expect(second.errors.contains("another backup is under way"), "\(second.errors)")
    backup.signal(SIGINT)
    #expect(backup.waitUntilExit() == 130, "\(backup.text)")
    #expect(backup.text.contains("was cancelled"))
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty)
    #expect(try FileManager.default.contentsOfDirectory(atPath: target).isEmpty)
    writer.goesOn()
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text)
  }

  /// The backup command, the machine or the one that a snapshot is plugged into is killed at any moment: nothing that was flushed is lost, `--recover` shortens the
  /// chains, and the next backup succeeds. `SWIFTVMM_BACKUP_KILLS` says how often.
  @Test(arguments: engines)
  func killedAtAnyMoment(engine: String) throws {
    let delays = [30_000, 30_000, 60_000, 60_000, 120_000, 150_000, 200_000, 400_000, 350_000]
    let rounds = Int(ProcessInfo.processInfo.environment["SWIFTVMM_BACKUP_KILLS"] ?? "") ?? delays.count
    var random = SystemRandomNumberGenerator()
    let isFixed = rounds == delays.count
    let writer = try Writer(engine)
    let target = writer.folder.path + "/backups/"
    for round in 0..<rounds {
      let delay = isFixed ? delays[round] : Int.random(in: 0...500_000, using: &random)
      if round % 3 == 2 {
        try killTheAppliance(writer, target, engine, after: delay)
        continue
      }
      let backup = try BackgroundProcess([
        "backup", writer.socket, "-q", "--target", target, "--incremental", "-r", "4M",
      ])
      usleep(UInt32(delay))
      if round % 3 == 1 {
        writer.machine.kill()
        _ = backup.waitUntilExit()
        let text = writer.machine.text
        let merged = try VMM.run("backup", "--recover", writer.images[0])
        #expect(merged.status == 0, "round \(round), \(delay) us: \(merged.errors)")
        #expect(writer.leftovers.isEmpty, "round \(round), \(delay) us: \(writer.leftovers)")
        try Self.verify(writer.images, flushed: text, wasKilled: true)
        try FileManager.default.removeItem(atPath: target)
        for image in writer.images {
          try FileManager.default.removeItem(atPath: image)
          try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", image, "32M").status == 0)
        }
        try writer.start()
      } else {
        backup.signal(SIGKILL)
        _ = backup.waitUntilExit()
        writer.goesOn()
        let recovered = try VMM.run("backup", "--recover", writer.socket)
        #expect(recovered.status == 0, "round \(round), \(delay) us: \(recovered.errors)")
        #expect(try writer.depths() == [0, 0], "round \(round), \(delay) us")
        #expect(writer.leftovers.isEmpty, "round \(round), \(delay) us: \(writer.leftovers)")
        writer.goesOn()
        let before = writer.machine.text
        let made = try writer.backUp("--target", target, "--incremental")
        #expect(made.status == 0, "round \(round), \(delay) us: \(made.errors)")
        try Self.verify(Self.restore(target, writer.folder, "again"), flushed: before)
        try FileManager.default.removeItem(atPath: writer.folder.path + "/again")
      }
    }
    let text = try writer.end()
    try Self.verify(writer.images, flushed: text, wasKilled: true)
  }

  /// Whoever reads the snapshots ends while they are lent: the backup comes to its end by itself.
  private func killTheAppliance(_ writer: Writer, _ target: String, _ engine: String, after delay: Int) throws {
    // It would keep the disks for ever.
    let appliance = try RunningVMM(["ticks", "--engine", engine, "--time-limit", "300", "--paused"])
    let backup = try BackgroundProcess(["backup", writer.socket, "-q", "--to-vm", appliance.socket])
    usleep(UInt32(delay))
    appliance.kill()
    let status = backup.waitUntilExit()
    // It may have been too early even for the disks' coming.
    #expect([0, 69, 74].contains(status), "\(delay) us: \(status) \(backup.text)")
    #expect(try writer.depths() == [0, 0], "\(delay) us: \(backup.text)")
    #expect(writer.leftovers.isEmpty, "\(delay) us: \(writer.leftovers)")
    writer.goesOn()
    let before = writer.machine.text
    let made = try writer.backUp("--target", target, "--incremental")
    #expect(made.status == 0, "\(delay) us: \(made.errors)")
    try Self.verify(Self.restore(target, writer.folder, "again"), flushed: before)
    try FileManager.default.removeItem(atPath: writer.folder.path + "/again")
  }

  /// While the newest writes are beside a disk, nobody runs it without them.
  @Test func aDiskThatWaitsForRecoveryIsNotRun() throws {
    let writer = try Writer("soft")
    let backup = try BackgroundProcess([
      "backup", writer.socket, "-q", "--target", writer.folder.path + "/b/", "-r", "64K",
    ])
    for _ in 0..<1000 where try writer.depths() != [1, 1] { usleep(10_000) }
    writer.goesOn()
    writer.machine.kill()
    #expect(backup.waitUntilExit() == 74)
    #expect(backup.text.contains("backup --recover"), "\(backup.text)")
    let refused = try VMM.run("run", "disk", "--disk", writer.images[1])
    #expect(
      refused.status == 66 && refused.errors.contains("backup --recover \(writer.images[1])"), "\(refused.errors)")
    #expect(try VMM.run("backup", "--recover", writer.images[1]).status == 0)
    #expect(try VMM.run("backup", "--recover", writer.images[0]).status == 0)
    #expect(writer.leftovers.isEmpty)
    try Self.verify(writer.images, flushed: writer.machine.text, wasKilled: true)
  }
}

/// The executable, or another tool, while a test does something else. It is killed with its owner.
final class BackgroundProcess {
  private let process = Process()
  private let output: URL

  init(_ arguments: [String], tool: String = VMM.path) throws {
    output = URL(fileURLWithPath: NSTemporaryDirectory() + "swiftvmm-output-\(UUID().uuidString)")
    try Data().write(to: output)
    let handle = try FileHandle(forWritingTo: output)
    process.executableURL = URL(fileURLWithPath: tool)
    process.arguments = arguments
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = handle
    process.standardError = handle
    try process.run()
  }

  deinit {
    if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    try? FileManager.default.removeItem(at: output)
  }

  /// What it has printed.
  var text: String { (try? String(contentsOf: output, encoding: .utf8)) ?? "" }

  /// Whether it has not ended.
  var isRunning: Bool { process.isRunning }

  func signal(_ number: Int32) { kill(process.processIdentifier, number) }

  func waitUntilExit() -> Int32 {
    process.waitUntilExit()
    return process.terminationReason == .exit ? process.terminationStatus : 128 + process.terminationStatus
  }
}
