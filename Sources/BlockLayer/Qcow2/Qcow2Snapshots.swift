/// An internal snapshot's entry in the snapshot table ("Snapshots").
public struct Qcow2Snapshot: Equatable, Sendable {
  /// The unique identifier.
  public var id: String
  /// The name.
  public var name: String
  /// Seconds since 1970.
  public var seconds: UInt32
  /// Nanoseconds beyond them.
  public var nanoseconds: UInt32
  /// Nanoseconds that the guest had run.
  public var guestClock: UInt64
  /// Bytes of saved VM state.
  public var stateSize: UInt64
  /// The disk's size at the time.
  public var diskSize: UInt64?
  var l1Offset: UInt64
  var l1Entries: UInt32
  /// Extra data beyond what is known.
  var furtherExtra: [UInt8] = []

  static let maximumTableBytes = 64 << 20

  static func readAll(_ file: any BlockFile, _ header: Qcow2Header) throws(BlockError) -> [Qcow2Snapshot] {
    guard header.snapshotCount > 0 else { return [] }
    func truncated(_ need: Int, _ have: Int) -> BlockError {
      .malformed(
        path: file.path, .truncated(what: "snapshot table", need: UInt64(max(0, need)), have: UInt64(max(0, have))))
    }
    let available = Int(min(file.length - min(header.snapshotsOffset, file.length), UInt64(Self.maximumTableBytes)))
    var snapshots: [Qcow2Snapshot] = []
    var position = 0
    for _ in 0..<header.snapshotCount {
      guard position + 40 <= available else { throw truncated(position + 40, available) }
      let base = header.snapshotsOffset + UInt64(position)
      let fixed = try file.readArray(at: base, count: 40)
      let (idLength, nameLength) = (Int(fixed.bigEndian16(12)), Int(fixed.bigEndian16(14)))
      let extraLength = Int(fixed.bigEndian32(36))
      let length = 40 + extraLength + idLength + nameLength
      guard extraLength <= 1024, position + length <= available else { throw truncated(position + length, available) }
      let rest = try file.readArray(at: base + 40, count: length - 40)
      guard let id = String(validating: rest[extraLength..<(extraLength + idLength)], as: UTF8.self),
        let name = String(validating: rest[(extraLength + idLength)...], as: UTF8.self)
      else { throw .malformed(path: file.path, .text(what: "snapshot's name")) }
      let snapshot = Qcow2Snapshot(
        id: id, name: name, seconds: fixed.bigEndian32(16), nanoseconds: fixed.bigEndian32(20),
        guestClock: fixed.bigEndian64(24),
        stateSize: extraLength >= 8 ? rest.bigEndian64(0) : UInt64(fixed.bigEndian32(32)),
        diskSize: extraLength >= 16 ? rest.bigEndian64(8) : nil, l1Offset: fixed.bigEndian64(0),
        l1Entries: fixed.bigEndian32(8), furtherExtra: extraLength > 16 ? Array(rest[16..<extraLength]) : [])
      guard UInt64(snapshot.l1Entries) * 8 <= Qcow2Header.maximumL1Bytes else {
        throw .malformed(
          path: file.path,
          .beyondLimit(
            what: "snapshot's L1 table size", value: UInt64(snapshot.l1Entries) * 8,
            limit: Qcow2Header.maximumL1Bytes))
      }
      try header.place("snapshot's L1 table", snapshot.l1Offset, UInt64(snapshot.l1Entries) * 8, in: file)
      snapshots.append(snapshot)
      position = (position + length + 7) & ~7
    }
    return snapshots
  }

  func serialized(diskSize: UInt64) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(l1Offset)
    bytes.appendBigEndian(l1Entries)
    bytes.appendBigEndian(UInt16(id.utf8.count))
    bytes.appendBigEndian(UInt16(name.utf8.count))
    bytes.appendBigEndian(seconds)
    bytes.appendBigEndian(nanoseconds)
    bytes.appendBigEndian(guestClock)
    bytes.appendBigEndian(UInt32(truncatingIfNeeded: stateSize))
    bytes.appendBigEndian(UInt32(16 + furtherExtra.count))
    bytes.appendBigEndian(stateSize)
    bytes.appendBigEndian(self.diskSize ?? diskSize)
    bytes += furtherExtra
    bytes += Array(id.utf8)
    bytes += Array(name.utf8)
    return bytes + [UInt8](repeating: 0, count: (8 - bytes.count % 8) % 8)
  }
}

/// Internal snapshots change refcounts and flags all over the image, which no single write can: the image is marked
/// dirty meanwhile, so that whoever opens it after a crash puts the refcounts right. No request may be under way.
extension Qcow2Image {
  /// The snapshots, in the order of the table.
  public var snapshots: [Qcow2Snapshot] { snapshotTable }

  /// The snapshot with this identifier or, where there is none, this name.
  public func snapshot(_ name: String) throws(BlockError) -> Qcow2Snapshot {
    guard let found = snapshotTable.first(where: { $0.id == name }) ?? snapshotTable.first(where: { $0.name == name })
    else { throw .unknown(what: "snapshot", name: name, path: file.path) }
    return found
  }

