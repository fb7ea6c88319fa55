import Glibc

/// Two disks, read beside each other: whether they hold the same, up to the end of the longer one.
///
/// A rebase is the same with a repair: what differs is written into a layer above.
public class CompareJob: BlockJob {
  private var left: Side
  private var right: Side
  /// The first byte that differs.
  public private(set) var firstDifference: UInt64?

  /// Compares two disks; what is past the end of the shorter one counts as zeros.
  public convenience init(_ left: any BlockNode, _ right: any BlockNode) {
    self.init(left: left, right: right, total: max(left.size, right.size))
  }

  /// nil is a disk of zeros.
  fileprivate init(left: (any BlockNode)?, right: (any BlockNode)?, total: UInt64, stretch: Int = stretch) {
    self.left = Side(left)
    self.right = Side(right)
    super.init(total: total, stretch: stretch)
  }

  /// One of the two disks, and where the bytes of the stretch in hand are; nil for a disk of zeros.
  private struct Side {
    private let node: (any BlockNode)?
    private var walk: ChainWalk?
    private(set) var pieces: [(layer: (any BlockNode)?, length: UInt64)] = []

    init(_ node: (any BlockNode)?) {
      self.node = node
      walk = node.map { ChainWalk($0) }
    }

    /// The layer that holds the bytes; nil for zeros.
    mutating func state(
      at offset: UInt64, length: UInt64
    ) throws(BlockError) -> (layer: (any BlockNode)?, length: UInt64, isZero: Bool) {
      guard let node, offset < node.size else { return (nil, length, true) }
      guard let found = try walk?.extent(at: offset, length: length).found else { return (nil, length, true) }
      return (found.layer, found.extent.length, found.extent.isZero)
    }

    mutating func begin() { pieces.removeAll(keepingCapacity: true) }

    mutating func add(_ layer: (any BlockNode)?, _ length: UInt64) { pieces.append((layer, length)) }

    /// Reads the stretch in hand.
    func read(at position: UInt64, into bytes: UnsafeMutableRawPointer, by read: StretchRead) {
      var done: UInt64 = 0
      for piece in pieces {
        if let layer = piece.layer {
          read.read(layer, at: position + done, length: piece.length, into: bytes + Int(done))
        } else {
          memset(bytes + Int(done), 0, Int(piece.length))
        }
        done += piece.length
      }
    }
  }

  // Requests are begun in order: once one differs, those behind it cannot tell of an earlier place.
  override var isSettled: Bool { firstDifference != nil }

  override func begin(at position: UInt64) throws(BlockError) -> UInt64 {
    try compare(at: position, length: total - position)
  }

  /// A stretch that is known to be the same, or one of data up to where the next such begins.
  fileprivate func compare(at position: UInt64, length: UInt64) throws(BlockError) -> UInt64 {
    left.begin()
    right.begin()
    let most = min(length, UInt64(stretch))
    var covered: UInt64 = 0
    while covered < most {
      // What is known to be the same may be longer than a stretch.
      let (isSame, next) = try foreknown(
        at: position + covered, length: (covered == 0 ? length : most) - covered, upTo: most - covered)
      if isSame {
        if covered == 0 { return next }
        break
      }
      covered += next
    }
    readBoth(at: position, length: covered)
    return covered
  }

  /// Whether metadata alone says that both hold the same; else the next piece of the stretch, of at most `most` bytes, is noted.
  private func foreknown(
    at position: UInt64, length: UInt64, upTo most: UInt64
  ) throws(BlockError) -> (isSame: Bool, length: UInt64) {
    let one = try left.state(at: position, length: length)
    let other = try right.state(at: position, length: one.length)
    if one.isZero, other.isZero { return (true, other.length) }
    if let mine = one.layer, let theirs = other.layer, mine.isSameLayer(as: theirs) { return (true, other.length) }
    let covered = min(other.length, most)
    left.add(one.isZero ? nil : one.layer, covered)
    right.add(other.isZero ? nil : other.layer, covered)
    return (false, covered)
  }

