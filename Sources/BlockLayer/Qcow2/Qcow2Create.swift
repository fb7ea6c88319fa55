/// What a new qcow2 image is to be.
public struct Qcow2CreateOptions: Sendable {
  /// The disk's bytes.
  public var size: UInt64
  /// 3, or 2 for programs from before 2012.
  public var version: UInt32 = 3
  /// A power of two from 512 to 2 MiB.
  public var clusterSize: UInt64 = 65536
  /// A power of two from 1 to 64.
  public var refcountBits: UInt64 = 16
  /// Refcounts are put right after a crash instead of being kept right.
  public var lazyRefcounts = false
  /// Parts of a cluster, a 32nd each, are allocated one by one, so that a small write copies little from below.
  public var extendedL2 = false
  /// How clusters are compressed.
  public var compression = CompressionType.zlib
  /// The backing file's name as it is stored.
  public var backingName: String?
  /// The backing file's format.
  public var backingFormat: String?

  /// A disk of `size` bytes with the usual values.
  public init(size: UInt64) { self.size = size }
}

extension Qcow2Image {
  /// Writes an empty image into a file, which must have no bytes.
  public static func create(_ options: Qcow2CreateOptions, in file: any BlockFile) throws(BlockError) {
    var header = Qcow2Header()
    guard options.clusterSize.nonzeroBitCount == 1, (512...(2 << 20)).contains(options.clusterSize) else {
      throw .invalid(
        what: "cluster size", value: "\(options.clusterSize)", expected: "a power of two from 512 to 2097152")
    }
    guard options.refcountBits.nonzeroBitCount == 1, options.refcountBits <= 64 else {
      throw .invalid(what: "refcount bits", value: "\(options.refcountBits)", expected: "a power of two from 1 to 64")
    }
    guard options.version == 2 || options.version == 3 else {
      throw .invalid(what: "version", value: "\(options.version)", expected: "2 or 3")
    }
    let needsVersion3 = options.refcountBits != 16 || options.lazyRefcounts || options.compression != .zlib
    if options.version == 2, needsVersion3 || options.extendedL2 {
      throw .invalid(
        what: "version", value: "2",
        expected: "3 for refcounts of other widths, lazy refcounts, zstd and extended L2 entries")
    }
    if options.extendedL2, options.clusterSize < 16384 {
      throw .invalid(
        what: "cluster size", value: "\(options.clusterSize)", expected: "16384 or more with extended L2 entries")
    }
    header.version = options.version
    header.clusterBits = UInt32(options.clusterSize.trailingZeroBitCount)
    header.refcountOrder = UInt32(options.refcountBits.trailingZeroBitCount)
    header.size = options.size.roundedUp(to: 512)
    header.backingName = options.backingName
    if options.lazyRefcounts { header.compatible |= Qcow2Header.Compatible.lazyRefcounts }
    if options.extendedL2 { header.incompatible |= Qcow2Header.Incompatible.extendedL2 }
    if options.compression != .zlib {
      header.incompatible |= Qcow2Header.Incompatible.compressionType
      header.compressionType = options.compression.rawValue
    }
    if options.backingName != nil, let format = options.backingFormat {
      header.setExtension(Qcow2Header.Extension.backingFormat, Array(format.utf8))
    }
    let entries = max(1, header.l1EntriesNeeded(for: header.size))
    guard options.size <= UInt64(Int64.max), entries * 8 <= Qcow2Header.maximumL1Bytes else {
      throw .invalid(what: "size", value: "\(options.size)", expected: "a smaller one, or larger clusters")
    }
    let l1Clusters = (entries * 8).dividedUp(by: header.clusterSize)
    var blocks: UInt64 = 1
    var tableClusters: UInt64 = 1
    var total: UInt64 = 0
    while true {
      total = 1 + tableClusters + blocks + l1Clusters
      let neededBlocks = total.dividedUp(by: header.refcountBlockEntries)
      let neededTable = max(1, (neededBlocks * 8).dividedUp(by: header.clusterSize))
      if neededBlocks == blocks, neededTable == tableClusters { break }
      blocks = neededBlocks
      tableClusters = neededTable
    }
    header.refcountTableOffset = header.clusterSize
    header.refcountTableClusters = UInt32(tableClusters)
    header.l1Offset = (1 + tableClusters + blocks) * header.clusterSize
    header.l1Entries = UInt32(entries)
    try writeTables(header, blocks: blocks, total: total, to: file)
    try file.setLength(total * header.clusterSize)
    try file.writeArray(at: 0, try header.serialized())
    try file.flush()
  }

  private static func writeTables(
    _ header: Qcow2Header, blocks: UInt64, total: UInt64, to file: any BlockFile
  ) throws(BlockError) {
    let firstBlock = header.refcountTableOffset + UInt64(header.refcountTableClusters) * header.clusterSize
    var table: [UInt8] = []
    for block in 0..<blocks {
      table.appendBigEndian(firstBlock + block * header.clusterSize)
      var bytes = [UInt8](repeating: 0, count: Int(header.clusterSize))
      let first = block * header.refcountBlockEntries
      for cluster in first..<min(first + header.refcountBlockEntries, total) {
        Qcow2Refcounts.put(1, &bytes, Int(cluster - first), bits: header.refcountBits)
      }
      try file.writeArray(at: firstBlock + block * header.clusterSize, bytes)
    }
    try file.writeArray(at: header.refcountTableOffset, table)
  }

