/// A disk in a qcow2 image. One object owns the image's metadata; see docs/disks.md for the order of its writes.
public final class Qcow2Image: BlockNode {
  /// How an image is opened.
  public struct Options: Sendable {
    /// Bytes of L2 tables held in memory.
    public var l2CacheBytes = 32 << 20
    /// Bytes of refcount blocks held in memory.
    public var refcountCacheBytes = 4 << 20
    /// Freed clusters are given back to the host.
    public var punchesHoles = true
    /// An image that is marked dirty or corrupt is opened as it is, for `check`.
    public var forCheck = false

    /// The usual values.
    public init() {}
  }

  /// The image's file.
  public let file: any BlockFile
  /// The next layer, from which unallocated clusters are read.
  public var backing: (any BlockNode)?
  var header: Qcow2Header
  let options: Options
  let clusterBits: UInt64
  /// Bytes of a cluster.
  public let clusterSize: UInt64
  /// A cluster's parts may be allocated one by one.
  public let hasExtendedL2: Bool
  /// The smallest unit of allocation: a 32nd of a cluster with extended L2 entries, else a cluster.
  let subclusterBits: UInt64

  // Tables.
  var l1: [UInt64]
  var dirtyL1 = DirtySectors()
  let l2Cache: TableCache
  let refcounts: Qcow2Refcounts
  var snapshotTable: [Qcow2Snapshot] = []
  var bitmapStore = Qcow2Bitmaps()
  /// Bitmaps whose clusters are given up when the others are stored.
  var removedBitmaps: [Qcow2Bitmap] = []

  // Write-back.
  var writeBack: Qcow2WriteBack?
  var waitingFlushes: [BlockRequest] = []
  /// Host clusters that tables in memory name no more, with a reference of each still counted.
  var pendingFrees: [UInt64] = []
  var grace = GracePeriods()
  /// Once damage has been seen, nothing more is written.
  var damage: ImageFault?

  // Requests.
  var allocations: [UInt64: Qcow2Allocation] = [:]
  var compressedTail: UInt64 = 0
  var decompressed = DecompressedCluster()

  /// Opens the image in `file`. Its backing file is the caller's to open and to set.
  public init(_ file: any BlockFile, options: Options = Options()) throws(BlockError) {
    let header = try Qcow2Header(file: file)
    self.file = file
    self.header = header
    self.options = options
    clusterBits = UInt64(header.clusterBits)
    clusterSize = header.clusterSize
    hasExtendedL2 = header.hasExtendedL2
    subclusterBits = UInt64(header.clusterBits) - (header.hasExtendedL2 ? 5 : 0)
    l1 = try Self.readTable(file, at: header.l1Offset, entries: UInt64(header.l1Entries))
    let unit = Int(min(clusterSize, 4096))
    l2Cache = TableCache(unit: unit, bytes: options.l2CacheBytes)
    refcounts = try Qcow2Refcounts(file: file, header: header, cacheBytes: options.refcountCacheBytes)
    snapshotTable = try Qcow2Snapshot.readAll(file, header)
    refcounts.owner = self
    guard !options.forCheck else { return }
    bitmapStore = try Qcow2Bitmaps(file: file, header: header)
    if !file.isReadOnly { try prepareForWriting() }
  }

  private func prepareForWriting() throws(BlockError) {
    guard header.incompatible & Qcow2Header.Incompatible.corrupt == 0 else {
      throw .unsupported(path: file.path, .corrupt)
    }
    if header.incompatible & Qcow2Header.Incompatible.dirty != 0 {
      _ = try repair([.leaks, .errors])
      guard header.incompatible & Qcow2Header.Incompatible.dirty == 0 else {
        throw .unsupported(path: file.path, .dirty)
      }
    }
    guard header.refcountTableClusters > 0 else {
      throw .malformed(path: file.path, .tableTooSmall(what: "refcount table", entries: 0, need: 1))
    }
    refcounts.noteMetadata(l1: l1, header: header, snapshots: snapshotTable)
    let unknown = header.autoclear & ~Qcow2Header.Autoclear.known
    if unknown != 0 {
      header.autoclear &= ~unknown
      try writeHeader()
    }
    try beginBitmaps()
  }

  static func readTable(_ file: any BlockFile, at offset: UInt64, entries: UInt64) throws(BlockError) -> [UInt64] {
    let bytes = try file.readArray(at: offset, count: Int(entries) * 8)
    return (0..<Int(entries)).map { bytes.bigEndian64($0 * 8) }
  }

