import CLinux
import Glibc
import Host

/// The client's side of the handshake, and what it has found out. The socket waits.
struct NBDHandshake {
  /// How long the server may take for each answer, seconds.
  private static let timeout = 30
  /// Replies to one option.
  private static let replyLimit = 100_000

  private let socket: Int32
  private let uri: NBDURI
  private(set) var size: UInt64 = 0
  private(set) var flags: NBDProtocol.TransmissionFlags = []
  private(set) var structured = false
  /// The number of `base:allocation`, where the server tells of it.
  private(set) var allocationContext: UInt32?
  private(set) var longestPayload = NBDProtocol.longestPayload
  private var noZeroes = false

  /// Goes through the handshake on a connected socket.
  init(_ socket: Int32, _ uri: NBDURI) throws(BlockError) {
    self.socket = socket
    self.uri = uri
    setTimeout(Self.timeout)
    let greeting = try receive(18)
    guard greeting.bigEndian64(0) == NBDProtocol.greeting else { throw fault(.notNBD) }
    guard greeting.bigEndian64(8) == NBDProtocol.optionMagic else { throw fault(.oldServer) }
    let offered = NBDProtocol.HandshakeFlags(rawValue: UInt32(greeting.bigEndian16(16)))
    guard offered.contains(.fixedNewstyle) else { throw fault(.oldServer) }
    let chosen = offered.intersection([.fixedNewstyle, .noZeroes])
    noZeroes = chosen.contains(.noZeroes)
    var bytes: [UInt8] = []
    bytes.appendBigEndian(chosen.rawValue)
    try send(bytes)
    try negotiate()
    guard size <= UInt64(Int64.max) else { throw fault(.tooLarge(size: size)) }
    setTimeout(0)
  }

  private func fault(_ fault: NBDFault) -> BlockError { .remote(uri: "\(uri)", fault) }

  private func setTimeout(_ seconds: Int) {
    var limit = timeval(tv_sec: seconds, tv_usec: 0)
    for option in [SO_RCVTIMEO, SO_SNDTIMEO] {
      setsockopt(socket, SOL_SOCKET, option, &limit, socklen_t(MemoryLayout<timeval>.size))
    }
  }

  private mutating func negotiate() throws(BlockError) {
    structured = try ask(.structuredReply, []) { _, _ in }
    if structured {
      var query = Self.string(uri.export)
      query.appendBigEndian(UInt32(1))
      query += Self.string(NBDProtocol.baseAllocation)
      var context: UInt32?
      _ = try ask(.setMetaContext, query) { type, data in
        guard type == NBDProtocol.OptionReply.metaContext, data.count >= 4 else { return }
        if data.dropFirst(4).elementsEqual(NBDProtocol.baseAllocation.utf8) { context = data.bigEndian32(0) }
      }
      allocationContext = context
    }
    var request = Self.string(uri.export)
    request.appendBigEndian(UInt16(1))
    request.appendBigEndian(NBDProtocol.Info.blockSize.rawValue)
    var export: (UInt64, UInt16)?
    var blocks: (minimum: UInt32, maximum: UInt32)?
    let knowsGo = try ask(.go, request) { type, data in
      guard type == NBDProtocol.OptionReply.info, data.count >= 2 else { return }
      switch NBDProtocol.Info(rawValue: data.bigEndian16(0)) {
      case .export where data.count == 12: export = (data.bigEndian64(2), data.bigEndian16(10))
      case .blockSize where data.count == 14: blocks = (data.bigEndian32(2), data.bigEndian32(10))
      default: break
      }
    }
    if !knowsGo { export = try goByName() }
    guard let (size, flags) = export else { throw fault(.malformedReply(option: NBDProtocol.Option.go.rawValue)) }
    self.size = size
    self.flags = NBDProtocol.TransmissionFlags(rawValue: flags)
    if let (minimum, maximum) = blocks {
      guard minimum <= 512, minimum.nonzeroBitCount == 1, maximum >= 4096 else {
        throw fault(.blockSizes(minimum: minimum, maximum: maximum))
      }
      longestPayload = min(longestPayload, Int(maximum) & ~4095)
    }
  }

  /// For servers that do not know `NBD_OPT_GO`.
  private func goByName() throws(BlockError) -> (UInt64, UInt16) {
    try sendOption(.exportName, Array(uri.export.utf8))
    let bytes = try receive(noZeroes ? 10 : 134)
    return (bytes.bigEndian64(0), bytes.bigEndian16(8))
  }

