import BlockLayer
import Glibc

/// 1 GiB of data in clusters all over a disk of 4 GiB: a sparse raw file `raw`, the same as the qcow2 image `base`, and above it the
/// layers `l1` to `l5`, each of which rewrites 512 clusters (32 MiB).
struct ScatteredImages {
  private static let size: UInt64 = 4 << 30
  private static let cluster: UInt64 = 64 << 10
  private static let layerClusters = 512
  static let layers = 5

  private let folder: String
  /// The clusters with data, in no order.
  private let clusters: [UInt64]

  init(in folder: String) throws(BlockError) {
    self.folder = folder
    var random = SplitMix(state: 1)
    clusters = Array(Array(0..<Self.size / Self.cluster).shuffled(using: &random).prefix(1 << 14))
    let queue = try makeIOQueue()
    try HostFile.create("\(folder)/raw", length: Self.size)
    let raw = try BlockChain(
      path: "\(folder)/raw", format: .raw, access: FileAccess(writable: true), queue: queue)
    try Self.makeLayer("\(folder)/base", over: nil, format: nil, queue)
    let base = try BlockChain(path: "\(folder)/base", access: FileAccess(writable: true), queue: queue)
    let buffer = DiskBuffer(count: Int(Self.cluster))
    for cluster in clusters {
      for place in stride(from: 0, to: buffer.bytes.count, by: 8) {
        buffer.start.storeBytes(of: random.next(), toByteOffset: place, as: UInt64.self)
      }
      for chain in [raw, base] {
        try chain.top.perform(.write, at: cluster * Self.cluster, memory: buffer.bytes, on: queue)
      }
    }
    try raw.close()
    try base.close()
    for layer in 1...Self.layers { try makeLayer(layer, as: "l\(layer)", over: layer == 1 ? "base" : "l\(layer - 1)") }
  }

  /// A layer with what `l1` to `l5` has, under another name.
  func makeLayer(_ number: Int, as name: String, over backing: String) throws(BlockError) {
    let queue = try makeIOQueue()
    let path = "\(folder)/\(name)"
    try Self.makeLayer(path, over: backing, format: "qcow2", queue)
    let chain = try BlockChain(path: path, access: FileAccess(writable: true), queue: queue)
    let buffer = DiskBuffer(count: Int(Self.cluster))
    memset(buffer.start, Int32(number), buffer.bytes.count)
    var random = SplitMix(state: UInt64(number) + 1)
    for cluster in clusters.shuffled(using: &random).prefix(Self.layerClusters) {
      try chain.top.perform(.write, at: cluster * Self.cluster, memory: buffer.bytes, on: queue)
    }
    try chain.close()
  }

  private static func makeLayer(
    _ path: String, over backing: String?, format: String?, _ queue: any IOQueue
  ) throws(BlockError) {
    var options = Qcow2CreateOptions(size: size)
    options.backingName = backing
    options.backingFormat = format
    try HostFile.create(path)
    let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
    defer { file.close() }
    try Qcow2Image.create(options, in: file)
  }
}

/// The same numbers in every run (Steele, Lea and Flood: Fast Splittable Pseudorandom Number Generators, 2014).
struct SplitMix: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var value = state
    value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
    value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
    return value ^ value >> 31
  }
}
