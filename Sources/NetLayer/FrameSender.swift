import Glibc

/// A stream on its way out: frames stay where they are until `flush`, which gives them to the socket in one call; what it has no
/// room for waits in a queue, and what the queue has no room for is dropped.
struct FrameSender: ~Copyable {
  /// Pieces of memory that one call takes.
  private static let vectorLimit = 256
  /// Has the socket take bytes, and returns how many it has taken: 0 where it is full.
  typealias Write = (UnsafeMutablePointer<iovec>, Int) -> Int

  private let vectors: UnsafeMutablePointer<iovec>
  private var vectorCount = 0
  private var frameCount = 0
  private var byteCount = 0
  private var queue = FrameQueue()

  init() { vectors = .allocate(capacity: Self.vectorLimit) }

  deinit { vectors.deallocate() }

  /// Whether bytes wait for the socket.
  var isWaiting: Bool { !queue.isEmpty }
  /// Whether `flush` comes before the next frame.
  var isFull: Bool { vectorCount == Self.vectorLimit }

  /// Adds a frame with its length before it.
  mutating func send(_ frame: UnsafeRawBufferPointer) {
    guard let start = UnsafeMutableRawPointer(mutating: frame.baseAddress) else { return }
    frameCount += 1
    byteCount += frame.count
    // Frames that came one after the other go on as one piece.
    if vectorCount > 0, vectors[vectorCount - 1].iov_base + vectors[vectorCount - 1].iov_len == start {
      vectors[vectorCount - 1].iov_len += frame.count
      return
    }
    vectors[vectorCount] = iovec(iov_base: start, iov_len: frame.count)
    vectorCount += 1
  }

  /// Gives what has been added to the socket, behind what waits; to nobody where it is over.
  mutating func flush(_ traffic: Traffic, isOver: Bool, _ write: Write) {
    guard vectorCount > 0 else { return }
    let written = queue.isEmpty && !isOver ? write(vectors, vectorCount) : 0
    if written == byteCount {
      traffic.sent(frames: frameCount, bytes: byteCount - frameCount * StreamFraming.prefix)
    } else {
      keep(from: written, traffic, isOver)
    }
    vectorCount = 0
    frameCount = 0
    byteCount = 0
  }

  /// Queues the frames after `written` bytes, one of which may have gone in part.
  private mutating func keep(from written: Int, _ traffic: Traffic, _ isOver: Bool) {
    var skip = written
    for vector in UnsafeBufferPointer(start: vectors, count: vectorCount) {
      var rest = UnsafeRawBufferPointer(start: vector.iov_base, count: vector.iov_len)[...]
      while !rest.isEmpty {
        let start = UnsafeRawBufferPointer(rebasing: rest)
        let count = StreamFraming.prefix + Int(UInt32(bigEndian: start.loadUnaligned(as: UInt32.self)))
        let unsent = UnsafeRawBufferPointer(rebasing: rest.prefix(count).dropFirst(skip))
        // An empty queue has room for a frame that has gone in part: it is the first.
        if !isOver, unsent.isEmpty || queue.append(unsent) {
          traffic.sent(frames: 1, bytes: count - StreamFraming.prefix)
        } else {
          traffic.dropped(frames: 1)
        }
        skip = max(0, skip - count)
        rest = rest.dropFirst(count)
      }
    }
  }

  /// Gives what waits to the socket, as far as it has room.
  mutating func drain(_ write: Write) {
    while !queue.isEmpty {
      let pieces = queue.pieces()
      let count = withUnsafeTemporaryAllocation(of: iovec.self, capacity: 2) { vectors in
        vectors.initializeElement(at: 0, to: pieces.0)
        vectors.initializeElement(at: 1, to: pieces.1)
        return write(vectors.baseAddress!, pieces.1.iov_len == 0 ? 1 : 2)
      }
      guard count > 0 else { return }
      queue.removeFirst(count)
    }
  }
}
