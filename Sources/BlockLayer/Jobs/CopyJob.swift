import Glibc

/// Copies a disk, or what some of its upper layers hold, into another one: convert, flatten and commit.
public final class CopyJob: BlockJob {
  /// What is copied, and how.
  public struct Options: Sendable {
    /// Only what the upper layers, so many, say themselves; nil for everything.
    public var layers: Int?
    /// The target reads as zeros wherever nothing is written.
    public var targetReadsZero = false
    /// Runs of so many zero bytes are not written as data; 0: everything is.
    public var sparse: UInt64 = 4096
    /// Clusters are compressed; the target is a new qcow2 image.
    public var compresses = false
    /// Only these bytes, in ascending order; nil for everything.
    public var ranges: [Range<UInt64>]?

    /// Everything, into a disk with any contents.
    public init() {}
  }

  private let source: any BlockNode
  private let target: any BlockNode
  private let options: Options
  /// Zeros are looked for in blocks of so many bytes, which the target can leave out.
  private let granularity: Int
  private var walk: ChainWalk

  /// The target is at least as large as the source.
  public init(from source: any BlockNode, to target: any BlockNode, _ options: Options = Options()) {
    self.source = source
    self.target = target
    self.options = options
    let unit = (target as? Qcow2Image)?.clusterSize ?? 512
    granularity = Int(min(max(options.sparse, unit), UInt64(Self.largestStretch)))
    walk = ChainWalk(source, layers: options.layers ?? .max)
    super.init(total: source.size, stretch: max(granularity, Self.stretch))
  }

  override func begin(at position: UInt64) throws(BlockError) -> UInt64 {
    let first = try state(at: position, length: total - position)
    switch first.state {
    case .elsewhere: return first.length
    case .zero where options.sparse > 0:
      // Compressed clusters are whole ones: what follows within one is looked at with it.
      let length = options.compresses ? wholeClusters(position, first.length) : first.length
      if length > 0 {
        if !options.targetReadsZero { writeZeroes(at: position, length: length) }
        return length
      }
    default: break
    }
    return try copyStretch(at: position)
  }

  private enum State { case elsewhere, zero, data }

  private func state(
    at offset: UInt64, length: UInt64
  ) throws(BlockError) -> (state: State, length: UInt64, layer: any BlockNode) {
    var length = length
    if let ranges = options.ranges {
      let next = firstRange(endingAfter: offset, ranges)
      guard next < ranges.count, ranges[next].lowerBound < offset + length else { return (.elsewhere, length, source) }
      guard ranges[next].lowerBound <= offset else {
        return (.elsewhere, ranges[next].lowerBound - offset, source)
      }
      length = min(length, ranges[next].upperBound - offset)
    }
    let (found, covered) = try walk.extent(at: offset, length: length)
    guard let found else { return (.elsewhere, covered, source) }
    return (found.extent.isZero ? .zero : .data, covered, found.layer)
  }

  private func firstRange(endingAfter offset: UInt64, _ ranges: [Range<UInt64>]) -> Int {
    var (low, high) = (0, ranges.count)
    while low < high {
      let middle = (low + high) / 2
      if ranges[middle].upperBound > offset { high = middle } else { low = middle + 1 }
    }
    return low
  }

  private func wholeClusters(_ position: UInt64, _ length: UInt64) -> UInt64 {
    position + length == total ? length : length.roundedDown(to: UInt64(granularity))
  }

  /// Data, with what lies between it where clusters are compressed whole.
  private func copyStretch(at position: UInt64) throws(BlockError) -> UInt64 {
    // Ends where the target's clusters do, so that none is written in two parts.
    let limit = min(total, (position + UInt64(stretch)).roundedDown(to: UInt64(granularity)))
    let most = (limit > position ? limit : min(total, position + UInt64(stretch))) - position
    let buffer = takeBuffer()
    let bytes = buffer.start
    var pieces: [(layer: any BlockNode, offset: UInt64, length: UInt64)] = []
    var length: UInt64 = 0
    while length < most {
      let next = try state(at: position + length, length: most - length)
      if next.state == .elsewhere { break }
      if next.state == .zero {
        // A hole that the target can leave out ends the stretch.
        if options.sparse > 0, !options.compresses, next.length >= UInt64(granularity) { break }
        memset(bytes + Int(length), 0, Int(next.length))
      } else {
        pieces.append((next.layer, position + length, next.length))
      }
      length += next.length
    }
    let stretch = length
    started(stretch)
    let read = StretchRead { [self] error in
      if let error { return end(buffer, stretch, error) }
      write(buffer, at: position, stretch)
    }
    for piece in pieces {
      read.read(piece.layer, at: piece.offset, length: piece.length, into: bytes + Int(piece.offset - position))
    }
    read.commit()
    return stretch
  }

