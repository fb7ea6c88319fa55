import Glibc

/// Two disks, read beside each other: whether they hold the same, up to the end of the longer one.
///
/// A rebase is the same with a repair: what differs is written into a layer above.
public class CompareJob: BlockJob {
  fileprivate let left: (any BlockNode)?
  fileprivate let right: (any BlockNode)?
  /// The first byte that differs.
  public private(set) var firstDifference: UInt64?

  /// Compares two disks; what is past the end of the shorter one counts as zeros.
  public convenience init(_ left: any BlockNode, _ right: any BlockNode) {
    self.init(left: left, right: right, total: max(left.size, right.size))
  }

  /// nil is a disk of zeros.
  fileprivate init(left: (any BlockNode)?, right: (any BlockNode)?, total: UInt64, stretch: Int = stretch) {
    self.left = left
    self.right = right
    super.init(total: total, stretch: stretch)
  }

  // Requests are begun in order: once one differs, those behind it cannot tell of an earlier place.
  override var isSettled: Bool { firstDifference != nil }

  override func begin(at position: UInt64) throws(BlockError) -> UInt64 {
    try compare(at: position, length: total - position)
  }

  /// A stretch that is known to be the same, or one of data up to where the next such begins.
  fileprivate func compare(at position: UInt64, length: UInt64) throws(BlockError) -> UInt64 {
    var (isSame, covered) = try foreknown(at: position, length: length)
    if isSame { return covered }
    let most = min(length, UInt64(stretch))
    while covered < most {
      let next = try foreknown(at: position + covered, length: most - covered)
      if next.isSame { break }
      covered += next.length
    }
    return try readBoth(at: position, length: min(covered, most))
  }

  /// Whether metadata alone says that both hold the same.
  private func foreknown(at position: UInt64, length: UInt64) throws(BlockError) -> (isSame: Bool, length: UInt64) {
    let one = try Self.state(left, at: position, length: length)
    let other = try Self.state(right, at: position, length: one.length)
    if one.isZero, other.isZero { return (true, other.length) }
    guard let mine = one.layer, let theirs = other.layer else { return (false, other.length) }
    return (mine.isSameLayer(as: theirs), other.length)
  }

  private static func state(
    _ node: (any BlockNode)?, at offset: UInt64, length: UInt64
  ) throws(BlockError) -> (isZero: Bool, length: UInt64, layer: (any BlockNode)?) {
    guard let node, offset < node.size else { return (true, length, nil) }
    let found = try node.chainExtent(at: offset, length: length)
    return (found.extent.isZero, found.extent.length, found.layer)
  }

  private func readBoth(at position: UInt64, length: UInt64) throws(BlockError) -> UInt64 {
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
    do throws(BlockError) {
      try Self.read(left, at: position, length: length, into: one.start, by: read)
      try Self.read(right, at: position, length: length, into: other.start, by: read)
    } catch {
      read.fail(error)
    }
    read.commit()
    return length
  }

  /// Reads from the layers that hold the bytes.
  private static func read(
    _ node: (any BlockNode)?, at position: UInt64, length: UInt64, into bytes: UnsafeMutableRawPointer,
    by read: StretchRead
  ) throws(BlockError) {
    var done: UInt64 = 0
    while done < length {
      let place = position + done
      guard let node, place < node.size else {
        memset(bytes + Int(done), 0, Int(length - done))
        return
      }
      let found = try node.chainExtent(at: place, length: length - done)
      if found.extent.isZero {
        memset(bytes + Int(done), 0, Int(found.extent.length))
      } else {
        read.read(found.layer, at: place, length: found.extent.length, into: bytes + Int(done))
      }
      done += found.extent.length
    }
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

  /// `overlay` has the old backing file as its backing node; nil for `new` is no backing file any more.
  public init(_ overlay: Qcow2Image, to new: (any BlockNode)?) {
    self.overlay = overlay
    let stretch = max(Int(overlay.clusterSize), Self.stretch)
    super.init(left: overlay.backing, right: new, total: overlay.size, stretch: stretch)
  }

  override var isSettled: Bool { false }

  override func begin(at position: UInt64) throws(BlockError) -> UInt64 {
    let extent = try overlay.extent(at: position, length: total - position)
    return extent.isAllocated ? extent.length : try compare(at: position, length: extent.length)
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
