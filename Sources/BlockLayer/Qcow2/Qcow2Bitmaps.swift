/// A persistent dirty bitmap as it is in memory ("Bitmaps").
public struct Qcow2Bitmap: Sendable {
  /// The name, unique in the image.
  public var name: String
  /// Bytes of the disk that one bit stands for: a power of two.
  public var granularity: UInt64
  /// Writes are recorded.
  public var isRecording: Bool
  /// It was not saved properly and says nothing.
  public var isInconsistent: Bool
  /// Bits, the disk's first bytes in the lowest bit of the first word.
  public internal(set) var words: [UInt64]
  var granularityBits: UInt8
  var extra: [UInt8] = []
  /// Where the image has it.
  var tableOffset: UInt64 = 0
  var tableEntries: UInt32 = 0
  /// Clusters of bitmap data that the image has for it.
  var dataClusters: [UInt64] = []

  /// Whether anything from `offset` on was recorded in `length` bytes.
  public func isDirty(at offset: UInt64, length: UInt64) -> Bool {
    guard length > 0 else { return false }
    for bit in (offset / granularity)...((offset + length - 1) / granularity) {
      guard bit / 64 < UInt64(words.count) else { return false }
      if words[Int(bit / 64)] >> (bit % 64) & 1 == 1 { return true }
    }
    return false
  }

  /// Whether the byte at `offset` is dirty, and how many bytes from there on share that; `length` at most.
  public func run(at offset: UInt64, length: UInt64) -> (isDirty: Bool, length: UInt64) {
    let first = offset / granularity
    let last = (offset + max(length, 1) - 1) / granularity
    func word(_ index: UInt64) -> UInt64 { index < UInt64(words.count) ? words[Int(index)] : 0 }
    let isDirty = word(first / 64) >> (first % 64) & 1 == 1
    var bit = first + 1
    while bit <= last {
      // The bits that differ from the first one, from this one on.
      let other = (isDirty ? ~word(bit / 64) : word(bit / 64)) >> (bit % 64)
      if other != 0 {
        bit += UInt64(other.trailingZeroBitCount)
        break
      }
      bit += 64 - bit % 64
    }
    return (isDirty, min(length, bit * granularity - offset))
  }

  mutating func mark(_ offset: UInt64, _ length: UInt64) {
    guard length > 0 else { return }
    for bit in (offset / granularity)...((offset + length - 1) / granularity) where bit / 64 < UInt64(words.count) {
      words[Int(bit / 64)] |= 1 << (bit % 64)
    }
  }
}

/// The bitmaps of an image.
struct Qcow2Bitmaps {
  /// QEMU's limits.
  static let maximumCount: UInt32 = 65535
  static let maximumNameBytes = 1023
  static let maximumDirectoryBytes: UInt64 = 64 << 20
  /// Bytes that all bitmaps together may have in memory.
  static let maximumDataBytes: UInt64 = 256 << 20

  var all: [Qcow2Bitmap] = []
  var directoryOffset: UInt64 = 0
  var directorySize: UInt64 = 0

  init() {}

  init(file: any BlockFile, header: Qcow2Header) throws(BlockError) {
    func rule(_ text: String) -> BlockError { .malformed(path: file.path, .bitmaps(text)) }
    guard header.autoclear & Qcow2Header.Autoclear.bitmaps != 0 else { return }
    guard let data = header.extensions.first(where: { $0.type == Qcow2Header.Extension.bitmaps })?.data else {
      throw rule("the feature bit is set and there is no extension")
    }
    guard data.count == 24 else { throw rule("the extension has \(data.count) bytes") }
    let count = data.bigEndian32(0)
    directorySize = data.bigEndian64(8)
    directoryOffset = data.bigEndian64(16)
    guard (1...Self.maximumCount).contains(count), data.bigEndian32(4) == 0 else { throw rule("\(count) bitmaps") }
    guard directorySize <= Self.maximumDirectoryBytes, directorySize <= file.length else {
      throw rule("a directory of \(directorySize) bytes")
    }
    try header.place("bitmap directory", directoryOffset, directorySize, in: file)
    let directory = try file.readArray(at: directoryOffset, count: Int(directorySize))
    var position = 0
    var total: UInt64 = 0
    for _ in 0..<count {
      guard position + 24 <= directory.count else { throw rule("the directory ends within an entry") }
      let (bitmap, length) = try Self.entry(directory, position, file, header, &total)
      guard !all.contains(where: { $0.name == bitmap.name }) else { throw rule("two are called \(bitmap.name)") }
      all.append(bitmap)
      position += length
    }
    guard position == directory.count else { throw rule("the directory has \(directory.count) bytes, not \(position)") }
  }

