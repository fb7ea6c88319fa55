import Foundation
import Testing

/// The sample guest `recover`, which gets snapshots of its own disk as second disks, on both engines.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct RecoveryTests {
  private static let engines = BackupTests.engines
  private let folder: TemporaryFolder
  private var disk: String { folder.path + "/disk" }
  private var top: String { folder.path + "/top" }
  private var audit: String { folder.path + "/audit" }

  init() throws {
    folder = try TemporaryFolder()
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", folder.path + "/disk", "32M").status == 0)
  }

  private func machine(_ engine: String, _ append: String, _ more: String...) throws -> RunningVMM {
    try RunningVMM(
      [
        "recover", "--engine", engine, "--agent", "--recovery-audit", audit, "--time-limit", "120", "--disk",
        disk + ",id=d0", "--append", append,
      ] + more)
  }

  private func cut(_ machine: RunningVMM) throws {
    try machine.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": top])
  }

  private func lines() throws -> [[String: Any]] {
    try String(contentsOfFile: audit, encoding: .utf8).split(separator: "\n").map {
      try #require(try JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any])
    }
  }

  private func hash(_ path: String) throws -> String { try hostTool("sha256sum", path).output }

  /// The files that attached snapshots write to are gone as soon as they are open.
  private var leftovers: [String] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
    return names.filter { $0.contains(".snapshot-") }
  }

  private func check(_ images: String...) throws {
    for image in images {
      let checked = try hostTool("qemu-img", "check", image)
      #expect(checked.status == 0, "\(image): \(checked.output)")
    }
  }

  /// Written, cut, spoiled, asked for, found, copied back and given up; the guest itself verifies every record.
  @Test(arguments: engines, ["read-only", "copy-on-write"])
  func aFileComesBack(engine: String, policy: String) throws {
    let machine = try machine(engine, "rounds=2", "--recovery", policy)
    #expect(machine.waitFor("written"), "\(machine.text)")
    try cut(machine)
    let before = try hash(disk)
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    #expect(
      machine.text.components(separatedBy: "detached disk").count == 3 && machine.text.contains("all passed"),
      "\(machine.text)")
    #expect(try hash(disk) == before)
    #expect(leftovers.isEmpty)
    try check(disk, top)
    let entries = try lines()
    let granted = entries.compactMap { $0["granted"] as? [String: Any] }
    #expect(granted.filter { $0["writable"] as? Bool == (policy == "copy-on-write") }.count == 2, "\(entries)")
    #expect(entries.filter { $0["detached"] != nil }.count == 2)
    #expect(!entries.contains { $0["refused"] != nil })
  }

  /// Several at once, each with what is written to it; the host takes them back one after another while the guest uses all of
  /// them, politely or with requests under way.
  @Test(arguments: engines, ["rude=0", "rude=1"])
  func theHostTakesThemBackUnderLoad(engine: String, manners: String) throws {
    let written = try machine(engine, "records=16")
    #expect(written.waitFor("written"))
    try cut(written)
    #expect(written.waitUntilExit() == 0, "\(written.text)")
    let hashes = try [hash(disk), hash(top)]
    let held = try RunningVMM([
      "recover", "--engine", engine, "--agent", "--recovery", "copy-on-write", "--recovery-audit", audit,
      "--time-limit", "120", "--disk", top + ",id=d0", "--append", "mode=hold attaches=4 \(manners)",
    ])
    #expect(held.waitFor("holding"), "\(held.text)")
    let attached = try held.execute("x-swiftvmm-query-attached-snapshots") as? [[String: String]]
    #expect(
      attached?.compactMap { $0["device"] } == (1...4).map { "snapshot-\($0)" }
        && attached?.compactMap { $0["serial"] } == ["disk", "disk+2", "disk+3", "disk+4"]
        && attached?.allSatisfy { $0["id"] == "disk" } == true, "\(attached ?? [])")
    for number in [3, 1, 2, 4] {
      try held.execute("device_del", ["id": "snapshot-\(number)"])
      #expect(try held.event("DEVICE_DELETED")["device"] as? String == "snapshot-\(number)")
    }
    #expect(held.waitUntilExit() == 0, "\(held.text)")
    #expect(held.text.components(separatedBy: "gone").count == 5, "\(held.text)")
    #expect(try [hash(disk), hash(top)] == hashes)
    #expect(leftovers.isEmpty)
    #expect(try lines().filter { $0["detached"] != nil }.count == 4 + 1)
  }

  /// The guest gives them up itself, with reads under way.
  @Test(arguments: engines, ["read-only", "copy-on-write"])
  func theGuestLetsGoUnderLoad(engine: String, policy: String) throws {
    let written = try machine(engine, "records=16")
    #expect(written.waitFor("written"))
    try cut(written)
    #expect(written.waitUntilExit() == 0, "\(written.text)")
    let hashes = try [hash(disk), hash(top)]
    let held = try RunningVMM([
      "recover", "--engine", engine, "--agent", "--recovery", policy, "--time-limit", "120", "--disk", top + ",id=d0",
      "--append", "mode=hold attaches=3 rude=1 detach=1",
    ])
    #expect(held.waitUntilExit() == 0, "\(held.text)")
    #expect(held.text.components(separatedBy: "detached disk").count == 4, "\(held.text)")
    #expect(try [hash(disk), hash(top)] == hashes)
  }

  /// What a guest may write to snapshots is limited; beyond it the write fails, the guest goes on and the audit has a line. What
  /// goes with a disk is free again.
  @Test(arguments: engines)
  func writesBeyondTheQuotaAreRefused(engine: String) throws {
    let written = try machine(engine, "records=16")
    #expect(written.waitFor("written"))
    try cut(written)
    #expect(written.waitUntilExit() == 0, "\(written.text)")
    let held = try RunningVMM([
      "recover", "--engine", engine, "--agent", "--recovery", "copy-on-write", "--recovery-quota", "512K",
      "--recovery-audit", audit, "--time-limit", "120", "--disk", top + ",id=d0", "--append",
      "mode=hold attaches=2 spread=1",
    ])
    #expect(held.waitFor("no more writes"), "\(held.text)")
    for number in 1...2 {
      try held.execute("device_del", ["id": "snapshot-\(number)"])
      _ = try held.event("DEVICE_DELETED")
    }
    #expect(held.waitUntilExit() == 0, "\(held.text)")
    let refused = try lines().filter { $0["request"] as? String == "write" }
    #expect((1...2).contains(refused.count), "\(refused)")
    #expect(refused.allSatisfy { ($0["refused"] as? String)?.contains("524288 bytes") == true }, "\(refused)")
    #expect(refused.allSatisfy { $0["id"] as? String == "disk" })
    for value in ["0", "-1", "many", "99999999999T"] {
      #expect(try VMM.run("run", "recover", "--recovery-quota", value).status == 64, "\(value)")
    }
  }

  /// Sends lines and returns what the host answers to each.
  private func ask(_ engine: String, _ text: String, policy: String = "read-only", quota: String = "1G") throws
    -> (machine: RunningVMM, answers: () -> [String])
  {
    let file = try folder.file("lines", Array(text.utf8))
    let machine = try RunningVMM([
      "recover", "--engine", engine, "--agent", "--recovery", policy, "--recovery-quota", quota, "--recovery-audit",
      audit, "--time-limit", "120", "--paused", "--disk", disk + ",id=d0", "--module", file, "--append", "mode=ask",
    ])
    return (machine, { machine.text.split(separator: "\n").map(String.init).filter { $0.hasPrefix("{") } })
  }

  /// Each refusal is the guest's answer and a line of the audit, and changes nothing.
  @Test(arguments: engines)
  func everyRefusalHasItsLine(engine: String) throws {
    let other = folder.path + "/other"
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", other, "16M").status == 0)
    let wishes: [(arguments: String, reason: String)] = [
      (#", "snapshot": "other""#, "called other"), (#", "snapshot": "\#(other)""#, "a snapshot's id is letters"),
      (#", "snapshot": "../disk""#, "a snapshot's id is letters"),
      (#", "snapshot": "..""#, "a snapshot's id is letters"),
      (#", "snapshot": "disk\u0000""#, "a snapshot's id is letters"),
      (#", "snapshot": """#, "a snapshot's id is letters"),
      (#", "snapshot": 7"#, "a snapshot's id is letters"), (#", "snapshot": "disk""#, "revoked"),
      (#", "before": "yesterday""#, "no time"), (#", "before": -1"#, "no time"), (#", "at": 1"#, "at 1970-01-01"),
      (#", "after": 99999999999999"#, "after "), (#", "before": 1"#, "before 1970-01-01"), ("", "say which one"),
      (#", "snapshot": "top", "disk": "d7""#, "no disk d7"), (#", "snapshot": "top", "disk": 7"#, "no disk"),
    ]
    var text = wishes.enumerated().map { #"{"id": \#($0), "request": "snapshot-attach"\#($1.arguments)}"# }
    text.append(#"{"id": 90, "request": "snapshot-detach", "serial": "disk0"}"#)
    text.append(#"{"id": 91, "request": "snapshot-attach", "snapshot""#)
    text.append(#"{"id": 92, "request": "snapshot-burn"}"#)
    text.append(String(repeating: "[", count: 20_000))
    let (machine, answers) = try ask(engine, text.joined(separator: "\n"))
    try cut(machine)
    try machine.execute("x-swiftvmm-snapshot-right", ["id": "disk", "allowed": false])
    let hashes = try [hash(disk), hash(other)]
    try machine.execute("cont")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    let said = answers()
    #expect(said.count == text.count, "\(said)")
    let refused = try lines().compactMap { $0["refused"] as? String }
    #expect(refused.count == wishes.count + 1, "\(refused)")
    for (number, wish) in wishes.enumerated() where number < said.count && number < refused.count {
      #expect(said[number].contains("\"error\"") && said[number].contains(wish.reason), "\(said[number])")
      #expect(refused[number].contains(wish.reason), "\(wish.arguments): \(refused[number])")
    }
    #expect(refused.last?.contains("attached as disk0") == true)
    #expect(said.filter { $0.contains("malformed") }.count == 2, "\(said.suffix(3))")
    #expect(said.contains { $0.contains("unknown request snapshot-burn") })
    #expect(try [hash(disk), hash(other)] == hashes)
  }

  /// A right that is given back is one again; more than four at once, and a guest without the right, are refused.
  @Test(arguments: engines)
  func rightsAndCounts(engine: String) throws {
    let attach = #"{"id": 1, "request": "snapshot-attach", "snapshot": "disk"}"#
    // Answers and events come in turns: a plug is an answer and an event.
    let (machine, answers) = try ask(engine, Array(repeating: attach, count: 10).joined(separator: "\n"))
    try cut(machine)
    try machine.execute("x-swiftvmm-snapshot-right", ["id": "disk", "allowed": false])
    try machine.execute("x-swiftvmm-snapshot-right", ["id": "disk", "allowed": true])
    try machine.execute("cont")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    let refused = try lines().compactMap { $0["refused"] as? String }
    #expect(refused.count >= 1 && refused.allSatisfy { $0.contains("4 snapshots are attached") }, "\(refused)")
    #expect(answers().filter { $0.contains("\"serial\": \"disk+4\"") }.count >= 1, "\(answers())")
    #expect(!answers().contains { $0.contains("disk+5") })
    try FileManager.default.removeItem(atPath: audit)
    let (off, saysNo) = try ask(engine, attach, policy: "off")
    try off.execute("cont")
    #expect(off.waitUntilExit() == 0, "\(off.text)")
    #expect(saysNo().contains { $0.contains("no right to its snapshots") }, "\(off.text)")
    #expect(try lines().filter { $0["refused"] != nil }.count == 1)
  }

  /// The channel goes with a machine that moves or is saved: the agent there neither opens the port again nor says hello.
  @Test(arguments: engines)
  func theChannelMovesWithTheMachine(engine: String) throws {
    var machine = try machine(engine, "mode=serve")
    #expect(machine.waitFor("serving"), "\(machine.text)")
    for _ in 0..<500 where try hello(machine) == nil { usleep(10_000) }
    func check(_ machine: RunningVMM) throws {
      #expect(try hello(machine) == "GuestKit")
      try machine.execute("x-swiftvmm-agent", ["request": "ping"])
      #expect(try machine.refusal("x-swiftvmm-agent", ["request": "dance"]).contains("unknown request"))
    }
    try check(machine)
    for index in 0..<3 {
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try self.machine(engine, "mode=serve", "--incoming", uri)
      try machine.execute("migrate", ["uri": uri])
      while let state = try machine.execute("query-migrate") as? [String: Any],
        ["setup", "active", "device"].contains(state["status"] as? String)
      { usleep(2000) }
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      machine = next
      try check(machine)
    }
    let file = folder.path + "/saved"
    try machine.execute("x-swiftvmm-save", ["file": file, "stop": true])
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    let restored = try self.machine(engine, "mode=serve", "--restore", file)
    try check(restored)
    #expect(!restored.text.contains("serving"), "\(restored.text)")
    try restored.execute("quit")
    #expect(restored.waitUntilExit() == 0)
  }

  /// An agent that cannot freeze is no obstacle to a backup, which says what it is then.
  @Test func aBackupGoesWithoutFreezing() throws {
    let machine = try machine("soft", "mode=serve")
    #expect(machine.waitFor("serving"), "\(machine.text)")
    for _ in 0..<500 where try hello(machine) == nil { usleep(10_000) }
    let backup = try VMM.run("backup", machine.socket, "-q", "--target", folder.path + "/b/")
    #expect(backup.status == 0, "\(backup.errors)")
    #expect(
      backup.errors.contains("not frozen") && backup.errors.contains("as after a power cut"), "\(backup.errors)")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
  }

  private func hello(_ machine: RunningVMM) throws -> String? {
    let state = try machine.execute("x-swiftvmm-query-agent") as? [String: Any]
    return (state?["hello"] as? [String: Any])?["agent"] as? String
  }

  /// Each way to say which one means that one, its disk says so, and the host sees what the guest has.
  @Test(arguments: engines)
  func eachWishMeansItsSnapshot(engine: String) throws {
    let first = try machine(engine, "mode=serve")
    #expect(first.waitFor("serving"), "\(first.text)")
    let names = ["one", "two", "a-layer-of-a-name-that-is-long"]
    for name in names {
      try first.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/" + name])
      usleep(20_000)
    }
    let listed = try first.execute("x-swiftvmm-query-snapshots") as? [String: Any]
    let snapshots = try #require(listed?["snapshots"] as? [[String: Any]])
    #expect(snapshots.compactMap { $0["id"] as? String } == ["disk", "one", "two"])
    let times = snapshots.compactMap { $0["time"] as? Int }
    try #require(times.count == 3 && times[0] < times[1] && times[1] < times[2])
    try first.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/last"])
    try first.execute("quit")
    #expect(first.waitUntilExit() == 0)

    let wishes: [(arguments: String, id: String, serial: String)] = [
      (#""at": \#(times[1])"#, "one", "one"), (#""before": \#(times[1])"#, "disk", "disk"),
      (#""after": \#(times[1])"#, "two", "two"),
      (#""snapshot": "\#(names[2])", "disk": "d0""#, names[2], "a-layer-of-a-name-+4"),
    ]
    var text = wishes.enumerated().map { #"{"id": \#($0), "request": "snapshot-attach", \#($1.arguments)}"# }
    // The guest reads a line for each, and a plug is an answer and an event: these make it wait for the last one.
    text += Array(repeating: #"{"id": 9, "request": "snapshots"}"#, count: 2 * wishes.count)
    let file = try folder.file("lines", Array(text.joined(separator: "\n").utf8))
    let second = try RunningVMM([
      "recover", "--engine", engine, "--agent", "--recovery-audit", audit, "--time-limit", "120", "--disk",
      folder.path + "/last,id=d0", "--module", file, "--append", "mode=ask",
    ])
    #expect(second.waitUntilExit() == 0, "\(second.text)")
    let granted = try self.lines().compactMap { $0["granted"] as? [String: Any] }
    #expect(granted.compactMap { $0["id"] as? String } == wishes.map(\.id), "\(second.text)")
    #expect(granted.compactMap { $0["serial"] as? String } == wishes.map(\.serial), "\(second.text)")
  }

  /// Ten thousand lines that are no requests (fewer where ring 0 is emulated), from a real guest: each is refused, and neither the snapshots, the disks nor the
  /// conversation after them have changed.
  @Test(arguments: engines)
  func malformedLinesChangeNothing(engine: String) throws {
    var random = Random(state: 20_261_130)
    let good = Array(
      #"{"id": 7, "request": "snapshot-attach", "snapshot": "disk", "before": "2026-11-30T00:00:00Z"}"#.utf8)
    let count = engine == "soft" ? 10_000 : 1000
    let text = (0..<count).map { _ -> [UInt8] in
      var line = good
      for _ in 0...random.next(6) {
        let place = random.next(line.count)
        switch random.next(3) {
        case 0: line[place] = UInt8(random.next(256))
        case 1: line.insert(UInt8(random.next(256)), at: place)
        default: line.removeLast(random.next(line.count))
        }
      }
      // None is JSON, whatever the changes have made of it.
      return line.filter { $0 != 10 } + Array("]".utf8)
    }
    let file = try folder.file("lines", Array(text.joined(separator: [10])))
    let machine = try RunningVMM([
      "recover", "--engine", engine, "--agent", "--recovery", "copy-on-write", "--recovery-audit", audit,
      "--time-limit",
      "120", "--paused", "--disk", disk + ",id=d0", "--module", file, "--append", "mode=flood",
    ])
    try cut(machine)
    let hashes = try [hash(disk), hash(top)]
    try machine.execute("cont")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    #expect(machine.text.contains("malformed \(count)"), "\(machine.text)")
    #expect(try [hash(disk), hash(top)] == hashes)
    #expect(try lines().isEmpty)
  }

  /// Numbers that are the same in every run (SplitMix64).
  private struct Random {
    var state: UInt64

    mutating func next(_ count: Int) -> Int {
      state &+= 0x9e37_79b9_7f4a_7c15
      var mixed = state
      mixed = (mixed ^ mixed >> 30) &* 0xbf58_476d_1ce4_e5b9
      mixed = (mixed ^ mixed >> 27) &* 0x94d0_49bb_1331_11eb
      return Int((mixed ^ mixed >> 31) % UInt64(count))
    }
  }

  /// The channel is there again after the guest has started again, by the host's reset or its own, and all that was asked of it
  /// before is over.
  @Test(arguments: engines, ["system_reset", "restart"])
  func theChannelSurvivesAReset(engine: String, reset: String) throws {
    let machine = try machine(engine, "mode=serve")
    for round in 1...3 {
      #expect(machine.waitFor("serving", count: round), "\(machine.text)")
      for _ in 0..<500 {
        let state = try machine.execute("x-swiftvmm-query-agent") as? [String: Any]
        if (state?["hello"] as? [String: Any])?["agent"] as? String == "GuestKit" { break }
        usleep(10_000)
      }
      try machine.execute("x-swiftvmm-agent", ["request": "ping"])
      #expect(try machine.refusal("x-swiftvmm-agent", ["request": "dance"]).contains("unknown request"))
      if reset == "restart" {
        #expect(try machine.refusal("x-swiftvmm-agent", ["request": reset]).contains("no agent answers"))
      } else {
        try machine.execute(reset)
      }
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
  }
}
