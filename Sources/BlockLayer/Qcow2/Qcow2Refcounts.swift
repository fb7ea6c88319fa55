/// Sectors of 512 bytes of an in-memory table that differ from the disk's.
struct DirtySectors {
  private(set) var sectors: Set<Int> = []
  var isEmpty: Bool { sectors.isEmpty }

  mutating func mark(entry: Int) { sectors.insert(entry / 64) }
  mutating func mark(_ more: Set<Int>) { sectors.formUnion(more) }

  mutating func take(from table: [UInt64], at offset: UInt64) -> [TableSector] {
    defer { sectors.removeAll(keepingCapacity: true) }
    return sectors.sorted().map { sector in
      let entries = table[sector * 64..<min((sector + 1) * 64, table.count)]
      var bytes: [UInt8] = []
      for entry in entries { bytes.appendBigEndian(entry) }
      return TableSector(sector: sector, offset: offset + UInt64(sector) * 512, bytes: bytes)
    }
  }
}

/// A sector of a table as it was when a write-back began.
struct TableSector {
  let sector: Int
  let offset: UInt64
  let bytes: [UInt8]
}

/// The refcounts of an image's clusters, and with them the allocation of host clusters ("Host cluster management").
final class Qcow2Refcounts {
  /// Outlives it. A weak reference would make every use of the image dearer.
  unowned var owner: Qcow2Image?
  private let file: any BlockFile
  private let clusterSize: UInt64
  private let clusterBits: UInt64
  private let bits: Int
  private let blockEntries: UInt64
  private(set) var table: [UInt64]
  private(set) var tableOffset: UInt64
  var dirtyTable = DirtySectors()
  let cache: TableCache
  /// No cluster below this one is free.
  private var firstFree: UInt64 = 1
  /// Clusters from here on were never used: the file ends before them, so they read as zeros.
  private(set) var untouched: UInt64
  /// The file has been made longer than what is in use.
  private var hasReserved = false
  /// Clusters of live tables, which no refcount makes free.
  private var metadata: Set<UInt64> = [0]

  init(file: any BlockFile, header: Qcow2Header, cacheBytes: Int) throws(BlockError) {
    self.file = file
    clusterSize = header.clusterSize
    clusterBits = UInt64(header.clusterBits)
    bits = header.refcountBits
    blockEntries = header.refcountBlockEntries
    tableOffset = header.refcountTableOffset
    table = try Qcow2Image.readTable(
      file, at: tableOffset, entries: UInt64(header.refcountTableClusters) * header.clusterSize / 8)
    cache = TableCache(unit: Int(min(clusterSize, 4096)), bytes: cacheBytes)
    untouched = file.length.dividedUp(by: header.clusterSize)
  }

  /// Remembers where tables are, so that a wrong refcount does not have them overwritten.
  func noteMetadata(l1: [UInt64], header: Qcow2Header, snapshots: [Qcow2Snapshot]) {
    protect(header.l1Offset, UInt64(header.l1Entries) * 8)
    protect(tableOffset, UInt64(table.count) * 8)
    for entry in table where entry & Qcow2Entry.offsetMask != 0 { protect(entry & Qcow2Entry.offsetMask, 1) }
    for entry in l1 where entry & Qcow2Entry.offsetMask != 0 { protect(entry & Qcow2Entry.offsetMask, 1) }
    for snapshot in snapshots { protect(snapshot.l1Offset, UInt64(snapshot.l1Entries) * 8) }
  }

  func protect(_ offset: UInt64, _ length: UInt64) {
    guard length > 0 else { return }
    for cluster in (offset >> clusterBits)...((offset &+ length &- 1) >> clusterBits) { metadata.insert(cluster) }
  }

  func unprotect(_ offset: UInt64, _ length: UInt64) {
    guard length > 0 else { return }
    for cluster in (offset >> clusterBits)...((offset &+ length &- 1) >> clusterBits) { metadata.remove(cluster) }
  }

  func isMetadata(cluster: UInt64) -> Bool { metadata.contains(cluster) }

  // MARK: One refcount

  /// The cached piece and the position in it of a cluster's refcount; nil where its block does not exist.
  private func locate(_ cluster: UInt64) throws(BlockError) -> (place: Int, index: Int)? {
    let block = cluster / blockEntries
    guard block < UInt64(table.count) else { return nil }
    let entry = table[Int(block)]
    guard entry != 0 else { return nil }
    guard entry & 511 == 0, entry % clusterSize == 0, entry <= Qcow2Entry.offsetMask else {
      throw fault(.misaligned(what: "refcount block", offset: entry))
    }
    let inBlock = (cluster % blockEntries) * UInt64(bits)
    let unitBits = UInt64(cache.unit) * 8
    let offset = entry + inBlock / unitBits * UInt64(cache.unit)
    return (try load(offset), Int(inBlock % unitBits))
  }

