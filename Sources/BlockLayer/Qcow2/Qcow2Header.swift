/// A qcow2 image's header with its extensions: QEMU's docs/interop/qcow2.txt, "Header".
struct Qcow2Header: Equatable {
  /// Bits of `incompatible_features`.
  enum Incompatible {
    static let dirty: UInt64 = 1 << 0
    static let corrupt: UInt64 = 1 << 1
    static let externalData: UInt64 = 1 << 2
    static let compressionType: UInt64 = 1 << 3
    static let extendedL2: UInt64 = 1 << 4
    static let known = dirty | corrupt | externalData | compressionType | extendedL2
  }

  /// Bits of `compatible_features`.
  enum Compatible {
    static let lazyRefcounts: UInt64 = 1 << 0
  }

  /// Bits of `autoclear_features`.
  enum Autoclear {
    static let bitmaps: UInt64 = 1 << 0
    static let known = bitmaps
  }

  /// A header extension, kept as it is where its type is not known.
  struct Extension: Equatable {
    var type: UInt32
    var data: [UInt8]

    static let end: UInt32 = 0
    static let backingFormat: UInt32 = 0xe279_2aca
    static let featureNames: UInt32 = 0x6803_f857
    static let bitmaps: UInt32 = 0x2385_2875
    static let encryption: UInt32 = 0x0537_be77
    static let externalData: UInt32 = 0x4441_5441
  }

  static let magic: UInt32 = 0x5146_49fb
  /// QEMU's limits: larger images cannot be opened there either.
  static let maximumL1Bytes: UInt64 = 32 << 20
  static let maximumRefcountTableBytes: UInt64 = 8 << 20
  static let maximumSnapshots: UInt32 = 65536
  static let maximumBackingNameBytes: UInt32 = 1023

  var version: UInt32 = 3
  var backingName: String?
  var clusterBits: UInt32 = 16
  var size: UInt64 = 0
  var encryptionMethod: UInt32 = 0
  var l1Entries: UInt32 = 0
  var l1Offset: UInt64 = 0
  var refcountTableOffset: UInt64 = 0
  var refcountTableClusters: UInt32 = 0
  var snapshotCount: UInt32 = 0
  var snapshotsOffset: UInt64 = 0
  var incompatible: UInt64 = 0
  var compatible: UInt64 = 0
  var autoclear: UInt64 = 0
  var refcountOrder: UInt32 = 4
  var compressionType: UInt8 = 0
  /// Header bytes from 112 on, which belong to features that are not known and may be ignored.
  var furtherFields: [UInt8] = []
  var extensions: [Extension] = []

  var clusterSize: UInt64 { 1 << UInt64(clusterBits) }
  /// L2 entries have a second word, with two bits for each 32nd of a cluster ("Extended L2 Entries").
  var hasExtendedL2: Bool { incompatible & Incompatible.extendedL2 != 0 }
  /// Bytes of an L2 entry.
  var l2EntrySize: UInt64 { hasExtendedL2 ? 16 : 8 }
  /// Entries of an L2 table.
  var l2Entries: UInt64 { clusterSize / l2EntrySize }
  /// Bytes of the disk that one L1 entry stands for.
  var l2Coverage: UInt64 { clusterSize * l2Entries }
  var refcountBits: Int { 1 << Int(refcountOrder) }
  /// Clusters that one refcount block counts.
  var refcountBlockEntries: UInt64 { clusterSize * 8 / UInt64(refcountBits) }
  /// The highest refcount that can be stored.
  var maximumRefcount: UInt64 { refcountBits == 64 ? UInt64.max : (1 << UInt64(refcountBits)) - 1 }
  var usesLazyRefcounts: Bool { compatible & Compatible.lazyRefcounts != 0 }

  var backingFormat: String? {
    extensions.first { $0.type == Extension.backingFormat }.map { String(decoding: $0.data, as: UTF8.self) }
  }

  /// L1 entries that a disk of `size` bytes needs.
  func l1EntriesNeeded(for size: UInt64) -> UInt64 { size.dividedUp(by: l2Coverage) }

