import CLinux
import Glibc
import Host

/// A connection to an NBD server past its handshake: a thread that sends, and one that receives.
final class NBDLink: @unchecked Sendable {
  private struct State {
    var outgoing: [NBDPart] = []
    /// What the server has to answer, by cookie.
    var asked: [UInt64: NBDPart] = [:]
    var nextCookie: UInt64 = 1
    /// Parts of requests that have ended.
    var done: [NBDPart] = []
    /// Why nothing goes on.
    var failure: BlockError?
    var isClosing = false
  }

  private let stream: NBDStream
  private let event: FileDescriptor
  private let path: String
  private let structured: Bool
  private let allocationContext: UInt32?
  private let state = Condition(State())
  private var threads: [HostThread] = []

  init(_ stream: NBDStream, path: String, _ handshake: NBDHandshake) throws(HostError) {
    self.stream = stream
    // Waits, unlike other eventfds: a queue reads it.
    event = FileDescriptor(owning: try check("eventfd", eventfd(0, Int32(EFD_CLOEXEC))))
    self.path = path
    structured = handshake.structured
    allocationContext = handshake.allocationContext
    threads.append(try HostThread(name: "nbd-receive") { [unowned self] in receiveAll() })
    do throws(HostError) {
      threads.append(try HostThread(name: "nbd-send") { [unowned self] in sendAll() })
    } catch {
      close()
      throw error
    }
  }

  deinit { close() }

  /// An eventfd that counts parts that have ended.
  var notifier: Int32 { event.rawValue }

  func send(_ part: NBDPart) {
    let failure = state.withLock { state -> BlockError? in
      if state.failure == nil { state.outgoing.append(part) }
      return state.failure
    }
    if let failure { finish([part], failure) }
  }

  func wait(for part: NBDPart) {
    _ = state.wait { _ in part.isDone ? true : nil }
  }

  func takeDone() -> [NBDPart] {
    state.withLock { state in
      defer { state.done = [] }
      return state.done
    }
  }

  func close() {
    let isBusy = state.withLock { state in
      state.isClosing = true
      return !state.asked.isEmpty || !state.outgoing.isEmpty
    }
    // A server that hangs must not hold its client.
    if isBusy { stream.shut() }
    for thread in threads.reversed() { thread.join() }
    threads = []
  }

  /// Parts have ended, all the same way.
  private func finish(_ parts: [NBDPart], _ error: BlockError?) {
    var count: UInt64 = 0
    state.withLock { state in
      for part in parts {
        if let error { part.error = error }
        part.isDone = true
        if part.whole != nil {
          state.done.append(part)
          count += 1
        }
      }
    }
    if count > 0 { eventfd_write(event.rawValue, count) }
  }

  private func fail(_ error: BlockError) {
    let parts = state.withLock { state -> [NBDPart] in
      if state.failure == nil { state.failure = error }
      defer {
        state.outgoing = []
        state.asked = [:]
      }
      return state.outgoing + state.asked.values
    }
    finish(parts, error)
  }

  // MARK: Sending

  private func sendAll() {
    while true {
      let next = state.wait { state -> (parts: [(UInt64, NBDPart)], ends: Bool)? in
        if state.failure != nil { return ([], true) }
        if state.outgoing.isEmpty { return state.isClosing ? ([], true) : nil }
        let parts = state.outgoing.map { part in
          defer { state.nextCookie &+= 1 }
          state.asked[state.nextCookie] = part
          return (state.nextCookie, part)
        }
        state.outgoing = []
        return (parts, false)
      }
      if next.ends { break }
      for (cookie, part) in next.parts where !send(part, cookie) {
        // The receiver sees the end of the stream and fails what was asked.
        return stream.shut()
      }
    }
    _ = send(NBDPart(.disconnect), 0)
    stream.end()
  }

  private func send(_ part: NBDPart, _ cookie: UInt64) -> Bool {
    withUnsafeTemporaryAllocation(byteCount: NBDProtocol.requestSize, alignment: 8) { header in
      guard let start = header.baseAddress else { return false }
      start.storeBigEndian(NBDProtocol.requestMagic, 0)
      start.storeBigEndian(part.flags.rawValue, 4)
      start.storeBigEndian(part.command.rawValue, 6)
      start.storeBigEndian(cookie, 8)
      start.storeBigEndian(part.offset, 16)
      start.storeBigEndian(UInt32(truncatingIfNeeded: part.length), 24)
      var vectors = IOVectors()
      vectors.append(start, NBDProtocol.requestSize)
      if part.command == .write { vectors.append(part.memory, from: 0, length: Int(part.length)) }
      return (try? stream.send(vectors.pointer, vectors.count)) != nil
    }
  }

  // MARK: Receiving

  private func receiveAll() {
    do throws(BlockError) {
      while true { try receiveReply() }
    } catch {
      fail(error)
      stream.shut()
    }
  }

