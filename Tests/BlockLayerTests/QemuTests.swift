import BlockLayer
import Foundation
import Testing

/// Images that each side makes are read and judged by the other.
@Suite(.enabled(if: hasQemuImg, "qemu-utils is not installed"))
struct QemuTests {
  static let clusterSizes: [UInt64] = [512, 4096, 65536, 2 << 20]

  /// Random requests through us; qemu-img finds the image clean and the bytes equal.
  @Test(arguments: clusterSizes, [UInt64(1), 2, 4, 8, 16, 32, 64])
  func whatWeWriteQemuReads(clusterSize: UInt64, refcountBits: UInt64) throws {
    try whatWeWriteQemuReads(clusterSize: clusterSize, refcountBits: refcountBits, extendedL2: false)
  }

  @Test(arguments: [UInt64(16384), 65536, 2 << 20])
  func subclustersThatWeWriteQemuReads(clusterSize: UInt64) throws {
    try whatWeWriteQemuReads(clusterSize: clusterSize, refcountBits: 16, extendedL2: true)
  }

  private func whatWeWriteQemuReads(clusterSize: UInt64, refcountBits: UInt64, extendedL2: Bool) throws {
    let scratch = Scratch()
    let size = 4 << 20
    var options = Qcow2CreateOptions(size: UInt64(size))
    options.clusterSize = clusterSize
    options.refcountBits = refcountBits
    options.extendedL2 = extendedL2
    let path = scratch("ours.qcow2")
    var expected = [UInt8](repeating: 0, count: size)
    try makeImage(path, options) { node, queue in
      var generator = SeededGenerator(clusterSize ^ refcountBits)
      for _ in 0..<60 {
        let offset = Int.random(in: 0..<size / 512, using: &generator) * 512
        let length = min(size - offset, Int.random(in: 1..<200, using: &generator) * 512)
        let value = UInt8.random(in: 1...255, using: &generator)
        if value % 5 == 0 {
          try node.perform(.writeZeroes, at: UInt64(offset), length: UInt64(length), mayUnmap: true, on: queue)
        } else {
          try node.fill(value, at: UInt64(offset), length, on: queue)
        }
        for index in offset..<(offset + length) { expected[index] = value % 5 == 0 ? 0 : value }
      }
    }
    try Data(expected).write(to: URL(fileURLWithPath: scratch("raw")))
    let check = try host("qemu-img", "check", path)
    #expect(check.status == 0, "\(check.output)")
    let compare = try host("qemu-img", "compare", "-F", "raw", path, scratch("raw"))
    #expect(compare.status == 0, "\(compare.output)")
  }

  /// qemu-io writes patterns; we find the image clean and read them.
  @Test(arguments: clusterSizes, ["zlib", "zstd"])
  func whatQemuWritesWeRead(clusterSize: UInt64, compression: String) throws {
    try whatQemuWritesWeRead("cluster_size=\(clusterSize),compression_type=\(compression)")
  }

  /// Images of version 2, which have no zero clusters; what we write into one stays of that version.
  @Test func imagesOfVersion2AreReadAndWritten() throws {
    try whatQemuWritesWeRead("compat=0.10")
    let scratch = Scratch()
    let path = scratch("old")
    try #require(host("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "8M").status == 0)
    try #require(host("qemu-io", "-c", "write -P 0x11 0 1M", path).status == 0)
    let queue = try makeIOQueue()
    let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
    try chain.top.fill(0x22, at: 512 << 10, 1 << 20, on: queue)
    try chain.top.perform(.writeZeroes, at: 100 << 10, length: 64 << 10, mayUnmap: true, on: queue)
    try chain.close()
    let read = try host(
      "qemu-io", "-c", "read -P 0x11 0 100k", "-c", "read -P 0 100k 64k", "-c", "read -P 0x11 164k 348k",
      "-c", "read -P 0x22 512k 1M", "-c", "read -P 0 1536k 1M", path)
    #expect(read.status == 0 && !read.output.contains("failed"), "\(read.output)")
    #expect(try host("qemu-img", "check", path).status == 0)
    #expect(try host("qemu-img", "info", path).output.contains("compat: 0.10"))
  }