  /// Replaces, adds or (nil) removes the extension of one type.
  mutating func setExtension(_ type: UInt32, _ data: [UInt8]?) {
    extensions.removeAll { $0.type == type }
    if let data { extensions.append(Extension(type: type, data: data)) }
  }
}

// MARK: Reading

extension Qcow2Header {
  /// Reads and checks a file's header.
  init(file: any BlockFile) throws(BlockError) {
    func fault(_ fault: ImageFault) -> BlockError { .malformed(path: file.path, fault) }
    let fixed = try file.readArray(at: 0, count: 112)
    guard fixed.bigEndian32(0) == Self.magic else { throw fault(.noMagic) }
    guard file.length >= 72 else { throw fault(.truncated(what: "header", need: 72, have: file.length)) }
    version = fixed.bigEndian32(4)
    guard version == 2 || version == 3 else { throw fault(.version(version)) }
    clusterBits = fixed.bigEndian32(20)
    guard (9...21).contains(clusterBits) else { throw fault(.clusterBits(clusterBits)) }
    size = fixed.bigEndian64(24)
    encryptionMethod = fixed.bigEndian32(32)
    l1Entries = fixed.bigEndian32(36)
    l1Offset = fixed.bigEndian64(40)
    refcountTableOffset = fixed.bigEndian64(48)
    refcountTableClusters = fixed.bigEndian32(56)
    snapshotCount = fixed.bigEndian32(60)
    snapshotsOffset = fixed.bigEndian64(64)
    var headerLength: UInt32 = 72
    if version == 3 {
      incompatible = fixed.bigEndian64(72)
      compatible = fixed.bigEndian64(80)
      autoclear = fixed.bigEndian64(88)
      refcountOrder = fixed.bigEndian32(96)
      headerLength = fixed.bigEndian32(100)
      guard headerLength >= 104, UInt64(headerLength) <= clusterSize else { throw fault(.headerLength(headerLength)) }
      guard refcountOrder <= 6 else { throw fault(.refcountOrder(refcountOrder)) }
      if headerLength > 104 { compressionType = fixed[104] }
      if headerLength > 112 {
        furtherFields = try file.readArray(at: 112, count: Int(headerLength) - 112)
      }
    }
    try readExtensions(file, from: UInt64(headerLength), backingOffset: fixed.bigEndian64(8))
    try readBackingName(file, offset: fixed.bigEndian64(8), length: fixed.bigEndian32(16))
    try checkFeatures(file)
    try checkTables(file)
  }

  private mutating func readExtensions(
    _ file: any BlockFile, from start: UInt64, backingOffset: UInt64
  ) throws(BlockError) {
    let end = backingOffset >= start && backingOffset < clusterSize ? backingOffset : clusterSize
    let area = try file.readArray(at: 0, count: Int(end))
    var position = Int(start)
    while position + 8 <= area.count {
      let type = area.bigEndian32(position)
      let length = Int(area.bigEndian32(position + 4))
      position += 8
      if type == Extension.end { return }
      guard length <= area.count - position else {
        throw .malformed(
          path: file.path,
          .truncated(what: "header extension", need: UInt64(length), have: UInt64(area.count - position)))
      }
      extensions.append(Extension(type: type, data: Array(area[position..<position + length])))
      position += (length + 7) & ~7
    }
  }

  private mutating func readBackingName(_ file: any BlockFile, offset: UInt64, length: UInt32) throws(BlockError) {
    guard offset != 0 else { return }
    guard length <= Self.maximumBackingNameBytes else {
      throw .malformed(
        path: file.path,
        .beyondLimit(
          what: "backing file name's length", value: UInt64(length), limit: UInt64(Self.maximumBackingNameBytes)))
    }
    guard offset < clusterSize, offset + UInt64(length) <= clusterSize else {
      throw .malformed(
        path: file.path, .outsideFile(what: "backing file name", offset: offset, length: UInt64(length)))
    }
    guard length > 0 else { return }
    guard let name = String(validating: try file.readArray(at: offset, count: Int(length)), as: UTF8.self) else {
      throw .malformed(path: file.path, .text(what: "backing file name"))
    }
    backingName = name
  }

