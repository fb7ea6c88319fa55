import BlockLayer

/// The handshake: the client's options and their replies ("Newstyle negotiation").
extension ServerSession {
  /// Contexts that one client may select.
  private static let contextLimit = 16

  /// Why an option is refused, for people.
  enum OptionFault: String {
    case optionTooLong = "the option has more than 64 KiB"
    case unknownOption = "the option is not known"
    case noTLS = "TLS is not available"
    case needsTLS = "TLS is required"
    case hasTLS = "TLS has begun"
    case malformed = "the option's data is malformed"
    case noExport = "no export has that name"
    case needsStructuredReplies = "structured replies have not been negotiated"
    case tooManyContexts = "more metadata contexts than one client may select"
  }

  func clientFlags(_ raw: UInt32) {
    let flags = NBDProtocol.HandshakeFlags(rawValue: raw)
    guard flags.subtracting([.fixedNewstyle, .noZeroes]).isEmpty else { return drop() }
    noZeroes = flags.contains(.noZeroes)
    phase = .optionHeader
  }

  func optionHeader(magic: UInt64, _ option: UInt32, length: UInt32) {
    optionCount += 1
    guard magic == NBDProtocol.optionMagic, optionCount <= Self.optionLimit else { return drop() }
    if Int(length) <= NBDProtocol.longestOption {
      phase = .option(option, length: Int(length))
    } else if Int(length) <= NBDProtocol.longestPayload, option != NBDProtocol.Option.exportName.rawValue {
      phase = .tooLongOption(option, rest: Int(length))
    } else {
      drop()
    }
  }

  /// An option with all of its data.
  func option(_ raw: UInt32, _ data: [UInt8]) {
    phase = .optionHeader
    let isWayToTLS = [NBDProtocol.Option.startTLS.rawValue, NBDProtocol.Option.abort.rawValue].contains(raw)
    if encryption == .required, !isWayToTLS {
      // What has no reply to say so ends the connection.
      if raw == NBDProtocol.Option.exportName.rawValue { return drop() }
      return refuse(raw, NBDProtocol.OptionReply.needsTLS, .needsTLS)
    }
    guard let option = NBDProtocol.Option(rawValue: raw) else {
      return refuse(raw, NBDProtocol.OptionReply.unsupported, .unknownOption)
    }
    switch option {
    case .exportName: exportName(data)
    case .abort:
      reply(raw, NBDProtocol.OptionReply.ack)
      phase = .ending
    case .list: list(data)
    case .startTLS: startTLS(data)
    case .info, .go: information(raw, data, isGo: option == .go)
    case .structuredReply:
      guard data.isEmpty else { return refuse(raw, NBDProtocol.OptionReply.invalid, .malformed) }
      usesStructuredReplies = true
      reply(raw, NBDProtocol.OptionReply.ack)
    case .listMetaContext, .setMetaContext: metaContexts(raw, data, isSet: option == .setMetaContext)
    }
  }

  func reply(_ option: UInt32, _ type: UInt32, _ data: [UInt8] = []) {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(NBDProtocol.optionReplyMagic)
    bytes.appendBigEndian(option)
    bytes.appendBigEndian(type)
    bytes.appendBigEndian(UInt32(data.count))
    output.append(bytes + data)
    onOutput()
  }

  func refuse(_ option: UInt32, _ type: UInt32, _ fault: OptionFault) {
    phase = .optionHeader
    reply(option, type, Array(fault.rawValue.utf8))
  }

  private func startTLS(_ data: [UInt8]) {
    let option = NBDProtocol.Option.startTLS.rawValue
    guard data.isEmpty else { return refuse(option, NBDProtocol.OptionReply.invalid, .malformed) }
    switch encryption {
    case .none: refuse(option, NBDProtocol.OptionReply.policy, .noTLS)
    case .active: refuse(option, NBDProtocol.OptionReply.invalid, .hasTLS)
    case .required:
      // What follows in the clear would count as if it were the client's.
      if hasMore { return drop() }
      phase = .startingTLS
      reply(option, NBDProtocol.OptionReply.ack)
    }
  }

  /// Ends the handshake. Contexts that were selected for another export are none of this one's.
  private func enter(_ export: NBDExport) {
    if contextExport !== export { contexts = [] }
    contextExport = nil
    self.export = export
    phase = .transmission
  }

  private func exportName(_ data: [UInt8]) {
    guard let name = String(validating: data, as: UTF8.self), let export = table.export(named: name) else {
      return drop()
    }
    var bytes: [UInt8] = []
    bytes.appendBigEndian(export.node.size)
    bytes.appendBigEndian(export.flags.rawValue)
    if !noZeroes { bytes += [UInt8](repeating: 0, count: 124) }
    output.append(bytes)
    enter(export)
    onOutput()
  }