  private static func entry(
    _ directory: [UInt8], _ position: Int, _ file: any BlockFile, _ header: Qcow2Header, _ total: inout UInt64
  ) throws(BlockError) -> (Qcow2Bitmap, Int) {
    func rule(_ text: String) -> BlockError { .malformed(path: file.path, .bitmaps(text)) }
    let flags = directory.bigEndian32(position + 12)
    let granularityBits = directory[position + 17]
    let nameLength = Int(directory.bigEndian16(position + 18))
    let extraLength = Int(directory.bigEndian32(position + 20))
    guard directory[position + 16] == 1 else { throw rule("type \(directory[position + 16])") }
    guard (9...31).contains(granularityBits) else { throw rule("granularity 2^\(granularityBits)") }
    guard flags & ~7 == 0 else { throw rule("flags 0x\(String(flags, radix: 16))") }
    guard (1...maximumNameBytes).contains(nameLength) else { throw rule("a name of \(nameLength) bytes") }
    guard extraLength <= directory.count, position + 24 + extraLength + nameLength <= directory.count else {
      throw rule("an entry goes past the directory's end")
    }
    let nameStart = position + 24 + extraLength
    guard let name = String(validating: directory[nameStart..<(nameStart + nameLength)], as: UTF8.self) else {
      throw rule("a name is not UTF-8 text")
    }
    let granularity: UInt64 = 1 << UInt64(granularityBits)
    let bits = header.size.dividedUp(by: granularity)
    let bytes = bits.dividedUp(by: 8)
    let needed = bytes.dividedUp(by: header.clusterSize)
    let entries = directory.bigEndian32(position + 8)
    let inUse = flags & 1 != 0
    guard inUse || UInt64(entries) == needed else { throw rule("\(entries) table entries where \(needed) are needed") }
    guard UInt64(entries) * 8 <= maximumDirectoryBytes else { throw rule("\(entries) table entries") }
    total += bytes
    guard total <= maximumDataBytes else { throw rule("\(total) bytes of bitmaps") }
    var bitmap = Qcow2Bitmap(
      name: name, granularity: granularity, isRecording: flags & 2 != 0, isInconsistent: inUse,
      words: [UInt64](repeating: 0, count: Int(bits.dividedUp(by: 64))), granularityBits: granularityBits,
      extra: Array(directory[(position + 24)..<nameStart]), tableOffset: directory.bigEndian64(position),
      tableEntries: entries)
    // Extra data that nobody knows makes the bitmap unusable unless its flag says otherwise.
    if extraLength > 0, flags & 4 == 0 { bitmap.isInconsistent = true }
    try header.place("bitmap table", bitmap.tableOffset, UInt64(entries) * 8, in: file)
    try readData(&bitmap, file, header)
    return (bitmap, (24 + extraLength + nameLength + 7) & ~7)
  }

