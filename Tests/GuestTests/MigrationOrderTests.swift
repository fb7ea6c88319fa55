import Foundation
import Testing

/// What goes when, by the trace and a reader of its own, where `MigrateTests` do not look: views, and pages that follow.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct MigrationOrderTests {
  private static let engines = MigrateTests.engines

  /// Moves a machine that stands still, and returns what the trace says was sent.
  private func move(_ machine: RunningVMM, to next: RunningVMM, at uri: String, pages: Int, isPostCopy: Bool = false)
    throws -> (trace: MigrationTraceReader, result: [String: Any])
  {
    let path = String(uri.dropFirst("unix:".count)) + ".trace"
    try machine.execute("migrate-set-parameters", ["x-swiftvmm-trace": path])
    try machine.execute(
      "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": isPostCopy]]])
    try machine.execute("migrate", ["uri": uri])
    if isPostCopy { try machine.execute("migrate-start-postcopy") }
    while true {
      let result = try #require(try machine.execute("query-migrate") as? [String: Any])
      let status = result["status"] as? String ?? ""
      if ["setup", "active", "device", "postcopy-active"].contains(status) {
        usleep(2000)
        continue
      }
      try #require(status == "completed", "\(result) \(next.text)")
      return (try MigrationTraceReader(path, pages: pages), result)
    }
  }

  /// The first iteration has what no view of a hardened machine lets be written, which the guest's page tables do not say.
  @Test(arguments: engines)
  func whatViewsKeepFromBeingWrittenComesFirst(engine: String) throws {
    let folder = try TemporaryFolder()
    let policy = try folder.file("policy", Array(#"{"version": 1, "signatures": {"required": false}}"#.utf8))
    let guest = [
      "loader", "--engine", engine, "--memory", "32M", "--time-limit", "300", "--module",
      VMM.checkout + "/build/guests/loader-counter.o", "--append", "cycles=100000000",
    ]
    let pages = 32 << 8
    func trace(_ arguments: [String], _ name: String) throws -> (trace: MigrationTraceReader, protected: Set<Int>) {
      let machine = try RunningVMM(arguments)
      #expect(machine.waitFor("module 0: returned 11"), "\(machine.text)")
      let uri = "unix:\(folder.path)/\(name)"
      let next = try RunningVMM(arguments + ["--incoming", uri])
      try machine.execute("stop")
      let protected =
        arguments.contains("--harden")
        ? try protectedPages(machine.execute("x-swiftvmm-query-views"), of: pages) : []
      let trace = try move(machine, to: next, at: uri, pages: pages).trace
      try next.execute("cont")
      #expect(try (next.execute("query-status") as? [String: Any])?["status"] as? String == "running")
      #expect(trace.firstRoundIsInOrder && !trace.sent.contains(0))
      return (trace, protected)
    }
    let (hardened, protected) = try trace(guest + ["--harden", policy], "hardened")
    // The kernel's text, the loader's code and the module.
    #expect(protected.count > 6, "\(protected)")
    for page in protected { #expect(hardened.classes[page] == "readOnly", "page \(page)") }
    let plain = try trace(guest, "plain").trace
    for page in protected { #expect(plain.classes[page] == "other", "page \(page)") }
  }

  /// Pages that no view lets be written, by what is told of the views.
  private func protectedPages(_ answer: Any, of count: Int) throws -> Set<Int> {
    let views = try #require((answer as? [String: Any])?["views"] as? [[String: Any]])
    #expect(views.count == 2)
    var pages = Set(0..<count)
    for view in views {
      var isWritable = [Bool](repeating: (view["rights"] as? String)?.contains("w") ?? true, count: count)
      for range in try #require(view["ranges"] as? [[String: Any]]) {
        let (start, size) = (range["start"] as? Int ?? 0, range["size"] as? Int ?? 0)
        for page in start >> 12..<(start + size) >> 12 {
          isWritable[page] = (range["rights"] as? String)?.contains("w") ?? true
        }
      }
      pages = pages.filter { !isWritable[$0] }
    }
    return pages
  }

  /// Before the machine is there and after it: what was sent is all that there is, what had not come by then went once more, and memory is
  /// byte for byte what it was.
  @Test(.enabled(if: PostCopyHost.hasFaults, "userfaultfd(2) is not to be had here"), arguments: engines)
  func whatFollowsTheMachineIsAllOfTheRest(engine: String) throws {
    let folder = try TemporaryFolder()
    let arguments = [
      "dirty", "--engine", engine, "--memory", "64M", "--time-limit", "300", "--append",
      "set=8 fill=16 readonly=4 free=4 seconds=0 jump=60000 skew=60000",
    ]
    let machine = try RunningVMM(arguments)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    try machine.execute("stop")
    try machine.execute("x-swiftvmm-save", ["file": folder.path + "/here"])
    let uri = "unix:\(folder.path)/move"
    let next = try RunningVMM(arguments + ["--incoming", uri])
    let (trace, result) = try move(machine, to: next, at: uri, pages: 64 << 8, isPostCopy: true)
    while try (next.execute("query-migrate") as? [String: Any])?["status"] as? String != "completed" { usleep(2000) }
    try next.execute("x-swiftvmm-save", ["file": folder.path + "/there"])
    let here = try savedMemory(folder.path + "/here")
    #expect(try savedMemory(folder.path + "/there") == here)
    let postCopy = try #require((result["x-swiftvmm"] as? [String: Any])?["postcopy"] as? [String: Any])
    let followed = trace.sentAgain.reduce(0, +)
    #expect(followed == postCopy["pages"] as? Int && followed > 1000, "\(postCopy)")
    #expect(trace.sentAgain.allSatisfy { $0 <= 1 })
    #expect(trace.firstRoundIsInOrder)
    // Memory is zeros from its beginning: what is so here need not go.
    for (page, count) in trace.sent.enumerated() where count == 0 {
      let start = here.startIndex + page << 12
      #expect(here[start..<start + 4096].allSatisfy { $0 == 0 }, "page \(page)")
    }
    try next.execute("cont")
    #expect(next.waitFor("dirty: pass", count: 2), "\(next.text)")
    #expect(!next.text.contains("FAIL"), "\(next.text)")
  }
}
