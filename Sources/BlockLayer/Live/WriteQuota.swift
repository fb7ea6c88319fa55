/// How much the guests of several disks may write together, counted in blocks that they touch for the first time.
///
/// What is beyond is refused as by a full file system. It belongs to the thread of the disks.
public final class WriteQuota {
  /// Bytes of a block, as many as a cluster of the layers that take the writes has.
  static let block: UInt64 = 64 << 10

  /// Bytes in all.
  public let limit: UInt64
  /// Told of each refusal.
  public var onRefusal: (LiveDisk) -> Void = { _ in }
  private var written: [ObjectIdentifier: DirtyBitmap] = [:]

  /// A quota that no disk is under.
  public init(limit: UInt64) { self.limit = limit }

  /// Bytes that are used.
  public var used: UInt64 { written.values.reduce(0) { $0 + $1.dirtyBytes } }

  /// Puts a disk under the quota.
  public func cover(_ disk: LiveDisk) {
    written[ObjectIdentifier(disk)] = DirtyBitmap(size: disk.size, granularity: Self.block)
    disk.quota = self
  }

  /// A disk goes, and what it has used is free.
  public func release(_ disk: LiveDisk) {
    written[ObjectIdentifier(disk)] = nil
    disk.quota = nil
  }

  /// Counts a change that is about to begin.
  ///
  /// - Returns: Why it must not; nothing is counted then.
  func refuse(_ disk: LiveDisk, _ range: Range<UInt64>) -> BlockError? {
    guard let blocks = written[ObjectIdentifier(disk)] else { return nil }
    let more = UInt64(blocks.unset(in: range)) * Self.block
    guard more > 0 else { return nil }
    guard used + more <= limit else {
      onRefusal(disk)
      return .quota(disk.name, limit: limit)
    }
    blocks.set(range.lowerBound, UInt64(range.count))
    return nil
  }
}
