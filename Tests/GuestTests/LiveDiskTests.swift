import Foundation
import Testing

/// Layers change below a guest that writes: snapshots, merges, copies.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct LiveDiskTests {
  static let engines: [String] = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]
  private static let options = "records=200 flush=10 sectors=16"

  private func image(_ folder: TemporaryFolder, _ name: String, format: String = "qcow2") throws -> String {
    let path = folder.path + "/" + name
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", format, path, "32M").status == 0)
    return path
  }

  /// A guest that writes for ever, on disks with these images.
  private func writer(_ engine: String, _ images: [String], _ more: String = "") throws -> RunningVMM {
    let disks = images.enumerated().flatMap { ["--disk", "\($1),id=d\($0)"] }
    let machine = try RunningVMM(
      ["disk", "--engine", engine, "--time-limit", "300"] + disks + [
        "--append", "mode=rewrite passes=100000 disks=\(images.count) \(Self.options) \(more)",
      ])
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    return machine
  }

  /// Waits until the guest has flushed something that it wrote after this call.
  private func goesOn(_ machine: RunningVMM) {
    let count = machine.text.components(separatedBy: "flushed").count
    #expect(machine.waitFor("flushed", count: count + 1), "\(machine.text.suffix(2000))")
  }

  private func verify(_ images: [String], flushed text: String? = nil, wasKilled: Bool = false) throws {
    for image in images {
      let checked = try hostTool("qemu-img", "check", image)
      // 63: a raw one, with nothing to check. 3: clusters that a killed process leaves unused.
      let isSound = [0, 63].contains(checked.status) || wasKilled && checked.status == 3
      #expect(isSound, "\(image): \(checked.output)")
    }
    var expectation = ""
    if let last = text?.split(separator: "\n", omittingEmptySubsequences: false).dropLast().last(where: {
      $0.hasPrefix("flushed")
    }) {
      let words = last.split(separator: " ")
      expectation = "expect=\(words[1]) generation=\(words[3])"
    }
    let disks = images.flatMap { ["--disk", $0] }
    let verified = try VMM.run(
      ["run", "disk", "--engine", "soft"] + disks + [
        "--append", "mode=verify disks=\(images.count) \(Self.options) \(expectation)",
      ])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
  }

  private func depth(_ machine: RunningVMM, _ disk: Int = 0) throws -> Int {
    let blocks = try #require(try machine.execute("query-block") as? [[String: Any]])
    let inserted = try #require(blocks[disk]["inserted"] as? [String: Any])
    return try #require(inserted["backing_file_depth"] as? Int)
  }

  private func wait(_ machine: RunningVMM, job: String, for event: String = "BLOCK_JOB_COMPLETED") throws {
    let data = try machine.event(event) { $0["device"] as? String == job }
    #expect(data["error"] == nil, "\(data)")
  }

  private func end(_ machine: RunningVMM) throws -> String {
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    return machine.text
  }

  @Test(arguments: engines, ["split", "packed"])
  func snapshotsOfTwoDisksAreOfOneInstant(engine: String, queue: String) throws {
    let folder = try TemporaryFolder()
    let images = [try image(folder, "a"), try image(folder, "b", format: "raw")]
    let machine = try writer(engine, images, "queue=\(queue)")
    var chain = [images]
    for round in 0..<6 {
      let names = ["\(folder.path)/a\(round)", "\(folder.path)/b\(round)"]
      let actions = names.enumerated().map { index, name in
        [
          "type": "blockdev-snapshot-sync", "data": ["device": "d\(index)", "snapshot-file": name, "format": "qcow2"],
        ] as [String: Any]
      }
      try machine.execute("transaction", ["actions": actions])
      chain.append(names)
      goesOn(machine)
    }
    #expect(try depth(machine) == 6)
    let text = try end(machine)
    try verify(chain[6], flushed: text)
    // Each state that was left behind is one that a crash could have left: nothing torn, both disks cut off together.
    for images in chain.dropLast() { try verify(images) }
  }

  /// A transaction does everything or nothing: what its earlier actions did is undone, and no file of it stays open.
  @Test func transactionsThatFailAreUndone() throws {
    let folder = try TemporaryFolder()
    let images = [try image(folder, "a"), try image(folder, "b")]
    let machine = try writer("soft", images)
    func bitmap(_ type: String, _ disk: Int, _ name: String) -> [String: Any] {
      ["type": type, "data": ["node": "d\(disk)", "name": name]]
    }
    func snapshot(_ disk: Int) -> [String: Any] {
      ["type": "blockdev-snapshot-sync", "data": ["device": "d\(disk)", "snapshot-file": "\(folder.path)/s\(disk)"]]
    }
    func bitmaps(_ disk: Int) throws -> [String: Any] {
      let blocks = try #require(try machine.execute("query-block") as? [[String: Any]])
      let inserted = try #require(blocks[disk]["inserted"] as? [String: Any])
      let all = inserted["dirty-bitmaps"] as? [[String: Any]] ?? []
      return Dictionary(uniqueKeysWithValues: all.map { ($0["name"] as? String ?? "", $0["count"] ?? 0) })
    }
    try machine.execute("block-dirty-bitmap-add", ["node": "d0", "name": "kept"])
    goesOn(machine)
    let before = try bitmaps(0)
    #expect((before["kept"] as? Int ?? 0) > 0)
    let failing: [[[String: Any]]] = [
      [bitmap("block-dirty-bitmap-clear", 0, "kept"), bitmap("block-dirty-bitmap-remove", 1, "nothing")],
      [bitmap("block-dirty-bitmap-remove", 0, "kept"), snapshot(0), bitmap("block-dirty-bitmap-clear", 1, "nothing")],
      [bitmap("block-dirty-bitmap-add", 1, "new"), snapshot(1), bitmap("block-dirty-bitmap-add", 1, "new")],
      [snapshot(0), snapshot(1), ["type": "abort", "data": [:] as [String: Any]]],
    ]
    for actions in failing {
      let message = try machine.refusal("transaction", ["actions": actions])
      #expect(!message.hasPrefix("not refused"))
    }
    #expect(try (bitmaps(0)["kept"] as? Int ?? 0) >= (before["kept"] as? Int ?? 0))
    #expect(try bitmaps(1).isEmpty)
    #expect(try depth(machine, 0) == 0)
    #expect(try depth(machine, 1) == 0)
    // The overlays' files are free again.
    try machine.execute("transaction", ["actions": [snapshot(0), snapshot(1)]])
    goesOn(machine)
    let text = try end(machine)
    try verify(["\(folder.path)/s0", "\(folder.path)/s1"], flushed: text)
  }

  @Test(arguments: engines)
  func layersAreMergedUnderTheWriter(engine: String) throws {
    let folder = try TemporaryFolder()
    let base = try image(folder, "base")
    let machine = try writer(engine, [base])
    func snapshot(_ name: String) throws {
      try machine.execute(
        "blockdev-snapshot-sync",
        ["device": "d0", "snapshot-file": "\(folder.path)/\(name)", "snapshot-node-name": name])
      goesOn(machine)
    }
    for name in ["s1", "s2", "s3", "s4"] { try snapshot(name) }
    // The middle: s2 into s1.
    try machine.execute("block-commit", ["device": "d0", "job-id": "j", "top-node": "s2", "base-node": "s1"])
    try wait(machine, job: "j")
    #expect(try depth(machine) == 3)
    goesOn(machine)
    // From below: s3 and s1 into s4.
    try machine.execute("block-stream", ["device": "d0", "job-id": "j", "base": base])
    try wait(machine, job: "j")
    #expect(try depth(machine) == 1)
    goesOn(machine)
    try snapshot("s5")
    // The active layer, all the way down.
    try machine.execute("block-commit", ["device": "d0", "job-id": "j"])
    try wait(machine, job: "j", for: "BLOCK_JOB_READY")
    goesOn(machine)
    try machine.execute("block-job-complete", ["device": "j"])
    try wait(machine, job: "j")
    #expect(try depth(machine) == 0)
    goesOn(machine)
    let text = try end(machine)
    try verify([base], flushed: text)
  }

  @Test(arguments: engines, ["qcow2", "raw"])
  func aBackupIsOfTheInstantThatItBegan(engine: String, format: String) throws {
    let folder = try TemporaryFolder()
    let source = try image(folder, "source", format: format)
    let target = try image(folder, "target")
    let machine = try writer(engine, [source])
    func add(_ name: String) throws {
      let file = ["driver": "file", "filename": "\(folder.path)/\(name)"]
      try machine.execute("blockdev-add", ["driver": "qcow2", "node-name": name, "file": file])
    }
    try add("target")
    // The bitmap notes what is written from the backup's instant on.
    let backup: [String: Any] = [
      "device": "d0", "job-id": "b", "target": "target", "sync": "full", "speed": 20_000_000,
    ]
    let bitmap: [String: Any] = ["node": "d0", "name": "since", "persistent": format == "qcow2"]
    try machine.execute(
      "transaction",
      ["actions": [["type": "block-dirty-bitmap-add", "data": bitmap], ["type": "blockdev-backup", "data": backup]]])
    try wait(machine, job: "b")
    goesOn(machine)
    try machine.execute("blockdev-del", ["node-name": "target"])
    try verify([target])
    // What has changed since, into a layer over the full backup.
    let layer = folder.path + "/layer"
    try #require(
      hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", "-b", target, "-F", "qcow2", layer).status == 0)
    try add("layer")
    try machine.execute("stop")
    try machine.execute(
      "blockdev-backup", ["device": "d0", "job-id": "b", "target": "layer", "sync": "incremental", "bitmap": "since"])
    try wait(machine, job: "b")
    let text = try end(machine)
    try verify([layer], flushed: text)
    let compared = try hostTool("qemu-img", "compare", "-f", format, "-F", "qcow2", source, layer)
    #expect(compared.status == 0, "\(compared.output)")
  }

  @Test func jobsPauseAndAreCancelled() throws {
    let folder = try TemporaryFolder()
    let base = try image(folder, "base")
    let machine = try writer("soft", [base])
    try machine.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/top"])
    goesOn(machine)
    func job() throws -> [String: Any]? {
      try #require(try machine.execute("query-block-jobs") as? [[String: Any]]).first
    }
    try machine.execute("block-stream", ["device": "d0", "job-id": "j", "speed": 65536])
    #expect(try machine.refusal("block-commit", ["device": "d0"]).contains("has a job, j"))
    #expect(
      try machine.refusal("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/x"])
        .contains("has a job, j"))
    try machine.execute("job-pause", ["id": "j"])
    #expect(try job()?["status"] as? String == "paused")
    #expect(try machine.refusal("job-complete", ["id": "j"]).contains("paused"))
    try machine.execute("job-resume", ["id": "j"])
    #expect(try job()?["status"] as? String == "running")
    try machine.execute("job-cancel", ["id": "j"])
    try wait(machine, job: "j", for: "BLOCK_JOB_CANCELLED")
    _ = try machine.event("JOB_STATUS_CHANGE") { $0["status"] as? String == "concluded" }
    #expect(try job() == nil)
    // The same again, to the end, with a job that stays until it is dismissed.
    try machine.execute("block-stream", ["device": "d0", "job-id": "j", "auto-dismiss": false, "auto-finalize": false])
    _ = try machine.event("JOB_STATUS_CHANGE") { $0["status"] as? String == "pending" }
    #expect(try job()?["status"] as? String == "pending")
    try machine.execute("job-finalize", ["id": "j"])
    _ = try machine.event("JOB_STATUS_CHANGE") { $0["status"] as? String == "concluded" }
    #expect(try job()?["status"] as? String == "concluded")
    try machine.execute("job-dismiss", ["id": "j"])
    #expect(try job() == nil)
    #expect(try depth(machine) == 0)
    let text = try end(machine)
    try verify([folder.path + "/top"], flushed: text)
  }

  /// The guest starts again in the middle of its requests, with memory as it was, and goes on with the same disk.
  @Test(arguments: engines, ["split", "packed"])
  func aResetUnderLoadLosesNothing(engine: String, queue: String) throws {
    let folder = try TemporaryFolder()
    let path = try image(folder, "a")
    let machine = try writer(engine, [path], "queue=\(queue)")
    for round in 1...3 {
      try machine.execute("system_reset")
      #expect(machine.waitFor("disk 0:", count: round + 1), "\(machine.text.suffix(2000))")
      goesOn(machine)
    }
    let text = try end(machine)
    #expect(!text.contains("FAIL"), "\(text.suffix(2000))")
    try verify([path], flushed: text)
  }

  /// A disk's mirror behind QEMU's NBD server holds what the guest has flushed; the guest goes on with a copy in a file.
  @Test(arguments: engines) func mirrorsFollowTheGuest(engine: String) throws {
    let folder = try TemporaryFolder()
    let (disk, copy) = (try image(folder, "disk"), try image(folder, "copy", format: "raw"))
    let (far, socket) = (try image(folder, "far", format: "raw"), folder.path + "/nbd")
    let server = Process()
    server.executableURL = URL(fileURLWithPath: "/usr/bin/qemu-nbd")
    server.arguments = ["-f", "raw", "-k", socket, "-x", "far", "-t", far]
    try server.run()
    while access(socket, F_OK) != 0 { usleep(10_000) }
    let machine = try writer(engine, [disk])
    let place: [String: Any] = ["type": "unix", "path": socket]
    try machine.execute("blockdev-add", ["driver": "nbd", "node-name": "far", "server": place, "export": "far"])
    try machine.execute("blockdev-mirror", ["job-id": "far", "device": "d0", "target": "far", "sync": "full"])
    try wait(machine, job: "far", for: "BLOCK_JOB_READY")
    goesOn(machine)
    try machine.execute("stop")
    try machine.execute("block-job-cancel", ["device": "far"])
    try wait(machine, job: "far")
    try machine.execute("blockdev-del", ["node-name": "far"])
    kill(server.processIdentifier, SIGKILL)
    server.waitUntilExit()
    try verify([far], flushed: machine.text)
    try machine.execute("cont")
    let file: [String: Any] = ["driver": "file", "filename": copy]
    try machine.execute("blockdev-add", ["driver": "raw", "node-name": "near", "file": file])
    try machine.execute("blockdev-mirror", ["job-id": "near", "device": "d0", "target": "near", "sync": "full"])
    try wait(machine, job: "near", for: "BLOCK_JOB_READY")
    goesOn(machine)
    try machine.execute("job-complete", ["id": "near"])
    try wait(machine, job: "near")
    goesOn(machine)
    let blocks = try #require(try machine.execute("query-block") as? [[String: Any]])
    #expect((blocks[0]["inserted"] as? [String: Any])?["node-name"] as? String == "near")
    try verify([copy], flushed: try end(machine))
  }

  /// Killed at any moment of a loop of snapshots and merges: what was flushed is there.
  @Test(arguments: engines)
  func aKillAmongTheMergesLosesNothing(engine: String) throws {
    let folder = try TemporaryFolder()
    let base = try image(folder, "base")
    let kills = ProcessInfo.processInfo.environment["SWIFTVMM_KILLS"].flatMap(Int.init) ?? 3
    for round in 0..<kills {
      let machine = try RunningVMM([
        "disk", "--engine", engine, "--time-limit", "300", "--disk", "\(base),id=d0", "--append",
        "mode=rewrite passes=100000 \(Self.options)",
      ])
      #expect(machine.waitFor("flushed", count: 3), "\(machine.text)")
      let top = "\(folder.path)/top\(round)"
      try machine.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": top])
      goesOn(machine)
      try machine.execute("block-commit", ["device": "d0", "job-id": "j", "speed": 4_000_000 << (round % 3 * 3)])
      goesOn(machine)
      machine.kill()
      // The job was not completed, so the top layer is still the disk; QEMU merges it.
      try #require(hostTool(VMM.path, "disk", "info", top).status == 0)
      try verify([top], flushed: machine.text, wasKilled: true)
      let committed = try hostTool("qemu-img", "commit", "-q", top)
      #expect(committed.status == 0, "\(committed.output)")
      try verify([base], flushed: machine.text, wasKilled: true)
    }
  }
}
