import Foundation
import Glibc
import Testing

@testable import BlockLayer

/// Host files whose requests are done and completed in an order that a seed gives.
private final class ShuffledQueue: IOQueue {
  var notifier: Int32 { -1 }
  var generator: SeededGenerator
  private var requests: [(request: BlockRequest, file: Int32)] = []
  private var works: [() -> Void] = []
  /// Requests to the file whose name ends so fail.
  var failingPath: String?
  var failure: Int32 = ENOSPC
  /// Folders are flushed only later, and these are who waits for it.
  var keepsFolders = false
  private(set) var kept: [BlockRequest] = []

  init(seed: UInt64) { generator = SeededGenerator(seed) }

  func start(_ request: BlockRequest, descriptor: Int32, path: String) {
    if let failingPath, path.hasSuffix(failingPath), request.operation != .flush {
      return works.append { [self] in request.completion(.io(call: "reach", path: path, errno: failure)) }
    }
    if keepsFolders, request.syncsAll { return kept.append(request) }
    requests.append((request, descriptor))
  }

  func flushFolders() {
    keepsFolders = false
    for request in kept { requests.append((request, -1)) }
    kept = []
  }

  func poll() { while wait() {} }

  /// Does one thing; false where there is nothing to do.
  func wait() -> Bool {
    if !works.isEmpty, requests.isEmpty || Bool.random(using: &generator) {
      works.removeFirst()()
      return true
    }
    guard !requests.isEmpty else { return false }
    let (request, file) = requests.remove(at: Int.random(in: 0..<requests.count, using: &generator))
    var offset = off_t(request.offset)
    request.memory.forEachPiece { start, count in
      switch request.operation {
      case .read:
        let got = max(0, pread(file, start, count, offset))
        memset(start + got, 0, count - got)
      case .write: _ = pwrite(file, start, count, offset)
      default: break
      }
      offset += off_t(count)
    }
    request.completion(nil)
    return true
  }

  func run(until isDone: () -> Bool) { while !isDone(), wait() {} }
}

/// A guest that writes, reads and checks, over a graph whose layers change meanwhile.
private final class Scene {
  static let size: UInt64 = 4 << 20
  static let sector = 4096

  let scratch = Scratch()
  let thread: ShuffledQueue
  let graph: BlockGraph
  let disk: LiveDisk
  /// A byte a sector.
  var model = [UInt8](repeating: 0, count: Int(size) / sector)
  private var busy: Set<Int> = []
  private(set) var underWay = 0
  private(set) var errors: [BlockError] = []
  private(set) var mismatches = 0
  private(set) var checked = 0
  private var nextFile = 0
  private(set) var removed: [String] = []
  var ended: [(job: LiveJob, status: [String])] = []
  private var states: [String: [String]] = [:]

  init(seed: UInt64) throws {
    thread = ShuffledQueue(seed: seed)
    graph = BlockGraph(queue: thread)
    try HostFile.create(scratch("base"))
    let made = try HostFile(path: scratch("base"), access: FileAccess(writable: true), queue: thread)
    try Qcow2Image.create(Qcow2CreateOptions(size: Self.size), in: made)
    made.close()
    var options = BlockGraph.Options(path: scratch("base"), access: FileAccess(writable: true))
    options.isImplicit = true
    disk = try graph.addDisk("disk0", on: try graph.open(options))
    graph.onJob = { [unowned self] job, event in
      switch event {
      case .status(let status): states[job.id, default: []].append(status.rawValue)
      case .ready: states[job.id, default: []].append("READY")
      case .cancelled:
        states[job.id, default: []].append("CANCELLED")
        ended.append((job, states[job.id] ?? []))
      case .completed:
        states[job.id, default: []].append("COMPLETED")
        ended.append((job, states[job.id] ?? []))
      }
    }
  }

  func random(_ range: Range<Int>) -> Int { Int.random(in: range, using: &thread.generator) }

  func states(of id: String) -> [String] { states[id] ?? [] }

