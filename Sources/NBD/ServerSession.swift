import BlockLayer
import Glibc

/// The exports of a server. They belong to its thread.
final class ExportTable {
  var exports: [NBDExport] = []

  func export(named name: String) -> NBDExport? { exports.first { $0.name == name } }
}

/// The server's side of one connection: bytes in, requests to nodes, bytes out. It knows no socket.
///
/// Whoever has the socket reads into `space`, tells `received` how much, and sends what `output` holds.
final class ServerSession {
  /// Requests of a client under way.
  private static let requestLimit = 128
  /// Bytes of memory that a client's requests hold; one request may have more alone.
  private static let memoryLimit = 8 << 20
  /// Extents that one context of a block status has at most.
  static let extentLimit = 4096
  /// Replies to options that a client may leave unread before its next option waits.
  private static let unreadLimit = 1024
  /// Options before the client must make up its mind.
  static let optionLimit = 1024

  /// What the client's bytes are protected by.
  enum Encryption {
    case none
    /// Nothing but the way to TLS is answered.
    case required
    case active
  }

  enum Phase {
    case clientFlags
    case optionHeader
    case option(UInt32, length: Int)
    /// An option that is too long; so many bytes of it are still to come.
    case tooLongOption(UInt32, rest: Int)
    /// What comes next is TLS, for whoever has the socket; see `startEncrypted`.
    case startingTLS
    case transmission
    /// A write whose bytes are coming.
    case payload(ServerTransfer, filled: Int)
    /// Bytes of a write that has been refused.
    case refusedPayload(ServerTransfer, rest: Int, NBDProtocol.Code)
    /// Nothing more is read; what is under way is answered.
    case ending
    /// The client broke the protocol or is gone.
    case dropped
  }

  let table: ExportTable
  let pool: BufferPool
  var phase = Phase.clientFlags
  var output = OutputQueue()
  /// Called when there is something to send.
  var onOutput: () -> Void = {}

  // What was negotiated.
  private(set) var encryption: Encryption
  var noZeroes = false
  var usesStructuredReplies = false
  var optionCount = 0
  var export: NBDExport?
  /// The export whose contexts have been selected, and which.
  var contextExport: NBDExport?
  var contexts: [Int] = []

  // Bytes that have come and not been looked at.
  private let input: UnsafeMutableRawBufferPointer
  private var start = 0
  private var end = 0

  // Requests under way.
  private var free: [ServerTransfer] = []
  private var transfers: [ServerTransfer] = []
  private(set) var inFlight = 0
  private var memoryInUse = 0
  /// A request waits for others to be answered, or an option for replies to be read.
  private(set) var isStalled = false

  init(table: ExportTable, pool: BufferPool, requiresTLS: Bool = false) {
    encryption = requiresTLS ? .required : .none
    self.table = table
    self.pool = pool
    input = .allocate(byteCount: NBDProtocol.longestOption + 4096, alignment: 16)
    greet()
  }

  deinit { input.deallocate() }

  private func greet() {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(NBDProtocol.greeting)
    bytes.appendBigEndian(NBDProtocol.optionMagic)
    let flags: NBDProtocol.HandshakeFlags = [.fixedNewstyle, .noZeroes]
    bytes.appendBigEndian(UInt16(truncatingIfNeeded: flags.rawValue))
    output.append(bytes)
  }

  /// Whether the client is past its options.
  var isNegotiated: Bool { export != nil }

  /// Whether bytes are wanted now.
  var wantsInput: Bool {
    switch phase {
    case .startingTLS, .ending, .dropped: false
    default: !isStalled
    }
  }

  /// Whether TLS is to begin: the client has been told.
  var wantsTLS: Bool {
    if case .startingTLS = phase { output.isEmpty } else { false }
  }

  /// Whether bytes have come that nobody has looked at.
  var hasMore: Bool { start < end }

  /// The handshake of TLS is done.
  func startEncrypted() {
    encryption = .active
    phase = .optionHeader
  }

  var isDropped: Bool {
    if case .dropped = phase { true } else { false }
  }

  /// Whether the connection is to be closed.
  var isOver: Bool {
    switch phase {
    case .ending: inFlight == 0 && output.isEmpty
    case .dropped: true
    default: false
    }
  }

