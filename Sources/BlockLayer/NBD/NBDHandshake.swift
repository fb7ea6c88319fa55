import Host
import TLS

/// The client's side of the handshake, and what it has found out.
struct NBDHandshake {
  /// How long the server may take for each answer, seconds.
  private static let timeout = 30
  /// Replies to one option.
  private static let replyLimit = 100_000

  private let stream: NBDStream
  private let uri: NBDURI
  private(set) var size: UInt64 = 0
  private(set) var flags: NBDProtocol.TransmissionFlags = []
  private(set) var structured = false
  /// The number of `base:allocation`, where the server tells of it.
  private(set) var allocationContext: UInt32?
  private(set) var longestPayload = NBDProtocol.longestPayload
  private var noZeroes = false

  /// Goes through the handshake.
  init(_ stream: NBDStream, _ uri: NBDURI) throws(BlockError) {
    self.stream = stream
    self.uri = uri
    stream.setPatience(Self.timeout)
    let greeting = try stream.receive(18)
    guard greeting.bigEndian64(0) == NBDProtocol.greeting else { throw fault(.notNBD) }
    guard greeting.bigEndian64(8) == NBDProtocol.optionMagic else { throw fault(.oldServer) }
    let offered = NBDProtocol.HandshakeFlags(rawValue: UInt32(greeting.bigEndian16(16)))
    guard offered.contains(.fixedNewstyle) else { throw fault(.oldServer) }
    let chosen = offered.intersection([.fixedNewstyle, .noZeroes])
    noZeroes = chosen.contains(.noZeroes)
    var bytes: [UInt8] = []
    bytes.appendBigEndian(chosen.rawValue)
    try stream.send(bytes)
    if let tls = uri.tls {
      try startTLS(tls)
      stream.setPatience(Self.timeout)
    }
    try negotiate()
    guard size <= UInt64(Int64.max) else { throw fault(.tooLarge(size: size)) }
    stream.setPatience(0)
  }

  private func fault(_ fault: NBDFault) -> BlockError { .remote(uri: "\(uri)", fault) }

  /// All that follows is encrypted.
  private func startTLS(_ tls: NBDURI.TLS) throws(BlockError) {
    guard let folder = tls.certificates else { throw fault(.noCertificates) }
    var host = tls.hostName
    if host == nil, case .tcp(let name, _) = uri.endpoint { host = name }
    let credentials: TLSCredentials
    do throws(TLSError) {
      credentials = try TLSCredentials(directory: folder, endpoint: .client, verifiesPeer: tls.verifiesPeer)
    } catch {
      throw fault(.tls(error))
    }
    guard try ask(.startTLS, [], { _, _ in }) else { throw fault(.hasNoTLS) }
    do throws(TLSError) { try stream.startTLS(credentials, hostName: host) } catch { throw fault(.tls(error)) }
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
    let bytes = try stream.receive(noZeroes ? 10 : 134)
    return (bytes.bigEndian64(0), bytes.bigEndian16(8))
  }

  /// Sends an option and reads its replies; false where the server does not know it.
  private func ask(
    _ option: NBDProtocol.Option, _ data: [UInt8], _ body: (UInt32, [UInt8]) -> Void
  ) throws(BlockError) -> Bool {
    try sendOption(option, data)
    for _ in 0..<Self.replyLimit {
      let header = try stream.receive(20)
      let (type, length) = (header.bigEndian32(12), Int(header.bigEndian32(16)))
      guard header.bigEndian64(0) == NBDProtocol.optionReplyMagic, header.bigEndian32(8) == option.rawValue,
        length <= NBDProtocol.longestOption
      else { throw fault(.malformedReply(option: option.rawValue)) }
      let data = try stream.receive(length)
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
    try stream.send(bytes + data)
  }

  private static func string(_ text: String) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(UInt32(text.utf8.count))
    return bytes + text.utf8
  }
}