  @Test(arguments: [16384, 65536, 2 << 20])
  func subclustersThatQemuWritesWeRead(clusterSize: Int) throws {
    try whatQemuWritesWeRead("cluster_size=\(clusterSize),extended_l2=on")
  }

  /// An overlay of ours with subclusters: qemu-img maps it as we do, and merges it.
  @Test(arguments: [false, true])
  func overlaysWithSubclustersAreQemusToo(isOurs: Bool) throws {
    let scratch = Scratch()
    let base = scratch("base")
    try #require(host("qemu-img", "create", "-q", "-f", "qcow2", base, "4M").status == 0)
    try #require(host("qemu-io", "-c", "write -P 0x55 0 3M", base).status == 0)
    let path = scratch("overlay")
    var expected = [UInt8](repeating: 0x55, count: 3 << 20) + [UInt8](repeating: 0, count: 1 << 20)
    var generator = SeededGenerator(isOurs ? 5 : 6)
    var writes: [(offset: Int, length: Int, value: UInt8)] = []
    for _ in 0..<80 {
      let offset = Int.random(in: 0..<8192, using: &generator) * 512
      let length = min((4 << 20) - offset, Int.random(in: 1..<80, using: &generator) * 512)
      let value = UInt8.random(in: 0...9, using: &generator)
      writes.append((offset, length, value))
      for index in offset..<(offset + length) { expected[index] = value }
    }
    if isOurs {
      var options = Qcow2CreateOptions(size: 4 << 20)
      options.extendedL2 = true
      options.backingName = "base"
      options.backingFormat = "qcow2"
      let queue = try makeIOQueue()
      try HostFile.create(path)
      let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
      try Qcow2Image.create(options, in: file)
      file.close()
      let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
      for write in writes {
        if write.value == 0 {
          try chain.top.perform(.writeZeroes, at: UInt64(write.offset), length: UInt64(write.length), on: queue)
        } else {
          try chain.top.fill(write.value, at: UInt64(write.offset), write.length, on: queue)
        }
      }
      try chain.close()
    } else {
      let made = try host(
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", base, "-F", "qcow2", path)
      try #require(made.status == 0, "\(made.output)")
      let commands = writes.flatMap { write in
        ["-c", "write \(write.value == 0 ? "-z" : "-P \(write.value)") \(write.offset) \(write.length)"]
      }
      let written = try host("qemu-io", commands + [path])
      try #require(written.status == 0, "\(written.output)")
    }
    try Data(expected).write(to: URL(fileURLWithPath: scratch("raw")))
    let compared = try host("qemu-img", "compare", "-F", "raw", path, scratch("raw"))
    #expect(compared.status == 0, "\(compared.output)")
    let checked = try host("qemu-img", "check", path)
    #expect(checked.status == 0, "\(checked.output)")
    let queue = try makeIOQueue()
    let chain = try BlockChain(path: path, queue: queue)
    #expect(try chain.top.contents(at: 0, 4 << 20, on: queue) == expected)
    let image = try #require(chain.layers[0].qcow2)
    #expect(image.hasExtendedL2)
    #expect(try image.check().isClean)
    try chain.close()
    let merged = try host("qemu-img", "commit", "-q", path)
    #expect(merged.status == 0, "\(merged.output)")
    let again = try host("qemu-img", "compare", "-F", "raw", base, scratch("raw"))
    #expect(again.status == 0, "\(again.output)")
  }

  private func whatQemuWritesWeRead(_ options: String) throws {
    let scratch = Scratch()
    let path = scratch("theirs.qcow2")
    let made = try host(
      "qemu-img", "create", "-f", "qcow2", "-o", options, path,
      "8M")
    #expect(made.status == 0, "\(made.output)")
    let written = try host(
      "qemu-io", "-c", "write -P 0x11 0 64k", "-c", "write -P 0x22 1000k 100k", "-c", "write -c -P 0x33 2M 2M",
      "-c", "write -z 1010k 20k", "-c", "discard 16k 16k", path)
    #expect(written.status == 0, "\(written.output)")
    let queue = try makeIOQueue()
    let chain = try BlockChain(path: path, queue: queue)
    func expect(_ value: UInt8, _ offset: UInt64, _ length: Int, sourceLocation: SourceLocation = #_sourceLocation)
      throws
    {
      let bytes = try chain.top.contents(at: offset, length, on: queue)
      #expect(bytes.allSatisfy { $0 == value }, sourceLocation: sourceLocation)
    }
    try expect(0x11, 0, 16 << 10)
    try expect(0x22, 1000 << 10, 10 << 10)
    try expect(0, 1010 << 10, 20 << 10)
    try expect(0x22, 1030 << 10, 70 << 10)
    try expect(0x33, 2 << 20, 2 << 20)
    try expect(0, 4 << 20, 4 << 20)
    let image = try #require(chain.layers[0].qcow2)
    #expect(try image.check().isClean)
    try chain.close()
  }

  /// Every layer of a chain holds its own blocks; the top reads them all.
  @Test(arguments: [1, 8, 64])
  func chainsOfAnyDepthReadTheSame(depth: Int) throws {
    let scratch = Scratch()
    let queue = try makeIOQueue()
    for layer in 0..<depth {
      var options = Qcow2CreateOptions(size: 8 << 20)
      if layer > 0 {
        options.backingName = "layer\(layer - 1)"
        options.backingFormat = "qcow2"
      }
      try HostFile.create(scratch("layer\(layer)"))
      let file = try HostFile(path: scratch("layer\(layer)"), access: FileAccess(writable: true), queue: queue)
      try Qcow2Image.create(options, in: file)
      file.close()
      let chain = try BlockChain(path: scratch("layer\(layer)"), access: FileAccess(writable: true), queue: queue)
      #expect(chain.layers.count == layer + 1)
      try chain.top.fill(UInt8(layer + 1), at: UInt64(layer) * 100_864, 70_144, on: queue)
      try chain.close()
    }
    let flat = try host("qemu-img", "convert", "-O", "raw", scratch("layer\(depth - 1)"), scratch("flat"))
    #expect(flat.status == 0, "\(flat.output)")
    let chain = try BlockChain(path: scratch("layer\(depth - 1)"), queue: queue)
    let ours = try chain.top.contents(at: 0, 8 << 20, on: queue)
    #expect(ours == [UInt8](try Data(contentsOf: URL(fileURLWithPath: scratch("flat")))))
    try chain.close()
  }

  @Test func snapshotsAreQemusToo() throws {
    let scratch = Scratch()
    let path = scratch("snap.qcow2")
    var options = Qcow2CreateOptions(size: 2 << 20)
    options.clusterSize = 4096
    try makeImage(path, options) { node, queue in
      let image = try #require(node as? Qcow2Image)
      try node.fill(1, at: 0, 1 << 20, on: queue)
      try image.createSnapshot("one", seconds: 1000, nanoseconds: 5)
      try node.fill(2, at: 4096, 8192, on: queue)
      try image.createSnapshot("two", seconds: 2000, nanoseconds: 6)
      try node.fill(3, at: 512 << 10, 1 << 20, on: queue)
    }
    let check = try host("qemu-img", "check", path)
    #expect(check.status == 0, "\(check.output)")
    let list = try host("qemu-img", "snapshot", "-l", path)
    #expect(list.output.contains("one") && list.output.contains("two"))
    #expect(try host("qemu-img", "snapshot", "-a", "one", path).status == 0)
    let read = try host("qemu-io", "-c", "read -P 1 0 1M", "-c", "read -P 0 1M 1M", path)
    #expect(read.status == 0 && !read.output.contains("failed"), "\(read.output)")
    let queue = try makeIOQueue()
    let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
    let image = try #require(chain.layers[0].qcow2)
    try image.applySnapshot("two")
    #expect(try image.contents(at: 4096, 8192, on: queue).allSatisfy { $0 == 2 })
    #expect(try image.contents(at: 512 << 10, 512 << 10, on: queue).allSatisfy { $0 == 1 })
    try image.deleteSnapshot("one")
    try image.deleteSnapshot("2")
    #expect(image.snapshots.isEmpty)
    try chain.close()
    let after = try host("qemu-img", "check", path)
    #expect(after.status == 0, "\(after.output)")
  }

  @Test func bitmapsAreQemusToo() throws {
    let scratch = Scratch()
    let path = scratch("bitmap.qcow2")
    #expect(try host("qemu-img", "create", "-f", "qcow2", path, "64M").status == 0)
    #expect(try host("qemu-img", "bitmap", "--add", "-g", "65536", path, "theirs").status == 0)
    let queue = try makeIOQueue()
    let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
    let image = try #require(chain.layers[0].qcow2)
    #expect(image.bitmaps.map(\.name) == ["theirs"])
    try image.addBitmap("ours", granularity: 4096)
    try image.fill(7, at: 10 << 20, 100_000, on: queue)
    try chain.close()
    let check = try host("qemu-img", "check", path)
    #expect(check.status == 0, "\(check.output)")
    let info = try host("qemu-img", "info", "--output=json", path)
    #expect(info.output.contains("theirs") && info.output.contains("ours"))
    // QEMU writes too, and both bitmaps have it.
    #expect(try host("qemu-io", "-c", "write -P 9 40M 64k", path).status == 0)
    let again = try BlockChain(path: path, queue: queue)
    let bitmaps = try #require(again.layers[0].qcow2).bitmaps
    #expect(bitmaps.count == 2)
    for bitmap in bitmaps {
      #expect(!bitmap.isInconsistent && bitmap.isRecording)
      #expect(bitmap.isDirty(at: 10 << 20, length: 100_000))
      #expect(bitmap.isDirty(at: 40 << 20, length: 65536))
      #expect(!bitmap.isDirty(at: 20 << 20, length: 10 << 20))
    }
    try again.close()
  }

  @Test(arguments: CompressionType.allCases)
  func compressedClustersAreQemusToo(_ type: CompressionType) throws {
    let scratch = Scratch()
    let path = scratch("compressed.qcow2")
    var options = Qcow2CreateOptions(size: 8 << 20)
    options.compression = type
    try makeImage(path, options) { node, queue in
      let image = try #require(node as? Qcow2Image)
      var generator = SeededGenerator(9)
      for cluster in 0..<64 {
        var bytes = [UInt8](repeating: UInt8(cluster + 1), count: 65536)
        for index in 0..<(cluster * 256) { bytes[index] = .random(in: 0...255, using: &generator) }
        #expect(try bytes.withUnsafeBytes { try image.writeCompressed(at: UInt64(cluster) * 65536, $0) })
      }
      // Written over in part, it is a cluster as any other.
      try node.fill(0xaa, at: 65536 + 1024, 512, on: queue)
    }
    let check = try host("qemu-img", "check", path)
    #expect(check.status == 0, "\(check.output)")
    #expect(try host("qemu-img", "convert", "-O", "raw", path, scratch("flat")).status == 0)
    let queue = try makeIOQueue()
    let chain = try BlockChain(path: path, queue: queue)
    #expect(try #require(chain.layers[0].qcow2).check().isClean)
    let ours = try chain.top.contents(at: 0, 8 << 20, on: queue)
    #expect(ours == [UInt8](try Data(contentsOf: URL(fileURLWithPath: scratch("flat")))))
    #expect(ours[65536 + 1024] == 0xaa && ours[63 * 65536 + 65535] == 64)
    try chain.close()
  }

  @Test func locksAreQemus() throws {
    let scratch = Scratch()
    let path = scratch("locked.qcow2")
    try makeImage(path, Qcow2CreateOptions(size: 1 << 20)) { _, _ in
      let writer = try host("qemu-io", "-c", "write 0 512", path)
      #expect(writer.output.contains("lock"), "\(writer.output)")
      let reader = try host("qemu-img", "info", path)
      #expect(reader.output.contains("lock"), "\(reader.output)")
      let sharer = try host("qemu-img", "info", "-U", path)
      #expect(sharer.status == 0, "\(sharer.output)")
    }
    let queue = try makeIOQueue()
    let reader = try BlockChain(path: path, queue: queue)
    #expect(throws: BlockError.self) {
      try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
    }
    #expect(try host("qemu-img", "info", path).status == 0)
    try reader.close()
  }

  private func makeImage(
    _ path: String, _ options: Qcow2CreateOptions, _ body: (any BlockNode, any IOQueue) throws -> Void
  ) throws {
    let queue = try makeIOQueue()
    try HostFile.create(path)
    let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
    try Qcow2Image.create(options, in: file)
    file.close()
    let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
    try body(chain.top, queue)
    try chain.close()
  }
}
