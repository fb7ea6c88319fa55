import Foundation
import Testing

/// `run --snapshot-every` and the catalogue of snapshots, below a guest that writes.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct SnapshotScheduleTests {
  private static let options = "records=200 flush=10 sectors=16"
  private let folder: TemporaryFolder
  private var disk: String { folder.path + "/disk" }

  init() throws {
    folder = try TemporaryFolder()
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", folder.path + "/disk", "32M").status == 0)
  }

  private func writer(_ more: String..., rate: Int = 2000) throws -> RunningVMM {
    try RunningVMM(
      ["disk", "--engine", BackupTests.engines.last ?? "soft", "--time-limit", "300", "--disk", disk + ",id=d0"] + more
        + ["--append", "mode=rewrite passes=100000 rate=\(rate) \(Self.options)"])
  }

  private func snapshots(_ machine: RunningVMM) throws -> [[String: Any]] {
    let answer = try machine.execute("x-swiftvmm-query-snapshots") as? [String: Any]
    return try #require(answer?["snapshots"] as? [[String: Any]])
  }

  private func ids(_ machine: RunningVMM) throws -> [String] {
    try snapshots(machine).compactMap { $0["id"] as? String }
  }

  private func verify(_ image: String, _ more: String...) throws {
    let verified = try VMM.run(
      ["run", "disk", "--engine", "soft", "--disk", image] + more + ["--append", "mode=verify \(Self.options)"])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
  }

  @Test(arguments: [
    ["--snapshot-every", "0s"], ["--snapshot-every", "-1m"], ["--snapshot-every", "10"], ["--snapshot-every", ""],
    ["--snapshot-every", "m"], ["--snapshot-every", "1.5h"], ["--snapshot-every", "366d"],
    ["--snapshot-every", "18446744073709551615d"], ["--snapshot-every", "213503982334602d"],
    ["--snapshot-every", "٣m"],
    ["--snapshot-every", "1m", "--keep", "0"], ["--snapshot-every", "1m", "--keep", "257"],
    ["--snapshot-every", "1m", "--keep=-1"], ["--keep", "3"],
  ])
  func oddSchedulesAreRefused(words: [String]) throws {
    let refused = try VMM.run(["run", "disk", "--disk", disk] + words)
    #expect(refused.status == 64, "\(refused.errors)")
  }

  /// No more than `--keep` stay, each is a state of the disk, and the machine goes on where it was when it is run again.
  @Test func theOldestAreMergedAway() throws {
    let machine = try writer("--snapshot-every", "1s", "--keep", "2")
    // Two have gone once the fourth is there.
    var seen: Set<String> = []
    for _ in 0..<1000 where seen.count < 4 || machine.text.isEmpty {
      seen.formUnion(try ids(machine))
      usleep(20_000)
    }
    #expect(seen.count >= 4)
    for _ in 0..<500 where try ids(machine).count > 2 { usleep(10_000) }
    let list = try snapshots(machine)
    #expect(list.count <= 2 && !list.isEmpty, "\(list)")
    #expect(list.allSatisfy { $0["name"] as? String == "every 1s" && $0["generation"] as? Int == 1 })
    #expect(try VMM.run("snapshots", machine.socket).output.contains("every 1s"))
    let text = machine.text
    machine.kill()
    let again = try writer("--snapshot-every", "1h")
    #expect(again.waitFor("goes on in") && again.waitFor("flushed"), "\(again.text) after \(text.suffix(500))")
    let after = try ids(again)
    #expect(!after.isEmpty && Set(after).isSubset(of: seen.union(list.compactMap { $0["id"] as? String })), "\(after)")
    let files = try snapshots(again).compactMap { $0["file"] as? String }
    try again.execute("quit")
    #expect(again.waitUntilExit() == 0)
    for file in files { try verify(file + ",readonly=on") }
    try verify(disk, "--snapshot-every", "1h")
    // By another name it is the same disk.
    try FileManager.default.createSymbolicLink(atPath: folder.path + "/link", withDestinationPath: folder.path)
    try verify(folder.path + "/./link/disk", "--snapshot-every", "1h")
  }

  /// Killed at any moment, merges among them: the newest layer is found, and holds what was flushed.
  @Test func killedWhileSnapshotsComeAndGo() throws {
    let rounds = Int(ProcessInfo.processInfo.environment["SWIFTVMM_SCHEDULE_KILLS"] ?? "") ?? 3
    for round in 0..<rounds {
      let machine = try writer("--snapshot-every", "1s", "--keep", "1", rate: 0)
      #expect(machine.waitFor("flushed"), "\(machine.text)")
      usleep(UInt32(rounds == 3 ? [2_020_000, 3_050_000, 2_500_000][round] : Int.random(in: 900_000...4_000_000)))
      machine.kill()
      let lines = machine.text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      let words = try #require(lines.last { $0.hasPrefix("flushed") }).split(separator: " ")
      let verified = try VMM.run([
        "run", "disk", "--engine", "soft", "--disk", disk, "--snapshot-every", "1h", "--append",
        "mode=verify \(Self.options) expect=\(words[1]) generation=\(words[3])",
      ])
      #expect(verified.output.contains("all passed"), "round \(round): \(verified.output) \(verified.errors)")
    }
  }

  /// The file keeps names and times; without it, or where it is damaged, the chain says what there is.
  @Test func theCatalogueIsRebuiltFromTheChain() throws {
    let machine = try writer()
    #expect(machine.waitFor("flushed"))
    for number in 1...2 {
      try machine.execute(
        "blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/top\(number)"])
    }
    try machine.execute("x-swiftvmm-snapshot-name", ["id": "top1", "name": "before the upgrade"])
    #expect(try machine.refusal("x-swiftvmm-snapshot-name", ["id": "none", "name": ""]).contains("called none"))
    let made = try snapshots(machine)
    #expect(made.compactMap { $0["id"] as? String } == ["disk", "top1"])
    #expect(made[1]["parent"] as? String == "disk" && made[1]["name"] as? String == "before the upgrade")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
    let catalogue = disk + ".snapshots"
    let top = folder.path + "/top2"
    func list() throws -> [[String: Any]] {
      let again = try RunningVMM([
        "disk", "--engine", "soft", "--time-limit", "300", "--paused", "--disk", top + ",id=d0",
      ])
      defer { again.kill() }
      return try snapshots(again)
    }
    let kept = try list()
    #expect(kept.map { $0["time"] as? Int } == made.map { $0["time"] as? Int })
    #expect(kept[1]["name"] as? String == "before the upgrade")
    let whole = try Data(contentsOf: URL(fileURLWithPath: catalogue))
    for damage in [
      Data(), whole.prefix(whole.count / 2), Data("{\"version\": 1}".utf8), Data(repeating: 0xff, count: 99),
    ] {
      try damage.write(to: URL(fileURLWithPath: catalogue))
      let rebuilt = try list()
      #expect(rebuilt.compactMap { $0["id"] as? String } == ["disk", "top1"])
      #expect(rebuilt[1]["name"] as? String == "" && rebuilt.allSatisfy { ($0["time"] as? Int ?? 0) > 0 })
    }
    // A snapshot that is made again beside one that is known is not older than that one.
    var partly = try #require(try JSONSerialization.jsonObject(with: whole) as? [String: Any])
    partly["snapshots"] = (partly["snapshots"] as? [Any]).map { Array($0.dropLast()) }
    try JSONSerialization.data(withJSONObject: partly).write(to: URL(fileURLWithPath: catalogue))
    try #require(hostTool("touch", "-d", "2001-01-01", folder.path + "/top1").status == 0)
    let again = try list()
    #expect(again.compactMap { $0["id"] as? String } == ["disk", "top1"])
    #expect(again.allSatisfy { $0["time"] as? Int == made[0]["time"] as? Int }, "\(again)")
    try FileManager.default.removeItem(atPath: catalogue)
    #expect(try list().count == 2)
    // A disk goes on in no layer that is another disk's.
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", folder.path + "/other", "32M").status == 0)
    let lie = #"{"version": 1, "top": "\#(folder.path)/other", "generation": 1, "snapshots": [], "spoiled": []}"#
    try Data(lie.utf8).write(to: URL(fileURLWithPath: catalogue))
    let refused = try VMM.run("run", "disk", "--disk", disk, "--snapshot-every", "1m")
    #expect(refused.status == 66 && refused.errors.contains("is not above it"), "\(refused.errors)")
  }

  /// A merged layer's snapshot is called as before, whatever file holds it; one that is overwritten is none.
  @Test func aMergeKeepsTheUpperSnapshot() throws {
    let machine = try writer()
    #expect(machine.waitFor("flushed"))
    for number in 1...3 {
      try machine.execute(
        "blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/top\(number)"])
    }
    let before = try snapshots(machine)
    try machine.execute(
      "block-commit", ["device": "d0", "job-id": "c", "top": folder.path + "/top1", "base": disk])
    _ = try machine.event("BLOCK_JOB_COMPLETED")
    let after = try snapshots(machine)
    #expect(after.compactMap { $0["id"] as? String } == ["top1", "top2"])
    #expect(after[0]["file"] as? String == (before[0]["file"] as? String))
    #expect(after[0]["time"] as? Int == before[1]["time"] as? Int)
    // The top goes down to the bottom: nothing below is left.
    try machine.execute("block-commit", ["device": "d0", "job-id": "c"])
    _ = try machine.event("BLOCK_JOB_READY")
    #expect(try snapshots(machine).isEmpty)
    try machine.execute("block-job-complete", ["device": "c"])
    _ = try machine.event("BLOCK_JOB_COMPLETED")
    #expect(try snapshots(machine).isEmpty)
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
    #expect(!FileManager.default.fileExists(atPath: disk + ".snapshots"))
    try verify(disk)
  }

  /// A disk that a job works on gets no snapshot, and nothing is left of the attempt; what somebody else makes is not the schedule's.
  @Test func whatIsRefusedLeavesNothing() throws {
    let machine = try writer("--snapshot-every", "1s", "--keep", "3")
    for _ in 0..<500 where try ids(machine).isEmpty { usleep(20_000) }
    try machine.execute("block-commit", ["device": "d0", "job-id": "c"])
    _ = try machine.event("BLOCK_JOB_READY")
    func files() throws -> [String] {
      try FileManager.default.contentsOfDirectory(atPath: folder.path).filter { $0.hasSuffix(".qcow2") }.sorted()
    }
    let before = try files()
    for _ in 0..<500 where !machine.text.contains("was not made") { usleep(20_000) }
    #expect(machine.text.contains("the scheduled snapshot was not made: the disk d0 has a job, c"), "\(machine.text)")
    #expect(try files() == before)
    try machine.execute("block-job-cancel", ["device": "c"])
    _ = try machine.event("BLOCK_JOB_CANCELLED")
    try machine.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/own"])
    let own = try snapshots(machine).filter { $0["scheduled"] as? Bool == false }
    #expect(own.count == 1 && own[0]["name"] as? String == "", "\(own)")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
  }

  /// While a backup leads a disk's writes beside it, nobody else changes its layers; ordinary listings do not show the backup's.
  @Test func aBackupIsNotDisturbed() throws {
    let machine = try writer("--snapshot-every", "1s", "--keep", "1")
    for _ in 0..<500 where try ids(machine).isEmpty { usleep(20_000) }
    let backup = try BackgroundProcess([
      "backup", machine.socket, "-q", "--target", folder.path + "/b/", "-r", "32K",
    ])
    func temporary() throws -> [String] {
      let answer = try machine.execute("x-swiftvmm-query-snapshots", ["all": true]) as? [String: Any]
      return (answer?["temporary"] as? [[String: Any]] ?? []).compactMap { $0["kind"] as? String }.sorted()
    }
    for _ in 0..<500 where try temporary().count < 2 { usleep(10_000) }
    #expect(try temporary() == ["backup-overlay", "backup-temporary"])
    let listed = try VMM.run("snapshots", machine.socket, "--all").output
    #expect(listed.contains("backup-temporary"))
    #expect(try !VMM.run("snapshots", machine.socket).output.contains("backup-"))
    func files(_ arguments: [String: Any]) throws -> [String] {
      let nodes = try machine.execute("query-named-block-nodes", arguments) as? [[String: Any]]
      return (nodes ?? []).compactMap { $0["file"] as? String }.filter { $0.hasSuffix(".backup-temporary") }
    }
    #expect(try files([:]).isEmpty)
    #expect(try files(["x-swiftvmm-all": true]).count == 1)
    for (command, arguments) in [
      ("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/x"]),
      ("block-commit", ["device": "d0"]), ("block-stream", ["device": "d0"]),
    ] {
      let message = try machine.refusal(command, arguments)
      #expect(message.contains("the disk d0 is being backed up"), "\(command): \(message)")
    }
    let before = try ids(machine)
    usleep(1_500_000)
    #expect(try ids(machine) == before)
    backup.signal(SIGINT)
    #expect(backup.waitUntilExit() == 130, "\(backup.text)")
    #expect(try temporary().isEmpty)
    for _ in 0..<500 where try ids(machine) == before { usleep(20_000) }
    #expect(try ids(machine) != before)
    let made = try VMM.run("backup", machine.socket, "-q", "--target", folder.path + "/c/")
    #expect(made.status == 0, "\(made.errors)")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
  }
}
