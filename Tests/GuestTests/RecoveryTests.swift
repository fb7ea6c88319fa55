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
    #expect(machine.text.contains("detached snapshot-2") && machine.text.contains("all passed"), "\(machine.text)")
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
    #expect(held.text.components(separatedBy: "detached snapshot-").count == 4, "\(held.text)")
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
    #expect(answers().filter { $0.contains("\"serial\": \"snapshot-4\"") }.count >= 1, "\(answers())")
    #expect(!answers().contains { $0.contains("snapshot-5") })
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

  private func hello(_ machine: RunningVMM) throws -> String? {
    let state = try machine.execute("x-swiftvmm-query-agent") as? [String: Any]
    return (state?["hello"] as? [String: Any])?["agent"] as? String
  }

  /// The channel is there again after the guest has started again, and with it all that was asked of it before is over.
  @Test(arguments: engines)
  func theChannelSurvivesAReset(engine: String) throws {
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
      try machine.execute("system_reset")
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
  }
}
