import BlockLayer
import Foundation
import Testing

/// Power is cut at every point of a random workload, with the writes since the last barrier reordered and torn.
/// `SWIFTVMM_CRASH_POINTS=100000` runs more of them, `SWIFTVMM_CRASH_SEED` others.
struct CrashTests {
  struct Shape: CustomTestStringConvertible {
    var name: String
    var clusterSize: UInt64
    var refcountBits: UInt64 = 16
    var lazy = false
    var snapshots = false
    var cacheBytes = 1 << 20
    var backing = false
    var extended = false
    var testDescription: String { name }
  }

  static let shapes = [
    Shape(name: "512-byte clusters", clusterSize: 512),
    Shape(name: "4 KiB clusters", clusterSize: 4096),
    Shape(name: "64 KiB clusters", clusterSize: 65536),
    Shape(name: "1-bit refcounts", clusterSize: 512, refcountBits: 1),
    Shape(name: "64-bit refcounts", clusterSize: 512, refcountBits: 64),
    Shape(name: "lazy refcounts", clusterSize: 1024, lazy: true),
    Shape(name: "tiny caches", clusterSize: 512, cacheBytes: 1),
    Shape(name: "backing file", clusterSize: 2048, backing: true),
    Shape(name: "internal snapshots", clusterSize: 1024, snapshots: true),
    Shape(name: "extended L2 entries", clusterSize: 16384, backing: true, extended: true),
    Shape(name: "extended L2 entries and snapshots", clusterSize: 16384, snapshots: true, extended: true),
  ]

  static let environment = ProcessInfo.processInfo.environment
  static let points = environment["SWIFTVMM_CRASH_POINTS"].flatMap { Int($0) } ?? 2200
  static let seed = environment["SWIFTVMM_CRASH_SEED"].flatMap { UInt64($0) } ?? 4

  @Test(arguments: shapes)
  func everyCrashPointLeavesAnImageThatOpens(_ shape: Shape) throws {
    let wanted = Self.points / Self.shapes.count
    var tried = 0
    var round: UInt64 = 0
    while tried < wanted {
      let workload = try Workload(shape, seed: Self.seed &* 1000 &+ round)
      try workload.run(operations: 120)
      #expect(workload.file.changedUnderWay == 0)
      tried += try workload.crash(atMost: wanted - tried)
      round += 1
    }
    #expect(tried >= wanted)
  }
}

/// Random requests on a small disk, several at a time, with what each sector may hold.
private final class Workload {
  static let sectors = 512
  let shape: CrashTests.Shape
  let queue = ManualQueue()
  let file: RecordingFile
  let base: RecordingFile?
  let image: Qcow2Image
  var generator: SeededGenerator
  let initial: [UInt8]
  /// By sector: the stamp that is durable for certain at a mark, and those that were written since.
  struct Certainty {
    var durable: [UInt64]
    var possible: [Set<UInt64>]
  }
  var certainty: Certainty
  var marks: [Certainty] = []
  var nextStamp: UInt64 = 1
  var busy: Set<Int> = []
  /// By sector: the change that has completed last, since none is under way. Its number tells zeros from earlier ones.
  var completed: [Int: (stamp: UInt64, change: Int)] = [:]
  private var changes = 0
  var snapshotNames: [String] = []

  init(_ shape: CrashTests.Shape, seed: UInt64) throws {
    self.shape = shape
    generator = SeededGenerator(seed)
    queue.generator = SeededGenerator(seed ^ 0xabcdef)
    file = RecordingFile(queue: queue)
    var options = Qcow2CreateOptions(size: UInt64(Self.sectors) * 512)
    options.clusterSize = shape.clusterSize
    options.refcountBits = shape.refcountBits
    options.lazyRefcounts = shape.lazy
    options.extendedL2 = shape.extended
    if shape.backing { options.backingName = "base" }
    try Qcow2Image.create(options, in: file)
    initial = file.bytes
    file.isRecording = true
    var opened = Qcow2Image.Options()
    opened.l2CacheBytes = shape.cacheBytes
    opened.refcountCacheBytes = shape.cacheBytes
    image = try Qcow2Image(file, options: opened)
    base = shape.backing ? RecordingFile(Self.stamped(UInt64.max - 1, sectors: Self.sectors), queue: queue) : nil
    image.backing = base.map { RawImage($0) }
    certainty = Certainty(
      durable: [UInt64](repeating: shape.backing ? UInt64.max - 1 : 0, count: Self.sectors),
      possible: [Set<UInt64>](repeating: [], count: Self.sectors))
  }