  private func checkFeatures(_ file: any BlockFile) throws(BlockError) {
    let unknown = incompatible & ~Incompatible.known
    guard unknown == 0 else {
      throw .unsupported(path: file.path, .features(unknown, names: featureNames(unknown)))
    }
    guard encryptionMethod == 0 else { throw .unsupported(path: file.path, .encryption) }
    guard incompatible & Incompatible.externalData == 0 else { throw .unsupported(path: file.path, .externalData) }
    guard !hasExtendedL2 || clusterBits >= 14 else {
      throw .malformed(path: file.path, .subclusters(clusterBits: clusterBits))
    }
    let named = incompatible & Incompatible.compressionType != 0
    guard named ? compressionType == 1 : compressionType == 0 else {
      throw .malformed(path: file.path, .compression(type: compressionType))
    }
  }

  /// The feature name table's names of incompatible features.
  private func featureNames(_ bits: UInt64) -> [String] {
    guard let table = extensions.first(where: { $0.type == Extension.featureNames })?.data else { return [] }
    return stride(from: 0, to: table.count / 48 * 48, by: 48).compactMap { start in
      guard table[start] == 0, table[start + 1] < 64, bits >> UInt64(table[start + 1]) & 1 == 1 else { return nil }
      return String(decoding: table[(start + 2)..<(start + 48)].prefix { $0 != 0 }, as: UTF8.self)
    }
  }

  private func checkTables(_ file: any BlockFile) throws(BlockError) {
    func limit(_ what: String, _ value: UInt64, _ limit: UInt64) throws(BlockError) {
      guard value <= limit else {
        throw .malformed(path: file.path, .beyondLimit(what: what, value: value, limit: limit))
      }
    }
    try limit("size", size, UInt64(Int64.max))
    try limit("L1 table's size", UInt64(l1Entries) * 8, Self.maximumL1Bytes)
    try limit(
      "refcount table's size", UInt64(refcountTableClusters) * clusterSize, Self.maximumRefcountTableBytes)
    try limit("number of snapshots", UInt64(snapshotCount), UInt64(Self.maximumSnapshots))
    let needed = l1EntriesNeeded(for: size)
    guard UInt64(l1Entries) >= needed else {
      throw .malformed(path: file.path, .tableTooSmall(what: "L1 table", entries: UInt64(l1Entries), need: needed))
    }
    try place("L1 table", l1Offset, UInt64(l1Entries) * 8, in: file)
    try place("refcount table", refcountTableOffset, UInt64(refcountTableClusters) * clusterSize, in: file)
    try place("snapshot table", snapshotsOffset, snapshotCount > 0 ? 1 : 0, in: file)
  }

  /// A table must be aligned, beyond the header and within what a file can have.
  func place(_ what: String, _ offset: UInt64, _ length: UInt64, in file: any BlockFile) throws(BlockError) {
    guard length > 0 else { return }
    guard offset % clusterSize == 0 else {
      throw .malformed(path: file.path, .misaligned(what: what, offset: offset))
    }
    guard offset >= clusterSize, offset <= Qcow2Entry.offsetMask, offset < file.length else {
      throw .malformed(path: file.path, .outsideFile(what: what, offset: offset, length: length))
    }
  }
}

// MARK: Writing

