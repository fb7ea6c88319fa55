/// What a range of a disk with layers holds, and which layer says so.
public struct ChainExtent {
  /// The state, as the layer that decides it has it.
  public var extent: BlockExtent
  /// 0 for the disk's own layer, 1 for its backing file and so on.
  public var depth: Int
  /// That layer.
  public var layer: any BlockNode
}

extension BlockNode {
  /// The next layer.
  public var backingNode: (any BlockNode)? { (self as? Qcow2Image)?.backing }

  /// The state of the bytes at `offset`, looked for through all layers: one extent, of `length` bytes at most.
  ///
  /// What no layer has reads as zeros and is not allocated; `depth` is then the last layer that reaches so far.
  public func chainExtent(at offset: UInt64, length: UInt64) throws(BlockError) -> ChainExtent {
    var layer: any BlockNode = self
    var length = length
    var depth = 0
    while true {
      var extent = try layer.extent(at: offset, length: length)
      guard !extent.isAllocated, let next = layer.backingNode else {
        return ChainExtent(extent: extent, depth: depth, layer: layer)
      }
      guard offset < next.size else {
        extent.isZero = true
        return ChainExtent(extent: extent, depth: depth, layer: layer)
      }
      length = extent.length
      layer = next
      depth += 1
    }
  }
}

extension BlockNode {
  /// Calls `body` for every stretch of the disk, as long as possible, in order.
  public func forEachExtent(_ body: (ChainExtent) throws -> Void) throws {
    var pending: ChainExtent?
    var offset: UInt64 = 0
    while offset < size {
      let next = try chainExtent(at: offset, length: size - offset)
      offset += next.extent.length
      if let last = pending, last.isContinued(by: next) {
        pending?.extent.length += next.extent.length
      } else {
        if let pending { try body(pending) }
        pending = next
      }
    }
    if let pending { try body(pending) }
  }

  /// The first byte that one disk stores and the other, of the same size, does not.
  public func firstStoredDifference(from other: any BlockNode) throws(BlockError) -> UInt64? {
    var offset: UInt64 = 0
    while offset < min(size, other.size) {
      let mine = try chainExtent(at: offset, length: size - offset).extent
      let theirs = try other.chainExtent(at: offset, length: mine.length).extent
      if mine.isData != theirs.isData { return offset }
      offset += theirs.length
    }
    return nil
  }
}

extension ChainExtent {
  fileprivate func isContinued(by next: ChainExtent) -> Bool {
    let (one, other) = (extent, next.extent)
    return depth == next.depth && one.isAllocated == other.isAllocated && one.isData == other.isData
      && one.isZero == other.isZero && one.hostOffset.map { $0 + one.length } == other.hostOffset
  }
}

/// What names a layer's bytes, whichever object stands for it: two chains that meet in one file read the same below it.
extension BlockNode {
  func isSameLayer(as other: any BlockNode) -> Bool {
    if self === other { return true }
    guard let mine = layerFile?.identity, let theirs = other.layerFile?.identity else { return false }
    return mine == theirs
  }

  private var layerFile: (any BlockFile)? {
    switch self {
    case let image as Qcow2Image: image.file
    case let image as RawImage: image.file
    default: nil
    }
  }
}