  /// One request of the guest: nobody else has one on its sectors.
  func guestStep() {
    let count = random(1..<24)
    let first = random(0..<(model.count - count))
    guard underWay < 12, !(first..<(first + count)).contains(where: busy.contains) else { return }
    let length = count * Self.sector
    let buffer = DiskBuffer(count: length)
    let kind = random(0..<10)
    let value = UInt8(random(1..<256))
    let operation: BlockRequest.Operation = kind < 6 ? .write : kind == 6 ? .writeZeroes : kind == 7 ? .flush : .read
    underWay += 1
    for sector in first..<(first + count) { busy.insert(sector) }
    let request = BlockRequest(
      operation, offset: UInt64(operation == .flush ? 0 : first * Self.sector),
      length: UInt64(operation == .flush ? 0 : length)
    ) { [self] error in
      underWay -= 1
      for sector in first..<(first + count) { busy.remove(sector) }
      if let error { return errors.append(error) }
      for sector in first..<(first + count) {
        switch operation {
        case .write: model[sector] = value
        case .writeZeroes: model[sector] = 0
        case .read:
          checked += 1
          let at = (sector - first) * Self.sector
          if buffer.bytes[at] != model[sector] || buffer.bytes[at + Self.sector - 1] != model[sector] {
            mismatches += 1
          }
        default: break
        }
      }
    }
    if operation == .write || operation == .read {
      memset(buffer.start, Int32(value), length)
      request.memory.append(buffer.start, length)
    }
    disk.submit(request)
  }

  func settle() { thread.run { underWay == 0 } }

  /// Runs the guest beside what the graph does until `isDone`.
  func run(until isDone: () -> Bool) {
    for _ in 0..<200_000 {
      if isDone() { return }
      guestStep()
      for _ in 0..<random(1..<6) { _ = thread.wait() }
    }
    Issue.record("nothing ends: \(graph.jobs.values.map { "\($0.kind) \($0.status) \($0.offset)/\($0.length)" })")
  }

  func newName() -> String {
    nextFile += 1
    return "n\(nextFile)"
  }

  func addImage(_ name: String) throws -> LiveNode {
    try HostFile.create(scratch(name))
    let made = try HostFile(path: scratch(name), access: FileAccess(writable: true), queue: thread)
    try Qcow2Image.create(Qcow2CreateOptions(size: Self.size), in: made)
    made.close()
    var options = BlockGraph.Options(path: scratch(name), format: .qcow2, access: FileAccess(writable: true))
    options.name = name
    return try graph.open(options)
  }

  func snapshot() throws -> BlockError? {
    var outcome: BlockError??
    let path = scratch(newName())
    let header = try graph.overlayHeader(of: disk)
    try BlockGraph.makeOverlayFile(path, header, queue: thread)
    graph.snapshot([try graph.openOverlay(of: disk, path: path, name: nil, madeFrom: header)]) { outcome = .some($0) }
    run { outcome != nil }
    return outcome ?? nil
  }

  /// Every second time a commit removes the file of the layer that it merges.
  func result(removing layer: LiveNode) -> CommitResult {
    var result = CommitResult()
    result.removesTop = random(0..<2) == 0
    if result.removesTop { removed.append(layer.path) }
    return result
  }

  /// Changes something while no request is under way; returns what the disk holds at that instant.
  func atRest(_ body: @escaping () throws -> Void) throws -> [UInt8] {
    var outcome: Result<[UInt8], any Error>?
    disk.hold { [self] in
      let model = model
      outcome = Result {
        try body()
        return model
      }
      disk.release()
    }
    run { outcome != nil }
    return try outcome?.get() ?? []
  }

  func expect(_ node: any BlockNode, holds model: [UInt8]) throws {
    let bytes = try node.contents(at: 0, Int(Self.size), on: thread)
    for sector in model.indices {
      let at = sector * Self.sector
      guard bytes[at] == model[sector], bytes[at + Self.sector - 1] == model[sector] else {
        Issue.record("sector \(sector): \(bytes[at]), expected \(model[sector])")
        return
      }
    }
  }

  /// Everything is closed: what files hold is what the guest wrote, and QEMU finds nothing wrong.
  func finish() throws {
    settle()
    #expect(errors.isEmpty)
    #expect(mismatches == 0)
    #expect(checked > 0)
    try expect(disk, holds: model)
    let path = disk.top.path
    let paths = disk.top.chain.map(\.path)
    try graph.closeAll()
    let chain = try BlockChain(path: path, queue: thread)
    try expect(chain.top, holds: model)
    try chain.close()
    guard hasQemuImg else { return print("skipped: no qemu-img to check the images") }
    for path in paths {
      let check = try host("qemu-img", "check", path)
      #expect(check.status == 0, "\(check.output)")
    }
  }
}

@Suite struct LiveGraphTests {
  private static let seeds: [UInt64] = {
    let first = ProcessInfo.processInfo.environment["SWIFTVMM_LIVE_SEED"].flatMap(UInt64.init) ?? 1
    let count = ProcessInfo.processInfo.environment["SWIFTVMM_LIVE_RUNS"].flatMap(UInt64.init) ?? 6
    return Array(first..<(first + count))
  }()

