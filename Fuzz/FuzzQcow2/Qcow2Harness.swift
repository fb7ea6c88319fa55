import BlockLayer
import Foundation

/// One input is an image: it is checked, and then used as a disk.
enum Qcow2Harness {
  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    let bytes = Array(input)
    guard hasSmallTables(bytes) || bytes.reduce(0, &+) == 0 else { return }
    var options = Qcow2Image.Options()
    options.l2CacheBytes = 8 << 10
    options.refcountCacheBytes = 8 << 10
    let ordinary = options
    options.forCheck = true
    if let image = try? Qcow2Image(MemoryFile(bytes, isReadOnly: true), options: options) { _ = try? image.check() }
    guard let image = try? Qcow2Image(MemoryFile(bytes, isReadOnly: false), options: ordinary) else { return }
    let queue = NoQueue()
    let buffer = DiskBuffer(count: 65536, zeroed: true)
    let length = Int(min(image.size, 65536))
    let memory = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<length])
    try? image.perform(.read, memory: memory, on: queue)
    try? image.perform(.write, memory: memory, on: queue)
    try? image.perform(.writeZeroes, length: UInt64(length), on: queue)
    for snapshot in image.snapshots.prefix(2) { try? image.applySnapshot(snapshot.id) }
    try? image.close()
  }

  /// Tables far larger than the file cost most of the time and say nothing new: one such input of 256 is used.
  private static func hasSmallTables(_ bytes: [UInt8]) -> Bool {
    func field(_ offset: Int) -> UInt64 {
      bytes.dropFirst(offset).prefix(4).reduce(0) { $0 << 8 | UInt64($1) }
    }
    let refcountTable = field(56) << min(field(20), 21)
    return field(36) <= 4096 && refcountTable <= 64 << 10 && field(60) <= 64
  }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    for (index, seed) in try seeds().enumerated() {
      try Data(seed).write(to: URL(fileURLWithPath: "\(directory)/seed\(index)"))
    }
  }

  /// Runs `count` images with bytes of their headers and tables changed.
  static func mutate(count: Int, seed: UInt64) throws {
    let seeds = try seeds()
    var generator = Mixer(state: seed)
    let values: [UInt8] = [0, 1, 2, 0x3f, 0x40, 0x7f, 0x80, 0xc0, 0xff]
    for round in 0..<count {
      var bytes = seeds[round % seeds.count]
      for _ in 0..<Int.random(in: 1...8, using: &generator) {
        // The header, or the file's tables, which come first in it.
        let area = [128, 4096, bytes.count][Int.random(in: 0..<3, using: &generator)]
        let place = Int.random(in: 0..<min(area, bytes.count), using: &generator)
        bytes[place] =
          Bool.random(using: &generator)
          ? .random(in: 0...255, using: &generator) : values[Int.random(in: 0..<values.count, using: &generator)]
      }
      bytes.withUnsafeBufferPointer { run($0) }
      if (round + 1) % 100_000 == 0 { print("\(round + 1) images") }
    }
  }

  private static func seeds() throws -> [[UInt8]] {
    var seeds: [[UInt8]] = []
    for bits in [1, 16, 64] {
      var options = Qcow2CreateOptions(size: 128 << 10)
      options.clusterSize = 512
      options.refcountBits = UInt64(bits)
      let file = MemoryFile([], isReadOnly: false)
      try Qcow2Image.create(options, in: file)
      let image = try Qcow2Image(file)
      let buffer = DiskBuffer(count: 4096, zeroed: true)
      try image.perform(.write, at: 1024, memory: buffer.bytes, on: NoQueue())
      if bits > 1 { try image.createSnapshot("s", seconds: 0, nanoseconds: 0) }
      try image.addBitmap("b", granularity: 512)
      try image.close()
      seeds.append(file.bytes)
    }
    return seeds
  }
}

/// splitmix64.
private struct Mixer: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var value = state
    value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
    value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
    return value ^ value >> 31
  }
}
