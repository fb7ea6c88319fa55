import BlockLayer
import Foundation
import Testing

/// Jobs on chains, with qemu-img as the judge.
@Suite(.enabled(if: hasQemuImg, "qemu-utils is not installed"))
struct JobTests {
  static let size: UInt64 = 6 << 20

  /// Layers with data and zeros at random places, the bottom one first; the last is the disk.
  private func makeChain(_ scratch: Scratch, depth: Int, clusterSize: UInt64, seed: UInt64) throws -> [String] {
    let queue = try makeIOQueue()
    var generator = SeededGenerator(seed)
    var paths: [String] = []
    for layer in 0..<depth {
      let path = scratch("layer\(layer)")
      // Layers of several lengths: what lies past the end of one reads as zeros.
      var options = Qcow2CreateOptions(size: Self.size - UInt64(layer % 3) * 300 * 512)
      options.clusterSize = clusterSize
      if layer > 0 {
        options.backingName = "layer\(layer - 1)"
        options.backingFormat = "qcow2"
      }
      try create(path, options, queue)
      let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
      for index in 0..<6 {
        let offset = UInt64.random(in: 0..<10_000, using: &generator) * 512
        let length = UInt64.random(in: 1..<400, using: &generator) * 512
        if index % 3 == 2 {
          try chain.top.perform(.writeZeroes, at: offset, length: length, mayUnmap: true, on: queue)
        } else {
          try chain.top.fill(UInt8.random(in: 1...255, using: &generator), at: offset, Int(length), on: queue)
        }
      }
      try chain.close()
      paths.append(path)
    }
    return paths
  }

  private func create(_ path: String, _ options: Qcow2CreateOptions, _ queue: any IOQueue) throws {
    try HostFile.create(path)
    let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
    defer { file.close() }
    try Qcow2Image.create(options, in: file)
  }

  private func expectSame(_ path: String, as raw: String, _ sourceLocation: SourceLocation = #_sourceLocation) throws {
    let check = try host("qemu-img", "check", path)
    #expect(check.status == 0, "\(check.output)", sourceLocation: sourceLocation)
    let compare = try host("qemu-img", "compare", "-F", "raw", path, raw)
    #expect(compare.status == 0, "\(compare.output)", sourceLocation: sourceLocation)
  }