  /// Sends an option and reads its replies; false where the server does not know it.
  private func ask(
    _ option: NBDProtocol.Option, _ data: [UInt8], _ body: (UInt32, [UInt8]) -> Void
  ) throws(BlockError) -> Bool {
    try sendOption(option, data)
    for _ in 0..<Self.replyLimit {
      let header = try receive(20)
      let (type, length) = (header.bigEndian32(12), Int(header.bigEndian32(16)))
      guard header.bigEndian64(0) == NBDProtocol.optionReplyMagic, header.bigEndian32(8) == option.rawValue,
        length <= NBDProtocol.longestOption
      else { throw fault(.malformedReply(option: option.rawValue)) }
      let data = try receive(length)
      switch type {
      case NBDProtocol.OptionReply.ack: return true
      case NBDProtocol.OptionReply.unsupported: return false
      case NBDProtocol.OptionReply.unknown: throw fault(.noExport)
      case NBDProtocol.OptionReply.needsTLS: throw fault(.needsTLS)
      case let type where type & NBDProtocol.OptionReply.errorBit != 0:
        // What is no condition of reading the disk is done without.
        if option != .go { return false }
        let text = String(decoding: data.prefix(200), as: UTF8.self).filter { $0.isASCII && !$0.isNewline }
        throw fault(.refused(option: option.rawValue, code: type, text: text))
      default: body(type, data)
      }
    }
    throw fault(.malformedReply(option: option.rawValue))
  }

  private func sendOption(_ option: NBDProtocol.Option, _ data: [UInt8]) throws(BlockError) {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(NBDProtocol.optionMagic)
    bytes.appendBigEndian(option.rawValue)
    bytes.appendBigEndian(UInt32(data.count))
    try send(bytes + data)
  }

  private static func string(_ text: String) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(UInt32(text.utf8.count))
    return bytes + text.utf8
  }

  private func send(_ bytes: [UInt8]) throws(BlockError) {
    let code = bytes.withUnsafeBytes { NBDSocket.send(socket, $0) }
    if code != 0 { throw .io(call: "write to", path: "\(uri)", errno: code) }
  }

  private func receive(_ count: Int) throws(BlockError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    let code = bytes.withUnsafeMutableBytes { NBDSocket.receive(socket, $0) }
    switch code {
    case 0: return bytes
    case ECONNRESET: throw fault(.closed)
    case EAGAIN: throw .io(call: "read from", path: "\(uri)", errno: ETIMEDOUT)
    default: throw .io(call: "read from", path: "\(uri)", errno: code)
    }
  }
}

/// Whole transfers on a socket that waits; each returns 0 or an `errno`.
enum NBDSocket {
  static func send(_ socket: Int32, _ bytes: UnsafeRawBufferPointer) -> Int32 {
    var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
    return send(socket, &vector, 1)
  }

  static func send(_ socket: Int32, _ vectors: UnsafeMutablePointer<iovec>, _ count: Int) -> Int32 {
    transfer(vectors, count) { message in sendmsg(socket, message, Int32(MSG_NOSIGNAL)) }
  }

  static func receive(_ socket: Int32, _ bytes: UnsafeMutableRawBufferPointer) -> Int32 {
    var vector = iovec(iov_base: bytes.baseAddress, iov_len: bytes.count)
    return receive(socket, &vector, 1)
  }

  static func receive(_ socket: Int32, _ vectors: UnsafeMutablePointer<iovec>, _ count: Int) -> Int32 {
    transfer(vectors, count) { message in recvmsg(socket, message, 0) }
  }

  private static func transfer(
    _ vectors: UnsafeMutablePointer<iovec>, _ count: Int, _ body: (UnsafeMutablePointer<msghdr>) -> Int
  ) -> Int32 {
    var index = 0
    while index < count {
      if vectors[index].iov_len == 0 {
        index += 1
        continue
      }
      var message = msghdr()
      message.msg_iov = vectors + index
      message.msg_iovlen = min(count - index, 1024)
      var moved = body(&message)
      if moved < 0 {
        if errno == EINTR { continue }
        return errno
      }
      // Something was asked for: nothing means that the peer is gone.
      if moved == 0 { return ECONNRESET }
      while moved > 0 {
        let part = min(moved, vectors[index].iov_len)
        vectors[index].iov_base = vectors[index].iov_base.map { $0 + part }
        vectors[index].iov_len -= part
        moved -= part
        if vectors[index].iov_len == 0 { index += 1 }
      }
    }
    return 0
  }
}
