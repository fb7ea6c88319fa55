import Testing

@testable import BlockLayer

/// Layers and jobs below a writer that never rests, against what it has written.
@Suite struct LiveTests {
  /// What a job does in a round.
  enum Work: String, CaseIterable {
    case stream, commitMiddle, commitActive, backup, snapshot
  }

  /// Requests of one sector size on a small disk, several at a time; each sector's last completed stamp is known, and reads
  /// are checked against what they may find.
  private final class Writer {
    static let sectors = 2048
    let disk: LiveDisk
    var generator: SeededGenerator
    /// By sector: the stamp that was written last.
    var model = [UInt64](repeating: 0, count: Writer.sectors)
    var busy: Set<Int> = []
    var next: UInt64 = 1
    var failures = 0
    var wrong = 0

    init(_ disk: LiveDisk, seed: UInt64) {
      self.disk = disk
      generator = SeededGenerator(seed)
    }

    /// Begins a request on sectors that no other one is on.
    func step() {
      let start = Int.random(in: 0..<Self.sectors, using: &generator)
      let range = start..<min(Self.sectors, start + Int.random(in: 1...40, using: &generator))
      guard !range.contains(where: busy.contains) else { return }
      busy.formUnion(range)
      switch Int.random(in: 0..<10, using: &generator) {
      case 0: zero(range)
      case 1...3: read(range)
      default: write(range)
      }
    }

    private func submit(
      _ operation: BlockRequest.Operation, _ range: Range<Int>, _ buffer: DiskBuffer?, then: @escaping () -> Void
    ) {
      var request: BlockRequest?
      request = BlockRequest(operation, offset: UInt64(range.lowerBound) * 512, length: UInt64(range.count) * 512) {
        [self, buffer] error in
        if error != nil { failures += 1 }
        withExtendedLifetime(buffer) { then() }
        busy.subtract(range)
        request = nil
      }
      if let buffer { request?.memory.append(buffer.start, range.count * 512) }
      if let request { disk.submit(request) }
    }

    private func write(_ range: Range<Int>) {
      let stamp = next
      next += 1
      let buffer = DiskBuffer(count: range.count * 512)
      for word in 0..<(range.count * 64) { buffer.start.storeBytes(of: stamp, toByteOffset: word * 8, as: UInt64.self) }
      for sector in range { model[sector] = stamp }
      submit(.write, range, buffer) {}
    }

    private func zero(_ range: Range<Int>) {
      for sector in range { model[sector] = 0 }
      submit(.writeZeroes, range, nil) {}
    }

    private func read(_ range: Range<Int>) {
      let buffer = DiskBuffer(count: range.count * 512, zeroed: true)
      submit(.read, range, buffer) { [self] in wrong += differences(range, buffer, model) }
    }

    private func differences(_ range: Range<Int>, _ buffer: DiskBuffer, _ model: [UInt64]) -> Int {
      (0..<(range.count * 64)).count { word in
        buffer.start.load(fromByteOffset: word * 8, as: UInt64.self) != model[range.lowerBound + word / 64]
      }
    }

    /// Words of a whole disk that are not as a model has them.
    func differences(_ node: any BlockNode, _ model: [UInt64], _ queue: any IOQueue) throws -> Int {
      let buffer = DiskBuffer(count: Self.sectors * 512, zeroed: true)
      try node.perform(.read, memory: buffer.bytes, on: queue)
      return differences(0..<Self.sectors, buffer, model)
    }
  }

  private func image(_ path: String, clusterSize: UInt64 = 4096, backing: String? = nil, _ queue: any IOQueue) throws {
    var options = Qcow2CreateOptions(size: UInt64(Writer.sectors) * 512)
    options.clusterSize = clusterSize
    options.backingName = backing
    options.backingFormat = backing == nil ? nil : "qcow2"
    try HostFile.create(path)
    let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
    defer { file.close() }
    try Qcow2Image.create(options, in: file)
  }

  @Test(arguments: Work.allCases, [1, 2] as [UInt64])
  func nothingIsLostOrTorn(_ work: Work, seed: UInt64) throws {
    let folder = Scratch()
    let queue = try makeIOQueue()
    try image(folder("base"), queue)
    let graph = BlockGraph(queue: queue)
    let disk = try graph.addDisk(
      "d", on: graph.open(.init(path: folder("base"), access: FileAccess(writable: true))))
    let writer = Writer(disk, seed: seed)
    var ended: [BlockError?] = []
    var ready: [LiveJob] = []
    graph.onJob = { job, event in
      switch event {
      case .completed(let error): ended.append(error)
      case .ready: ready.append(job)
      default: break
      }
    }
    func run(_ steps: Int) {
      for _ in 0..<steps {
        writer.step()
        if writer.busy.count > 200 { _ = queue.wait() }
      }
    }
    func runUntilEnd() {
      var steps = 0
      while ended.isEmpty, steps < 200_000 {
        writer.step()
        _ = queue.wait()
        if let job = ready.popLast() { try? job.complete() }
        steps += 1
      }
      #expect(ended == [nil])
      ended = []
    }
    var number = 0
    func snapshot() throws {
      number += 1
      let overlay = try graph.makeOverlay(of: disk, path: folder("s\(number)"), name: "s\(number)")
      var outcome: BlockError??
      graph.snapshot([overlay]) { outcome = .some($0) }
      while outcome == nil { _ = queue.wait() }
      #expect(outcome == .some(nil))
    }
    for round in 0..<3 {
      run(150)
      try snapshot()
      run(150)
      try snapshot()
      run(60)
      let chain = disk.top.chain
      switch work {
      case .snapshot: break
      case .stream: try graph.stream("j", disk, base: round == 0 ? nil : chain[chain.count - 1])
      case .commitMiddle: try graph.commit("j", disk, top: chain[1], base: chain[chain.count - 1])
      case .commitActive: try graph.commit("j", disk, top: chain[0], base: chain[chain.count - 1])
      case .backup:
        try image(folder("b\(round)"), queue)
        let target = try graph.open(.init(path: folder("b\(round)"), access: FileAccess(writable: true)))
        // The instant: the requests under way are part of it, later ones are not.
        var atStart: [UInt64] = []
        disk.hold {
          atStart = writer.model
          try? graph.backup("j", disk, to: target, mode: "full", bitmap: nil)
          disk.release()
        }
        while atStart.isEmpty { _ = queue.wait() }
        runUntilEnd()
        #expect(try writer.differences(target.node, atStart, queue) == 0)
        try graph.close(target)
        continue
      }
      if work != .snapshot { runUntilEnd() }
    }
    while !writer.busy.isEmpty { _ = queue.wait() }
    #expect(writer.wrong == 0)
    #expect(writer.failures == 0)
    #expect(writer.next > 500)
    #expect(try writer.differences(disk, writer.model, queue) == 0)
    let top = disk.top.path
    let depth = disk.top.chain.count
    let expected: [Work: Int] = [.stream: 2, .commitMiddle: 2, .commitActive: 1, .backup: 7, .snapshot: 7]
    #expect(depth == expected[work])
    try graph.closeAll()
    if hasQemuImg {
      let checked = try host("qemu-img", "check", "-q", top)
      #expect(checked.status == 0, "\(checked.output)")
    }
    let chain = try BlockChain(path: top, queue: queue)
    #expect(chain.layers.count == depth)
    #expect(try writer.differences(chain.top, writer.model, queue) == 0)
    try chain.close()
  }
}