  static func stamped(_ stamp: UInt64, sectors: Int) -> [UInt8] {
    let stamps = [UInt64](repeating: stamp, count: sectors * 64)
    return stamps.withUnsafeBytes { Array($0) }
  }

  /// A point of the log at which `certainty` holds from then on.
  func mark() {
    file.log.append(.mark(marks.count))
    marks.append(certainty)
  }

  func run(operations: Int) throws {
    mark()
    for index in 0..<operations {
      switch Int.random(in: 0..<100, using: &generator) {
      case 0..<62: write(sectors: Int.random(in: 1...24, using: &generator))
      case 62..<72: zero(.writeZeroes)
      case 72..<80: zero(.discard)
      case 80..<94: flush()
      default: drain()
      }
      while queue.pending.count > 6 { _ = queue.wait() }
      if shape.snapshots, index % 20 == 19 { try snapshot() }
    }
    drain()
    flush()
    drain()
    try image.close()
    mark()
  }

  private func drain() { while queue.wait() {} }

  private func freeRange(_ wanted: Int) -> Range<Int>? {
    let start = Int.random(in: 0..<Self.sectors, using: &generator)
    let range = start..<min(Self.sectors, start + wanted)
    return range.contains(where: busy.contains) ? nil : range
  }

  private func write(sectors: Int) {
    guard let range = freeRange(sectors) else { return }
    let stamp = nextStamp
    nextStamp += 1
    let bytes = Self.stamped(stamp, sectors: range.count)
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 16)
    bytes.withUnsafeBytes { buffer.copyMemory(from: $0) }
    change(range, stamp)
    let request = BlockRequest(.write, offset: UInt64(range.lowerBound) * 512, length: UInt64(bytes.count)) { error in
      buffer.deallocate()
      if error == nil { self.done(range, stamp) }
    }
    request.memory.append(buffer.baseAddress, buffer.count)
    image.submit(request)
  }

  private func zero(_ operation: BlockRequest.Operation) {
    guard let range = freeRange(Int.random(in: 1...60, using: &generator)) else { return }
    // Discarded sectors hold what they held, or zeros, or what lies below: none of it is checked but as possible.
    change(range, 0)
    let request = BlockRequest(operation, offset: UInt64(range.lowerBound) * 512, length: UInt64(range.count) * 512) {
      error in
      guard error == nil else { return }
      if operation == .writeZeroes { self.done(range, 0) } else { self.busy.subtract(range) }
    }
    request.mayUnmap = true
    image.submit(request)
  }

  private func change(_ range: Range<Int>, _ stamp: UInt64) {
    busy.formUnion(range)
    for sector in range {
      certainty.possible[sector].insert(stamp)
      completed[sector] = nil
    }
    mark()
  }

  private func done(_ range: Range<Int>, _ stamp: UInt64) {
    busy.subtract(range)
    changes += 1
    for sector in range { completed[sector] = (stamp, changes) }
  }

  private func flush() {
    let covered = completed
    let request = BlockRequest(.flush) { error in
      guard error == nil else { return }
      for (sector, change) in covered where self.completed[sector]?.change == change.change {
        self.certainty.durable[sector] = change.stamp
        self.certainty.possible[sector] = []
      }
      self.mark()
    }
    image.submit(request)
  }

  private func snapshot() throws {
    drain()
    if snapshotNames.count < 2 {
      let name = "s\(nextStamp)"
      try image.createSnapshot(name, seconds: 1, nanoseconds: 0)
      snapshotNames.append(name)
    } else {
      try image.deleteSnapshot(snapshotNames.removeFirst())
    }
  }

  /// Cuts at points of the log, and looks at what is left. How many were tried.
  func crash(atMost limit: Int) throws -> Int {
    var durable = RecordingFile(initial)
    var held = Set<Int>()
    var tried = 0
    var certain = marks[0]
    var flushedBefore = 0
    for point in 0..<file.log.count {
      switch file.log[point] {
      case .mark(let number): certain = marks[number]
      case .write: held.insert(point)
      case .flushed(let began):
        flushedBefore = max(flushedBefore, began)
        for index in held.sorted() {
          guard case .write(let event) = file.log[index], let end = event.completed, end <= began else { continue }
          held.remove(index)
          event.bytes.withUnsafeBytes { try? durable.write(at: event.offset, from: $0) }
        }
      }
      guard tried < limit else { continue }
      tried += 1
      try inspect(durable, held, point, certain)
    }
    durable = RecordingFile()
    return tried
  }

  private func inspect(_ durable: RecordingFile, _ held: Set<Int>, _ point: Int, _ certain: Certainty) throws {
    let medium = RecordingFile(durable.bytes)
    let mode = Int.random(in: 0..<4, using: &generator)
    var order = held.sorted()
    if mode >= 2 { order.shuffle(using: &generator) }
    for index in order {
      guard case .write(let event) = file.log[index] else { continue }
      // All of it, or each write or each sector with even odds.
      if mode == 1, Bool.random(using: &generator) { continue }
      for start in stride(from: 0, to: event.bytes.count, by: 512) {
        if mode == 3, Bool.random(using: &generator) { continue }
        let part = event.bytes[start..<min(start + 512, event.bytes.count)]
        part.withUnsafeBytes { try? medium.write(at: event.offset + UInt64(start), from: $0) }
      }
    }
    let bytes = medium.bytes
    let image: Qcow2Image
    do {
      image = try Qcow2Image(medium)
    } catch {
      Issue.record("point \(point): the image does not open: \(error)")
      return
    }
    image.backing = base.map { RawImage(RecordingFile($0.bytes)) }
    let report = try image.check()
    #expect(report.corruptions == 0, "point \(point): \(report.findings.prefix(3))")
    #expect(report.checkErrors == 0, "point \(point)")
    let queue = ManualQueue()
    let contents = try image.contents(at: 0, Self.sectors * 512, on: queue)
    var wrong: [String] = []
    contents.withUnsafeBytes { bytes in
      let stamps = bytes.bindMemory(to: UInt64.self)
      for sector in 0..<Self.sectors {
        let stamp = stamps[sector * 64]
        let isWhole = (0..<64).allSatisfy { stamps[sector * 64 + $0] == stamp }
        let below = base == nil ? 0 : UInt64.max - 1
        let wasDiscarded = certain.possible[sector].contains(0)
        if isWhole, stamp == certain.durable[sector] || certain.possible[sector].contains(stamp) { continue }
        if isWhole, wasDiscarded, stamp == below { continue }
        wrong.append("sector \(sector) holds \(stamp), not \(certain.durable[sector]) or \(certain.possible[sector])")
      }
    }
    #expect(wrong.isEmpty, "point \(point): \(wrong.prefix(3))")
    if hasQemuImg, point % 97 == 0 { try askQemu(bytes, point) }
  }

  private func askQemu(_ bytes: [UInt8], _ point: Int) throws {
    let scratch = Scratch()
    let path = scratch("crash.qcow2")
    try Data(bytes).write(to: URL(fileURLWithPath: path))
    try Data(Self.stamped(1, sectors: Self.sectors)).write(to: URL(fileURLWithPath: scratch("base")))
    // A dirty image is one whose refcounts may be wrong until somebody opens it for writing.
    let isDirty = bytes[79] & 1 == 1
    let result = try isDirty ? host("qemu-img", "check", "-r", "all", path) : host("qemu-img", "check", path)
    #expect(isDirty ? result.status == 0 : [0, 3].contains(result.status), "point \(point): \(result.output)")
  }
}
