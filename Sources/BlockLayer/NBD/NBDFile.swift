import Glibc
import Host

/// An export of an NBD server as the bytes below a format. Its requests end on the thread of its queue.
///
/// A thread sends and a thread receives, so that the owner's thread never waits for the network unless it asks for
/// metadata, and is told through the queue of what has ended.
public final class NBDFile: BlockFile {
  /// The longest trim, zeroing or map that one request asks for.
  private static let longestRange: UInt64 = 1 << 30

  /// The URI.
  public let path: String
  /// Whether writes are refused.
  public let isReadOnly: Bool
  /// The export's size.
  public let length: UInt64
  private let handshake: NBDHandshake
  private let link: NBDLink
  private let queue: any IOQueue
  private let ignoresFlushes: Bool
  /// Requests that have not ended, and whether the queue has been asked to tell when one does.
  private var pending = 0
  private var isWatching = false
  private let count = DiskBuffer(count: 8, zeroed: true)
  /// What the server has said last about what is stored, from an offset on; see `hole`.
  private var map: (offset: UInt64, extents: [(length: UInt64, flags: UInt32)]) = (0, [])

  /// Connects.
  public init(_ uri: NBDURI, access: FileAccess, queue: any IOQueue) throws(BlockError) {
    path = "\(uri)"
    self.queue = queue
    ignoresFlushes = access.ignoresFlushes
    let socket: FileDescriptor
    do throws(HostError) {
      socket = try uri.endpoint.connect()
    } catch {
      throw .io(call: "connect to", path: path, errno: error.errno)
    }
    let stream = NBDStream(socket, path: path)
    handshake = try NBDHandshake(stream, uri)
    length = handshake.size
    isReadOnly = !access.writable
    if access.writable, handshake.flags.contains(.readOnly) { throw .remote(uri: path, .readOnly) }
    do throws(HostError) {
      link = try NBDLink(stream, path: path, handshake)
    } catch {
      throw .queue(error)
    }
  }

  // MARK: Requests

  /// Begins a request.
  public func submit(_ request: BlockRequest) {
    let whole = NBDWhole(request)
    whole.outstanding = 1
    let isChange = request.operation != .read && request.operation != .flush
    if isReadOnly, isChange { return request.completion(.readOnly(path: path)) }
    if isChange { map = (0, []) }
    // What lies past the end, where a disk is rounded up to sectors, is zero.
    let inside = min(request.length, length - min(length, request.offset))
    switch request.operation {
    case .read:
      request.memory.zero(from: Int(inside), length: Int(request.length - inside))
      split(whole, .read, inside, by: UInt64(handshake.longestPayload))
    case .write:
      if inside < request.length { whole.error = .io(call: "write", path: path, errno: ENOSPC) }
      split(whole, .write, inside, by: UInt64(handshake.longestPayload))
    case .flush:
      if handshake.flags.contains(.sendFlush), !ignoresFlushes, !isReadOnly {
        begin(NBDPart(.flush, whole: whole))
      }
    case .discard:
      if handshake.flags.contains(.sendTrim) { split(whole, .trim, inside, by: Self.longestRange) }
    case .writeZeroes:
      if handshake.flags.contains(.sendWriteZeroes) {
        split(whole, .writeZeroes, inside, by: Self.longestRange, request.mayUnmap ? [] : .noHole)
      } else {
        writeZeros(whole, inside)
      }
    }
    end(whole, nil)
    watch()
  }

  private func split(
    _ whole: NBDWhole, _ command: NBDProtocol.Command, _ length: UInt64, by most: UInt64,
    _ flags: NBDProtocol.CommandFlags = []
  ) {
    var done: UInt64 = 0
    while done < length {
      let count = min(most, length - done)
      let part = NBDPart(command, flags: flags, offset: whole.request.offset + done, length: count, whole: whole)
      if command == .read || command == .write {
        part.memory.append(whole.request.memory, from: Int(done), length: Int(count))
      }
      begin(part)
      done += count
    }
  }

  /// For servers that know no zeroes: the same mebibyte of them over and over.
  private func writeZeros(_ whole: NBDWhole, _ length: UInt64) {
    let zeros = DiskBuffer(count: 1 << 20, zeroed: true)
    whole.zeros = zeros
    var done: UInt64 = 0
    while done < length {
      let count = min(UInt64(min(1 << 20, handshake.longestPayload)), length - done)
      let part = NBDPart(.write, offset: whole.request.offset + done, length: count, whole: whole)
      part.memory.append(zeros.start, Int(count))
      begin(part)
      done += count
    }
  }

  private func begin(_ part: NBDPart) {
    part.whole?.outstanding += 1
    pending += 1
    link.send(part)
  }

