import BlockLayer

/// What `-o` says about a new image.
struct DiskFormatOptions {
  enum Preallocation: String {
    case off, metadata, falloc, full
  }

  var clusterSize: UInt64 = 65536
  var refcountBits: UInt64 = 16
  var compression = CompressionType.zlib
  var lazyRefcounts = false
  var extendedL2 = false
  var version: UInt32 = 3
  var preallocation = Preallocation.off
  var backingName: String?
  var backingFormat: ImageFormat?

  /// `name=value` pairs, between commas.
  init(_ lists: [String], format: ImageFormat) throws(Failure) {
    for pair in lists.flatMap({ $0.split(separator: ",") }) {
      guard let equals = pair.firstIndex(of: "=") else {
        throw .badValue(option: "-o", value: String(pair), expected: "NAME=VALUE")
      }
      try set(String(pair[..<equals]), String(pair[pair.index(after: equals)...]), format)
    }
  }

  private mutating func set(_ name: String, _ value: String, _ format: ImageFormat) throws(Failure) {
    func choose<T>(_ choices: [String: T]) throws(Failure) -> T {
      if let choice = choices[value] { return choice }
      throw .badValue(option: "-o \(name)", value: value, expected: choices.keys.sorted().joined(separator: ", "))
    }
    let isQcow2 = format == .qcow2
    switch name {
    case "preallocation":
      var choices: [String: Preallocation] = ["off": .off, "falloc": .falloc, "full": .full]
      if isQcow2 { choices["metadata"] = .metadata }
      preallocation = try choose(choices)
    case "cluster_size" where isQcow2: clusterSize = try parseSize(value, option: "-o cluster_size")
    case "refcount_bits" where isQcow2: refcountBits = try parseSize(value, option: "-o refcount_bits")
    case "compression_type" where isQcow2:
      compression = try choose(Dictionary(uniqueKeysWithValues: CompressionType.allCases.map { ($0.name, $0) }))
    case "lazy_refcounts" where isQcow2: lazyRefcounts = try choose(["on": true, "off": false])
    case "compat" where isQcow2: version = try choose(["0.10": 2, "v2": 2, "1.1": 3, "v3": 3])
    case "extended_l2" where isQcow2: extendedL2 = try choose(["on": true, "off": false])
    case "backing_file" where isQcow2: backingName = value
    case "backing_fmt" where isQcow2: backingFormat = try choose(["raw": ImageFormat.raw, "qcow2": .qcow2])
    default:
      throw .badValue(
        option: "-o", value: name,
        expected: isQcow2
          ? "cluster_size, compression_type, refcount_bits, lazy_refcounts, extended_l2, preallocation, compat, "
            + "backing_file or backing_fmt"
          : "preallocation")
    }
  }

  /// Makes an empty disk, with its storage where that was asked for.
  func make(_ path: String, format: ImageFormat, size: UInt64, queue: any IOQueue) throws {
    if NBDURI.isURI(path) { throw Failure.diskIsRemote(path: path) }
    if backingName != nil, preallocation != .off { throw Failure.conflict("-b", "-o preallocation") }
    try HostFile.create(path, length: format == .raw ? size : 0)
    if format == .qcow2 {
      var options = Qcow2CreateOptions(size: size)
      options.version = version
      options.clusterSize = clusterSize
      options.refcountBits = refcountBits
      options.lazyRefcounts = lazyRefcounts
      options.extendedL2 = extendedL2
      options.compression = compression
      options.backingName = backingName
      options.backingFormat = backingFormat?.rawValue
      let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
      defer { file.close() }
      try Qcow2Image.create(options, in: file)
    }
    if preallocation != .off { try preallocate(path, format, queue) }
  }

  private func preallocate(_ path: String, _ format: ImageFormat, _ queue: any IOQueue) throws {
    let chain = try BlockChain(path: path, format: format, access: FileAccess(writable: true), queue: queue)
    try withChain(chain) {
      try chain.layers[0].qcow2?.preallocate()
      if preallocation == .metadata { return }
      try (chain.layers[0].file as? HostFile)?.allocateStorage()
      if preallocation == .falloc { return }
      let zeros = DiskBuffer(count: 2 << 20, zeroed: true)
      var offset: UInt64 = 0
      while offset < chain.top.size {
        let count = min(chain.top.size - offset, 2 << 20)
        try chain.top.perform(
          .write, at: offset, memory: UnsafeMutableRawBufferPointer(rebasing: zeros.bytes[..<Int(count)]), on: queue)
        offset += count
      }
    }
  }
}
