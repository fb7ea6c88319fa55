import Foundation
import Testing

/// Network cards of guests on a switch: frames arrive as they were, also while a machine moves. `SWIFTVMM_MOVES` sets how often.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct NetworkGuestTests {
  private static let engines: [String] = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]
  private static let moves = ProcessInfo.processInfo.environment["SWIFTVMM_MOVES"].flatMap { Int($0) } ?? 4
  /// Of the queues, by the number of vCPUs.
  private static let ways = [
    1: ["", "queue=packed indirect=0 buffer=256 buffers=80"],
    2: ["queue=packed", "indirect=0 events=0 buffer=700 buffers=40"],
  ]

  private func arguments(_ engine: String, cpus: Int = 1, net: String, _ append: String) -> [String] {
    [
      "net", "--engine", engine, "--cpus", "\(cpus)", "--memory", "64M", "--time-limit", "600", "--net", net,
      "--append",
      append,
    ]
  }

  @Test(arguments: engines, [1, 2]) func framesArriveAsTheyWere(engine: String, cpus: Int) throws {
    let network = try TestSwitch()
    let frames = engine == "kvm" ? 100 : 2000
    let net = "switch=\(network.path),mtu=4000"
    for way in Self.ways[cpus] ?? [] {
      let peer = try RunningVMM(arguments(engine, cpus: cpus, net: net + ",mac=52:54:00:00:00:02", "mode=echo \(way)"))
      #expect(peer.waitFor("net: 52:54:00:00:00:02, mtu 4000"), "\(peer.text)")
      // None may be lost, as nobody is overrun.
      let result = try VMM.run(
        ["run"] + arguments(engine, cpus: cpus, net: net, "mode=ping frames=\(frames) lost=0 timeout=60000 \(way)"))
      #expect(result.status == 0, "\(way): \(result.output) \(result.errors)")
      #expect(result.output.contains("net: all passed"), "\(result.output)")
      try peer.execute("quit")
      #expect(peer.waitUntilExit() == 0, "\(peer.text)")
    }
  }

  // MARK: Moves

  /// A peer that stays, and the line of its counts that came last.
  private func pinger(_ network: TestSwitch, rate: Int) throws -> RunningVMM {
    try RunningVMM(
      arguments(
        "soft", net: "switch=\(network.path),mac=52:54:00:00:00:01",
        "mode=ping rate=\(rate) window=2000 timeout=20000 report=50 longest=1000"))
  }

  private func count(_ what: String, _ machine: RunningVMM) throws -> Int {
    let line = machine.text.components(separatedBy: "\n").dropLast().last { $0.hasPrefix("net: received") } ?? ""
    let words = line.components(separatedBy: " ")
    let place = try #require(words.firstIndex(of: what), "\(machine.text)")
    return try #require(Int(words[place + 1]))
  }

  /// Waits for `reports` more lines of counts.
  private func progress(_ machine: RunningVMM, _ reports: Int = 2) {
    let seen = machine.text.components(separatedBy: "net: received").count - 1
    #expect(machine.waitFor("net: received", count: seen + reports), "\(machine.text)")
  }

  private func move(_ machine: RunningVMM, to next: RunningVMM, _ uri: String, isPostCopy: Bool) throws {
    try machine.execute(
      "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": isPostCopy]]])
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
      return
    }
  }

  /// The traffic goes on at every new place, with the card's address; frames are lost with the pause alone, none comes twice.
  @Test(arguments: engines, [1, 2]) func aGuestMovesWhileAPeerSends(engine: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let network = try TestSwitch()
    // Without mac=: another process would have another address.
    let guest = arguments(engine, cpus: cpus, net: "switch=\(network.path)", "mode=echo report=20 announce=\(cpus - 1)")
    var machine = try RunningVMM(guest)
    #expect(machine.waitFor("net: "), "\(machine.text)")
    let address = try self.address(machine)
    let peer = try pinger(network, rate: engine == "kvm" ? 50 : 400)
    progress(peer)
    var lost = try count("lost", peer)
    #expect(lost == 0, "\(peer.text)")
    for index in 0..<Self.moves {
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try RunningVMM(guest + ["--incoming", uri])
      #expect(try self.address(next) != address)
      progress(peer, 1)
      // None has been lost since the last move.
      #expect(try count("lost", peer) == lost, "move \(index): \(peer.text)")
      try move(machine, to: next, uri, isPostCopy: index % 2 == 1 && PostCopyHost.hasFaults)
      #expect(next.waitFor("net: received", count: 2), "move \(index): \(next.text) \(peer.text)")
      #expect(try self.address(next) == address)
      if cpus == 2 { #expect(next.waitFor("net: announced"), "\(next.text)") }
      progress(peer)
      lost = try count("lost", peer)
      let before = try count("received", machine)
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      #expect(try count("received", machine) == before)
      machine = next
    }
    for machine in [peer, machine] {
      for what in ["doubled", "damaged"] { #expect(try count(what, machine) == 0, "\(machine.text)") }
      #expect(!machine.text.contains("FAIL"), "\(machine.text)")
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    }
  }

  private func address(_ machine: RunningVMM) throws -> String {
    let cards = try #require(try machine.execute("x-swiftvmm-query-networks") as? [[String: Any]])
    return try #require(cards.first?["mac"] as? String)
  }

  /// From file to file and from engine to engine.
  @Test func aSavedGuestGoesOn() throws {
    let network = try TestSwitch()
    let folder = try TemporaryFolder()
    let file = folder.path + "/saved"
    func guest(_ engine: String) -> [String] {
      arguments(engine, net: "switch=\(network.path)", "mode=echo report=20") + ["--cpu", "common"]
    }
    var machine = try RunningVMM(guest("soft"))
    #expect(machine.waitFor("net: "), "\(machine.text)")
    let address = try self.address(machine)
    let peer = try pinger(network, rate: 50)
    progress(peer)
    for index in 0..<4 {
      try machine.execute("x-swiftvmm-save", ["file": file, "stop": true])
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      machine = try RunningVMM(guest(Self.engines[(index + 1) % Self.engines.count]) + ["--restore", file])
      #expect(machine.waitFor("net: received", count: 2), "file \(index): \(machine.text)")
      #expect(try self.address(machine) == address)
    }
    progress(peer)
    for machine in [peer, machine] {
      for what in ["doubled", "damaged"] { #expect(try count(what, machine) == 0, "\(machine.text)") }
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    }
  }

  /// Refused with what differs, and the machine goes on where it is.
  @Test func aCardThatDiffersIsNamed() throws {
    let network = try TestSwitch()
    let folder = try TemporaryFolder()
    let net = "switch=\(network.path),mac=52:54:00:00:00:02,mtu=1400"
    let machine = try RunningVMM(arguments("soft", net: net, "mode=echo report=20"))
    #expect(machine.waitFor("net: "), "\(machine.text)")
    let cases = [
      ("switch=\(network.path),mtu=1500", "an MTU of 1400 in place", "an MTU of 1500"),
      ("switch=\(network.path)", "net0 with an MTU of 1400", "the destination net0 in place"),
      ("switch=\(network.path),mtu=1400,id=n1", "the network cards net0", "the destination n1"),
      ("switch=\(network.path),mac=52:54:00:00:00:03,mtu=1400", "mac= of net0 52:54:00:00:00:02", "52:54:00:00:00:03"),
      ("none", "the network cards net0", "the destination none"),
    ]
    for (index, (other, there, here)) in cases.enumerated() {
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try RunningVMM(arguments("soft", net: other, "mode=echo report=20") + ["--incoming", uri])
      try machine.execute("migrate", ["uri": uri])
      var state: [String: Any] = [:]
      while true {
        state = try #require(try machine.execute("query-migrate") as? [String: Any])
        if state["status"] as? String == "failed" { break }
        try #require(state["status"] as? String != "completed", "\(other)")
        usleep(5000)
      }
      let reason = state["error-desc"] as? String ?? ""
      #expect(reason.contains(there) && reason.contains(here), "\(other): \(reason)")
      next.kill()
    }
    #expect((try machine.execute("query-status") as? [String: Any])?["status"] as? String == "running")
  }

  // MARK: Control

  @Test func theLinkIsToldOf() throws {
    let network = try TestSwitch()
    let machine = try RunningVMM(arguments("soft", net: "switch=\(network.path),id=lan", "mode=echo"))
    #expect(machine.waitFor("net: "), "\(machine.text)")
    try machine.execute("set_link", ["name": "lan", "up": false])
    #expect(machine.waitFor("net: link down"), "\(machine.text)")
    try machine.execute("set_link", ["name": "lan", "up": true])
    #expect(machine.waitFor("net: link up"), "\(machine.text)")
    #expect(try machine.refusal("set_link", ["name": "wan", "up": true]).contains("'wan' not found"))
    let bounds = ["initial": 1, "max": 1, "rounds": 1, "step": 0]
    try machine.execute("announce-self", bounds)
    #expect(machine.waitFor("net: announced"), "\(machine.text)")
    for (name, value) in [("initial", 0), ("rounds", 1001), ("step", -1)] {
      #expect(try machine.refusal("announce-self", bounds.merging([name: value]) { $1 }).contains(name))
    }
    let filters = try #require(try machine.execute("query-rx-filter") as? [[String: Any]])
    #expect(filters.first?["promiscuous"] as? Bool == false)
    #expect(filters.first?["main-mac"] as? String == (try address(machine)))
    #expect(try machine.refusal("query-rx-filter", ["name": "wan"]).contains("'wan' not found"))
  }

  /// Two machines never share an address that nobody has given them, and one has the same whenever it starts.
  @Test func addressesAreTheMachines() throws {
    let network = try TestSwitch()
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk"
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "1M").status == 0)
    func address(_ more: [String]) throws -> Substring {
      let result = try VMM.run(
        ["run"] + arguments("soft", net: "switch=\(network.path)", "mode=send frames=1") + more)
      #expect(result.status == 0, "\(result.output) \(result.errors)")
      let address = try #require(result.output.split(separator: "\n").first).dropFirst(5).prefix(17)
      // Locally administered, and a station's.
      #expect(try #require(UInt8(address.prefix(2), radix: 16)) & 3 == 2)
      return address
    }
    let control = ["--control", "unix:\(folder.path)/qmp"]
    let byControl = try address(control)
    #expect(try address(control) == byControl)
    let byDisk = try address(control + ["--disk", disk])
    #expect(try address(["--control", "unix:\(folder.path)/other", "--disk", disk]) == byDisk)
    #expect(try address(["--disk", disk + ",readonly=on"] + control) == byControl)
    #expect(Set([byControl, byDisk, try address([]), try address([])]).count == 4)
  }

  @Test func whatCannotBeIsOneLine() throws {
    let network = try TestSwitch()
    let good = "switch=\(network.path)"
    let cases: [([String], Int32, String)] = [
      (["wire"], 64, "expected tap=NAME or switch=PATH"),
      (["switch=/nonexistent/net"], 69, "no switch at /nonexistent/net"),
      (["tap=nothing-here"], 69, "nothing-here"),
      ([good + ",mac=01:00:00:00:00:00"], 64, "--net mac 01:00:00:00:00:00"),
      ([good + ",mac=52:54"], 64, "--net mac 52:54"),
      ([good + ",mtu=67"], 64, "expected 68 to 65535"),
      ([good + ",id=1"], 64, "--net id 1"),
      ([good + ",speed=1"], 64, "expected mac=, mtu=, id= or offloads="),
      ([good + ",id=a", good + ",id=a"], 64, "two devices are called a"),
      (["none", good], 64, "--net none and another --net exclude each other"),
    ]
    for (nets, status, text) in cases {
      let result = try VMM.run(["run", "hello", "--engine", "soft"] + nets.flatMap { ["--net", $0] })
      #expect(result.status == status, "\(nets): \(result.errors)")
      #expect(result.errors.contains(text), "\(nets): \(result.errors)")
      #expect(result.errors.split(separator: "\n").count == 1, "\(result.errors)")
    }
    let conflict = try VMM.run("run", "hello", "--deterministic", "--net", good)
    #expect(conflict.status == 64 && conflict.errors.contains("--deterministic and --net"), "\(conflict.errors)")
    #expect(try VMM.run("run", "hello", "--engine", "soft", "--net", "none").status == 0)
    let none = try VMM.run("run", "net", "--engine", "soft")
    #expect(none.status == 3 && none.output.contains("FAIL there is no network card"))
  }
}