  private func end(_ whole: NBDWhole, _ error: BlockError?) {
    if whole.error == nil { whole.error = error }
    whole.outstanding -= 1
    if whole.outstanding == 0 { whole.request.completion(whole.error) }
  }

  /// Has the queue tell when a part has ended, for as long as one is under way.
  private func watch() {
    guard pending > 0, !isWatching else { return }
    isWatching = true
    let request = BlockRequest(.read, length: 8) { [self] _ in
      isWatching = false
      for part in link.takeDone() {
        pending -= 1
        if let whole = part.whole { end(whole, part.error) }
      }
      watch()
    }
    request.memory.append(count.start, 8)
    queue.start(request, descriptor: link.notifier, path: path)
  }

  // MARK: Metadata

  /// Reads and waits.
  public func read(at offset: UInt64, into bytes: UnsafeMutableRawBufferPointer) throws(BlockError) {
    let inside = Int(min(UInt64(bytes.count), length - min(length, offset)))
    if inside < bytes.count, let base = bytes.baseAddress { memset(base + inside, 0, bytes.count - inside) }
    try transfer(.read, at: offset, UnsafeMutableRawBufferPointer(rebasing: bytes[..<inside]))
  }

  /// Writes and waits.
  public func write(at offset: UInt64, from bytes: UnsafeRawBufferPointer) throws(BlockError) {
    guard !isReadOnly else { throw .readOnly(path: path) }
    map = (0, [])
    guard offset <= length, UInt64(bytes.count) <= length - offset else {
      throw .io(call: "write", path: path, errno: ENOSPC)
    }
    try transfer(.write, at: offset, UnsafeMutableRawBufferPointer(mutating: bytes))
  }

  private func transfer(
    _ command: NBDProtocol.Command, at offset: UInt64, _ bytes: UnsafeMutableRawBufferPointer
  ) throws(BlockError) {
    var done = 0
    while done < bytes.count {
      let count = min(bytes.count - done, handshake.longestPayload)
      let part = NBDPart(command, offset: offset + UInt64(done), length: UInt64(count))
      part.memory.append(bytes.baseAddress.map { $0 + done }, count)
      try perform(part)
      done += count
    }
  }

  private func perform(_ part: NBDPart) throws(BlockError) {
    link.send(part)
    link.wait(for: part)
    if let error = part.error { throw error }
  }

  /// Has the server make durable what was written.
  public func flush() throws(BlockError) {
    guard handshake.flags.contains(.sendFlush), !ignoresFlushes, !isReadOnly else { return }
    try perform(NBDPart(.flush))
  }

  /// An export has the size that it has.
  public func setLength(_ length: UInt64) throws(BlockError) {
    guard length == self.length else { throw .unsupported(path: path, .operation("changing the size")) }
  }

  /// Zeroes with the right to give storage back; false where the server knows no zeroes.
  public func punchHole(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool {
    guard !isReadOnly else { throw .readOnly(path: path) }
    guard handshake.flags.contains(.sendWriteZeroes) else { return length == 0 }
    map = (0, [])
    let inside = min(length, self.length - min(self.length, offset))
    var done: UInt64 = 0
    while done < inside {
      let count = min(Self.longestRange, inside - done)
      try perform(NBDPart(.writeZeroes, offset: offset + done, length: count))
      done += count
    }
    return true
  }

  /// What reads as zeros, by `base:allocation`; all data where the server cannot tell.
  ///
  /// One answer serves a walk from its start to its end, but is not kept for a second one: others may have written.
  public func hole(at offset: UInt64, length count: UInt64) -> (isHole: Bool, length: UInt64) {
    guard offset < length else { return (true, count) }
    guard handshake.allocationContext != nil else { return (false, min(count, length - offset)) }
    if let found = takeFromMap(offset, count) { return found }
    map = (0, [])
    let part = NBDPart(.blockStatus, offset: offset, length: min(Self.longestRange, length - offset))
    // A server that cannot say it is one whose data must be read.
    guard (try? perform(part)) != nil else { return (false, min(count, length - offset)) }
    map = (offset, part.extents)
    return takeFromMap(offset, count) ?? (false, min(count, length - offset))
  }

  private func takeFromMap(_ offset: UInt64, _ count: UInt64) -> (isHole: Bool, length: UInt64)? {
    guard offset >= map.offset else { return nil }
    while let first = map.extents.first {
      if offset < map.offset + first.length {
        // What lies before is told no second time.
        map.extents[0].length -= offset - map.offset
        map.offset = offset
        return (first.flags & NBDProtocol.stateZero != 0, min(count, map.extents[0].length))
      }
      map.offset += first.length
      map.extents.removeFirst()
    }
    return nil
  }

  /// The URI names it.
  public var identity: FileIdentity? { .export(uri: path) }

  /// Says good-bye.
  public func close() { link.close() }
}