  private static func readData(
    _ bitmap: inout Qcow2Bitmap, _ file: any BlockFile, _ header: Qcow2Header
  ) throws(BlockError) {
    let table = try Qcow2Image.readTable(file, at: bitmap.tableOffset, entries: UInt64(bitmap.tableEntries))
    let wordsPerCluster = Int(header.clusterSize / 8)
    for (index, entry) in table.enumerated() {
      let offset = entry & Qcow2Entry.offsetMask
      guard entry & ~(Qcow2Entry.offsetMask | 1) == 0, offset % header.clusterSize == 0, offset == 0 || entry & 1 == 0
      else { throw .malformed(path: file.path, .reservedBits(what: "bitmap table entry", value: entry)) }
      if offset != 0 { bitmap.dataClusters.append(offset >> UInt64(header.clusterBits)) }
      let first = index * wordsPerCluster
      guard !bitmap.isInconsistent, first < bitmap.words.count else { continue }
      let last = min(first + wordsPerCluster, bitmap.words.count)
      if offset == 0 {
        if entry & 1 != 0 { for word in first..<last { bitmap.words[word] = .max } }
        continue
      }
      let bytes = try file.readArray(at: offset, count: (last - first) * 8)
      for word in first..<last { bitmap.words[word] = bytes.bigEndian64((word - first) * 8).byteSwapped }
    }
  }

  mutating func mark(_ offset: UInt64, _ length: UInt64) {
    for index in all.indices where all[index].isRecording && !all[index].isInconsistent {
      all[index].mark(offset, length)
    }
  }

  func directory() -> [UInt8] {
    var bytes: [UInt8] = []
    for bitmap in all {
      bytes.appendBigEndian(bitmap.tableOffset)
      bytes.appendBigEndian(bitmap.tableEntries)
      let flags: UInt32 = (bitmap.isInconsistent ? 1 : 0) | (bitmap.isRecording ? 2 : 0)
      bytes.appendBigEndian(flags)
      bytes += [1, bitmap.granularityBits]
      bytes.appendBigEndian(UInt16(bitmap.name.utf8.count))
      bytes.appendBigEndian(UInt32(bitmap.extra.count))
      bytes += bitmap.extra
      bytes += Array(bitmap.name.utf8)
      bytes += [UInt8](repeating: 0, count: (8 - bytes.count % 8) % 8)
    }
    return bytes
  }
}

extension Qcow2Image {
  /// The persistent dirty bitmaps.
  public var bitmaps: [Qcow2Bitmap] { bitmapStore.all }

  /// Says on disk that the bitmaps are in use, before anything is written: after a crash nobody may trust them.
  func beginBitmaps() throws(BlockError) {
    if header.autoclear & Qcow2Header.Autoclear.bitmaps == 0 {
      // What an older program left behind is not consistent with the disk; its clusters are leaks.
      if header.extensions.contains(where: { $0.type == Qcow2Header.Extension.bitmaps }) {
        header.setExtension(Qcow2Header.Extension.bitmaps, nil)
        try writeHeader()
      }
      return
    }
    protectBitmaps()
    var directory = bitmapStore
    for index in directory.all.indices where directory.all[index].isRecording {
      directory.all[index].isInconsistent = true
    }
    try file.writeArray(at: bitmapStore.directoryOffset, directory.directory())
    try file.flush()
  }

  private func protectBitmaps() {
    refcounts.protect(bitmapStore.directoryOffset, bitmapStore.directorySize)
    for bitmap in bitmapStore.all {
      refcounts.protect(bitmap.tableOffset, UInt64(bitmap.tableEntries) * 8)
      for cluster in bitmap.dataClusters { refcounts.protect(cluster << clusterBits, 1) }
    }
  }

  /// Adds an empty bitmap, which records from now on and is saved when the image is closed.
  public func addBitmap(_ name: String, granularity: UInt64 = 65536) throws(BlockError) {
    try requireWritable()
    guard header.version >= 3 else { throw .unsupported(path: file.path, .operation("keeping bitmaps")) }
    guard (1...Qcow2Bitmaps.maximumNameBytes).contains(name.utf8.count) else {
      throw .invalid(what: "bitmap name", value: name, expected: "1 to \(Qcow2Bitmaps.maximumNameBytes) bytes")
    }
    guard granularity.nonzeroBitCount == 1, (512...(1 << 31)).contains(granularity) else {
      throw .invalid(what: "granularity", value: "\(granularity)", expected: "a power of two from 512 to 2147483648")
    }
    guard !bitmapStore.all.contains(where: { $0.name == name }) else {
      throw .exists(what: "bitmap", name: name, path: file.path)
    }
    let words = size.dividedUp(by: granularity).dividedUp(by: 64)
    let total = bitmapStore.all.reduce(words * 8) { $0 + UInt64($1.words.count) * 8 }
    guard total <= Qcow2Bitmaps.maximumDataBytes else {
      throw .invalid(what: "granularity", value: "\(granularity)", expected: "a larger one: the bitmap is too big")
    }
    bitmapStore.all.append(
      Qcow2Bitmap(
        name: name, granularity: granularity, isRecording: true, isInconsistent: false,
        words: [UInt64](repeating: 0, count: Int(words)), granularityBits: UInt8(granularity.trailingZeroBitCount)))
  }