  private func broken(_ rule: String) -> BlockError { .remote(uri: path, .reply(rule)) }

  private func receive(into part: NBDPart, from offset: Int, _ count: Int) throws(BlockError) {
    var vectors = IOVectors()
    vectors.append(part.memory, from: offset, length: count)
    guard vectors.byteCount == count else { throw broken("bytes that nobody asked for") }
    try stream.receive(vectors.pointer, vectors.count)
  }

  private func receiveReply() throws(BlockError) {
    let head = try stream.receive(NBDProtocol.simpleReplySize)
    let cookie = head.bigEndian64(8)
    guard let part = state.withLock({ $0.asked[cookie] }) else { throw broken("an answer to no request") }
    switch head.bigEndian32(0) {
    case NBDProtocol.simpleReplyMagic:
      let code = head.bigEndian32(4)
      guard !structured || part.command != .read && part.command != .blockStatus else {
        throw broken("a simple reply to a read")
      }
      if code != 0 {
        part.error = error(code, part)
      } else if part.command == .read {
        try receive(into: part, from: 0, Int(part.length))
      }
      end(part, cookie)
    case NBDProtocol.structuredReplyMagic:
      guard structured else { throw broken("a structured reply, which was not agreed on") }
      let length = Int(try stream.receive(4).bigEndian32(0))
      try receiveChunk(part, type: head.bigEndian16(6), length)
      guard head.bigEndian16(4) & NBDProtocol.Chunk.done != 0 else { return }
      if part.error == nil, part.command == .read, !part.isCovered { throw broken("a read that is not answered whole") }
      if part.error == nil, part.command == .blockStatus, part.extents.isEmpty {
        throw broken("a block status without extents")
      }
      end(part, cookie)
    default: throw broken("no magic number")
    }
  }

  private func end(_ part: NBDPart, _ cookie: UInt64) {
    state.withLock { $0.asked[cookie] = nil }
    finish([part], nil)
  }

  private func receiveChunk(_ part: NBDPart, type: UInt16, _ length: Int) throws(BlockError) {
    switch type {
    case NBDProtocol.Chunk.none:
      guard length == 0 else { throw broken("an empty chunk with bytes") }
    case NBDProtocol.Chunk.offsetData where part.command == .read:
      guard length > 8, length - 8 <= Int(part.length) else { throw broken("a data chunk of \(length) bytes") }
      let offset = try stream.receive(8).bigEndian64(0)
      guard part.cover(offset, UInt64(length - 8)) else { throw broken("data at \(offset) that nobody asked for") }
      try receive(into: part, from: Int(offset - part.offset), length - 8)
    case NBDProtocol.Chunk.offsetHole where part.command == .read:
      guard length == 12 else { throw broken("a hole chunk of \(length) bytes") }
      let bytes = try stream.receive(12)
      let (offset, count) = (bytes.bigEndian64(0), UInt64(bytes.bigEndian32(8)))
      guard part.cover(offset, count) else { throw broken("a hole at \(offset) that nobody asked for") }
      part.memory.zero(from: Int(offset - part.offset), length: Int(count))
    case NBDProtocol.Chunk.blockStatus where part.command == .blockStatus:
      guard length >= 12, length % 8 == 4, length <= 16 << 20 else { throw broken("a status of \(length) bytes") }
      try takeExtents(part, try stream.receive(length))
    case let type where type & 1 << 15 != 0:
      guard length >= 6, length <= NBDProtocol.longestOption else { throw broken("an error of \(length) bytes") }
      let bytes = try stream.receive(length)
      part.error = error(bytes.bigEndian32(0), part)
    default: throw broken("a chunk of type \(type)")
    }
  }

  private func takeExtents(_ part: NBDPart, _ bytes: [UInt8]) throws(BlockError) {
    guard bytes.bigEndian32(0) == allocationContext, part.extents.isEmpty else {
      throw broken("a status that nobody asked for")
    }
    var rest = part.length
    for place in stride(from: 4, to: bytes.count, by: 8) where rest > 0 {
      let length = UInt64(bytes.bigEndian32(place))
      guard length > 0 else { throw broken("an extent without bytes") }
      // The last one may go on past what was asked for.
      part.extents.append((min(length, rest), bytes.bigEndian32(place + 4)))
      rest -= min(length, rest)
    }
  }

  /// An error that the server tells, which has the host's numbers.
  private func error(_ code: UInt32, _ part: NBDPart) -> BlockError {
    let call: String =
      switch part.command {
      case .read: "read"
      case .write: "write"
      case .flush, .disconnect: "flush"
      case .trim: "discard blocks of"
      case .writeZeroes: "write zeroes to"
      case .blockStatus: "map"
      }
    return .io(call: call, path: path, errno: NBDProtocol.Code(rawValue: code) == nil ? EIO : Int32(code))
  }
}