  @Test(arguments: seeds) func guestWritesWhileLayersChange(seed: UInt64) throws {
    let scene = try Scene(seed: seed)
    var backups: [(node: LiveNode, model: [UInt8])] = []
    for round in 0..<24 {
      for _ in 0..<20 { scene.guestStep() }
      let chain = scene.disk.top.chain
      let id = "job\(round)"
      switch scene.random(0..<8) {
      case 0, 1:
        #expect(try scene.snapshot() == nil)
      case 2 where chain.count > 1:
        let base = scene.random(1..<(chain.count + 1))
        try scene.graph.stream(id, scene.disk, base: base < chain.count ? chain[base] : nil)
        scene.run { scene.graph.jobs.isEmpty }
        #expect(scene.disk.top.chain.count == chain.count - base + 1)
      case 3 where chain.count > 2:
        let top = scene.random(1..<(chain.count - 1))
        let base = scene.random((top + 1)..<chain.count)
        let result = scene.result(removing: chain[top])
        try scene.graph.commit(id, scene.disk, top: chain[top], base: chain[base], result: result)
        scene.run { scene.graph.jobs.isEmpty }
        #expect(scene.disk.top.chain.count == chain.count - (base - top))
      case 4 where chain.count > 1:
        let base = scene.random(1..<chain.count)
        let result = scene.result(removing: chain[0])
        try scene.graph.commit(id, scene.disk, top: chain[0], base: chain[base], result: result)
        scene.run { scene.graph.jobs.isEmpty || scene.graph.jobs.values.first?.status == .ready }
        try scene.graph.jobs.values.first?.complete()
        scene.run { scene.graph.jobs.isEmpty }
        #expect(scene.disk.top === chain[base])
      case 5:
        let target = try scene.addImage(scene.newName())
        let model = try scene.atRest {
          try scene.graph.backup(id, scene.disk, to: target, mode: "full", bitmap: nil)
        }
        scene.run { scene.graph.jobs.isEmpty }
        backups.append((target, model))
      case 6:
        let target = try scene.addImage(scene.newName())
        try scene.graph.mirror(id, scene.disk, to: target, mode: "full")
        scene.run { scene.graph.jobs[id]?.status == .ready }
        try scene.graph.jobs[id]?.complete()
        scene.run { scene.graph.jobs.isEmpty }
        #expect(scene.disk.top === target)
        #expect(target.chain.count == 1)
      case 7:
        let target = try scene.addImage(scene.newName())
        try scene.graph.mirror(id, scene.disk, to: target, mode: "full")
        scene.run { scene.graph.jobs[id]?.status == .ready }
        // The guest rests from here on; what it has written last is in the copy.
        for _ in 0..<20 { scene.guestStep() }
        scene.settle()
        let model = scene.model
        scene.graph.jobs[id]?.cancel(isForced: false)
        scene.thread.run { scene.graph.jobs.isEmpty }
        #expect(scene.disk.top === chain[0])
        backups.append((target, model))
      default: continue
      }
      #expect(scene.removed.allSatisfy { access($0, F_OK) != 0 })
      #expect(scene.ended.allSatisfy { $0.job.error == nil })
    }
    #expect(!scene.ended.isEmpty)
    for backup in backups {
      try scene.expect(backup.node.node, holds: backup.model)
    }
    try scene.finish()
  }

