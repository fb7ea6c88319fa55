/// Finds packets and interrupts in what a debugger sends (GDB manual, appendix E.1). Any bytes are safe.
struct PacketReader {
  /// Bytes of a packet, as `PacketSize` promises.
  static let limit = 0x4000

  enum Item: Equatable {
    /// A packet's content, with escapes resolved.
    case packet([UInt8])
    /// A packet whose checksum is wrong, or that is too long.
    case damaged
    /// The other side got our packet.
    case acknowledgement
    /// The other side wants our last packet again.
    case retransmission
    /// Ctrl-C.
    case interrupt
  }

  private enum State {
    case idle
    case content
    case escape
    case checksum
    case checksumEnd(UInt8?)
  }

  private var state = State.idle
  private var content: [UInt8] = []
  private var sum: UInt8 = 0
  private var isTooLong = false

  /// Takes the next byte; returns what it completes.
  mutating func take(_ byte: UInt8) -> Item? {
    switch (state, UnicodeScalar(byte)) {
    case (.idle, "+"): return .acknowledgement
    case (.idle, "-"): return .retransmission
    case (.idle, "\u{3}"): return .interrupt
    case (.idle, "$"), (.content, "$"):
      content.removeAll(keepingCapacity: true)
      sum = 0
      isTooLong = false
      state = .content
    case (.idle, _): break
    case (.content, "#"): state = .checksum
    case (.content, "}"):
      sum &+= byte
      state = .escape
    case (.content, _): append(byte, byte)
    case (.escape, _):
      append(byte ^ 0x20, byte)
      state = .content
    case (.checksum, _): state = .checksumEnd(Hex.digit(byte))
    case (.checksumEnd(let high), _):
      state = .idle
      guard let high, let low = Hex.digit(byte), high << 4 | low == sum, !isTooLong else { return .damaged }
      return .packet(content)
    }
    return nil
  }

  private mutating func append(_ byte: UInt8, _ raw: UInt8) {
    sum &+= raw
    isTooLong = isTooLong || content.count == Self.limit
    if !isTooLong { content.append(byte) }
  }

  /// A packet as it goes over the wire.
  static func frame(_ content: [UInt8]) -> [UInt8] {
    let sum = content.reduce(UInt8(0)) { $0 &+ $1 }
    return [UInt8(ascii: "$")] + content + [UInt8(ascii: "#")] + Hex.encode([sum])
  }

  /// Binary data inside a packet: `#`, `$`, `}` and `*` are escaped.
  static func escape(_ bytes: some Sequence<UInt8>) -> [UInt8] {
    bytes.reduce(into: []) { result, byte in
      switch UnicodeScalar(byte) {
      case "#", "$", "}", "*": result += [UInt8(ascii: "}"), byte ^ 0x20]
      default: result.append(byte)
      }
    }
  }
}

/// Hexadecimal numbers and bytes.
enum Hex {
  private static let digits = Array("0123456789abcdef".utf8)

  static func digit(_ byte: UInt8) -> UInt8? {
    switch UnicodeScalar(byte) {
    case "0"..."9": byte - UInt8(ascii: "0")
    case "a"..."f": byte - UInt8(ascii: "a") + 10
    case "A"..."F": byte - UInt8(ascii: "A") + 10
    default: nil
    }
  }

  static func encode(_ bytes: some Sequence<UInt8>) -> [UInt8] {
    var result: [UInt8] = []
    for byte in bytes { result += [digits[Int(byte >> 4)], digits[Int(byte & 15)]] }
    return result
  }

  /// Pairs of digits; nil for anything else.
  static func decode(_ text: ArraySlice<UInt8>) -> [UInt8]? {
    guard text.count.isMultiple(of: 2) else { return nil }
    var result: [UInt8] = []
    result.reserveCapacity(text.count / 2)
    for index in stride(from: text.startIndex, to: text.endIndex, by: 2) {
      guard let high = digit(text[index]), let low = digit(text[index + 1]) else { return nil }
      result.append(high << 4 | low)
    }
    return result
  }
}

/// Takes a packet's content apart; every step says whether it found what it looked for.
struct PacketScanner {
  private(set) var rest: ArraySlice<UInt8>

  init(_ content: [UInt8]) {
    rest = content[...]
  }

  var isAtEnd: Bool { rest.isEmpty }

  /// Skips `text` where it comes next.
  mutating func skip(_ text: String) -> Bool {
    guard rest.starts(with: text.utf8) else { return false }
    rest = rest.dropFirst(text.utf8.count)
    return true
  }

  /// A number of 1 to 16 hexadecimal digits.
  mutating func number() -> UInt64? {
    var value: UInt64 = 0
    let digits = rest.prefix { Hex.digit($0) != nil }
    guard (1...16).contains(digits.count) else { return nil }
    for digit in digits { value = value << 4 | UInt64(Hex.digit(digit) ?? 0) }
    rest = rest.dropFirst(digits.count)
    return value
  }

  /// Two numbers with a comma between.
  mutating func pair() -> (UInt64, UInt64)? {
    guard let first = number(), skip(","), let second = number() else { return nil }
    return (first, second)
  }

  /// The text up to `separator`, which is skipped, or up to the end.
  mutating func text(upTo separator: Character) -> String {
    let part = rest.prefix { UnicodeScalar($0) != separator.unicodeScalars.first }
    rest = rest.dropFirst(part.count + 1)
    return String(decoding: part, as: UTF8.self)
  }
}