  /// Gives a bitmap up.
  public func removeBitmap(_ name: String) throws(BlockError) {
    try requireWritable()
    guard let index = bitmapStore.all.firstIndex(where: { $0.name == name }) else {
      throw .unknown(what: "bitmap", name: name, path: file.path)
    }
    let bitmap = bitmapStore.all.remove(at: index)
    removedBitmaps.append(bitmap)
  }

  /// Writes every bitmap into new clusters and then names them, so that a crash leaves the old ones, which say that
  /// they are in use.
  func storeBitmaps() throws(BlockError) {
    let old = bitmapStore
    guard !old.all.isEmpty || old.directorySize > 0 else { return }
    var obsolete: [(UInt64, UInt64)] = [(old.directoryOffset, old.directorySize)]
    for bitmap in old.all + removedBitmaps {
      obsolete.append((bitmap.tableOffset, UInt64(bitmap.tableEntries) * 8))
      obsolete += bitmap.dataClusters.map { ($0 << clusterBits, clusterSize) }
    }
    for index in bitmapStore.all.indices { try storeBitmap(&bitmapStore.all[index]) }
    if bitmapStore.all.isEmpty {
      bitmapStore.directorySize = 0
      bitmapStore.directoryOffset = 0
      header.autoclear &= ~Qcow2Header.Autoclear.bitmaps
      header.setExtension(Qcow2Header.Extension.bitmaps, nil)
    } else {
      let directory = bitmapStore.directory()
      bitmapStore.directoryOffset = try writeTable(directory)
      bitmapStore.directorySize = UInt64(directory.count)
      var data: [UInt8] = []
      data.appendBigEndian(UInt32(bitmapStore.all.count))
      data.appendBigEndian(UInt32(0))
      data.appendBigEndian(bitmapStore.directorySize)
      data.appendBigEndian(bitmapStore.directoryOffset)
      header.setExtension(Qcow2Header.Extension.bitmaps, data)
      header.autoclear |= Qcow2Header.Autoclear.bitmaps
    }
    try writeBackNow(withRefcounts: true)
    try file.flush()
    try writeHeader()
    removedBitmaps = []
    for (offset, length) in obsolete { freeRange(offset, length) }
  }

  private func storeBitmap(_ bitmap: inout Qcow2Bitmap) throws(BlockError) {
    let wordsPerCluster = Int(clusterSize / 8)
    var table: [UInt8] = []
    bitmap.dataClusters = []
    // The table of one that nobody could read is not touched but moved with its clusters' contents given up.
    let clusters = (bitmap.words.count + wordsPerCluster - 1) / wordsPerCluster
    for index in 0..<clusters {
      let words = bitmap.words[(index * wordsPerCluster)..<min((index + 1) * wordsPerCluster, bitmap.words.count)]
      if words.allSatisfy({ $0 == 0 }) {
        table.appendBigEndian(UInt64(0))
        continue
      }
      var bytes: [UInt8] = []
      for word in words { bytes.appendBigEndian(word.byteSwapped) }
      let offset = try writeTable(bytes)
      bitmap.dataClusters.append(offset >> clusterBits)
      table.appendBigEndian(offset)
    }
    bitmap.tableEntries = UInt32(clusters)
    bitmap.tableOffset = clusters == 0 ? 0 : try writeTable(table)
  }
}