  @Test(arguments: [UInt64(512), 4096, 65536, 2 << 20], [false, true])
  func copiesAreComplete(clusterSize: UInt64, compresses: Bool) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    let layers = try makeChain(scratch, depth: 5, clusterSize: 4096, seed: clusterSize)
    #expect(try host("qemu-img", "convert", "-O", "raw", layers[4], scratch("raw")).status == 0)
    let source = try BlockChain(path: layers[4], queue: queue)
    var options = Qcow2CreateOptions(size: source.top.size)
    options.clusterSize = clusterSize
    try create(scratch("copy"), options, queue)
    let target = try BlockChain(path: scratch("copy"), access: FileAccess(writable: true), queue: queue)
    var copy = CopyJob.Options()
    copy.targetReadsZero = true
    copy.compresses = compresses
    let job = CopyJob(from: source.top, to: target.top, copy)
    try job.run(on: queue)
    #expect(job.done == source.top.size && job.isFinished)
    try target.close()
    try expectSame(scratch("copy"), as: scratch("raw"))
    // Into a disk that is full of something else, zeros are written too.
    try create(scratch("used"), options, queue)
    let used = try BlockChain(path: scratch("used"), access: FileAccess(writable: true), queue: queue)
    try used.top.fill(0x77, at: 0, Int(used.top.size), on: queue)
    try CopyJob(from: source.top, to: used.top).run(on: queue)
    try used.close()
    try expectSame(scratch("used"), as: scratch("raw"))
    try source.close()
  }

  /// A walk over a chain finds at every place what a look at that place alone finds.
  @Test(arguments: [512, 4096, 65536] as [UInt64]) func walksMissNothing(clusterSize: UInt64) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    let layers = try makeChain(scratch, depth: 7, clusterSize: clusterSize, seed: clusterSize)
    let chain = try BlockChain(path: layers[6], queue: queue)
    var end: UInt64 = 0
    var depths: Set<Int> = []
    try chain.top.forEachExtent { found in
      #expect(found.extent.offset == end && found.extent.length > 0)
      end += found.extent.length
      depths.insert(found.depth)
      var place = found.extent.offset
      while place < end {
        let alone = try chain.top.chainExtent(at: place, length: end - place)
        #expect(
          alone.depth == found.depth && alone.layer === found.layer && alone.extent.isZero == found.extent.isZero
            && alone.extent.isAllocated == found.extent.isAllocated && alone.extent.isData == found.extent.isData
            && alone.extent.hostOffset == found.extent.hostOffset.map { $0 + (place - found.extent.offset) })
        place += min(alone.extent.length, 512 * 7)
      }
    }
    #expect(end == chain.top.size && depths.count >= 5)
    try chain.close()
  }

  /// What is set aside before it is written is what is written.
  @Test(arguments: [ImageFormat.raw, .qcow2], [false, true])
  func bulkCopiesKeepTheirHoles(format: ImageFormat, withThreads: Bool) throws {
    let scratch = Scratch()
    let queue: any IOQueue = withThreads ? try ThreadPoolQueue() : try makeIOQueue()
    try create(scratch("disk"), Qcow2CreateOptions(size: 64 << 20), queue)
    let source = try BlockChain(path: scratch("disk"), access: FileAccess(writable: true), queue: queue)
    for offset in [UInt64(0), 10 << 20, 63 << 20] { try source.top.fill(0x5a, at: offset, 1 << 20, on: queue) }
    try source.top.fill(0, at: 30 << 20, 2 << 20, on: queue)
    try HostFile.create(scratch("copy"), length: format == .raw ? source.top.size : 0)
    if format == .qcow2 { try create(scratch("copy"), Qcow2CreateOptions(size: source.top.size), queue) }
    var access = FileAccess(writable: true, ignoresFlushes: true)
    access.isBulk = true
    let target = try BlockChain(path: scratch("copy"), format: format, access: access, queue: queue)
    var copy = CopyJob.Options()
    copy.targetReadsZero = true
    try CopyJob(from: source.top, to: target.top, copy).run(on: queue)
    let allocated = try #require(target.layers[0].file.allocatedBytes)
    try target.close()
    try source.close()
    #expect(allocated >= 3 << 20)
    #expect(allocated < 4 << 20)
    let compare = try host("qemu-img", "compare", scratch("disk"), scratch("copy"))
    #expect(compare.status == 0, "\(compare.output)")
  }

  @Test(arguments: [1, 2, 4])
  func commitsReachTheirBase(layersAbove: Int) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    let layers = try makeChain(scratch, depth: 6, clusterSize: 4096, seed: UInt64(layersAbove))
    #expect(try host("qemu-img", "convert", "-O", "raw", layers[5], scratch("raw")).status == 0)
    let chain = try BlockChain(
      path: layers[5], access: FileAccess(writable: true), writableDepth: layersAbove, queue: queue)
    let base = chain.layers[layersAbove].node
    if base.size < chain.top.size { try base.resize(to: chain.top.size, on: queue) }
    var options = CopyJob.Options()
    options.layers = layersAbove
    try CopyJob(from: chain.top, to: base, options).run(on: queue)
    if layersAbove == 1 { try #require(chain.layers[0].qcow2).makeEmpty() }
    try chain.close()
    let compare = try host("qemu-img", "compare", "-F", "raw", layers[5 - layersAbove], scratch("raw"))
    #expect(compare.status == 0, "\(compare.output)")
    try expectSame(layers[5], as: scratch("raw"))
  }

  @Test(arguments: [nil, 0, 2])
  func rebasesKeepTheContents(newBase: Int?) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    let layers = try makeChain(scratch, depth: 5, clusterSize: 65536, seed: 77)
    #expect(try host("qemu-img", "convert", "-O", "raw", layers[4], scratch("raw")).status == 0)
    let chain = try BlockChain(path: layers[4], access: FileAccess(writable: true), queue: queue)
    let image = try #require(chain.layers[0].qcow2)
    let new = try newBase.map { try BlockChain(path: layers[$0], queue: queue) }
    try RebaseJob(image, to: new?.top).run(on: queue)
    try image.setBacking(name: newBase.map { "layer\($0)" }, format: newBase == nil ? nil : "qcow2")
    try new?.close()
    try chain.close()
    try expectSame(layers[4], as: scratch("raw"))
    let again = try BlockChain(path: layers[4], queue: queue)
    #expect(again.layers.count == 1 + (newBase.map { $0 + 1 } ?? 0))
    try again.close()
  }

  @Test func differencesAreFoundWhereTheyAre() throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    let layers = try makeChain(scratch, depth: 3, clusterSize: 4096, seed: 5)
    #expect(try host("qemu-img", "convert", "-O", "raw", layers[2], scratch("raw")).status == 0)
    let disk = try BlockChain(path: layers[2], queue: queue)
    let copy = try BlockChain(path: scratch("raw"), access: FileAccess(writable: true), queue: queue)
    let same = CompareJob(disk.top, copy.top)
    try same.run(on: queue)
    #expect(same.firstDifference == nil)
    let place: UInt64 = 3_000_320
    let byte = try disk.top.contents(at: place, 512, on: queue)[7]
    try copy.top.fill(byte &+ 1, at: place + 7, 1, on: queue)
    let differing = CompareJob(disk.top, copy.top)
    try differing.run(on: queue)
    #expect(differing.firstDifference == place + 7)
    try disk.close()
    try copy.close()
  }

  /// A job that is cancelled ends once what is under way has ended, and one that fails says why.
  @Test func jobsEndWhenTheyAreCancelled() throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    try HostFile.create(scratch("from"), length: 64 << 20)
    try HostFile.create(scratch("to"), length: 64 << 20)
    let source = try BlockChain(path: scratch("from"), format: .raw, queue: queue)
    let target = try BlockChain(
      path: scratch("to"), format: .raw, access: FileAccess(writable: true), queue: queue)
    var options = CopyJob.Options()
    options.sparse = 0
    let job = CopyJob(from: source.top, to: target.top, options)
    job.parallel = 2
    var ends = 0
    job.onEnd = { ends += 1 }
    job.pump()
    #expect(!job.isFinished && job.done == 0)
    job.cancel()
    queue.run { job.isFinished }
    #expect(job.isFinished && ends == 1 && job.done < job.total)
    let refused = CopyJob(from: target.top, to: source.top, options)
    #expect(throws: BlockError.readOnly(path: scratch("from"))) { try refused.run(on: queue) }
    try source.close()
    try target.close()
  }

  /// Zeros that are written stay, although a layer below said the same and goes: a stream relies on that.
  @Test(arguments: [false, true])
  func writtenZeroesOutliveTheLayerBelow(extendedL2: Bool) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    var options = Qcow2CreateOptions(size: 1 << 20)
    try create(scratch("bottom"), options, queue)
    options.clusterSize = 4096
    (options.backingName, options.backingFormat) = ("bottom", "qcow2")
    try create(scratch("middle"), options, queue)
    options = Qcow2CreateOptions(size: 1 << 20)
    options.extendedL2 = extendedL2
    (options.backingName, options.backingFormat) = ("middle", "qcow2")
    try create(scratch("top"), options, queue)
    let writable = FileAccess(writable: true)
    let bottom = try BlockChain(path: scratch("bottom"), access: writable, queue: queue)
    try bottom.top.fill(7, at: 0, 1 << 20, on: queue)
    try bottom.close()
    let middle = try BlockChain(path: scratch("middle"), access: writable, queue: queue)
    try middle.top.perform(.writeZeroes, at: 0, length: 512 << 10, on: queue)
    try middle.close()
    let chain = try BlockChain(path: scratch("top"), access: writable, queue: queue)
    // Parts of a cluster, on its parts' boundaries and not.
    for (offset, length) in [(4096, 8192), (70_000 / 512 * 512, 20 << 10), (200 << 10, 56 << 10), (300 << 10, 512)] {
      try chain.top.perform(.writeZeroes, at: UInt64(offset), length: UInt64(length), on: queue)
      let image = try #require(chain.layers[0].qcow2)
      let below = image.backing
      image.backing = nil
      let bottom = try BlockChain(path: scratch("bottom"), queue: queue)
      image.backing = bottom.top
      #expect(try chain.top.contents(at: UInt64(offset), length, on: queue).allSatisfy { $0 == 0 })
      image.backing = below
      try bottom.close()
    }
    try chain.close()
  }

  @Test(arguments: [UInt64(512), 65536])
  func resizedDisksReadZerosWhereTheyGrew(clusterSize: UInt64) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    let layers = try makeChain(scratch, depth: 2, clusterSize: clusterSize, seed: 3)
    let chain = try BlockChain(path: layers[1], access: FileAccess(writable: true), queue: queue)
    try chain.top.fill(9, at: 0, 2 << 20, on: queue)
    try chain.top.resize(to: 1_000_448, on: queue)
    try chain.top.resize(to: 4 << 20, on: queue)
    #expect(try chain.top.contents(at: 0, 1_000_448, on: queue).allSatisfy { $0 == 9 })
    #expect(try chain.top.contents(at: 1_000_448, (4 << 20) - 1_000_448, on: queue).allSatisfy { $0 == 0 })
    try chain.close()
    let check = try host("qemu-img", "check", layers[1])
    #expect(check.status == 0, "\(check.output)")
  }
}
