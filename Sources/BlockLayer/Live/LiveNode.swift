import Glibc

/// One layer of the disks of a machine, open under a name.
public final class LiveNode {
  /// What QMP calls it.
  public let name: String
  /// The image.
  public let path: String
  /// Its format.
  public let format: ImageFormat
  /// The image, with all below it.
  public let node: any BlockNode
  /// The layer below; nil for none.
  public internal(set) var backing: LiveNode?
  /// It was opened because a layer above names it, and goes when that one does.
  public let isImplicit: Bool
  /// Disks, layers above, jobs and exports that need it.
  public internal(set) var users = 0
  /// Dirty bitmaps that are in memory only.
  public internal(set) var bitmaps: [DirtyBitmap] = []

  let file: any BlockFile

  init(
    name: String, path: String, format: ImageFormat, node: any BlockNode, file: any BlockFile, isImplicit: Bool
  ) {
    self.name = name
    self.path = path
    self.format = format
    self.node = node
    self.file = file
    self.isImplicit = isImplicit
  }

  /// The image, where it is a qcow2 one.
  public var qcow2: Qcow2Image? { node as? Qcow2Image }

  /// The layers, this one first.
  public var chain: [LiveNode] {
    var chain = [self]
    while let next = chain[chain.count - 1].backing { chain.append(next) }
    return chain
  }

  /// Notes a change; persistent bitmaps are the image's own.
  func mark(_ offset: UInt64, _ length: UInt64) {
    for bitmap in bitmaps where bitmap.isRecording { bitmap.set(offset, length) }
  }

  /// How the file is opened.
  public var access: FileAccess { (file as? HostFile)?.access ?? FileAccess() }
  /// Bytes of the host's storage.
  public var allocatedBytes: UInt64 { file.allocatedBytes ?? 0 }

  /// Whether a path means this layer.
  public func isCalled(_ path: String) -> Bool {
    path == self.path || BlockGraph.absolute(path) == BlockGraph.absolute(self.path)
  }

  /// Lets writes be, or refuses them, from now on.
  func setWritable(_ writable: Bool) throws(BlockError) {
    switch node {
    case let image as Qcow2Image: try image.setWritable(writable)
    case let raw as RawImage: try raw.file.setWritable(writable)
    default: if writable == node.isReadOnly { throw .readOnly(path: path) }
    }
  }

  // MARK: Bitmaps, persistent or not

  /// What is to be told of a bitmap.
  public struct BitmapState {
    /// Its name.
    public var name: String
    /// Bytes a bit.
    public var granularity: UInt64
    /// Bytes that have changed, in whole bits.
    public var dirtyBytes: UInt64
    /// Writes are noted.
    public var isRecording: Bool
    /// The image keeps it.
    public var isPersistent: Bool
    /// It was not saved properly and says nothing.
    public var isInconsistent: Bool
  }

  /// Every bitmap.
  public var bitmapStates: [BitmapState] {
    let kept = (qcow2?.bitmaps ?? []).map { bitmap in
      BitmapState(
        name: bitmap.name, granularity: bitmap.granularity,
        dirtyBytes: bitmap.words.reduce(0) { $0 + UInt64($1.nonzeroBitCount) } * bitmap.granularity,
        isRecording: bitmap.isRecording, isPersistent: true, isInconsistent: bitmap.isInconsistent)
    }
    let others = bitmaps.map { bitmap in
      BitmapState(
        name: bitmap.name, granularity: bitmap.granularity, dirtyBytes: bitmap.dirtyBytes,
        isRecording: bitmap.isRecording, isPersistent: false, isInconsistent: false)
    }
    return kept + others
  }

  private func persistent(_ name: String) throws(BlockError) -> Int {
    guard let index = qcow2?.bitmapStore.all.firstIndex(where: { $0.name == name }) else {
      throw .unknown(what: "bitmap", name: name, path: path)
    }
    return index
  }

  /// What puts all bitmaps back as they are now. No write may come between.
  public func rememberBitmaps() -> () -> Void {
    let others = bitmaps.map { DirtyBitmap($0) }
    let kept = qcow2.map { ($0.bitmapStore.all, $0.removedBitmaps) }
    return { [self] in
      bitmaps = others
      if let kept, let qcow2 { (qcow2.bitmapStore.all, qcow2.removedBitmaps) = kept }
    }
  }

  /// Adds a bitmap that records from now on; without a granularity, that of the image's clusters, as QEMU's.
  public func addBitmap(_ name: String, granularity: UInt64? = nil, isPersistent: Bool) throws(BlockError) {
    let granularity = granularity ?? qcow2.map { min(max($0.clusterSize, 4096), 65536) } ?? 65536
    guard granularity.nonzeroBitCount == 1, (512...(1 << 31)).contains(granularity) else {
      throw .invalid(what: "granularity", value: "\(granularity)", expected: "a power of two from 512 to 2147483648")
    }
    guard !name.isEmpty, !bitmaps.contains(where: { $0.name == name }) else {
      throw .exists(what: "bitmap", name: name, path: path)
    }
    if isPersistent {
      guard let image = qcow2 else { throw .unsupported(path: path, .operation("keeping bitmaps")) }
      return try image.addBitmap(name, granularity: granularity)
    }
    guard qcow2?.bitmapStore.all.contains(where: { $0.name == name }) != true else {
      throw .exists(what: "bitmap", name: name, path: path)
    }
    bitmaps.append(DirtyBitmap(name: name, size: node.size, granularity: granularity))
  }