  private func load(_ offset: UInt64) throws(BlockError) -> Int {
    if let place = cache.find(offset) { return place }
    let place = try room(offset)
    do {
      try file.read(at: offset, into: UnsafeMutableRawBufferPointer(start: cache.bytes(place), count: cache.unit))
    } catch {
      cache.forget(place)
      throw error
    }
    return place
  }

  private func room(_ offset: UInt64) throws(BlockError) -> Int {
    if let place = cache.insert(offset) { return place }
    try owner?.writeBackNow(withRefcounts: true)
    guard let place = cache.insert(offset) else { throw .io(call: "cache a table of", path: file.path, errno: 12) }
    return place
  }

  private func fault(_ fault: ImageFault) -> BlockError {
    owner?.noteDamage(fault) ?? .malformed(path: file.path, fault)
  }

  func count(_ cluster: UInt64) throws(BlockError) -> UInt64 {
    guard let (place, bit) = try locate(cluster) else { return 0 }
    let bytes = UnsafeRawPointer(cache.bytes(place))
    switch bits {
    case 8: return UInt64(bytes.load(fromByteOffset: bit / 8, as: UInt8.self))
    case 16: return UInt64(bytes.bigEndian16(bit / 8))
    case 32: return UInt64(bytes.bigEndian32(bit / 8))
    case 64: return bytes.bigEndian64(bit / 8)
    default:
      return UInt64(bytes.load(fromByteOffset: bit / 8, as: UInt8.self) >> UInt8(bit % 8)) & ((1 << UInt64(bits)) - 1)
    }
  }

  private func store(_ value: UInt64, _ place: Int, _ bit: Int) {
    let bytes = cache.bytes(place)
    switch bits {
    case 8: bytes.storeBytes(of: UInt8(truncatingIfNeeded: value), toByteOffset: bit / 8, as: UInt8.self)
    case 16: bytes.storeBigEndian(UInt16(truncatingIfNeeded: value), bit / 8)
    case 32: bytes.storeBigEndian(UInt32(truncatingIfNeeded: value), bit / 8)
    case 64: bytes.storeBigEndian(value, bit / 8)
    default:
      let mask = UInt8((1 << bits) - 1) << UInt8(bit % 8)
      let old = bytes.load(fromByteOffset: bit / 8, as: UInt8.self)
      let new = old & ~mask | UInt8(truncatingIfNeeded: value) << UInt8(bit % 8) & mask
      bytes.storeBytes(of: new, toByteOffset: bit / 8, as: UInt8.self)
    }
    cache.markDirty(place)
  }

  /// Sets a refcount; its block is made where there is none.
  func set(_ cluster: UInt64, _ value: UInt64) throws(BlockError) {
    guard let (place, bit) = try locateOrMake(cluster) else { return }
    store(value, place, bit)
    if value == 0 { firstFree = min(firstFree, cluster) }
  }

  private func locateOrMake(_ cluster: UInt64) throws(BlockError) -> (place: Int, index: Int)? {
    if let found = try locate(cluster) { return found }
    try makeBlock(for: cluster)
    return try locate(cluster)
  }

  /// One reference more.
  func retain(_ cluster: UInt64) throws(BlockError) {
    let count = try count(cluster)
    guard count > 0 else { throw fault(.refcount(cluster: cluster, value: 0)) }
    guard count < maximum else { throw .unsupported(path: file.path, .refcountOverflow(bits: bits)) }
    try set(cluster, count + 1)
  }

  var maximum: UInt64 { bits == 64 ? UInt64.max : (1 << UInt64(bits)) - 1 }

  /// One reference less; whether it was the last.
  func release(_ cluster: UInt64) throws(BlockError) -> Bool {
    let count = try count(cluster)
    guard count > 0 else { throw fault(.refcount(cluster: cluster, value: 0)) }
    try set(cluster, count - 1)
    return count == 1
  }

  // MARK: Allocation

  /// Finds free host clusters, as many as `wanted` in a row or fewer, but at least one, and takes them. Byte offset and
  /// number of clusters.
  func allocate(upTo wanted: UInt64) throws(BlockError) -> (offset: UInt64, count: UInt64, isFresh: Bool) {
    var cluster = firstFree
    while true {
      if try isTaken(cluster) {
        cluster += 1
        continue
      }
      // The block that counts this cluster may take the cluster itself.
      if try locate(cluster) == nil {
        try makeBlock(for: cluster)
        continue
      }
      break
    }
    let first = cluster
    var count: UInt64 = 0
    while count < wanted, !(try isTaken(first + count)) {
      guard let (place, bit) = try locate(first + count) else { break }
      store(1, place, bit)
      count += 1
    }
    firstFree = first + count
    let isFresh = first >= untouched
    untouched = max(untouched, first + count)
    guard (first + count) << clusterBits <= Qcow2Entry.offsetMask else {
      throw .io(call: "make larger", path: file.path, errno: 27)
    }
    let end = (first + count) << clusterBits
    if end > file.length {
      file.reserve(upTo: end + min(max(end / 4, 1 << 20), 64 << 20))
      hasReserved = file.length > end
    }
    return (first << clusterBits, count, isFresh)
  }

