import Glibc

/// Memory that O_DIRECT takes: aligned to 4096 bytes. Owned by whoever made it.
public final class DiskBuffer {
  /// The bytes.
  public let bytes: UnsafeMutableRawBufferPointer

  /// `count` bytes, which are zero where `zeroed`.
  public init(count: Int, zeroed: Bool = false) {
    bytes = .allocate(byteCount: max(count, 1), alignment: 4096)
    if zeroed { memset(start, 0, count) }
  }

  deinit { bytes.deallocate() }

  /// Where the bytes begin.
  public var start: UnsafeMutableRawPointer { bytes.baseAddress.unsafelyUnwrapped }
}

/// The memory of one request: a list of pieces, as readv(2) takes it. The pieces belong to the requester.
public struct IOVectors: ~Copyable {
  private(set) var pointer: UnsafeMutablePointer<iovec>
  private var capacity: Int
  /// How many pieces there are.
  public private(set) var count = 0
  /// The bytes of all pieces.
  public private(set) var byteCount = 0

  /// Without pieces.
  public init() {
    capacity = 4
    pointer = .allocate(capacity: capacity)
  }

  deinit { pointer.deallocate() }

  /// Forgets every piece and keeps the room.
  public mutating func removeAll() {
    count = 0
    byteCount = 0
  }

  /// Adds a piece; one without bytes is left out.
  public mutating func append(_ start: UnsafeMutableRawPointer?, _ length: Int) {
    guard length > 0 else { return }
    if count == capacity {
      let larger = UnsafeMutablePointer<iovec>.allocate(capacity: capacity * 2)
      larger.update(from: pointer, count: count)
      pointer.deallocate()
      pointer = larger
      capacity *= 2
    }
    pointer[count] = iovec(iov_base: start, iov_len: length)
    count += 1
    byteCount += length
  }

  /// Adds the pieces of `length` bytes of another list, from its byte `offset` on.
  public mutating func append(_ other: borrowing IOVectors, from offset: Int, length: Int) {
    var skip = offset
    var rest = length
    for index in 0..<other.count where rest > 0 {
      let piece = other.pointer[index]
      if skip >= piece.iov_len {
        skip -= piece.iov_len
        continue
      }
      let part = min(piece.iov_len - skip, rest)
      append(piece.iov_base.map { $0 + skip }, part)
      skip = 0
      rest -= part
    }
  }

  /// Drops the first `length` bytes, which have been transferred.
  mutating func dropFirst(_ length: Int) {
    var rest = length
    var kept = 0
    for index in 0..<count {
      var piece = pointer[index]
      let part = min(rest, piece.iov_len)
      rest -= part
      piece.iov_base = piece.iov_base.map { $0 + part }
      piece.iov_len -= part
      if piece.iov_len > 0 {
        pointer[kept] = piece
        kept += 1
      }
    }
    count = kept
    byteCount -= min(length, byteCount)
  }

  /// Calls `body` with the start and length of every piece.
  public func forEachPiece(_ body: (UnsafeMutableRawPointer, Int) -> Void) {
    for index in 0..<count {
      if let start = pointer[index].iov_base { body(start, pointer[index].iov_len) }
    }
  }

  /// The pieces as system calls take them, during the call only.
  public func withPieces(_ body: (UnsafeBufferPointer<iovec>) -> Void) {
    body(UnsafeBufferPointer(start: pointer, count: count))
  }

  /// Makes `length` bytes from `offset` on zero.
  public func zero(from offset: Int, length: Int) {
    forEach(from: offset, length: length) { start, count, _ in memset(start, 0, count) }
  }

  /// Fills `length` bytes from `offset` on with what is at `source`.
  public func copyIn(_ source: UnsafeRawPointer, from offset: Int, length: Int) {
    forEach(from: offset, length: length) { start, count, done in memcpy(start, source + done, count) }
  }

  /// Copies `length` bytes from `offset` on to `target`.
  public func copyOut(_ target: UnsafeMutableRawPointer, from offset: Int, length: Int) {
    forEach(from: offset, length: length) { start, count, done in memcpy(target + done, start, count) }
  }

  private func forEach(from offset: Int, length: Int, _ body: (UnsafeMutableRawPointer, Int, Int) -> Void) {
    var skip = offset
    var done = 0
    for index in 0..<count where done < length {
      let piece = pointer[index]
      if skip >= piece.iov_len {
        skip -= piece.iov_len
        continue
      }
      let part = min(piece.iov_len - skip, length - done)
      if let base = piece.iov_base { body(base + skip, part, done) }
      skip = 0
      done += part
    }
  }
}