  /// The states are those that QEMU 7.2 goes through.
  @Test func statesAreQEMUs() throws {
    let scene = try Scene(seed: 3)
    scene.run { scene.model.filter { $0 != 0 }.count > 500 }
    #expect(try scene.snapshot() == nil)
    try scene.graph.stream("st", scene.disk, base: nil)
    scene.run { scene.graph.jobs.isEmpty }
    #expect(
      scene.states(of: "st") == ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"])
    #expect(try scene.snapshot() == nil)
    try scene.graph.commit("cm", scene.disk, top: scene.disk.top, base: scene.disk.top.chain.last!)
    scene.run { scene.graph.jobs.isEmpty || scene.graph.jobs.values.first?.status == .ready }
    try scene.graph.jobs.values.first?.complete()
    scene.run { scene.graph.jobs.isEmpty }
    #expect(
      scene.states(of: "cm")
        == ["created", "running", "ready", "READY", "waiting", "pending", "COMPLETED", "concluded", "null"])
    let target = try scene.addImage("target")
    let other = try scene.addImage("other")
    try scene.graph.mirror("mi", scene.disk, to: other, mode: "full")
    scene.run { scene.graph.jobs.values.first?.status == .ready }
    scene.graph.jobs.values.first?.cancel(isForced: false)
    scene.run { scene.graph.jobs.isEmpty }
    #expect(
      scene.states(of: "mi")
        == ["created", "running", "ready", "READY", "waiting", "pending", "COMPLETED", "concluded", "null"])
    try scene.graph.mirror("mf", scene.disk, to: other, mode: "full")
    scene.run { scene.graph.jobs.values.first?.status == .ready }
    scene.graph.jobs.values.first?.cancel(isForced: true)
    scene.run { scene.graph.jobs.isEmpty }
    #expect(
      scene.states(of: "mf") == ["created", "running", "ready", "READY", "aborting", "CANCELLED", "concluded", "null"])
    try scene.graph.backup("slow", scene.disk, to: target, mode: "full", bitmap: nil) { $0.speed = 1 }
    scene.graph.jobs["slow"]?.cancel()
    scene.run { scene.graph.jobs.isEmpty }
    #expect(scene.states(of: "slow") == ["created", "running", "aborting", "CANCELLED", "concluded", "null"])
    try scene.finish()
  }

  /// A host that fails one file's requests ends the job with that error; the guest's disk is as it was.
  @Test(arguments: ["stream", "commit", "commit-active", "backup", "mirror"]) func failingFileEndsTheJob(kind: String)
    throws
  {
    let scene = try Scene(seed: 11)
    scene.run { scene.model.filter { $0 != 0 }.count > 300 }
    #expect(try scene.snapshot() == nil)
    scene.run { scene.model.filter { $0 != 0 }.count > 600 }
    if kind == "commit" {
      #expect(try scene.snapshot() == nil)
    }
    let target = try scene.addImage("target")
    let chain = scene.disk.top.chain
    // A guest's own I/O must not meet the failure: it rests, but for what the job does.
    scene.settle()
    scene.thread.failingPath = ["backup", "mirror"].contains(kind) ? "target" : "base"
    let (graph, disk) = (scene.graph, scene.disk)
    switch kind {
    case "stream": try graph.stream("j", disk, base: nil)
    case "commit": try graph.commit("j", disk, top: chain[1], base: chain[2])
    case "commit-active": try graph.commit("j", disk, top: chain[0], base: chain[1])
    case "mirror": try graph.mirror("j", disk, to: target, mode: "full")
    default: try graph.backup("j", disk, to: target, mode: "full", bitmap: nil)
    }
    scene.thread.run { graph.jobs.isEmpty }
    #expect(scene.ended.count == 1)
    #expect(scene.ended.first?.job.error?.isNoSpace == true)
    // A mirror may call itself ready while its last stretches are under way.
    let states = scene.states(of: "j").filter { kind != "mirror" || $0.lowercased() != "ready" }
    #expect(states == ["created", "running", "aborting", "COMPLETED", "concluded", "null"])
    #expect(scene.disk.top === chain[0])
    #expect(scene.disk.top.chain.count == chain.count)
    scene.thread.failingPath = nil
    scene.run { scene.checked > 200 }
    try scene.finish()
  }

  /// The guest goes on while the name of a merged layer's file goes, but no flush ends before it is gone for good.
  @Test func aFlushWaitsForTheRemovalOfAMergedLayer() throws {
    let scene = try Scene(seed: 31)
    scene.run { scene.model.filter { $0 != 0 }.count > 300 }
    #expect(try scene.snapshot() == nil)
    scene.run { scene.model.filter { $0 != 0 }.count > 600 }
    let (graph, disk) = (scene.graph, scene.disk)
    let (top, base) = (disk.top, try #require(disk.top.backing))
    var result = CommitResult()
    result.removesTop = true
    try graph.commit("j", disk, top: top, base: base, result: result)
    scene.run { graph.jobs["j"]?.status == .ready }
    scene.settle()
    scene.thread.keepsFolders = true
    try graph.jobs["j"]?.complete()
    scene.thread.run { disk.top === base }
    #expect(access(top.path, F_OK) != 0 && scene.thread.kept.count == 1)
    var isFlushed = false
    disk.submit(BlockRequest(.flush) { isFlushed = $0 == nil })
    try disk.fill(9, at: 0, Scene.sector, on: scene.thread)
    #expect(try disk.contents(at: 0, Scene.sector, on: scene.thread).allSatisfy { $0 == 9 })
    scene.model[0] = 9
    scene.thread.poll()
    #expect(!isFlushed && graph.jobs["j"]?.status == .pending)
    graph.jobs["j"]?.cancel()
    #expect(throws: BlockError.self) { try graph.jobs["j"]?.finalize() }
    scene.thread.flushFolders()
    scene.thread.poll()
    #expect(isFlushed && graph.jobs.isEmpty && scene.ended.count == 1 && scene.ended[0].job.error == nil)
    scene.run { scene.checked > 500 }
    try scene.finish()
  }

  /// Another thread closes a file that has no name any more, which takes long.
  @Test func aFileWithoutANameIsClosed() throws {
    let scratch = Scratch()
    try HostFile.create(scratch("gone"), length: 4096)
    // As /proc calls it.
    let path = try #require(realpath(scratch("gone"), nil).map { String(cString: $0) })
    func isOpen() throws -> Bool {
      try FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").contains { descriptor in
        let link = "/proc/self/fd/" + descriptor
        return (try? FileManager.default.destinationOfSymbolicLink(atPath: link)) == path + " (deleted)"
      }
    }
    var file: HostFile? = try HostFile(
      path: path, access: FileAccess(writable: true), queue: ShuffledQueue(seed: 1))
    unlink(path)
    #expect(try file != nil && isOpen())
    file = nil
    var waits = 0
    while try isOpen(), waits < 5000 {
      waits += 1
      usleep(1000)
    }
    #expect(waits < 5000)
  }

  /// A mirror that is ended for another process is the disk as it was, and closed; without one there is nothing to hand over.
  @Test func aMirrorIsHandedOver() throws {
    let scene = try Scene(seed: 21)
    scene.run { scene.model.filter { $0 != 0 }.count > 300 }
    let target = try scene.addImage("target")
    let small = try scene.addImage("small")
    try small.node.resize(to: Scene.size / 2, on: scene.thread)
    #expect(throws: BlockError.self) { try scene.graph.mirror("s", scene.disk, to: small, mode: "full") }
    #expect(throws: BlockError.self) { try scene.graph.mirror("s", scene.disk, to: target, mode: "incremental") }
    #expect(throws: BlockError.self) { try scene.graph.mirror("s", scene.disk, to: scene.disk.top, mode: "full") }
    try scene.graph.mirror("m", scene.disk, to: target, mode: "full") {
      ($0.staysConcluded, $0.staysPending) = (true, true)
    }
    var early: BlockError??
    scene.graph.finishMirror(of: scene.disk) { early = .some($0) }
    #expect(early == .some(.jobState("m", "running")))
    scene.run { scene.graph.jobs["m"]?.status == .ready }
    #expect(throws: BlockError.self) { try scene.graph.requireNoMirror(of: scene.disk) }
    for _ in 0..<40 { scene.guestStep() }
    scene.settle()
    var outcome: BlockError??
    scene.graph.finishMirror(of: scene.disk) { outcome = .some($0) }
    scene.thread.run { outcome != nil }
    #expect(outcome == .some(nil))
    #expect(scene.graph.jobs.isEmpty)
    #expect(throws: BlockError.self) { try scene.graph.node("target") }
    let copy = try BlockChain(path: scene.scratch("target"), queue: scene.thread)
    try scene.expect(copy.top, holds: scene.model)
    try copy.close()
    var second: BlockError??
    scene.graph.finishMirror(of: scene.disk) { second = .some($0) }
    #expect(second == .some(.noMirror("disk0")))
    try scene.finish()
  }

  /// A bitmap names exactly what was written since it was cleared, and an incremental backup brings its target up to date.
  @Test(arguments: [false, true]) func incrementalBackupFollowsTheBitmap(isPersistent: Bool) throws {
    let scene = try Scene(seed: 8)
    let target = try scene.addImage("target")
    var model = try scene.atRest {
      try scene.disk.top.addBitmap("b", granularity: 65536, isPersistent: isPersistent)
      try scene.graph.backup("full", scene.disk, to: target, mode: "full", bitmap: nil)
    }
    scene.run { scene.graph.jobs.isEmpty }
    for round in 0..<5 {
      scene.run { scene.random(0..<40) == 0 }
      model = try scene.atRest {
        try scene.graph.backup("inc\(round)", scene.disk, to: target, mode: "incremental", bitmap: "b")
      }
      scene.run { scene.graph.jobs.isEmpty }
      try scene.expect(target.node, holds: model)
    }
    try scene.finish()
  }
}
