/// Why a text is not JSON (RFC 8259) within the parser's limits. Offsets are in bytes from the text's start.
public enum JSONError: Error, Equatable, Sendable, CustomStringConvertible {
  /// A byte that cannot stand where it stands.
  case unexpected(byte: UInt8, offset: Int)
  /// The text ends in the middle of a value, or holds none.
  case incomplete(offset: Int)
  /// A control character that is not escaped inside a string.
  case controlCharacter(byte: UInt8, offset: Int)
  /// A `\` followed by something other than RFC 8259, section 7, allows.
  case escape(offset: Int)
  /// Half of a surrogate pair (`\uD800` to `\uDFFF`) without the other half.
  case loneSurrogate(offset: Int)
  /// A string that is not UTF-8.
  case invalidUTF8(offset: Int)
  /// A number that breaks RFC 8259, section 6, or that no `Double` can hold.
  case number(offset: Int)
  /// A key that its object has already.
  case duplicateKey(String, offset: Int)
  /// Something after the value.
  case trailing(offset: Int)
  /// Arrays and objects nested deeper than the limit.
  case tooDeep(limit: Int)
  /// A value longer than the limit.
  case tooLong(limit: Int)

  /// One line: what is wrong, and where.
  public var description: String {
    switch self {
    case .unexpected(let byte, let offset): "unexpected \(Self.name(byte)) at byte \(offset)"
    case .incomplete(let offset): "the text ends at byte \(offset), before its value does"
    case .controlCharacter(let byte, let offset): "\(Self.name(byte)) inside the string at byte \(offset); escape it"
    case .escape(let offset): "invalid escape at byte \(offset)"
    case .loneSurrogate(let offset): "half of a surrogate pair at byte \(offset)"
    case .invalidUTF8(let offset): "the string that ends at byte \(offset) is not UTF-8"
    case .number(let offset): "invalid number before byte \(offset)"
    case .duplicateKey(let key, let offset): "duplicate key \(JSONValue.string(key).serialized()) at byte \(offset)"
    case .trailing(let offset): "unexpected text after the value, at byte \(offset)"
    case .tooDeep(let limit): "nested deeper than \(limit) levels"
    case .tooLong(let limit): "longer than \(limit) bytes"
    }
  }

  private static func name(_ byte: UInt8) -> String {
    switch byte {
    case 0x21...0x7e: "'\(Character(UnicodeScalar(byte)))'"
    default: "byte 0x" + (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }
  }
}
