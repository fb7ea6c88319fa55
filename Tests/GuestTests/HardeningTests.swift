import Foundation
import Testing

private let why: Comment = "needs the release build and scripts/build-guests"

/// The guest `loader` with and without `--harden`: by one body on every engine that has views.
@Suite(.enabled(if: VMM.isBuilt, why), .serialized)
struct HardeningTests {
  static let engines = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]

  /// Signed modules, a policy with their key, and where audits go.
  private final class Workshop {
    let folder: TemporaryFolder
    let key: String
    let policy: String
    var audit: String { folder.path + "/audit.jsonl" }

    init(_ more: String = "") throws {
      if !VMM.hasKVM { print("HardeningTests: on the software engine alone: there is no /dev/kvm") }
      folder = try TemporaryFolder()
      let made = try VMM.run("harden", "keygen", folder.path + "/key")
      #expect(made.status == 0, "\(made.errors)")
      key = made.output.trimmingCharacters(in: .whitespacesAndNewlines)
      policy = try folder.file(
        "policy.json", Array(#"{"version": 1, "signatures": {"keys": ["\#(key)"]}\#(more)}"#.utf8))
    }

    static func plain(_ name: String) -> String { VMM.checkout + "/build/guests/loader-\(name).o" }

    func signed(_ name: String) throws -> String {
      let output = folder.path + "/\(name).signed"
      let result = try VMM.run("harden", "sign", "--key", folder.path + "/key", Self.plain(name), output)
      #expect(result.status == 0, "\(result.errors)")
      return output
    }

    /// The audit's lines of a kind.
    func events(_ kind: String) throws -> [[String: Any]] {
      try String(contentsOfFile: audit, encoding: .utf8).split(separator: "\n").compactMap { line in
        let event = try #require(try JSONSerialization.jsonObject(with: Data(line.utf8)) as? [String: Any])
        return event["event"] as? String == kind ? event : nil
      }
    }

    func run(
      _ engine: String, cpus: Int, hardened: Bool, modules: [String], _ append: String, limit: Int = 240
    ) throws -> VMM {
      var arguments = ["run", "loader", "--engine", engine, "--cpus", "\(cpus)", "--time-limit", "\(limit)"]
      if hardened { arguments += ["--harden", policy, "--audit", audit] }
      for module in modules { arguments += ["--module", module] }
      return try VMM.run(arguments + ["--append", append])
    }
  }

  struct Attack: Sendable, CustomTestStringConvertible {
    var name: String
    /// What the audit says of it.
    var reason: String
    var module: String?
    var isSigned = false
    var cpus = [1, 2]
    var testDescription: String { name }
  }

  static let attacks = [
    Attack(name: "text", reason: "write to a page that is not writable"),
    Attack(name: "data", reason: "execution of a page that is not executable"),
    Attack(name: "middle", reason: "entry into the loader elsewhere than at an entry point"),
    Attack(name: "read-loader", reason: "access to the loader's memory from outside"),
    Attack(name: "permission", reason: "request for a permission from outside the loader"),
    Attack(name: "register", reason: "registration after the lock"),
    Attack(name: "alias-text", reason: "write to a page that is not writable"),
    Attack(name: "alias-loader", reason: "access to the loader's memory from outside"),
    Attack(name: "remap", reason: "the page tables no longer lead to the registered loader"),
    Attack(name: "module", reason: "signature is missing", module: "counter"),
    Attack(name: "smp", reason: "write to a page that is not writable", module: "counter", isSigned: true, cpus: [2]),
    Attack(name: "dma", reason: "a device's access to protected memory"),
  ]

  @Test(arguments: engines, attacks)
  func attacksAreBlockedAndElseSucceed(_ engine: String, _ attack: Attack) throws {
    let shop = try Workshop()
    let modules = try attack.module.map { [try attack.isSigned ? shop.signed($0) : Workshop.plain($0)] } ?? []
    for cpus in attack.cpus {
      let free = try shop.run(engine, cpus: cpus, hardened: false, modules: modules, "attack=\(attack.name)")
      #expect(free.status == 0, "\(free.output) \(free.errors)")
      #expect(free.output.contains("attack \(attack.name): succeeded"), "\(free.output)")
      let hardened = try shop.run(engine, cpus: cpus, hardened: true, modules: modules, "attack=\(attack.name)")
      #expect(hardened.status == 0, "\(hardened.output) \(hardened.errors)")
      #expect(hardened.output.contains("attack \(attack.name): blocked"), "\(hardened.output)")
      let denied = try shop.events("denied")
      #expect(
        denied.contains { ($0["reason"] as? String)?.contains(attack.reason) == true }, "\(attack.name): \(denied)")
    }
  }

  @Test(arguments: engines)
  func aModuleThatWasTamperedWithIsRefused(_ engine: String) throws {
    let shop = try Workshop()
    let path = try shop.signed("counter")
    var bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: path)))
    bytes[0x44] ^= 1
    let tampered = try shop.folder.file("tampered", bytes)
    // A key that the policy does not know is as good as none.
    let other = try Workshop()
    let foreign = try other.signed("counter")
    for cpus in [1, 2] {
      for module in [tampered, foreign] {
        let free = try shop.run(engine, cpus: cpus, hardened: false, modules: [module], "attack=module")
        #expect(free.output.contains("attack module: succeeded"), "\(free.output) \(free.errors)")
        let result = try shop.run(engine, cpus: cpus, hardened: true, modules: [module], "attack=module")
        #expect(result.output.contains("attack module: blocked"), "\(result.output) \(result.errors)")
        #expect(try shop.events("denied").contains { ($0["reason"] as? String)?.contains("signature") == true })
      }
    }
  }

  @Test(arguments: engines, ["hold", "resume"])
  func anInterruptDoesNotSteerTheLoader(_ engine: String, _ rule: String) throws {
    let shop = try Workshop(#", "interrupts": {"rule": "\#(rule)", "bound-ms": 10000}"#)
    // Longer than the timer's time on either engine, and shorter than the bound.
    let append = "attack=interrupt \(engine == "soft" ? "wait=3000000" : "wait=100000 timer=5000000")"
    for cpus in [1, 2] {
      let free = try shop.run(engine, cpus: cpus, hardened: false, modules: [], append)
      #expect(free.output.contains("attack interrupt: succeeded"), "\(free.output) \(free.errors)")
      let result = try shop.run(engine, cpus: cpus, hardened: true, modules: [], append)
      #expect(result.output.contains("attack interrupt: blocked"), "\(result.output) \(result.errors)")
      #expect(result.output.contains("interrupts: 1, \(rule == "hold" ? 0 : 1) in the loader"), "\(result.output)")
      #expect(try shop.events("suspend").count == (rule == "hold" ? 0 : 1))
    }
  }

  /// Interrupts that the loader keeps waiting come when the policy's time is over, and then do not steer it either.
  @Test(arguments: engines)
  func interruptsWaitForABoundedTime(_ engine: String) throws {
    let shop = try Workshop(#", "interrupts": {"rule": "hold", "bound-ms": 10}"#)
    let append = "attack=interrupt \(engine == "soft" ? "wait=100000000" : "wait=300000 timer=5000000")"
    let result = try shop.run(engine, cpus: 1, hardened: true, modules: [], append)
    #expect(result.output.contains("attack interrupt: blocked"), "\(result.output) \(result.errors)")
    #expect(result.output.contains("interrupts: 1, 1 in the loader"), "\(result.output)")
    #expect(try shop.events("bound").count == 1)
    #expect(try shop.events("suspend").count == 1)
  }

  @Test(arguments: ["wp": "cr0.wp", "idt": "idtr"])
  func pinnedRegistersStay(_ attack: String, _ register: String) throws {
    let shop = try Workshop(#", "pin": ["cr0.wp", "cr4.smep", "cr4.smap", "efer.nxe", "idtr", "gdtr"]"#)
    let free = try shop.run("soft", cpus: 1, hardened: false, modules: [], "attack=\(attack)")
    #expect(free.output.contains("attack \(attack): succeeded"), "\(free.output)")
    let result = try shop.run("soft", cpus: 1, hardened: true, modules: [], "attack=\(attack)")
    #expect(result.output.contains("attack \(attack): blocked"), "\(result.output) \(result.errors)")
    #expect(try shop.events("denied").contains { $0["reason"] as? String == "change of \(register)" })
  }

  @Test(arguments: engines, [1, 2])
  func modulesAreLoadedAndUnloaded(_ engine: String, cpus: Int) throws {
    let shop = try Workshop()
    let modules = try ["counter", "greeter", "sums"].map { try shop.signed($0) }
    for hardened in [false, true] {
      let result = try shop.run(engine, cpus: cpus, hardened: hardened, modules: modules, "")
      #expect(result.status == 0, "\(result.output) \(result.errors)")
      #expect(result.output.contains("module 0: returned 11\n"), "\(result.output)")
      #expect(result.output.contains("greeter: a module says hello\n"))
      #expect(result.output.contains("module 2: returned 65\n"))
      #expect(result.output.contains("loader: all passed"))
    }
    #expect(try shop.events("enter").count == shop.events("leave").count)
    #expect(try shop.events("denied").isEmpty)
  }

  /// The log reaction lets all through, and the stop reaction nothing more.
  @Test(arguments: engines)
  func reactions(_ engine: String) throws {
    let log = try Workshop(#", "reaction": "log""#)
    let logged = try log.run(engine, cpus: 1, hardened: true, modules: [], "attack=text")
    #expect(logged.output.contains("attack text: succeeded"), "\(logged.output) \(logged.errors)")
    #expect(try log.events("denied").count == 1)
    let stop = try Workshop(#", "reaction": "stop""#)
    let stopped = try stop.run(engine, cpus: 1, hardened: true, modules: [], "attack=text")
    #expect(stopped.status == 134, "\(stopped.output)")
    #expect(stopped.errors.contains("the guest was stopped: write to a page that is not writable"))
  }

  /// A module's pages cost KVM an exit for each access: `SWIFTVMM_LOADS` makes the run there as long.
  @Test(arguments: engines, [1, 2])
  func tenThousandLoads(_ engine: String, cpus: Int) throws {
    let shop = try Workshop()
    let modules = try ["counter", "greeter", "sums"].map { try shop.signed($0) }
    let wanted = ProcessInfo.processInfo.environment["SWIFTVMM_LOADS"].flatMap { Int($0) }
    let count = engine == "soft" ? 10_000 : wanted ?? 500
    let result = try shop.run(
      engine, cpus: cpus, hardened: true, modules: modules, "cycles=\(count)", limit: 240 + count)
    #expect(result.status == 0, "\(result.output.suffix(300)) \(result.errors)")
    #expect(result.output.contains("cycles: \(count)"))
    // Each load and each unload is a visit, after three of both before. The guest looks that no page kept any rights.
    #expect(try shop.events("enter").count == 2 * count + 6)
    #expect(try shop.events("leave").count == 2 * count + 6)
    #expect(try shop.events("denied").isEmpty)
  }

  /// A machine that loads and unloads modules moves, and goes on from a file: with its views, its registration and whoever
  /// was inside the loader; every visit is in one of the audits. It comes only where its policy is. It stands still but for
  /// some switches at each place, so that it has not ended before it is saved on the fastest host.
  @Test(arguments: engines, [1, 2])
  func theLoaderMovesWithTheMachine(_ engine: String, cpus: Int) throws {
    let shop = try Workshop()
    let count = engine == "soft" ? 30_000 : 200
    var arguments = ["loader", "--engine", engine, "--cpus", "\(cpus)", "--time-limit", "240", "--harden", shop.policy]
    for name in ["counter", "greeter", "sums"] { arguments += ["--module", try shop.signed(name)] }
    arguments += ["--append", "cycles=\(count)", "--audit"]
    func audit(_ index: Int) -> String { "\(shop.folder.path)/audit\(index)" }
    var machine = try RunningVMM(arguments + [audit(0)])
    #expect(machine.waitFor("module 2: returned 65"), "\(machine.text)")
    try machine.execute("stop")
    for index in 1...3 {
      let uri = "unix:\(shop.folder.path)/move\(index)"
      let next = try RunningVMM(arguments + [audit(index), "--incoming", uri])
      let views = try machine.execute("x-swiftvmm-query-views") as? NSObject
      try machine.execute("migrate", ["uri": uri])
      while let state = try machine.execute("query-migrate") as? [String: Any],
        ["setup", "active", "device"].contains(state["status"] as? String)
      { usleep(2000) }
      #expect(try ranges(next.execute("x-swiftvmm-query-views")) == ranges(views))
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      machine = next
      let before = try switches(machine)
      try machine.execute("cont")
      while try machine.isRunning && switches(machine) < before + 5 {}
      try machine.execute("stop")
    }
    let other = try Workshop(#", "wx": false"#)
    let uri = "unix:\(shop.folder.path)/other"
    let stranger = try RunningVMM(
      arguments.map { $0 == shop.policy ? other.policy : $0 } + [other.audit, "--incoming", uri])
    try machine.execute("migrate", ["uri": uri])
    #expect(stranger.waitUntilExit() == 74)
    #expect(stranger.text.contains("the machine has --harden of policy"), "\(stranger.text)")
    let file = shop.folder.path + "/saved"
    try machine.execute("x-swiftvmm-save", ["file": file, "stop": true])
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    #expect(!machine.text.contains("cycles: "), "it ended before it was saved: \(machine.text)")
    let restored = try RunningVMM(arguments + [audit(4), "--restore", file])
    try restored.execute("cont")
    #expect(restored.waitUntilExit() == 0, "\(restored.text)")
    #expect(restored.text.contains("cycles: \(count)"), "\(restored.text)")
    #expect(restored.text.contains("loader: all passed"), "\(restored.text)")
    let lines = try (0...4).flatMap { try String(contentsOfFile: audit($0), encoding: .utf8).split(separator: "\n") }
    // Each load and each unload is a visit, after three of both before.
    #expect(lines.filter { $0.contains("\"enter\"") }.count == 2 * count + 6)
    #expect(!lines.contains { $0.contains("\"denied\"") })
  }

  /// The views' names, rights and ranges.
  private func ranges(_ views: Any?) throws -> String {
    let object = try #require(views as? [String: Any])
    let list = (object["views"] as? [[String: Any]] ?? []).map { $0.filter { $0.key != "number" } }
    #expect(list.count == 2)
    return String(decoding: try JSONSerialization.data(withJSONObject: list, options: .sortedKeys), as: UTF8.self)
  }

  /// How often its vCPUs have changed views.
  private func switches(_ machine: RunningVMM) throws -> Int {
    let object = try #require(try machine.execute("x-swiftvmm-query-views") as? [String: Any])
    return try #require(object["vcpus"] as? [[String: Any]]).reduce(0) { $0 + ($1["switches"] as? Int ?? 0) }
  }

  @Test func toolsSayWhatIsWrong() throws {
    let shop = try Workshop()
    let check = try VMM.run("harden", "check", shop.policy)
    #expect(check.status == 0)
    #expect(check.output.contains("signed with one of 1 key"))
    // The policy that leaves everything out has a name.
    let empty = try shop.folder.file("empty.json", Array(#"{"version": 1}"#.utf8))
    #expect(try VMM.run("harden", "check", "default").output == VMM.run("harden", "check", empty).output)
    let run = try VMM.run("run", "loader", "--engine", "soft", "--harden", "default", "--append", "attack=text")
    #expect(run.output.contains("attack text: blocked"), "\(run.output) \(run.errors)")
    let bad = try shop.folder.file("bad.json", Array(#"{"version": 1, "reaction": 3}"#.utf8))
    let refused = try VMM.run("harden", "check", bad)
    #expect(refused.status == 66)
    #expect(refused.errors.contains("reaction"))
    let again = try VMM.run("harden", "keygen", shop.folder.path + "/key")
    #expect(again.status == 74)
    let page = shop.folder.path + "/page.html"
    _ = try shop.run("soft", cpus: 2, hardened: true, modules: [], "attack=middle")
    let drawn = try VMM.run("harden", "timeline", shop.audit, page)
    #expect(drawn.status == 0, "\(drawn.errors)")
    let html = try String(contentsOfFile: page, encoding: .utf8)
    #expect(html.contains("<svg") && html.contains("entry into the loader elsewhere"))
    #expect(!html.contains("http://") || html.components(separatedBy: "http://").count == 2)
  }
}