  /// Gives a bitmap up.
  public func removeBitmap(_ name: String) throws(BlockError) {
    if let index = bitmaps.firstIndex(where: { $0.name == name }) {
      bitmaps.remove(at: index)
    } else {
      _ = try persistent(name)
      try qcow2?.removeBitmap(name)
    }
  }

  /// A copy of a bitmap's bits.
  public func dirtyBitmap(_ name: String) throws(BlockError) -> DirtyBitmap {
    if let bitmap = bitmaps.first(where: { $0.name == name }) { return DirtyBitmap(bitmap) }
    let index = try persistent(name)
    guard let bitmap = qcow2?.bitmapStore.all[index], !bitmap.isInconsistent else {
      throw .invalid(what: "bitmap", value: name, expected: "one that was saved properly; remove it")
    }
    return DirtyBitmap(size: node.size, granularity: bitmap.granularity, words: bitmap.words)
  }

  /// Clears a bitmap.
  public func clearBitmap(_ name: String) throws(BlockError) {
    if let bitmap = bitmaps.first(where: { $0.name == name }) { return bitmap.clear() }
    let index = try persistent(name)
    guard let image = qcow2 else { return }
    image.bitmapStore.all[index].words = image.bitmapStore.all[index].words.map { _ in 0 }
  }

  /// Adds bits to a bitmap.
  public func mergeBitmap(_ name: String, _ bits: DirtyBitmap) throws(BlockError) {
    if let bitmap = bitmaps.first(where: { $0.name == name }) { return bitmap.merge(bits) }
    let index = try persistent(name)
    var block = 0
    while let next = bits.next(from: block) {
      let range = bits.range(next)
      qcow2?.bitmapStore.all[index].mark(range.lowerBound, UInt64(range.count))
      block = next + 1
    }
  }

  /// Notes writes from now on, or not.
  public func setRecording(_ name: String, _ isRecording: Bool) throws(BlockError) {
    if let bitmap = bitmaps.first(where: { $0.name == name }) {
      bitmap.isRecording = isRecording
    } else {
      let index = try persistent(name)
      qcow2?.bitmapStore.all[index].isRecording = isRecording
    }
  }
}

/// Which blocks of a disk have changed.
public final class DirtyBitmap {
  /// Unique on its layer; empty for a job's own.
  public let name: String
  /// Bytes a bit.
  public let granularity: UInt64
  /// Whether writes are noted.
  public var isRecording = true
  private let size: UInt64
  private var words: [UInt64]
  /// Bits that are set.
  public private(set) var count = 0

  /// A bitmap for a disk, without anything set.
  public init(name: String = "", size: UInt64, granularity: UInt64) {
    self.name = name
    self.size = size
    self.granularity = granularity
    words = [UInt64](repeating: 0, count: Int(size.dividedUp(by: granularity).dividedUp(by: 64)))
  }

  /// A copy.
  init(_ other: DirtyBitmap) {
    (name, granularity, size, words, count) = (
      other.name, other.granularity, other.size, other.words, other.count
    )
    isRecording = other.isRecording
  }

  /// Bits as a qcow2 image has them.
  init(size: UInt64, granularity: UInt64, words: [UInt64]) {
    name = ""
    (self.size, self.granularity, self.words) = (size, granularity, words)
    count = words.reduce(0) { $0 + $1.nonzeroBitCount }
  }

  /// Blocks in all.
  var blocks: Int { Int(size.dividedUp(by: granularity)) }
  /// Bytes that the set bits stand for.
  public var dirtyBytes: UInt64 { UInt64(count) * granularity }

  /// Sets the bits of a range.
  public func set(_ offset: UInt64, _ length: UInt64) {
    guard length > 0, offset < size else { return }
    let last = Int((min(offset + length, size) - 1) / granularity)
    for block in Int(offset / granularity)...last { self[block] = true }
  }

  /// Blocks of a range that are not set.
  func unset(in range: Range<UInt64>) -> Int {
    guard !range.isEmpty, range.lowerBound < size else { return 0 }
    let last = Int((min(range.upperBound, size) - 1) / granularity)
    return (Int(range.lowerBound / granularity)...last).reduce(0) { $0 + (self[$1] ? 0 : 1) }
  }

  /// Sets every bit.
  public func setAll() { set(0, size) }

  /// Clears every bit.
  public func clear() {
    for index in words.indices { words[index] = 0 }
    count = 0
  }

  /// Whether a block is set.
  subscript(_ block: Int) -> Bool {
    get { words[block >> 6] >> UInt64(block & 63) & 1 != 0 }
    set {
      guard self[block] != newValue else { return }
      words[block >> 6] ^= 1 << UInt64(block & 63)
      count += newValue ? 1 : -1
    }
  }

  /// The first set block from one on.
  func next(from block: Int) -> Int? {
    var word = block >> 6
    guard word < words.count else { return nil }
    var bits = words[word] & (~0 << UInt64(block & 63))
    while bits == 0 {
      word += 1
      guard word < words.count else { return nil }
      bits = words[word]
    }
    return word << 6 + bits.trailingZeroBitCount
  }

  /// The bytes of a block.
  func range(_ block: Int) -> Range<UInt64> {
    let start = UInt64(block) * granularity
    return start..<min(start + granularity, size)
  }

  /// Adds another bitmap's bits, whatever its granularity.
  public func merge(_ other: DirtyBitmap) {
    var block = 0
    while let next = other.next(from: block) {
      let range = other.range(next)
      set(range.lowerBound, UInt64(range.count))
      block = next + 1
    }
  }
}