  /// Exactly `count` clusters in a row, for tables.
  func allocateContiguous(_ count: UInt64) throws(BlockError) -> UInt64 {
    if count == 1 { return try allocate(upTo: 1).offset }
    var run: UInt64 = 0
    var cluster = firstFree
    while run < count {
      if try isTaken(cluster) {
        run = 0
      } else if try locate(cluster) == nil {
        try makeBlock(for: cluster)
        if try isTaken(cluster) { run = 0 } else { run += 1 }
      } else {
        run += 1
      }
      cluster += 1
    }
    let first = cluster - count
    for index in first..<cluster { try set(index, 1) }
    untouched = max(untouched, cluster)
    return first << clusterBits
  }

  /// Gives back what the file has been made longer by; a file that keeps it is as good.
  func trim() {
    guard hasReserved else { return }
    hasReserved = false
    try? file.setLength(min(file.length, untouched << clusterBits))
  }

  private func isTaken(_ cluster: UInt64) throws(BlockError) -> Bool {
    if metadata.contains(cluster) { return true }
    return try count(cluster) != 0
  }

  /// Makes the refcount block that counts `cluster`, in the first cluster it counts itself.
  private func makeBlock(for cluster: UInt64) throws(BlockError) {
    let block = cluster / blockEntries
    if block >= UInt64(table.count) { return try growTable(for: block) }
    let home = block * blockEntries
    guard !metadata.contains(home) else { throw fault(.overlap(what: "tables", offset: home << clusterBits)) }
    try zeroCluster(home)
    table[Int(block)] = home << clusterBits
    dirtyTable.mark(entry: Int(block))
    protect(home << clusterBits, 1)
    try set(home, 1)
    untouched = max(untouched, home + 1)
  }

  private func zeroCluster(_ cluster: UInt64) throws(BlockError) {
    cache.forget(from: cluster << clusterBits, length: clusterSize)
    let zeros = DiskBuffer(count: Int(clusterSize), zeroed: true)
    try file.write(at: cluster << clusterBits, from: UnsafeRawBufferPointer(zeros.bytes))
  }

  /// A larger refcount table, with the blocks that count it, in clusters that no block counted before. It is durable
  /// before the header names it.
  private func growTable(for block: UInt64) throws(BlockError) {
    // The blocks that the old table has must be on disk before the new table names them.
    try owner?.writeBackNow(withRefcounts: true)
    let first = UInt64(table.count) * blockEntries
    let home = max(first, block * blockEntries)
    var entries = max(UInt64(table.count) * 3 / 2, block + 1)
    var blocks: UInt64 = 1
    var tableClusters: UInt64 = 0
    repeat {
      tableClusters = (entries * 8).dividedUp(by: clusterSize)
      blocks = (tableClusters + blocks).dividedUp(by: blockEntries)
      entries = max(entries, home / blockEntries + blocks)
    } while (entries * 8).dividedUp(by: clusterSize) != tableClusters
      || (tableClusters + blocks).dividedUp(by: blockEntries) != blocks
    entries = tableClusters * clusterSize / 8
    guard entries * 8 <= Qcow2Header.maximumRefcountTableBytes else {
      throw .malformed(
        path: file.path,
        .beyondLimit(
          what: "refcount table's size", value: entries * 8, limit: Qcow2Header.maximumRefcountTableBytes))
    }
    let oldOffset = tableOffset
    let oldCount = UInt64(table.count) * 8 / clusterSize
    var larger = table + [UInt64](repeating: 0, count: Int(entries) - table.count)
    for index in 0..<blocks {
      try zeroCluster(home + index)
      larger[Int(home / blockEntries + index)] = (home + index) << clusterBits
    }
    let newOffset = (home + blocks) << clusterBits
    var bytes: [UInt8] = []
    bytes.reserveCapacity(larger.count * 8)
    for entry in larger { bytes.appendBigEndian(entry) }
    try file.writeArray(at: newOffset, bytes)
    table = larger
    tableOffset = newOffset
    protect(home << clusterBits, (blocks + tableClusters) << clusterBits)
    for cluster in home..<(home + blocks + tableClusters) { try set(cluster, 1) }
    untouched = max(untouched, home + blocks + tableClusters)
    for copy in cache.takeDirtyCopies() {
      try file.write(at: copy.offset, from: UnsafeRawBufferPointer(copy.buffer.bytes))
    }
    try file.flush()
    try owner?.adoptRefcountTable(offset: newOffset, clusters: UInt32(tableClusters))
    unprotect(oldOffset, oldCount << clusterBits)
    for cluster in 0..<oldCount { owner?.free((oldOffset >> clusterBits) + cluster) }
  }

  /// Starts again with a table that a repair has written.
  func adopt(table: [UInt64], offset: UInt64) {
    self.table = table
    tableOffset = offset
    firstFree = 1
  }
}

extension TableCache {
  /// `takeDirty` for a writer that writes at once.
  func takeDirtyCopies() -> [TableCopy] {
    let copies = takeDirty()
    finishWriting(copies, failed: false)
    return copies
  }
}