extension Qcow2Header {
  /// The first cluster's bytes, or as many of them as are used.
  func serialized() throws(BlockError) -> [UInt8] {
    var bytes: [UInt8] = []
    let extensions = extensions.filter { $0.type != Extension.featureNames }
    var names = extensions
    if version == 3 { names.append(Extension(type: Extension.featureNames, data: Self.ownFeatureNames)) }
    let headerLength = version == 2 ? 72 : 112 + furtherFields.count
    var tail = Self.bytes(of: names)
    let name = Array((backingName ?? "").utf8)
    // Images with small clusters have no room for names of features.
    if headerLength + tail.count + name.count > Int(clusterSize) { tail = Self.bytes(of: extensions) }
    guard headerLength + tail.count + name.count <= Int(clusterSize) else {
      throw .invalid(
        what: "backing file name", value: backingName ?? "",
        expected: "at most \(max(0, Int(clusterSize) - headerLength - tail.count)) bytes with this cluster size")
    }
    bytes.appendBigEndian(Self.magic)
    bytes.appendBigEndian(version)
    bytes.appendBigEndian(name.isEmpty ? 0 : UInt64(headerLength + tail.count))
    bytes.appendBigEndian(UInt32(name.count))
    bytes.appendBigEndian(clusterBits)
    bytes.appendBigEndian(size)
    bytes.appendBigEndian(encryptionMethod)
    bytes.appendBigEndian(l1Entries)
    bytes.appendBigEndian(l1Offset)
    bytes.appendBigEndian(refcountTableOffset)
    bytes.appendBigEndian(refcountTableClusters)
    bytes.appendBigEndian(snapshotCount)
    bytes.appendBigEndian(snapshotsOffset)
    if version == 3 {
      bytes.appendBigEndian(incompatible)
      bytes.appendBigEndian(compatible)
      bytes.appendBigEndian(autoclear)
      bytes.appendBigEndian(refcountOrder)
      bytes.appendBigEndian(UInt32(headerLength))
      bytes += [compressionType, 0, 0, 0, 0, 0, 0, 0]
      bytes += furtherFields
    }
    return bytes + tail + name
  }

  private static func bytes(of extensions: [Extension]) -> [UInt8] {
    var bytes: [UInt8] = []
    for item in extensions {
      bytes.appendBigEndian(item.type)
      bytes.appendBigEndian(UInt32(item.data.count))
      bytes += item.data
      bytes += [UInt8](repeating: 0, count: (8 - item.data.count % 8) % 8)
    }
    bytes.appendBigEndian(UInt64(0))
    return bytes
  }

  /// Names that older programs show when they refuse an image.
  private static let ownFeatureNames: [UInt8] = {
    let names: [(UInt8, UInt8, String)] = [
      (0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"), (0, 3, "compression type"),
      (0, 4, "extended L2 entries"), (1, 0, "lazy refcounts"), (2, 0, "bitmaps"), (2, 1, "raw external data"),
    ]
    return names.flatMap { type, bit, name in
      [type, bit] + Array(name.utf8) + [UInt8](repeating: 0, count: 46 - name.utf8.count)
    }
  }()
}

/// An L2 entry: where a cluster is, and in an image with extended L2 entries the state of its subclusters.
struct Qcow2L2Entry: Equatable {
  /// Subclusters of a cluster.
  static let subclusters: UInt64 = 32
  /// Every subcluster has data.
  static let allData: UInt64 = 0xffff_ffff
  /// Every subcluster reads as zeros.
  static let allZeros: UInt64 = 0xffff_ffff << 32

  var descriptor: UInt64 = 0
  /// Bits 0-31: a subcluster has data; bits 32-63: it reads as zeros. 0 without extended entries.
  var bits: UInt64 = 0

  var host: UInt64 { descriptor & Qcow2Entry.offsetMask }
  var isCompressed: Bool { descriptor & Qcow2Entry.compressed != 0 }
  /// A cluster that nothing else refers to.
  var isOwn: Bool { host != 0 && !isCompressed && descriptor & Qcow2Entry.copied != 0 }
  /// Whether the bits of an extended entry can be true.
  var isSound: Bool {
    if isCompressed { return bits == 0 }
    return descriptor & Qcow2Entry.zero == 0 && bits & bits >> 32 & Self.allData == 0
      && (host != 0 || bits & Self.allData == 0)
  }
}

/// Bits of L1, L2 and refcount table entries ("Cluster mapping").
enum Qcow2Entry {
  /// Bits 9-55: a host offset.
  static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00
  /// Bit 63: the refcount is exactly one, so what is named may be changed in place.
  static let copied: UInt64 = 1 << 63
  /// Bit 62: compressed cluster.
  static let compressed: UInt64 = 1 << 62
  /// Bit 0: reads as zeros.
  static let zero: UInt64 = 1
  /// What must be zero in an L1 entry.
  static let l1Reserved: UInt64 = 0x7f00_0000_0000_01ff
  /// What must be zero in a standard L2 entry.
  static let l2Reserved: UInt64 = 0x3f00_0000_0000_01fe
}