  /// Keeps the disk as it is now under a name; `seconds` and `nanoseconds` since 1970.
  public func createSnapshot(_ name: String, seconds: UInt32, nanoseconds: UInt32) throws(BlockError) {
    try requireWritable()
    guard !name.isEmpty, name.utf8.count <= 255 else {
      throw .invalid(what: "snapshot name", value: name, expected: "1 to 255 bytes")
    }
    guard snapshotTable.count < Qcow2Header.maximumSnapshots else {
      throw .invalid(what: "snapshot", value: name, expected: "fewer than \(Qcow2Header.maximumSnapshots) of them")
    }
    try beginStructuralChange()
    let id = (snapshotTable.compactMap { UInt64($0.id) }.max() ?? 0) + 1
    try changeReferences(of: l1, by: .more)
    let copy = try writeL1(l1.map { $0 & ~Qcow2Entry.copied })
    try refreshCopiedFlags()
    try writeBackNow(withRefcounts: true)
    let snapshot = Qcow2Snapshot(
      id: "\(id)", name: name, seconds: seconds, nanoseconds: nanoseconds, guestClock: 0, stateSize: 0,
      diskSize: size, l1Offset: copy, l1Entries: UInt32(l1.count))
    try replaceSnapshotTable(snapshotTable + [snapshot])
    try endStructuralChange()
  }

  /// Makes the disk what it was when the snapshot was taken.
  public func applySnapshot(_ name: String) throws(BlockError) {
    try requireWritable()
    let snapshot = try snapshot(name)
    guard snapshot.diskSize ?? size == size else { throw .unsupported(path: file.path, .internalSnapshotOfOtherSize) }
    try beginStructuralChange()
    let saved = try Self.readTable(file, at: snapshot.l1Offset, entries: UInt64(snapshot.l1Entries))
    try checkL1(saved)
    let needed = max(saved.count, Int(header.l1EntriesNeeded(for: size)))
    let table = saved + [UInt64](repeating: 0, count: needed - saved.count)
    try changeReferences(of: table, by: .more)
    let old = (l1, header.l1Offset, header.l1Entries)
    let offset = try writeL1(table)
    try writeBackNow(withRefcounts: true)
    header.l1Offset = offset
    header.l1Entries = UInt32(table.count)
    try writeHeader()
    l1 = table
    refcounts.protect(offset, UInt64(table.count) * 8)
    try changeReferences(of: old.0, by: .fewer)
    freeRange(old.1, UInt64(old.2) * 8)
    try refreshCopiedFlags()
    try endStructuralChange()
    bitmapStore.mark(0, size)
  }

  /// Gives up a snapshot and the clusters that only it refers to.
  public func deleteSnapshot(_ name: String) throws(BlockError) {
    try requireWritable()
    let snapshot = try snapshot(name)
    let saved = try Self.readTable(file, at: snapshot.l1Offset, entries: UInt64(snapshot.l1Entries))
    try checkL1(saved)
    try beginStructuralChange()
    try replaceSnapshotTable(snapshotTable.filter { $0.id != snapshot.id })
    try changeReferences(of: saved, by: .fewer)
    freeRange(snapshot.l1Offset, UInt64(snapshot.l1Entries) * 8)
    try refreshCopiedFlags()
    try endStructuralChange()
  }

  /// Reads the disk as it was when the snapshot was taken, from an image that is open for reading.
  public func readSnapshot(_ name: String) throws(BlockError) {
    guard file.isReadOnly else { throw .unsupported(path: file.path, .operation("reading a snapshot while writing")) }
    let snapshot = try snapshot(name)
    let saved = try Self.readTable(file, at: snapshot.l1Offset, entries: UInt64(snapshot.l1Entries))
    try checkL1(saved)
    header.size = snapshot.diskSize ?? size
    l1 = saved
  }

  /// Gives up everything that the layer itself holds, after it has been committed: its backing file shows through.
  public func makeEmpty() throws(BlockError) {
    try requireWritable()
    try checkL1(l1)
    try beginStructuralChange()
    let old = l1
    for index in l1.indices where l1[index] != 0 {
      l1[index] = 0
      dirtyL1.mark(entry: index)
    }
    try changeReferences(of: old, by: .fewer)
    try endStructuralChange()
  }

  func requireWritable() throws(BlockError) {
    if let damage { throw .damaged(path: file.path, damage) }
    guard !file.isReadOnly else { throw .readOnly(path: file.path) }
  }

  func beginStructuralChange() throws(BlockError) {
    try writeBackNow(withRefcounts: true)
    release(grace.add([]))
    try setDirty()
  }

  func endStructuralChange() throws(BlockError) {
    try writeBackNow(withRefcounts: true)
    // What the first one freed.
    try writeBackNow(withRefcounts: true)
    if !header.usesLazyRefcounts { try clearDirty() }
  }

