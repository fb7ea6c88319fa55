import BlockLayer
import Glibc

/// One request of a client, from its header until its reply has been sent. Used again and again.
final class ServerTransfer {
  /// The longest header of a reply with one chunk: a structured one's, and an offset and a length.
  static let headerCapacity = 32

  let request: BlockRequest
  let header: UnsafeMutableRawPointer
  var command = NBDProtocol.Command.read
  var flags: NBDProtocol.CommandFlags = []
  var cookie: UInt64 = 0
  var offset: UInt64 = 0
  var length: UInt32 = 0
  var buffer: DiskBuffer?
  /// Bytes that count for it against the client's limit.
  var weight = 0
  /// For a structured read: what is data and what is a hole; empty where all is data.
  var stretches: [Stretch] = []
  /// Keeps the session while the request is under way.
  var session: ServerSession?

  struct Stretch {
    let isHole: Bool
    var length: UInt32
  }

  init() {
    request = BlockRequest(.read) { _ in }
    header = .allocate(byteCount: Self.headerCapacity, alignment: 8)
    // Unowned: the session that `session` keeps keeps this.
    request.completion = { [unowned self] error in session?.completed(self, error) }
  }

  deinit { header.deallocate() }
}

/// Memory for what is read and written, kept for the next request: fresh memory costs as much as the copy into it.
final class BufferPool {
  private static let smallest = 4096
  private static let classes = 10
  private static let limit = 32 << 20
  private var free: [[DiskBuffer]] = Array(repeating: [], count: classes)
  private var bytes = 0

  /// At least `count` bytes.
  func take(_ count: Int) -> DiskBuffer {
    guard let index = Self.index(count) else { return DiskBuffer(count: count) }
    if let buffer = free[index].popLast() {
      bytes -= buffer.bytes.count
      return buffer
    }
    return DiskBuffer(count: Self.smallest << index)
  }

  func give(_ buffer: DiskBuffer) {
    let size = buffer.bytes.count
    guard let index = Self.index(size), Self.smallest << index == size, bytes + size <= Self.limit else { return }
    bytes += size
    free[index].append(buffer)
  }

  private static func index(_ count: Int) -> Int? {
    var index = 0
    while index < classes, smallest << index < count { index += 1 }
    return index < classes ? index : nil
  }
}