  private func end(_ buffer: DiskBuffer, _ length: UInt64, _ error: BlockError?) {
    giveBack(buffer)
    finished(length, error)
  }

  private func write(_ buffer: DiskBuffer, at position: UInt64, _ length: UInt64) {
    if options.compresses { return writeCompressed(buffer, at: position, length) }
    let parts = StretchWrite { [self] error in end(buffer, length, error) }
    var offset = 0
    while offset < Int(length) {
      var part = (isZero: false, length: Int(length) - offset)
      if options.sparse > 0 {
        part = Zeros.run(buffer.start, from: offset, to: Int(length), granularity: granularity)
      }
      let place = position + UInt64(offset)
      if !part.isZero {
        parts.write(target, at: place, length: UInt64(part.length), from: buffer.start + offset)
      } else if !options.targetReadsZero {
        parts.writeZeroes(target, at: place, length: UInt64(part.length))
      }
      offset += part.length
    }
    parts.commit()
  }

  private func writeCompressed(_ buffer: DiskBuffer, at position: UInt64, _ length: UInt64) {
    guard let image = target as? Qcow2Image else {
      return end(buffer, length, .unsupported(path: "the target", .operation("compression")))
    }
    let parts = StretchWrite { [self] error in end(buffer, length, error) }
    let cluster = Int(image.clusterSize)
    for offset in stride(from: 0, to: Int(length), by: cluster) {
      let count = min(cluster, Int(length) - offset)
      if options.targetReadsZero, Zeros.fill(buffer.start + offset, count) { continue }
      let place = position + UInt64(offset)
      let isWhole = place % UInt64(cluster) == 0 && (count == cluster || place + UInt64(count) == total)
      do throws(BlockError) {
        if isWhole {
          // The disk's last cluster is stored with zeros behind its end.
          memset(buffer.start + offset + count, 0, cluster - count)
          let bytes = UnsafeRawBufferPointer(start: buffer.start + offset, count: cluster)
          if try image.writeCompressed(at: place, bytes) { continue }
        }
        parts.write(image, at: place, length: UInt64(count), from: buffer.start + offset)
      } catch {
        parts.fail(error)
        break
      }
    }
    parts.commit()
  }

  private func writeZeroes(at position: UInt64, length: UInt64) {
    started(length)
    let parts = StretchWrite { [self] error in finished(length, error) }
    parts.writeZeroes(target, at: position, length: length)
    parts.commit()
  }
}

/// Writes of one stretch.
final class StretchWrite {
  private var outstanding = 1
  private var error: BlockError?
  private let then: (BlockError?) -> Void

  init(then: @escaping (BlockError?) -> Void) { self.then = then }

  func write(_ node: any BlockNode, at offset: UInt64, length: UInt64, from source: UnsafeMutableRawPointer) {
    outstanding += 1
    let request = BlockRequest(.write, offset: offset, length: length) { [self] error in end(error) }
    request.isBulk = true
    request.memory.append(source, Int(length))
    node.submit(request)
  }

  func writeZeroes(_ node: any BlockNode, at offset: UInt64, length: UInt64) {
    outstanding += 1
    let request = BlockRequest(.writeZeroes, offset: offset, length: length) { [self] error in end(error) }
    request.mayUnmap = true
    node.submit(request)
  }

  func fail(_ error: BlockError) {
    if self.error == nil { self.error = error }
  }

  /// Everything has been begun.
  func commit() { end(nil) }

  private func end(_ error: BlockError?) {
    if let error { fail(error) }
    outstanding -= 1
    if outstanding == 0 { then(self.error) }
  }
}