  enum ReferenceChange { case more, fewer }

  func checkL1(_ table: [UInt64]) throws(BlockError) {
    for entry in table {
      guard entry & Qcow2Entry.offsetMask % clusterSize == 0, entry & Qcow2Entry.l1Reserved == 0 else {
        throw .malformed(path: file.path, .reservedBits(what: "L1 entry", value: entry))
      }
    }
  }

  /// One reference more or fewer to each L2 table of an L1 table and to each cluster that they name.
  private func changeReferences(of table: [UInt64], by change: ReferenceChange) throws(BlockError) {
    for entry in table {
      let offset = entry & Qcow2Entry.offsetMask
      guard offset != 0 else { continue }
      for index in 0..<Int(header.l2Entries) {
        for cluster in hostClusters(try l2Value(offset, index).descriptor) {
          try changeReference(of: cluster, by: change)
        }
      }
      try changeReference(of: offset >> clusterBits, by: change)
    }
  }

  private func changeReference(of cluster: UInt64, by change: ReferenceChange) throws(BlockError) {
    switch change {
    case .more: try refcounts.retain(cluster)
    case .fewer: free(cluster)
    }
  }

  func l2Value(_ table: UInt64, _ index: Int) throws(BlockError) -> Qcow2L2Entry {
    let byte = index * Int(header.l2EntrySize)
    let place = try l2Load(table + UInt64(byte / l2Cache.unit * l2Cache.unit))
    return l2Entry(place, byte % l2Cache.unit)
  }

  /// Makes the flags of the active tables agree with the refcounts.
  func refreshCopiedFlags() throws(BlockError) {
    // Frees that wait lower refcounts, and the flags must say what will be.
    try writeBackNow(withRefcounts: true)
    for (l1Index, entry) in l1.enumerated() where entry & Qcow2Entry.offsetMask != 0 {
      let table = entry & Qcow2Entry.offsetMask
      let tableFlag = try refcounts.count(table >> clusterBits) == 1 ? Qcow2Entry.copied : 0
      if entry & Qcow2Entry.copied != tableFlag {
        l1[l1Index] = entry & ~Qcow2Entry.copied | tableFlag
        dirtyL1.mark(entry: l1Index)
      }
      for index in 0..<Int(header.l2Entries) {
        let value = try l2Value(table, index).descriptor
        guard value & Qcow2Entry.compressed == 0, value & Qcow2Entry.offsetMask != 0 else { continue }
        let cluster = (value & Qcow2Entry.offsetMask) >> clusterBits
        let flag = try refcounts.count(cluster) == 1 ? Qcow2Entry.copied : 0
        guard value & Qcow2Entry.copied != flag else { continue }
        let byte = index * Int(header.l2EntrySize)
        let place = try l2Load(table + UInt64(byte / l2Cache.unit * l2Cache.unit))
        l2Cache.bytes(place).storeBigEndian(value & ~Qcow2Entry.copied | flag, byte % l2Cache.unit)
        l2Cache.markDirty(place)
      }
    }
  }

  /// An L1 table in clusters of its own.
  func writeL1(_ table: [UInt64]) throws(BlockError) -> UInt64 {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(table.count * 8)
    for entry in table { bytes.appendBigEndian(entry) }
    return try writeTable(bytes)
  }

  /// Writes bytes into new clusters, filled up with zeros.
  func writeTable(_ bytes: [UInt8]) throws(BlockError) -> UInt64 {
    let clusters = max(1, UInt64(bytes.count).dividedUp(by: clusterSize))
    let offset = try refcounts.allocateContiguous(clusters)
    try file.writeArray(at: offset, bytes + [UInt8](repeating: 0, count: Int(clusters * clusterSize) - bytes.count))
    return offset
  }

  func freeRange(_ offset: UInt64, _ length: UInt64) {
    guard length > 0, offset > 0 else { return }
    refcounts.unprotect(offset, length)
    for cluster in (offset >> clusterBits)...((offset + length - 1) >> clusterBits) { free(cluster) }
  }

  private func replaceSnapshotTable(_ table: [Qcow2Snapshot]) throws(BlockError) {
    let oldLength = snapshotTable.reduce(0) { $0 + $1.serialized(diskSize: size).count }
    let oldOffset = header.snapshotsOffset
    let bytes = table.flatMap { $0.serialized(diskSize: size) }
    guard bytes.count <= Qcow2Snapshot.maximumTableBytes else {
      throw .malformed(
        path: file.path,
        .beyondLimit(
          what: "snapshot table's size", value: UInt64(bytes.count), limit: UInt64(Qcow2Snapshot.maximumTableBytes)))
    }
    let offset = table.isEmpty ? 0 : try writeTable(bytes)
    try writeBackNow(withRefcounts: true)
    try file.flush()
    header.snapshotsOffset = offset
    header.snapshotCount = UInt32(table.count)
    try writeHeader()
    snapshotTable = table
    freeRange(oldOffset, UInt64(oldLength))
  }
}