  private func readBoth(at position: UInt64, length: UInt64) {
    let one = takeBuffer()
    let other = takeBuffer()
    started(length)
    let read = StretchRead { [self] error in
      if let error {
        giveBack(one)
        giveBack(other)
        return finished(length, error)
      }
      judge(one, other, at: position, length)
    }
    left.read(at: position, into: one.start, by: read)
    right.read(at: position, into: other.start, by: read)
    read.commit()
  }

  private func judge(_ one: DiskBuffer, _ other: DiskBuffer, at position: UInt64, _ length: UInt64) {
    guard memcmp(one.start, other.start, Int(length)) != 0 else {
      giveBack(one)
      giveBack(other)
      return finished(length, nil)
    }
    differs(one, other, at: position, length) { [self] error in
      giveBack(one)
      giveBack(other)
      finished(length, error)
    }
  }

  /// What to do about a stretch whose contents, both in memory, are not the same.
  fileprivate func differs(
    _ one: DiskBuffer, _ other: DiskBuffer, at position: UInt64, _ length: UInt64,
    then: @escaping (BlockError?) -> Void
  ) {
    let (left, right) = (UnsafeRawPointer(one.start), UnsafeRawPointer(other.start))
    var offset = 0
    while offset < Int(length),
      left.load(fromByteOffset: offset, as: UInt8.self) == right.load(fromByteOffset: offset, as: UInt8.self)
    { offset += 1 }
    firstDifference = min(firstDifference ?? UInt64.max, position + UInt64(offset))
    then(nil)
  }
}

/// Before an image gets another backing file: what it reads from the old one and would read otherwise from the new one
/// is written into the image itself.
public final class RebaseJob: CompareJob {
  private let overlay: Qcow2Image
  /// What it holds itself: what the job writes is behind the walk.
  private var walk: ChainWalk

  /// `overlay` has the old backing file as its backing node; nil for `new` is no backing file any more.
  public init(_ overlay: Qcow2Image, to new: (any BlockNode)?) {
    self.overlay = overlay
    walk = ChainWalk(overlay, layers: 1)
    let stretch = max(Int(overlay.clusterSize), Self.stretch)
    super.init(left: overlay.backing, right: new, total: overlay.size, stretch: stretch)
  }

  override var isSettled: Bool { false }

  override func begin(at position: UInt64) throws(BlockError) -> UInt64 {
    let (own, length) = try walk.extent(at: position, length: total - position)
    return own?.extent.isAllocated ?? false ? length : try compare(at: position, length: length)
  }

  override fileprivate func differs(
    _ one: DiskBuffer, _ other: DiskBuffer, at position: UInt64, _ length: UInt64,
    then: @escaping (BlockError?) -> Void
  ) {
    let cluster = Int(overlay.clusterSize)
    let parts = StretchWrite(then: then)
    // Neighbours that hold data are written together.
    var run = (start: 0, length: 0)
    func writeRun() {
      guard run.length > 0 else { return }
      parts.write(
        overlay, at: position + UInt64(run.start), length: UInt64(run.length), from: one.start + run.start)
      run.length = 0
    }
    var offset = 0
    while offset < Int(length) {
      // Up to the end of the cluster, wherever the stretch begins.
      let toEnd = cluster - (Int(position % UInt64(cluster)) + offset) % cluster
      let count = min(toEnd, Int(length) - offset)
      let bytes = one.start + offset
      if memcmp(bytes, other.start + offset, count) == 0 {
        writeRun()
      } else if Zeros.fill(bytes, count) {
        writeRun()
        parts.writeZeroes(overlay, at: position + UInt64(offset), length: UInt64(count))
      } else {
        if run.length == 0 { run.start = offset }
        run.length += count
      }
      offset += count
    }
    writeRun()
    parts.commit()
  }
}