  /// The disk's size in bytes.
  public var size: UInt64 { header.size }
  /// Whether writes are refused.
  public var isReadOnly: Bool { file.isReadOnly || damage != nil }
  /// The backing file's name as the image has it.
  public var backingName: String? { header.backingName }
  /// The backing file's format as the image has it.
  public var backingFormat: String? { header.backingFormat }
  /// The format's version, 2 or 3.
  public var version: UInt32 { header.version }
  /// Bits of a refcount.
  public var refcountBits: Int { header.refcountBits }
  /// Refcounts are put right after a crash instead of being kept right.
  public var usesLazyRefcounts: Bool { header.usesLazyRefcounts }
  /// How clusters are compressed.
  public var compression: CompressionType { CompressionType(rawValue: header.compressionType) ?? .zlib }
  /// The image says that its refcounts may be wrong.
  public var isMarkedDirty: Bool { header.incompatible & Qcow2Header.Incompatible.dirty != 0 }
  /// The image says that it is damaged.
  public var isMarkedCorrupt: Bool { header.incompatible & Qcow2Header.Incompatible.corrupt != 0 }

  /// The header's first cluster, written in one go and made durable. What matters is in the first sector.
  func writeHeader() throws(BlockError) {
    try file.writeArray(at: 0, try header.serialized())
    try file.flush()
  }

  /// Begins a request.
  public func submit(_ request: BlockRequest) {
    if let error = rangeError(request) { return request.completion(error) }
    if request.operation == .flush { return submitFlush(request) }
    if request.length == 0 { return request.completion(nil) }
    if request.operation != .read {
      if let damage { return request.completion(.damaged(path: file.path, damage)) }
      if file.isReadOnly { return request.completion(.readOnly(path: file.path)) }
      if let error = prepareForChange(at: request.offset, length: request.length) {
        return request.completion(error)
      }
    }
    switch request.operation {
    case .read: Qcow2Read(self, request).advance()
    case .write: Qcow2Write(self, request).advance()
    case .discard, .writeZeroes: Qcow2Zero(self, request).advance()
    case .flush: break
    }
  }

  /// What the first change after opening, or any change, needs before it.
  func prepareForChange(at offset: UInt64, length: UInt64) -> BlockError? {
    do throws(BlockError) {
      if header.usesLazyRefcounts { try setDirty() }
      bitmapStore.mark(offset, length)
      return nil
    } catch {
      return error
    }
  }

  /// Says on disk that refcounts may be wrong from now on.
  func setDirty() throws(BlockError) {
    guard header.version == 3, header.incompatible & Qcow2Header.Incompatible.dirty == 0 else { return }
    header.incompatible |= Qcow2Header.Incompatible.dirty
    try writeHeader()
  }

  /// Says on disk that the refcounts are right.
  func clearDirty() throws(BlockError) {
    guard header.incompatible & Qcow2Header.Incompatible.dirty != 0 else { return }
    header.incompatible &= ~Qcow2Header.Incompatible.dirty
    try writeHeader()
  }

  /// Stops writing, because what was read cannot be true, and says so on disk.
  func noteDamage(_ fault: ImageFault) -> BlockError {
    if !file.isReadOnly, !options.forCheck, damage == nil {
      damage = fault
      if header.version == 3 {
        header.incompatible |= Qcow2Header.Incompatible.corrupt
        // The image is refused from now on whether or not this can be written.
        try? writeHeader()
      }
      return .damaged(path: file.path, fault)
    }
    return .malformed(path: file.path, fault)
  }

  /// Lets writes be, or refuses them, from now on; then the image is as after a close. No write may be under way.
  public func setWritable(_ writable: Bool) throws(BlockError) {
    guard writable == file.isReadOnly else { return }
    if !writable {
      try settle()
      return try file.setWritable(false)
    }
    try file.setWritable(true)
    do throws(BlockError) {
      try prepareForWriting()
    } catch {
      try? file.setWritable(false)
      throw error
    }
  }

  /// Writes everything back and closes the file. No request may be under way.
  public func close() throws(BlockError) {
    defer { file.close() }
    try settle()
  }

  private func settle() throws(BlockError) {
    guard !file.isReadOnly, !options.forCheck, damage == nil else { return }
    try storeBitmaps()
    try writeBackNow(withRefcounts: true)
    // What the last write-back freed.
    try writeBackNow(withRefcounts: true)
    if header.usesLazyRefcounts { try clearDirty() }
    refcounts.trim()
  }
}
