/// A parser that takes one byte at a time, so that a stream of JSON values needs no framing of its own.
///
/// It keeps its own stack: nesting costs memory, not the thread's stack. After an error it starts afresh.
public struct JSONParser: Sendable {
  /// What a value may cost.
  public struct Limits: Equatable, Sendable {
    /// Levels of arrays and objects.
    public var depth: Int
    /// Bytes of one value, white space inside it included.
    public var bytes: Int

    /// Limits for values from outside: 128 levels and 1 MiB.
    public init(depth: Int = 128, bytes: Int = 1 << 20) {
      self.depth = depth
      self.bytes = bytes
    }
  }

  private enum State {
    case value
    case firstElement
    case firstKey
    case key
    case colon
    case separator
    case string
    case escape
    case hexadecimal
    case number
    case literal
  }

  private struct Container {
    var elements: [JSONValue] = []
    var members: JSONObject?
    var key = ""
  }

  private let limits: Limits
  private var state = State.value
  private var stack: [Container] = []
  /// The string, number or literal under way.
  private var text: [UInt8] = []
  private var stringIsKey = false
  private var escaped: (digits: Int, unit: UInt16) = (0, 0)
  private var highSurrogate: UInt16?
  private var start = 0
  private var offset = 0

  /// A parser at the start of a value.
  public init(limits: Limits = .init()) {
    self.limits = limits
  }

  /// Whether no value is under way.
  public var isIdle: Bool { stack.isEmpty && state == .value }

  /// Takes the next byte.
  ///
  /// A number that is not inside an array or object ends at the byte after it.
  /// - Returns: The value that is whole with this byte.
  /// - Throws: What is wrong with this byte; offsets count from the first byte after the last value or error.
  public mutating func feed(_ byte: UInt8) throws(JSONError) -> JSONValue? {
    do throws(JSONError) {
      if isIdle { start = offset }
      guard offset - start < limits.bytes else { throw .tooLong(limit: limits.bytes) }
      let value = try take(byte)
      offset = value != nil && isIdle ? 0 : offset + 1
      return value
    } catch {
      self = JSONParser(limits: limits)
      throw error
    }
  }

  /// Says that no more bytes come.
  ///
  /// - Returns: A number that only the end could end; nil when nothing was under way.
  /// - Throws: `incomplete` in the middle of a value.
  public mutating func finish() throws(JSONError) -> JSONValue? {
    defer { self = JSONParser(limits: limits) }
    if isIdle { return nil }
    guard state == .number, stack.isEmpty else { throw .incomplete(offset: offset) }
    return try number()
  }

  private mutating func take(_ byte: UInt8) throws(JSONError) -> JSONValue? {
    switch state {
    case .value, .firstElement, .firstKey, .key, .colon, .separator:
      return Self.isSpace(byte) ? nil : try takeToken(byte)
    case .string:
      return try takeStringByte(byte)
    case .escape:
      try takeEscape(byte)
      return nil
    case .hexadecimal:
      try takeHexadecimalDigit(byte)
      return nil
    case .number:
      if Self.isNumberByte(byte) {
        text.append(byte)
        return nil
      }
      let value = complete(try number())
      return try take(byte) ?? value
    case .literal:
      text.append(byte)
      return try literal()
    }
  }

  private mutating func takeToken(_ byte: UInt8) throws(JSONError) -> JSONValue? {
    switch (state, UnicodeScalar(byte)) {
    case (.firstElement, "]"), (.firstKey, "}"):
      return close()
    case (.separator, "]") where stack.last?.members == nil, (.separator, "}") where stack.last?.members != nil:
      return close()
    case (.separator, ","):
      state = stack.last?.members == nil ? .value : .key
    case (.colon, ":"):
      state = .value
    case (.firstKey, "\""), (.key, "\""):
      beginText(.string)
      stringIsKey = true
    case (.value, _), (.firstElement, _):
      try beginValue(byte)
    default:
      throw .unexpected(byte: byte, offset: offset)
    }
    return nil
  }

  private mutating func beginValue(_ byte: UInt8) throws(JSONError) {
    switch UnicodeScalar(byte) {
    case "[", "{":
      guard stack.count < limits.depth else { throw .tooDeep(limit: limits.depth) }
      let isObject = byte == UInt8(ascii: "{")
      stack.append(Container(members: isObject ? JSONObject() : nil))
      state = isObject ? .firstKey : .firstElement
    case "\"":
      beginText(.string)
      stringIsKey = false
    case "t", "f", "n":
      beginText(.literal)
      text.append(byte)
    case "-", "0"..."9":
      beginText(.number)
      text.append(byte)
    default:
      throw .unexpected(byte: byte, offset: offset)
    }
  }

  private mutating func beginText(_ state: State) {
    text.removeAll(keepingCapacity: true)
    self.state = state
  }

  private mutating func close() -> JSONValue? {
    let container = stack.removeLast()
    return complete(container.members.map(JSONValue.object) ?? .array(container.elements))
  }

  /// Puts a value where it belongs; gives it back where that is the top.
  private mutating func complete(_ value: JSONValue) -> JSONValue? {
    guard let top = stack.indices.last else {
      state = .value
      start = offset
      return value
    }
    state = .separator
    if stack[top].members == nil {
      stack[top].elements.append(value)
    } else {
      let key = stack[top].key
      stack[top].members?[key] = value
    }
    return nil
  }

  static func isSpace(_ byte: UInt8) -> Bool {
    byte == 0x20 || byte == 0x0a || byte == 0x0d || byte == 0x09
  }
}