  /// Where the next bytes belong: straight into a write's memory, where one is coming.
  var space: UnsafeMutableRawBufferPointer {
    if start == end {
      start = 0
      end = 0
      if case .payload(let transfer, let filled) = phase, let buffer = transfer.buffer {
        return UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[filled..<Int(transfer.length)])
      }
    } else if start > 0 {
      if let base = input.baseAddress { memmove(base, base + start, end - start) }
      end -= start
      start = 0
    }
    return UnsafeMutableRawBufferPointer(rebasing: input[end...])
  }

  /// `count` bytes are in `space`.
  func received(_ count: Int) {
    if start == end, case .payload(let transfer, let filled) = phase {
      payloadCame(transfer, filled + count)
    } else {
      end += count
    }
    advance()
  }

  /// The client is gone, or is to go: nothing more is sent. What is under way ends by itself.
  func drop() {
    if case .payload(let transfer, _) = phase { release(transfer) }
    if case .refusedPayload(let transfer, _, _) = phase { release(transfer) }
    phase = .dropped
    output.removeAll { release($0) }
  }

  /// `count` bytes of the output have been sent.
  func sent(_ count: Int) {
    output.sent(count) { release($0) }
    if isStalled { advance() }
  }

  /// Works on what has come, as far as it goes.
  private func advance() {
    isStalled = false
    while step() {}
  }

  private func step() -> Bool {
    switch phase {
    case .clientFlags: return take(4) { clientFlags($0.bigEndian32(0)) }
    case .optionHeader:
      guard output.count < Self.unreadLimit else {
        isStalled = true
        return false
      }
      return take(16) { optionHeader(magic: $0.bigEndian64(0), $0.bigEndian32(8), length: $0.bigEndian32(12)) }
    case .option(let option, let length):
      return take(length) { self.option(option, Array(UnsafeRawBufferPointer(start: $0, count: length))) }
    case .tooLongOption(let option, let rest):
      let part = skip(rest)
      phase = .tooLongOption(option, rest: rest - part)
      if part == rest { refuse(option, NBDProtocol.OptionReply.tooBig, .optionTooLong) }
      return part > 0
    case .transmission: return takeRequest()
    case .payload(let transfer, let filled):
      guard let buffer = transfer.buffer, let base = input.baseAddress else { return false }
      let part = min(end - start, Int(transfer.length) - filled)
      memcpy(buffer.start + filled, base + start, part)
      start += part
      payloadCame(transfer, filled + part)
      return part > 0
    case .refusedPayload(let transfer, let rest, let code):
      let part = skip(rest)
      if part == rest {
        phase = .transmission
        answer(transfer, code)
      } else {
        phase = .refusedPayload(transfer, rest: rest - part, code)
      }
      return part > 0
    case .startingTLS, .ending, .dropped: return false
    }
  }

  private func take(_ count: Int, _ body: (UnsafeRawPointer) -> Void) -> Bool {
    guard end - start >= count, let base = input.baseAddress else { return false }
    let place = UnsafeRawPointer(base + start)
    start += count
    body(place)
    return true
  }

  private func skip(_ count: Int) -> Int {
    let part = min(count, end - start)
    start += part
    return part
  }

  // MARK: Requests

  /// One request, if all of its header is there and there is room for it.
  private func takeRequest() -> Bool {
    guard end - start >= NBDProtocol.requestSize, let base = input.baseAddress else { return false }
    let header = UnsafeRawPointer(base + start)
    guard header.bigEndian32(0) == NBDProtocol.requestMagic else {
      drop()
      return false
    }
    let command = NBDProtocol.Command(rawValue: header.bigEndian16(6))
    let length = header.bigEndian32(24)
    let memory =
      switch command {
      case .read, .write: Int(length)
      case .blockStatus: contexts.count * Self.extentLimit * 8
      default: 0
      }
    guard inFlight < Self.requestLimit, memoryInUse == 0 || memoryInUse + memory <= Self.memoryLimit else {
      isStalled = true
      return false
    }
    start += NBDProtocol.requestSize
    let transfer = begin()
    transfer.flags = NBDProtocol.CommandFlags(rawValue: header.bigEndian16(4))
    transfer.cookie = header.bigEndian64(8)
    transfer.offset = header.bigEndian64(16)
    transfer.length = length
    transfer.weight = memory
    memoryInUse += memory
    guard let command else {
      answer(transfer, .invalid)
      return true
    }
    transfer.command = command
    carryOut(transfer)
    return true
  }

  private func begin() -> ServerTransfer {
    let transfer: ServerTransfer
    if let last = free.popLast() {
      transfer = last
    } else {
      transfer = ServerTransfer()
      transfers.append(transfer)
    }
    transfer.session = self
    // What is no command of ours is answered as one without data.
    transfer.command = .flush
    inFlight += 1
    return transfer
  }

  /// Memory for the bytes of a request.
  func provideBuffer(_ transfer: ServerTransfer) -> DiskBuffer {
    let buffer = pool.take(Int(transfer.length))
    transfer.buffer = buffer
    return buffer
  }

  /// Ends a request, which has been answered or never will be.
  func release(_ transfer: ServerTransfer) {
    memoryInUse -= transfer.weight
    transfer.weight = 0
    if let buffer = transfer.buffer {
      pool.give(buffer)
      transfer.buffer = nil
    }
    transfer.request.memory.removeAll()
    transfer.stretches.removeAll(keepingCapacity: true)
    transfer.session = nil
    inFlight -= 1
    free.append(transfer)
  }

  /// A node has done what a request asked for.
  func completed(_ transfer: ServerTransfer, _ error: BlockError?) {
    if case .dropped = phase { return release(transfer) }
    if let error { return answer(transfer, NBDProtocol.Code(error)) }
    if transfer.flags.contains(.fua), transfer.command.changes {
      // Once: the flush comes back here as well.
      transfer.flags.remove(.fua)
      transfer.request.memory.removeAll()
      return submit(transfer, .flush)
    }
    if transfer.command == .read { answerRead(transfer) } else { answer(transfer, nil) }
  }

  /// `filled` bytes of a write are there.
  private func payloadCame(_ transfer: ServerTransfer, _ filled: Int) {
    guard filled == Int(transfer.length) else {
      phase = .payload(transfer, filled: filled)
      return
    }
    phase = .transmission
    submit(transfer, .write)
  }
}
