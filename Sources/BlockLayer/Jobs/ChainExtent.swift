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

/// A walk over a disk with layers, most of it in ascending order: each layer is asked once for a stretch, not again for every
/// extent of the layers below it. What the walk reads does not change meanwhile.
struct ChainWalk {
  private struct Layer {
    let node: any BlockNode
    /// What it said last.
    var known: BlockExtent
  }

  private var layers: [Layer] = []

  /// All layers of a disk, or its upper ones, so many.
  init(_ top: any BlockNode, layers count: Int = .max) {
    var next: (any BlockNode)? = top
    while let node = next, layers.count < count {
      layers.append(
        Layer(node: node, known: BlockExtent(offset: 0, length: 0, isAllocated: false, isData: false, isZero: false)))
      next = node.backingNode
    }
  }

  /// As `BlockNode.chainExtent`; nil where the upper layers say nothing, which are all that it looks at, and more are below.
  mutating func extent(
    at offset: UInt64, length: UInt64
  ) throws(BlockError) -> (found: ChainExtent?, length: UInt64) {
    var limit = UInt64.max - offset
    for depth in layers.indices {
      let size = layers[depth].node.size
      if depth > 0, offset >= size {
        var extent = layers[depth - 1].known.advanced(to: offset)
        extent.length = min(length, limit)
        extent.isZero = true
        return (ChainExtent(extent: extent, depth: depth - 1, layer: layers[depth - 1].node), extent.length)
      }
      if !layers[depth].known.contains(offset) {
        layers[depth].known = try layers[depth].node.extent(at: offset, length: min(limit, size - min(offset, size)))
      }
      var extent = layers[depth].known.advanced(to: offset)
      limit = min(limit, extent.length)
      let isLast = depth == layers.count - 1 && layers[depth].node.backingNode == nil
      guard extent.isAllocated || isLast else { continue }
      extent.length = min(length, limit)
      return (ChainExtent(extent: extent, depth: depth, layer: layers[depth].node), extent.length)
    }
    return (nil, min(length, limit))
  }
}

extension BlockExtent {
  fileprivate func contains(_ place: UInt64) -> Bool { place >= offset && place - offset < length }

  /// What is left of it from a place within it on.
  fileprivate func advanced(to place: UInt64) -> BlockExtent {
    var rest = self
    let distance = place - offset
    rest.offset = place
    rest.length -= distance
    rest.hostOffset = hostOffset.map { $0 + distance }
    return rest
  }
}

extension BlockNode {
  /// Calls `body` for every stretch of the disk, as long as possible, in order.
  public func forEachExtent(_ body: (ChainExtent) throws -> Void) throws {
    var walk = ChainWalk(self)
    var pending: ChainExtent?
    var offset: UInt64 = 0
    while offset < size, let next = try walk.extent(at: offset, length: size - offset).found {
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
    var (mine, theirs) = (ChainWalk(self), ChainWalk(other))
    var offset: UInt64 = 0
    while offset < min(size, other.size),
      let one = try mine.extent(at: offset, length: size - offset).found,
      let two = try theirs.extent(at: offset, length: one.extent.length).found
    {
      if one.extent.isData != two.extent.isData { return offset }
      offset += two.extent.length
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
