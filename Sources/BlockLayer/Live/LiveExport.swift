/// What a server needs of a layer that it shows.
extension LiveNode {
  /// Keeps the layer open until `endUse`.
  public func beginUse() { users += 1 }

  /// Undoes `beginUse`.
  public func endUse() { users -= 1 }

  /// Whether the layer has a dirty bitmap that says something.
  public func hasBitmap(_ name: String) -> Bool {
    bitmapStates.contains { $0.name == name && !$0.isInconsistent }
  }

  /// Whether the byte at `offset` is dirty now, and how many bytes from there on share that, `length` at most; nil where
  /// there is no such bitmap any more.
  public func dirtyRun(
    _ bitmap: String, at offset: UInt64, length: UInt64
  ) -> (isDirty: Bool, length: UInt64)? {
    if let found = bitmaps.first(where: { $0.name == bitmap }) { return found.run(at: offset, length: length) }
    return qcow2?.bitmaps.first { $0.name == bitmap }?.run(at: offset, length: length)
  }
}

extension DirtyBitmap {
  /// Whether the byte at `offset` is dirty, and how many bytes from there on share that; `length` at most.
  func run(at offset: UInt64, length: UInt64) -> (isDirty: Bool, length: UInt64) {
    let end = offset + length
    var block = Int(offset / granularity)
    guard block < blocks, self[block] else {
      let next = next(from: block).map { UInt64($0) * granularity } ?? end
      return (false, min(next, end) - offset)
    }
    while block < blocks, UInt64(block) * granularity < end, self[block] { block += 1 }
    return (true, min(UInt64(block) * granularity, end) - offset)
  }
}