  private func list(_ data: [UInt8]) {
    let option = NBDProtocol.Option.list.rawValue
    guard data.isEmpty else { return refuse(option, NBDProtocol.OptionReply.invalid, .malformed) }
    for export in table.exports {
      var bytes: [UInt8] = []
      bytes.appendBigEndian(UInt32(export.name.utf8.count))
      reply(option, NBDProtocol.OptionReply.server, bytes + export.name.utf8 + export.description.utf8)
    }
    reply(option, NBDProtocol.OptionReply.ack)
  }

  private func information(_ option: UInt32, _ data: [UInt8], isGo: Bool) {
    var reader = OptionReader(data)
    guard let name = reader.string(), let count = reader.word16() else {
      return refuse(option, NBDProtocol.OptionReply.invalid, .malformed)
    }
    var wanted: Set<UInt16> = []
    for _ in 0..<count {
      guard let info = reader.word16() else { return refuse(option, NBDProtocol.OptionReply.invalid, .malformed) }
      wanted.insert(info)
    }
    guard reader.isAtEnd else { return refuse(option, NBDProtocol.OptionReply.invalid, .malformed) }
    guard let export = table.export(named: name) else {
      return refuse(option, NBDProtocol.OptionReply.unknown, .noExport)
    }
    func inform(_ info: NBDProtocol.Info, _ fill: (inout [UInt8]) -> Void) {
      var bytes: [UInt8] = []
      bytes.appendBigEndian(info.rawValue)
      fill(&bytes)
      reply(option, NBDProtocol.OptionReply.info, bytes)
    }
    if wanted.contains(NBDProtocol.Info.name.rawValue) { inform(.name) { $0 += Array(export.name.utf8) } }
    if wanted.contains(NBDProtocol.Info.description.rawValue), !export.description.isEmpty {
      inform(.description) { $0 += Array(export.description.utf8) }
    }
    // Any offset and length will do; whole pages are what the host works with.
    inform(.blockSize) { bytes in
      bytes.appendBigEndian(UInt32(1))
      bytes.appendBigEndian(UInt32(4096))
      bytes.appendBigEndian(UInt32(NBDProtocol.longestPayload))
    }
    inform(.export) { bytes in
      bytes.appendBigEndian(export.node.size)
      bytes.appendBigEndian(export.flags.rawValue)
    }
    reply(option, NBDProtocol.OptionReply.ack)
    if isGo { enter(export) }
  }

  private func metaContexts(_ option: UInt32, _ data: [UInt8], isSet: Bool) {
    if isSet {
      // A selection that fails leaves none.
      contexts = []
      contextExport = nil
      guard usesStructuredReplies else {
        return refuse(option, NBDProtocol.OptionReply.invalid, .needsStructuredReplies)
      }
    }
    var reader = OptionReader(data)
    guard let name = reader.string(), let count = reader.word32() else {
      return refuse(option, NBDProtocol.OptionReply.invalid, .malformed)
    }
    var queries: [String] = []
    for _ in 0..<count {
      guard let query = reader.string() else { return refuse(option, NBDProtocol.OptionReply.invalid, .malformed) }
      queries.append(query)
    }
    guard reader.isAtEnd else { return refuse(option, NBDProtocol.OptionReply.invalid, .malformed) }
    guard let export = table.export(named: name) else {
      return refuse(option, NBDProtocol.OptionReply.unknown, .noExport)
    }
    let all = export.contexts
    let chosen = all.indices.filter { index in
      if !isSet, queries.isEmpty { return true }
      return queries.contains { $0 == all[index] || !isSet && Self.isNamespace($0, of: all[index]) }
    }
    if isSet {
      guard chosen.count <= Self.contextLimit else {
        return refuse(option, NBDProtocol.OptionReply.tooBig, .tooManyContexts)
      }
      contexts = chosen
      contextExport = export
    }
    for index in chosen {
      var bytes: [UInt8] = []
      bytes.appendBigEndian(UInt32(isSet ? index : 0))
      reply(option, NBDProtocol.OptionReply.metaContext, bytes + all[index].utf8)
    }
    reply(option, NBDProtocol.OptionReply.ack)
  }

  /// Whether a query asks for all contexts of a kind.
  private static func isNamespace(_ query: String, of context: String) -> Bool {
    ["base:", "qemu:", NBDProtocol.dirtyBitmapPrefix].contains(query) && context.hasPrefix(query)
  }
}

/// Reads the data of an option; nil where they end too soon or are no text.
private struct OptionReader {
  private let bytes: [UInt8]
  private var position = 0

  init(_ bytes: [UInt8]) { self.bytes = bytes }

  var isAtEnd: Bool { position == bytes.count }

  mutating func word16() -> UInt16? {
    guard bytes.count - position >= 2 else { return nil }
    defer { position += 2 }
    return bytes.bigEndian16(position)
  }

  mutating func word32() -> UInt32? {
    guard bytes.count - position >= 4 else { return nil }
    defer { position += 4 }
    return bytes.bigEndian32(position)
  }

  mutating func string() -> String? {
    guard let count = word32().map(Int.init), count <= NBDProtocol.longestString, bytes.count - position >= count else {
      return nil
    }
    defer { position += count }
    return String(validating: bytes[position..<(position + count)], as: UTF8.self)
  }
}
