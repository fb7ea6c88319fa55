import Glibc

/// What is on its way to a client: pieces of memory, each kept by its owner until it has been sent.
struct OutputQueue {
  private struct Piece {
    var start: UnsafeRawPointer
    var count: Int
    let owner: AnyObject
    /// The request that has been answered once this piece is sent.
    let ends: ServerTransfer?
  }

  private var pieces: [Piece] = []
  private var head = 0

  var isEmpty: Bool { head == pieces.count }
  /// Pieces that wait.
  var count: Int { pieces.count - head }

  /// Adds what the transfer's own memory holds, or its buffer.
  mutating func append(_ start: UnsafeRawPointer, _ count: Int, of transfer: ServerTransfer, ends: Bool) {
    pieces.append(Piece(start: start, count: count, owner: transfer, ends: ends ? transfer : nil))
  }

  mutating func append(_ bytes: [UInt8], ends: ServerTransfer? = nil) {
    let copy = OwnedBytes(bytes)
    pieces.append(Piece(start: UnsafeRawPointer(copy.start), count: bytes.count, owner: copy, ends: ends))
  }

  /// Names the first pieces for writev(2).
  func fill(_ vectors: UnsafeMutableBufferPointer<iovec>) -> Int {
    let count = min(vectors.count, pieces.count - head)
    for index in 0..<count {
      let piece = pieces[head + index]
      vectors[index] = iovec(iov_base: UnsafeMutableRawPointer(mutating: piece.start), iov_len: piece.count)
    }
    return count
  }

  /// Drops what has been sent, and calls `finished` with each request that is answered by now.
  mutating func sent(_ count: Int, _ finished: (ServerTransfer) -> Void) {
    var rest = count
    while head < pieces.count, rest >= pieces[head].count {
      rest -= pieces[head].count
      if let transfer = pieces[head].ends { finished(transfer) }
      head += 1
    }
    if head == pieces.count {
      pieces.removeAll(keepingCapacity: true)
      head = 0
    } else {
      pieces[head].start += rest
      pieces[head].count -= rest
      // What has been sent is let go of now and then, not for every piece.
      if head >= 64 {
        pieces.removeFirst(head)
        head = 0
      }
    }
  }

  mutating func removeAll(_ finished: (ServerTransfer) -> Void) {
    for piece in pieces[head...] {
      if let transfer = piece.ends { finished(transfer) }
    }
    pieces = []
    head = 0
  }
}

/// Bytes that stay where they are.
private final class OwnedBytes {
  let start: UnsafeMutableRawPointer

  init(_ bytes: [UInt8]) {
    start = .allocate(byteCount: max(bytes.count, 1), alignment: 8)
    bytes.withUnsafeBytes { source in
      if let base = source.baseAddress { memcpy(start, base, source.count) }
    }
  }

  deinit { start.deallocate() }
}
