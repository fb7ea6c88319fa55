import Foundation
import Testing

/// Whether pages can be waited for on this host.
enum PostCopyHost {
  static let hasFaults: Bool = {
    let isForAll = try? String(contentsOfFile: "/proc/sys/vm/unprivileged_userfaultfd", encoding: .utf8)
    return isForAll?.hasPrefix("1") ?? false || isForAll != nil && geteuid() == 0
  }()
}

/// Machines that move to another process while their guests run. `SWIFTVMM_MOVES` and `SWIFTVMM_KILLS` set how often.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct MigrateTests {
  static let engines: [String] = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]
  private static let moves = ProcessInfo.processInfo.environment["SWIFTVMM_MOVES"].flatMap { Int($0) } ?? 4
  private static let kills = ProcessInfo.processInfo.environment["SWIFTVMM_KILLS"].flatMap { Int($0) } ?? 6
  /// In turns: order, links, level of zstd.
  private static let ways = [("classed", 2, 0), ("linear", 1, 0), ("hot-last", 4, 3)]

  private func dirty(_ engine: String, cpus: Int, memory: String = "96M") -> [String] {
    [
      "dirty", "--engine", engine, "--cpus", "\(cpus)", "--memory", memory, "--time-limit", "600", "--append",
      "set=16 fill=16 readonly=4 free=4 reuse=50 pattern=hot seconds=0 jump=20000 skew=20000",
    ]
  }

  /// Starts a destination for a machine that was started with `arguments`.
  private func destination(_ arguments: [String], at uri: String) throws -> RunningVMM {
    try RunningVMM(arguments + ["--incoming", uri])
  }

  private func set(_ machine: RunningVMM, _ way: (order: String, links: Int, level: Int)) throws {
    try machine.execute(
      "migrate-set-parameters",
      [
        "x-swiftvmm-order": way.order, "multifd-channels": way.links,
        "multifd-compression": way.level > 0 ? "zstd" : "none",
      ])
  }

  /// Begins a move and waits for its end; returns `query-migrate`'s result.
  private func move(_ machine: RunningVMM, to uri: String) throws -> [String: Any] {
    try machine.execute("migrate", ["uri": uri])
    while true {
      let state = try #require(try machine.execute("query-migrate") as? [String: Any])
      let status = state["status"] as? String ?? "none"
      if ["completed", "failed", "cancelled"].contains(status) { return state }
      guard ["setup", "active", "device"].contains(status) else { return state }
      usleep(5000)
    }
  }

  private func passes(_ machine: RunningVMM) -> Int { machine.text.components(separatedBy: "dirty: pass").count - 1 }

  /// Checksums and clocks of the guest are right after every move, there and back.
  @Test(arguments: engines, [1, 2])
  func aBusyGuestMovesBackAndForth(engine: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let arguments = dirty(engine, cpus: cpus)
    var machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    for index in 0..<Self.moves {
      let uri = index % 2 == 0 ? "unix:\(folder.path)/move" : "tcp:127.0.0.1:\(try freePort())"
      let next = try destination(arguments, at: uri)
      let waiting = try #require(try next.execute("query-status") as? [String: Any])
      #expect(waiting["status"] as? String == "inmigrate")
      try set(machine, Self.ways[index % Self.ways.count])
      let generation = try #require(try machine.execute("query-vm-generation-id") as? [String: String])
      let result = try move(machine, to: uri)
      try #require(result["status"] as? String == "completed", "\(result) \(machine.text) \(next.text)")
      // It has moved; it is no copy.
      #expect(try next.execute("query-vm-generation-id") as? [String: String] == generation)
      let there = try #require(try machine.execute("query-status") as? [String: Any])
      #expect(there["status"] as? String == "postmigrate")
      #expect(next.waitFor("dirty: pass", count: 2), "move \(index): \(next.text)")
      #expect(!next.text.contains("FAIL"), "move \(index): \(next.text)")
      let before = passes(machine)
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      // It has not run on where it was.
      #expect(passes(machine) == before)
      machine = next
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }

  /// The same where the guest goes on before its pages have come, which it then waits for.
  @Test(.enabled(if: PostCopyHost.hasFaults, "userfaultfd(2) is not to be had here"), arguments: engines, [1, 2])
  func aGuestGoesOnBeforeItsPages(engine: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let arguments = dirty(engine, cpus: cpus)
    var machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    var faults: UInt64 = 0
    for index in 0..<Self.moves {
      let uri = index % 2 == 0 ? "unix:\(folder.path)/move" : "tcp:127.0.0.1:\(try freePort())"
      let next = try destination(arguments, at: uri)
      try set(machine, Self.ways[index % Self.ways.count])
      try machine.execute(
        "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": true]]])
      // What nobody asks for comes slowly, and half of the moves begin so with the first page.
      try machine.execute("migrate-set-parameters", ["max-postcopy-bandwidth": 256 << 20])
      try machine.execute("migrate", ["uri": uri])
      if index % 4 < 2 { try machine.execute("migrate-start-postcopy") }
      while try state(machine)["ram"] == nil || status(machine) == "setup" { usleep(500) }
      try machine.execute("migrate-start-postcopy")
      if index == 0 {
        // Until all pages are there it cannot be saved.
        _ = try next.event("MIGRATION") { $0["status"] as? String == "postcopy-active" }
        let reason = try? next.refusal("x-swiftvmm-save", ["file": folder.path + "/saved"])
        #expect(reason?.contains("pages of the machine are still to come") ?? true, "\(reason ?? "")")
        if status(machine) == "postcopy-active" {
          let refusal = try machine.refusal("migrate_cancel")
          #expect(refusal.contains("has been handed over"), "\(refusal)")
        }
      }
      while ["setup", "active", "device", "postcopy-active"].contains(status(machine)) { usleep(5000) }
      let result = try state(machine)
      try #require(result["status"] as? String == "completed", "\(result) \(machine.text) \(next.text)")
      let own = try #require(result["x-swiftvmm"] as? [String: Any])
      faults += (own["postcopy"] as? [String: Any])?["faults"] as? UInt64 ?? 0
      #expect(next.waitFor("dirty: pass", count: 2), "move \(index): \(next.text)")
      #expect(!next.text.contains("FAIL"), "move \(index): \(next.text)")
      let before = passes(machine)
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      #expect(passes(machine) == before)
      machine = next
    }
    #expect(faults > 0)
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }

  /// A writing guest whose links are cut while its pages come stands until they are there again, and loses nothing.
  @Test(.enabled(if: PostCopyHost.hasFaults, "userfaultfd(2) is not to be had here"), arguments: engines)
  func cutLinksAreMended(engine: String) throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk.qcow2"
    try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "32M").status == 0)
    let records = "records=200 flush=10 sectors=16"
    let arguments = [
      "disk", "--engine", engine, "--memory", "64M", "--time-limit", "600", "--disk", disk,
      "--append", "mode=rewrite passes=100000 \(records)",
    ]
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let uri = "unix:\(folder.path)/move"
    let next = try destination(arguments, at: uri)
    try machine.execute(
      "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": true]]])
    try machine.execute("migrate-set-parameters", ["max-postcopy-bandwidth": 1 << 20, "multifd-channels": 1])
    try machine.execute("migrate", ["uri": uri])
    try machine.execute("migrate-start-postcopy")
    while ["setup", "active", "device"].contains(status(machine)) { usleep(500) }
    try machine.execute("migrate-pause")
    _ = try next.event("MIGRATION") { $0["status"] as? String == "postcopy-paused" }
    _ = try machine.event("MIGRATION") { $0["status"] as? String == "postcopy-paused" }
    let lost = try machine.refusal("migrate", ["uri": uri])
    #expect(lost.contains("migration process in progress"), "\(lost)")
    let other = "unix:\(folder.path)/other"
    try next.execute("migrate-recover", ["uri": other])
    try machine.execute("migrate-set-parameters", ["max-postcopy-bandwidth": 0])
    try machine.execute("migrate", ["uri": other, "resume": true])
    while status(machine).hasPrefix("postcopy") { usleep(5000) }
    let end = try state(machine)
    #expect(end["status"] as? String == "completed", "\(end)")
    let count = next.text.components(separatedBy: "flushed").count
    #expect(next.waitFor("flushed", count: count + 20), "\(next.text)")
    #expect(!next.text.contains("FAIL"), "\(next.text)")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
    try next.execute("quit")
    #expect(next.waitUntilExit() == 0, "\(next.text.suffix(2000))")
    try verify(disk, machine.text + next.text, records)
  }

  /// What a guest has written to its disk, and was told so, is there after every move.
  @Test(arguments: engines, [1, 2])
  func aWritingGuestMovesWithItsDisk(engine: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk.qcow2"
    try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "32M").status == 0)
    let records = "records=200 flush=10 sectors=16"
    let arguments = [
      "disk", "--engine", engine, "--cpus", "\(cpus)", "--memory", "64M", "--time-limit", "600", "--disk", disk,
      "--append", "mode=rewrite passes=100000 \(records) queue=\(cpus == 1 ? "split" : "packed")",
    ]
    var machine = try RunningVMM(arguments)
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    for index in 0..<Self.moves {
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try destination(arguments, at: uri)
      try set(machine, Self.ways[index % Self.ways.count])
      let result = try move(machine, to: uri)
      try #require(result["status"] as? String == "completed", "\(result) \(machine.text) \(next.text)")
      #expect(next.waitFor("flushed", count: 20), "move \(index): \(next.text)")
      #expect(!next.text.contains("FAIL"), "move \(index): \(next.text)")
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0)
      machine = next
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    try verify(disk, machine.text, records)
  }

  /// The machine moves with a copy of its disk while the guest writes: what it was told is durable is in the copy.
  @Test(arguments: engines, ["qcow2", "raw"])
  func aDiskIsCopiedOnTheWay(engine: String, format: String) throws {
    let folder = try TemporaryFolder()
    let records = "records=200 flush=10 sectors=16"
    func image(_ name: String) throws -> String {
      let path = folder.path + "/" + name
      try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", format, path, "32M").status == 0)
      return "\(path),format=\(format)"
    }
    func arguments(_ image: String) -> [String] {
      [
        "disk", "--engine", engine, "--memory", "64M", "--time-limit", "600", "--disk", image, "--append",
        "mode=rewrite passes=100000 \(records)",
      ]
    }
    var machine = try RunningVMM(arguments(try image("disk0")))
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    for index in 1...2 {
      let uri = "unix:\(folder.path)/move\(index)"
      let disks = index == 1 ? "unix:\(folder.path)/disks" : "tcp:127.0.0.1:\(try freePort())"
      let next = try RunningVMM(arguments(try image("disk\(index)")) + ["--incoming", uri, "--incoming-disks", disks])
      let moved = try hostTool(VMM.path, "migrate", machine.socket, uri, "--copy-disks", disks)
      try #require(moved.status == 0, "\(moved.output) \(machine.text.suffix(500)) \(next.text)")
      #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(500))")
      #expect(next.waitFor("flushed", count: 40), "\(next.text)")
      #expect(!next.text.contains("FAIL"), "\(next.text)")
      let left = try #require(try next.execute("query-block-exports") as? [[String: Any]])
      #expect(left.isEmpty)
      machine = next
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    try verify(folder.path + "/disk2", machine.text, records, format: format)
  }

  /// Where a copy cannot begin or ends before the machine leaves, the machine stays with its disk, and can be moved later.
  @Test(arguments: engines)
  func aCopyThatEndsKeepsTheMachine(engine: String) throws {
    let folder = try TemporaryFolder()
    let records = "records=200 flush=10 sectors=16"
    let (here, there, uri) = (folder.path + "/here", folder.path + "/there", "unix:\(folder.path)/move")
    for (path, size) in [(here, "32M"), (there, "32M"), (folder.path + "/small", "16M")] {
      try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", path, size).status == 0)
    }
    let arguments = { (image: String) in
      [
        "disk", "--engine", engine, "--memory", "64M", "--time-limit", "600", "--disk", "\(image),id=d0", "--append",
        "mode=rewrite passes=100000 \(records)",
      ]
    }
    let machine = try RunningVMM(arguments(here))
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let small = try RunningVMM(
      arguments(folder.path + "/small") + [
        "--incoming", "unix:\(folder.path)/nowhere", "--incoming-disks", "unix:\(folder.path)/small-disks",
      ])
    let refused = try hostTool(
      VMM.path, "migrate", machine.socket, "unix:\(folder.path)/nowhere", "--copy-disks",
      "unix:\(folder.path)/small-disks")
    #expect(refused.status == 1 && refused.output.contains("the disk's"), "\(refused.output)")
    small.kill()
    let next = try destination(arguments(there), at: uri)
    let socket = folder.path + "/disks"
    try next.execute("nbd-server-start", ["addr": ["type": "unix", "data": ["path": socket]]])
    try next.execute("nbd-server-add", ["device": "d0", "writable": true])
    let server: [String: Any] = ["type": "unix", "path": socket]
    try machine.execute(
      "blockdev-add", ["driver": "nbd", "node-name": "copy", "server": server, "export": "d0"])
    let mirror: [String: Any] = ["job-id": "m", "device": "d0", "target": "copy", "sync": "full"]
    try machine.execute("blockdev-mirror", mirror.merging(["speed": 1 << 20]) { $1 })
    #expect(try machine.refusal("block_resize", ["device": "d0", "size": 64 << 20]).contains("has a job, m"))
    let early = try move(machine, to: uri)
    #expect((early["error-desc"] as? String)?.contains("the copy of the disk d0 is not ready") == true, "\(early)")
    // The destination ends, and with it the copy.
    let ended = try machine.event("BLOCK_JOB_COMPLETED") { $0["device"] as? String == "m" }
    #expect(ended["error"] != nil)
    #expect(next.waitUntilExit() == 74, "\(next.text)")
    // The layer goes, and says that it could not be flushed.
    #expect(try machine.refusal("blockdev-del", ["node-name": "copy"]).contains("the server ended the connection"))
    #expect(try machine.refusal("blockdev-del", ["node-name": "copy"]).contains("Cannot find device"))
    let count = machine.text.components(separatedBy: "flushed").count
    #expect(machine.waitFor("flushed", count: count + 5), "\(machine.text.suffix(500))")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(500))")
    try verify(here, machine.text, records)
  }

  /// Every record that the guest says is flushed is on the disk.
  private func verify(_ disk: String, _ text: String, _ records: String, format: String = "qcow2") throws {
    if format == "qcow2" {
      var check = try hostTool("qemu-img", "check", disk)
      // What io_uring held of a killed process goes a moment after it, and with it the locks.
      for _ in 0..<100 where check.output.contains("Failed to get") {
        usleep(50_000)
        check = try hostTool("qemu-img", "check", disk)
      }
      #expect(check.status == 0, "\(check.output)")
    }
    let flushed = text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      .last { $0.hasPrefix("flushed") }
    let words = try #require(flushed).split(separator: " ")
    let verified = try VMM.run([
      "run", "disk", "--engine", "soft", "--disk", "\(disk),format=\(format)", "--append",
      "mode=verify \(records) expect=\(words[1]) generation=\(words[3])",
    ])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
  }

  /// A destination that waits ends as other runs do.
  @Test func waitingHasAnEnd() throws {
    let folder = try TemporaryFolder()
    let arguments = ["run", "hello", "--engine", "soft", "--incoming", "unix:\(folder.path)/move"]
    #expect(try VMM.run(arguments + ["--time-limit", "0.5"]).status == 124)
    let waiting = try destination(["hello", "--engine", "soft"], at: "unix:\(folder.path)/move")
    #expect(try (waiting.execute("query-status") as? [String: Any])?["status"] as? String == "inmigrate")
    waiting.signal(SIGTERM)
    #expect(waiting.waitUntilExit() == 130, "\(waiting.text)")
  }

  /// A machine that stands still arrives byte for byte, and stands still there; what the trace says was sent is all there is.
  @Test(arguments: engines)
  func memoryArrivesAsItWas(engine: String) throws {
    let folder = try TemporaryFolder()
    let arguments = dirty(engine, cpus: 1, memory: "64M")
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    try machine.execute("stop")
    try machine.execute("x-swiftvmm-save", ["file": folder.path + "/here"])
    let uri = "unix:\(folder.path)/move"
    let next = try destination(arguments, at: uri)
    try machine.execute("migrate-set-parameters", ["x-swiftvmm-trace": folder.path + "/trace"])
    let result = try move(machine, to: uri)
    try #require(result["status"] as? String == "completed", "\(result)")
    let status = try #require(try next.execute("query-status") as? [String: Any])
    #expect(status["status"] as? String == "paused")
    try next.execute("x-swiftvmm-save", ["file": folder.path + "/there"])
    let here = try savedMemory(folder.path + "/here")
    let there = try savedMemory(folder.path + "/there")
    #expect(here.count == 64 << 20)
    #expect(here == there)
    let trace = try MigrationTraceReader(folder.path + "/trace", pages: here.count / 4096)
    #expect(trace.firstRoundIsInOrder)
    #expect(trace.sent.count == here.count / 4096 && !trace.sent.contains(0))
    try next.execute("cont")
    #expect(next.waitFor("dirty: pass", count: 1), "\(next.text)")
    #expect(!next.text.contains("FAIL"), "\(next.text)")
  }

  /// What the guest's own agent says of its pages: needed ones come second, filled ones last, and free ones never, but for those that the
  /// guest takes back meanwhile, which it verifies there.
  @Test(arguments: engines)
  func theGuestsHintsAreFollowed(engine: String) throws {
    let folder = try TemporaryFolder()
    let arguments = [
      "dirty", "--engine", engine, "--memory", "96M", "--time-limit", "600", "--agent", "--append",
      "agent set=8 fill=8 readonly=4 free=16 reuse=300 rate=2000 seconds=0 jump=20000 skew=20000",
    ]
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    let uri = "unix:\(folder.path)/move"
    let next = try destination(arguments, at: uri)
    try machine.execute(
      "migrate-set-parameters",
      ["x-swiftvmm-trace": folder.path + "/trace", "max-bandwidth": 20 << 20, "x-swiftvmm-hint-wait": 60_000])
    let result = try move(machine, to: uri)
    try #require(result["status"] as? String == "completed", "\(result) \(machine.text) \(next.text)")
    let trace = try MigrationTraceReader(folder.path + "/trace", pages: 96 << 8)
    #expect(trace.firstRoundIsInOrder)
    #expect((1000...2048).contains(trace.first["prioritized"] ?? 0), "\(trace.first)")
    #expect((2000...2048).contains(trace.first["deprioritized"] ?? 0), "\(trace.first)")
    // The free area ends with the last page that was never sent; what was sent of it had been written.
    let unsent = trace.sent.indices.filter { trace.sent[$0] == 0 }
    let last = try #require(unsent.last)
    let own = try #require(result["x-swiftvmm"] as? [String: Any])
    let ignored = try #require((own["classes"] as? [String: Int])?["ignored"])
    let taken = (last - ignored + 1...last).count { trace.sent[$0] > 0 }
    #expect(unsent.count + taken == ignored && unsent.count > 1000, "\(ignored) \(unsent.count) \(taken)")
    #expect(taken > 0, "\(own)")
    #expect(next.waitFor("dirty: pass", count: 3), "\(next.text)")
    #expect(!next.text.contains("FAIL"), "\(next.text)")
    // The agent goes on there.
    let hello = try #require(try next.execute("x-swiftvmm-query-agent") as? [String: Any])
    #expect(hello["open"] as? Bool == true)
    try next.execute("x-swiftvmm-agent", ["request": "ping"])
  }

  /// Whatever cannot go is refused, and the machine goes on where it is.
  @Test(arguments: engines)
  func refusalsLeaveTheMachine(engine: String) throws {
    let folder = try TemporaryFolder()
    let machine = try RunningVMM(dirty(engine, cpus: 1))
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    let early = try machine.refusal("migrate-start-postcopy")
    #expect(early.contains("use migrate first"), "\(early)")
    let nonsense = try machine.refusal("migrate", ["uri": "nonsense"])
    #expect(nonsense.contains("is neither unix:PATH nor HOST:PORT"), "\(nonsense)")
    let nobody = try move(machine, to: "unix:\(folder.path)/nobody")
    #expect((nobody["error-desc"] as? String)?.contains("No such file") == true, "\(nobody)")
    let uri = "unix:\(folder.path)/move"
    let other = try destination(dirty(engine, cpus: 2), at: uri)
    let refused = try move(machine, to: uri)
    let reason = refused["error-desc"] as? String ?? ""
    #expect(reason.contains("the machine has --cpus 1, and the destination 2"), "\(refused)")
    #expect(other.waitUntilExit() == 74)
    #expect(other.text.contains("no machine has come: the machine has --cpus 1"), "\(other.text)")
    let before = passes(machine)
    #expect(machine.waitFor("dirty: pass", count: before + 2), "\(machine.text)")
    #expect(!machine.text.contains("FAIL"), "\(machine.text)")
  }

  /// A guest that writes faster than the links carry is told of as one: what its pause would be, why it does not end, and how much its vCPUs
  /// are slowed.
  @Test(arguments: engines)
  func aStallIsToldOf(engine: String) throws {
    let folder = try TemporaryFolder()
    let arguments = [
      "dirty", "--engine", engine, "--memory", "64M", "--time-limit", "600", "--append",
      "set=8 seconds=0 jump=20000 skew=20000",
    ]
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    let uri = "unix:\(folder.path)/move"
    let next = try destination(arguments, at: uri)
    try machine.execute("migrate-set-parameters", ["max-bandwidth": 8 << 20, "downtime-limit": 1])
    try machine.execute(
      "migrate-set-capabilities", ["capabilities": [["capability": "auto-converge", "state": true]]])
    try machine.execute("migrate", ["uri": uri])
    var stall: String?
    var throttle = 0
    var expected = 0
    for _ in 0..<3000 where throttle == 0 || stall == nil {
      let result = try state(machine)
      try #require(["setup", "active"].contains(result["status"] as? String ?? ""), "\(result)")
      let own = result["x-swiftvmm"] as? [String: Any]
      if let text = own?["stall"] as? String {
        stall = text
        expected = result["expected-downtime"] as? Int ?? 0
      }
      throttle = (own?["rounds"] as? [[String: Any]])?.last?["throttle"] as? Int ?? 0
      usleep(20_000)
    }
    print("\(engine): \(stall ?? "no stall"); expected \(expected) ms, throttled by \(throttle) per cent")
    #expect(stall != nil && throttle >= 20, "\(throttle)")
    #expect(expected > 1)
    try machine.execute("migrate_cancel")
    #expect(next.waitUntilExit() == 74)
    let before = passes(machine)
    #expect(machine.waitFor("dirty: pass", count: before + 2), "\(machine.text)")
    #expect(!machine.text.contains("FAIL"), "\(machine.text)")
  }

  /// A cancelled migration leaves the machine where it is, and it can be moved then.
  @Test(arguments: engines)
  func aCancelledMoveCanBeTriedAgain(engine: String) throws {
    let folder = try TemporaryFolder()
    let arguments = dirty(engine, cpus: 1)
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    let uri = "unix:\(folder.path)/move"
    let first = try destination(arguments, at: uri)
    try machine.execute("migrate-set-parameters", ["max-bandwidth": 1 << 20])
    try machine.execute("migrate", ["uri": uri])
    _ = try machine.event("MIGRATION") { $0["status"] as? String == "active" }
    let busy = try machine.refusal("migrate", ["uri": uri])
    #expect(busy.contains("migration process in progress"))
    try machine.execute("migrate_cancel")
    _ = try machine.event("MIGRATION") { $0["status"] as? String == "cancelled" }
    #expect(first.waitUntilExit() == 74)
    let second = try destination(arguments, at: uri)
    try machine.execute("migrate-set-parameters", ["max-bandwidth": 0])
    let result = try move(machine, to: uri)
    try #require(result["status"] as? String == "completed", "\(result)")
    #expect(second.waitFor("dirty: pass", count: 2), "\(second.text)")
    #expect(!second.text.contains("FAIL"), "\(second.text)")
  }

  /// kill -9 of either side at any moment: the disk belongs to exactly one machine, which goes on, or was the one that was
  /// killed; nothing that was flushed is lost.
  @Test(arguments: engines)
  func eitherSideMayBeKilled(engine: String) throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk.qcow2"
    let records = "records=200 flush=10 sectors=16"
    let arguments = [
      "disk", "--engine", engine, "--memory", "64M", "--time-limit", "600", "--disk", disk,
      "--append", "mode=rewrite passes=100000 \(records)",
    ]
    var ends: [String: Int] = [:]
    var longest: Double = 0.05
    for index in 0..<Self.kills {
      try? FileManager.default.removeItem(atPath: disk)
      try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "32M").status == 0)
      let machine = try RunningVMM(arguments)
      #expect(machine.waitFor("flushed 200"), "\(machine.text)")
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try destination(arguments, at: uri)
      let killsSource = index % 2 == 0
      let began = Date()
      try machine.execute("migrate", ["uri": uri])
      // The first ones find out how long a migration takes; the others are cut anywhere in it, and a little after it.
      if index < 2 {
        while ["setup", "active", "device"].contains(status(machine)) { usleep(500) }
        longest = max(0.01, Date().timeIntervalSince(began))
      } else {
        usleep(UInt32(Double.random(in: 0..<1.2) * longest * 1e6))
      }
      (killsSource ? machine : next).kill()
      let end: String
      if killsSource {
        // Either the destination has it, or the machine is gone with its process.
        usleep(300_000)
        let state = next.isRunning ? (try? next.execute("query-status") as? [String: Any])?["status"] as? String : nil
        if state == "running" {
          #expect(next.waitFor("flushed", count: 10), "\(next.text)")
          end = "moved"
        } else if state == "inmigrate", status(next) == "none" {
          // The source had not come yet; another one still may.
          next.kill()
          end = "lost with its process"
        } else {
          #expect(next.waitUntilExit() == 74, "\(next.text)")
          #expect(!next.text.contains("flushed"), "\(next.text)")
          end = "lost with its process"
        }
      } else {
        while ["setup", "active", "device"].contains(status(machine)) { usleep(5000) }
        if status(machine) == "completed" {
          let state = try #require(try machine.execute("query-status") as? [String: Any])
          #expect(state["status"] as? String == "postmigrate")
          end = "moved, and killed there"
        } else {
          let state = try #require(try machine.execute("query-status") as? [String: Any])
          #expect(state["status"] as? String == "running", "\(machine.text)")
          let count = machine.text.components(separatedBy: "flushed").count
          #expect(machine.waitFor("flushed", count: count + 10), "\(machine.text.suffix(500))")
          end = "kept"
        }
      }
      ends[end, default: 0] += 1
      machine.kill()
      next.kill()
      let last = next.text.contains("flushed") ? machine.text + next.text : machine.text
      try verify(disk, last, records)
    }
    print("\(engine): after \(Self.kills) kills: \(ends)")
    #expect(ends.values.reduce(0, +) == Self.kills)
  }

  private func state(_ machine: RunningVMM) throws -> [String: Any] {
    try #require(try machine.execute("query-migrate") as? [String: Any])
  }

  private func status(_ machine: RunningVMM) -> String {
    ((try? machine.execute("query-migrate") as? [String: Any])?["status"] as? String) ?? "none"
  }
}