// Strings (RFC 8259, section 7).
extension JSONParser {
  private mutating func takeStringByte(_ byte: UInt8) throws(JSONError) -> JSONValue? {
    guard byte >= 0x20 else { throw .controlCharacter(byte: byte, offset: offset) }
    if byte == UInt8(ascii: "\\") {
      state = .escape
      return nil
    }
    guard highSurrogate == nil else { throw .loneSurrogate(offset: offset) }
    guard byte == UInt8(ascii: "\"") else {
      text.append(byte)
      return nil
    }
    guard let string = String(validating: text, as: UTF8.self) else { throw .invalidUTF8(offset: offset) }
    guard stringIsKey, let top = stack.indices.last else { return complete(.string(string)) }
    guard stack[top].members?[string] == nil else { throw .duplicateKey(string, offset: offset) }
    stack[top].key = string
    state = .colon
    return nil
  }

  private mutating func takeEscape(_ byte: UInt8) throws(JSONError) {
    if byte == UInt8(ascii: "u") {
      escaped = (0, 0)
      state = .hexadecimal
      return
    }
    guard highSurrogate == nil else { throw .loneSurrogate(offset: offset) }
    switch UnicodeScalar(byte) {
    case "\"", "\\", "/": text.append(byte)
    case "b": text.append(0x08)
    case "f": text.append(0x0c)
    case "n": text.append(0x0a)
    case "r": text.append(0x0d)
    case "t": text.append(0x09)
    default: throw .escape(offset: offset)
    }
    state = .string
  }

  private mutating func takeHexadecimalDigit(_ byte: UInt8) throws(JSONError) {
    guard let digit = Character(UnicodeScalar(byte)).hexDigitValue else { throw .escape(offset: offset) }
    escaped = (escaped.digits + 1, escaped.unit << 4 | UInt16(digit))
    guard escaped.digits == 4 else { return }
    state = .string
    let unit = escaped.unit
    if let high = highSurrogate {
      guard (0xdc00...0xdfff).contains(unit) else { throw .loneSurrogate(offset: offset) }
      highSurrogate = nil
      try append(0x10000 + (UInt32(high - 0xd800) << 10 | UInt32(unit - 0xdc00)))
    } else if (0xd800...0xdbff).contains(unit) {
      highSurrogate = unit
    } else {
      try append(UInt32(unit))
    }
  }

  private mutating func append(_ value: UInt32) throws(JSONError) {
    guard let scalar = UnicodeScalar(value) else { throw .loneSurrogate(offset: offset) }
    text.append(contentsOf: UTF8.encode(scalar) ?? UTF8.encodedReplacementCharacter)
  }
}

// Literals and numbers (RFC 8259, sections 3 and 6).
extension JSONParser {
  private mutating func literal() throws(JSONError) -> JSONValue? {
    for (word, value) in [("true", .bool(true)), ("false", .bool(false)), ("null", .null)] as [(String, JSONValue)] {
      if text.elementsEqual(word.utf8) { return complete(value) }
      if word.utf8.starts(with: text) { return nil }
    }
    throw .unexpected(byte: text.last ?? 0, offset: offset)
  }

  private static func isNumberByte(_ byte: UInt8) -> Bool {
    switch UnicodeScalar(byte) {
    case "0"..."9", "-", "+", ".", "e", "E": true
    default: false
    }
  }

  /// The number in `text`.
  private func number() throws(JSONError) -> JSONValue {
    var rest = text[...]
    func isDigit(_ byte: UInt8) -> Bool { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) }
    func takeDigits() -> Bool {
      let count = rest.prefix(while: isDigit).count
      rest = rest.dropFirst(count)
      return count > 0
    }
    if rest.first == UInt8(ascii: "-") { rest.removeFirst() }
    var isValid = true
    if rest.first == UInt8(ascii: "0") { rest.removeFirst() } else { isValid = takeDigits() }
    let isWhole = rest.isEmpty
    if rest.first == UInt8(ascii: ".") {
      rest.removeFirst()
      isValid = takeDigits() && isValid
    }
    if rest.first == UInt8(ascii: "e") || rest.first == UInt8(ascii: "E") {
      rest.removeFirst()
      if rest.first == UInt8(ascii: "-") || rest.first == UInt8(ascii: "+") { rest.removeFirst() }
      isValid = takeDigits() && isValid
    }
    guard isValid, rest.isEmpty else { throw .number(offset: offset) }
    let string = String(decoding: text, as: UTF8.self)
    if isWhole, let value = Int64(string) { return .integer(value) }
    if isWhole, let value = UInt64(string) { return .unsigned(value) }
    guard let value = Double(string), value.isFinite else { throw .number(offset: offset) }
    return .number(value)
  }
}

extension JSONValue {
  /// Parses one JSON text: a value with nothing but white space around it.
  ///
  /// - Throws: The first fault. A key that an object has twice is one (RFC 8259 leaves it open, QEMU refuses it too).
  public init(parsing text: String, limits: JSONParser.Limits = .init()) throws(JSONError) {
    try self.init(parsing: text.utf8, limits: limits)
  }

  /// Parses one JSON text of UTF-8 bytes, as `init(parsing:limits:)` of a string does.
  public init(parsing bytes: some Sequence<UInt8>, limits: JSONParser.Limits = .init()) throws(JSONError) {
    var parser = JSONParser(limits: limits)
    var result: JSONValue?
    var offset = 0
    for byte in bytes {
      if result == nil {
        result = try parser.feed(byte)
      } else if !JSONParser.isSpace(byte) {
        throw .trailing(offset: offset)
      }
      if result != nil, !parser.isIdle { throw .trailing(offset: offset) }
      offset += 1
    }
    if let value = try parser.finish() { result = value }
    guard let result else { throw .incomplete(offset: offset) }
    self = result
  }
}
