import Glibc

/// A bounded cache of an image's tables, in pieces of `unit` bytes. Pieces that are dirty or being written stay.
final class TableCache {
  private struct Slot {
    var offset: UInt64
    var buffer: DiskBuffer
    var isDirty = false
    var isBeingWritten = false
    var wasUsed = true
  }

  /// Bytes of a piece.
  let unit: Int
  private let capacity: Int
  private var slots: [Slot] = []
  private var places: [UInt64: Int] = [:]
  private var hand = 0
  private var dirty: [Int] = []
  /// The piece that was found last: requests come in runs.
  private var lastOffset = UInt64.max
  private var lastPlace = 0

  init(unit: Int, bytes: Int) {
    self.unit = unit
    capacity = max(bytes / unit, 16)
  }

  /// So many dirty pieces that writing them back should begin.
  var wantsWriteBack: Bool { dirty.count >= capacity / 2 }
  var hasDirty: Bool { !dirty.isEmpty }

  /// The piece at a multiple of `unit`, where it is held.
  func find(_ offset: UInt64) -> Int? {
    if offset == lastOffset { return lastPlace }
    guard let place = places[offset] else { return nil }
    slots[place].wasUsed = true
    lastOffset = offset
    lastPlace = place
    return place
  }

  /// Whether so many pieces more need no other to go.
  func hasRoom(for count: Int) -> Bool { slots.count + count <= capacity }

  func bytes(_ place: Int) -> UnsafeMutableRawPointer { slots[place].buffer.start }

  /// Room for the piece at `offset`, whose bytes are not set; nil where every piece is needed until it is written.
  func insert(_ offset: UInt64) -> Int? {
    if let place = places[offset] { return place }
    let place: Int
    if slots.count < capacity {
      place = slots.count
      slots.append(Slot(offset: offset, buffer: DiskBuffer(count: unit)))
    } else {
      guard let victim = evictable() else { return nil }
      place = victim
      places[slots[place].offset] = nil
      if slots[place].offset == lastOffset { lastOffset = .max }
      slots[place].offset = offset
      slots[place].wasUsed = true
    }
    places[offset] = place
    return place
  }

  private func evictable() -> Int? {
    for _ in 0..<slots.count * 2 {
      let place = hand
      hand = (hand + 1) % slots.count
      if slots[place].isDirty || slots[place].isBeingWritten { continue }
      if slots[place].wasUsed {
        slots[place].wasUsed = false
        continue
      }
      return place
    }
    return nil
  }

  /// Gives up a piece whose bytes could not be read.
  func forget(_ place: Int) {
    places[slots[place].offset] = nil
    if slots[place].offset == lastOffset { lastOffset = .max }
    slots[place].offset = .max
    slots[place].wasUsed = false
  }

  /// Gives up what is held of a range that is about to be used for something else.
  func forget(from offset: UInt64, length: UInt64) {
    for start in stride(from: offset, to: offset + length, by: unit) {
      guard let place = places[start] else { continue }
      if slots[place].isDirty {
        slots[place].isDirty = false
        dirty.removeAll { $0 == place }
      }
      forget(place)
    }
  }

  func markDirty(_ place: Int) {
    guard !slots[place].isDirty else { return }
    slots[place].isDirty = true
    dirty.append(place)
  }

  /// Copies of what is dirty, to be written; the pieces are clean from now on and stay until `finishWriting`.
  func takeDirty() -> [TableCopy] {
    defer { dirty.removeAll(keepingCapacity: true) }
    return dirty.map { place in
      slots[place].isDirty = false
      slots[place].isBeingWritten = true
      let copy = DiskBuffer(count: unit)
      memcpy(copy.start, slots[place].buffer.start, unit)
      return TableCopy(offset: slots[place].offset, buffer: copy)
    }
  }

  /// Ends what `takeDirty` began; where the writing failed, the pieces are dirty again.
  func finishWriting(_ copies: [TableCopy], failed: Bool) {
    for copy in copies {
      guard let place = places[copy.offset], slots[place].isBeingWritten else { continue }
      slots[place].isBeingWritten = false
      if failed { markDirty(place) }
    }
  }
}

/// A piece of a table as it was when a write-back began.
struct TableCopy {
  let offset: UInt64
  let buffer: DiskBuffer
}