  /// Changes the disk's size. Over a backing file that is longer than the disk was, the caller writes zeroes to what is added.
  public func setSize(_ newSize: UInt64) throws(BlockError) {
    try requireWritable()
    let newSize = newSize.roundedUp(to: 512)
    guard snapshotTable.isEmpty || newSize >= size else {
      throw .unsupported(path: file.path, .internalSnapshotOfOtherSize)
    }
    let entries = header.l1EntriesNeeded(for: newSize)
    guard newSize <= UInt64(Int64.max), entries * 8 <= Qcow2Header.maximumL1Bytes else {
      throw .invalid(what: "size", value: "\(newSize)", expected: "a smaller one, or larger clusters")
    }
    try writeBackNow(withRefcounts: true)
    if entries > UInt64(l1.count) {
      let larger = l1 + [UInt64](repeating: 0, count: Int(entries) - l1.count)
      let (oldOffset, oldLength) = (header.l1Offset, UInt64(l1.count) * 8)
      let offset = try writeL1(larger)
      try writeBackNow(withRefcounts: true)
      try file.flush()
      header.l1Offset = offset
      header.l1Entries = UInt32(larger.count)
      l1 = larger
      refcounts.protect(offset, UInt64(larger.count) * 8)
      freeRange(oldOffset, oldLength)
    }
    header.size = newSize
    try writeHeader()
    for index in bitmapStore.all.indices {
      let words = Int(newSize.dividedUp(by: bitmapStore.all[index].granularity).dividedUp(by: 64))
      let old = bitmapStore.all[index].words
      bitmapStore.all[index].words = Array(old.prefix(words)) + [UInt64](repeating: 0, count: max(0, words - old.count))
    }
  }

  /// Gives every cluster of an empty disk its place in the file, so that no later write has to look for one.
  public func preallocate() throws(BlockError) {
    try requireWritable()
    var offset: UInt64 = 0
    var end = file.length
    while offset < size {
      let wanted = min(256, (size - offset).dividedUp(by: clusterSize))
      let (host, count, _) = try refcounts.allocate(upTo: wanted)
      for index in 0..<count {
        let distance = index << clusterBits
        try setL2Entry(for: offset + distance, dataEntry(host + distance))
      }
      offset += count << clusterBits
      end = max(end, host + (count << clusterBits))
    }
    try writeBackNow(withRefcounts: true)
    if file.length < end { try file.setLength(end) }
  }

  /// Names another backing file; nil for none. What the disk reads changes with it: see `rebase`.
  public func setBacking(name: String?, format: String?) throws(BlockError) {
    try requireWritable()
    try writeBackNow(withRefcounts: true)
    var changed = header
    changed.backingName = name
    changed.setExtension(Qcow2Header.Extension.backingFormat, name == nil ? nil : format.map { Array($0.utf8) })
    _ = try changed.serialized()
    header = changed
    try writeHeader()
  }

  /// Writes one cluster in compressed form, where that is smaller; false where it is not, or where the cluster is
  /// allocated already. The bytes are a whole cluster.
  public func writeCompressed(at offset: UInt64, _ bytes: UnsafeRawBufferPointer) throws(BlockError) -> Bool {
    try requireWritable()
    guard offset % clusterSize == 0, offset < size, UInt64(bytes.count) == clusterSize,
      allocations[offset >> clusterBits] == nil, let type = CompressionType(rawValue: header.compressionType),
      let packed = type.compress(bytes)
    else { return false }
    if let error = prepareForChange(at: offset, length: min(clusterSize, size - offset)) { throw error }
    let (host, sectors) = try placeCompressed(UInt64(packed.count))
    try file.writeArray(at: host, packed)
    let shift = 62 - (clusterBits - 8)
    let old = try l2Entry(for: offset)
    let new = Qcow2L2Entry(descriptor: Qcow2Entry.compressed | sectors << shift | host)
    try setL2Entry(for: offset, new)
    // A host cluster that both forms name is kept by one reference each.
    let named = hostClusters(new.descriptor)
    for cluster in hostClusters(old.descriptor) where named.contains(cluster) { free(cluster) }
    limitDirtyTables()
    return true
  }

  /// Room for `length` bytes behind what was compressed last, and the sectors that it touches beyond the first.
  private func placeCompressed(_ length: UInt64) throws(BlockError) -> (offset: UInt64, sectors: UInt64) {
    var start = compressedTail
    let end = start.roundedUp(to: clusterSize)
    let shared = start != 0 && start != end
    if shared, try refcounts.count(start >> clusterBits) >= header.maximumRefcount { start = 0 }
    if start == 0 || start == end {
      start = try refcounts.allocateContiguous(length.dividedUp(by: clusterSize))
    } else if start + length > end {
      // Only the cluster right behind can take the rest.
      let next = try refcounts.allocate(upTo: 1).offset
      if next == end {
        try refcounts.retain(start >> clusterBits)
      } else {
        start = next
      }
    } else {
      try refcounts.retain(start >> clusterBits)
    }
    compressedTail = start + length
    let limit: UInt64 = 1 << (62 - (clusterBits - 8))
    guard compressedTail <= limit else { throw .io(call: "make larger", path: file.path, errno: 27) }
    return (start, (start + length - 1) / 512 - start / 512)
  }
}
