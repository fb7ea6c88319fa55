import Foundation
import Host
import TestRelay
import Testing

/// Two processes whose links are cut, by bytes that have passed and not by time: there is always one machine. `SWIFTVMM_CUTS` sets how often.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct LinkCutTests {
  private static let cuts = ProcessInfo.processInfo.environment["SWIFTVMM_CUTS"].flatMap { Int($0) } ?? 7

  /// Bytes of the greeting that each link begins with.
  private static let greetingSize = 40

  /// What is lost. Answers have 8 bytes each: that the machine is accepted, that it is ready there, that it is taken.
  private enum Loss: CaseIterable {
    case greeting, pages, answer, go, taken, laterPages, laterAnswer

    var isPostCopy: Bool { self == .laterPages || self == .laterAnswer }

    /// How the machine ends; nil where that depends on the place of the cut.
    var end: End? {
      switch self {
      case .greeting, .answer, .go: .kept
      case .taken: .moved
      case .pages, .laterPages, .laterAnswer: nil
      }
    }

    func cut(of length: Int, _ answered: Int) -> Relay.Cut {
      switch self {
      case .greeting: Relay.Cut(.forth, after: Int.random(in: 0..<greetingSize))
      case .pages, .laterPages: Relay.Cut(.forth, after: Int.random(in: 2 * greetingSize..<length))
      case .answer: Relay.Cut(.back, after: Int.random(in: 0..<16))
      case .go: Relay.Cut(.forth, after: Int.random(in: 0..<8), since: 16)
      case .taken: Relay.Cut(.back, after: Int.random(in: 16..<24))
      case .laterAnswer: Relay.Cut(.back, after: Int.random(in: 0..<answered))
      }
    }
  }

  private enum End: String { case kept, moved }

  /// The machine goes on where it is as if nothing had been asked, or there with all of its pages; from cut to cut, with its disk.
  @Test func aCutLinkLeavesOneMachine() throws {
    let folder = try TemporaryFolder()
    // By TCP a destination that was ready may be asked for half a minute what has become of the machine.
    let waiting = try MigrateTests.engines.flatMap { try cut($0, folder.path + "/\($0).qcow2") }
    for next in waiting {
      #expect(next.waitUntilExit() == 74, "\(next.text)")
      #expect(!next.text.contains("flushed"), "\(next.text)")
    }
  }

  /// Returns the destinations to which the machine has not come.
  private func cut(_ engine: String, _ disk: String) throws -> [RunningVMM] {
    try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "32M").status == 0)
    let arguments = [
      "disk", "--engine", engine, "--memory", "64M", "--time-limit", "3600", "--disk", disk, "--append",
      "mode=rewrite passes=1000000 \(BackupTests.options)",
    ]
    var machine = try RunningVMM(arguments)
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let losses = Loss.allCases.filter { PostCopyHost.hasFaults || !$0.isPostCopy }
    // The first of each kind is not cut: what passes then says where the others may be.
    var sizes: [Bool: (length: Int, answered: Int)] = [:]
    var ends: [String: Int] = [:]
    var waiting: [RunningVMM] = []
    for index in -2..<Self.cuts {
      let loss = index < 0 ? (index == -2 ? .pages : losses[losses.count - 1]) : losses[index % losses.count]
      let cut = index < 0 ? nil : sizes[loss.isPostCopy].map { loss.cut(of: $0.length, $0.answered) }
      let place = StreamEndpoint.tcp(host: "127.0.0.1", port: try freePort())
      let next = try RunningVMM(arguments + ["--incoming", "\(place)"])
      let relay = try Relay(at: .tcp(host: "127.0.0.1", port: 0), to: place, cut: cut)
      defer { relay.stop() }
      // Of two links the second may come once the first one has been cut.
      try machine.execute("migrate-set-parameters", ["multifd-channels": loss == .greeting ? 1 : 2])
      var end = try move(machine, to: relay.endpoint, isPostCopy: loss.isPostCopy)
      let story = "\(engine) \(index): \(loss), \(cut.map { "\($0)" } ?? "not cut"), \(end)"
      if index < 0 { sizes[loss.isPostCopy] = (relay.passed, relay.answered) }
      if let expected = index < 0 ? .moved : loss.end { try #require(end == expected, "\(story)") }
      if relay.isCut { ends["\(loss) \(end)", default: 0] += 1 }
      if end == .kept {
        try goesOn(machine, story)
        #expect(try status(machine) == "running", "\(story)")
        if loss == .greeting {
          // Where no source has come, another one may.
          #expect(try status(next) == "inmigrate", "\(story)")
          end = try move(machine, to: place, isPostCopy: false)
          try #require(end == .moved, "\(story): \(next.text)")
        } else {
          waiting.append(next)
        }
      }
      guard end == .moved else { continue }
      try goesOn(next, story)
      let text = machine.text
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0 && machine.text == text, "\(story): it has run on")
      machine = next
    }
    print("\(engine): \(ends.sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }.joined(separator: ", "))")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(500))")
    try BackupTests.verify([disk], flushed: machine.text)
    return waiting
  }

  private func goesOn(_ machine: RunningVMM, _ story: String) throws {
    let count = machine.text.components(separatedBy: "flushed").count
    try #require(machine.waitFor("flushed", count: count + 5), "\(story): \(machine.text.suffix(500))")
    #expect(!machine.text.contains("FAIL"), "\(story): \(machine.text.suffix(500))")
  }

  private func move(_ machine: RunningVMM, to place: StreamEndpoint, isPostCopy: Bool) throws -> End {
    try machine.execute(
      "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": isPostCopy]]])
    try machine.execute("migrate", ["uri": "\(place)"])
    if isPostCopy { try machine.execute("migrate-start-postcopy") }
    while true {
      switch try (machine.execute("query-migrate") as? [String: Any])?["status"] as? String {
      case "completed": return .moved
      case "failed": return .kept
      default: usleep(2000)
      }
    }
  }

  private func status(_ machine: RunningVMM) throws -> String? {
    (try machine.execute("query-status") as? [String: Any])?["status"] as? String
  }
}
