extension JSONValue {
  /// The value as text: on one line with a space after each comma and colon, as QMP has it; or, when `pretty`,
  /// one member or element a line, indented by two spaces a level. No newline at the end.
  public func serialized(pretty: Bool = false) -> String {
    var writer = JSONWriter(pretty: pretty)
    writer.write(self)
    return String(decoding: writer.bytes, as: UTF8.self)
  }
}

struct JSONWriter {
  private(set) var bytes: [UInt8] = []
  private let pretty: Bool
  private var level = 0

  init(pretty: Bool) {
    self.pretty = pretty
  }

  mutating func write(_ value: JSONValue) {
    switch value {
    case .null: append("null")
    case .bool(let value): append(value ? "true" : "false")
    case .integer(let value): append(String(value))
    case .unsigned(let value): append(String(value))
    case .number(let value): append(value.isFinite ? value.description : "null")
    case .string(let value): write(value)
    case .array(let elements):
      write("[", elements, "]") { writer, element in writer.write(element) }
    case .object(let object):
      write("{", object.keys, "}") { writer, key in
        writer.write(key)
        writer.append(": ")
        writer.write(object[key] ?? .null)
      }
    }
  }

  private mutating func write<Item>(
    _ opening: String, _ items: [Item], _ closing: String, _ writeItem: (inout JSONWriter, Item) -> Void
  ) {
    append(opening)
    level += 1
    for (index, item) in items.enumerated() {
      if index > 0 { append(pretty ? "," : ", ") }
      if pretty { startLine() }
      writeItem(&self, item)
    }
    level -= 1
    if pretty, !items.isEmpty { startLine() }
    append(closing)
  }

  private mutating func startLine() {
    append("\n")
    for _ in 0..<level { append("  ") }
  }

  private mutating func write(_ string: String) {
    append("\"")
    for byte in string.utf8 {
      switch byte {
      case UInt8(ascii: "\""): append("\\\"")
      case UInt8(ascii: "\\"): append("\\\\")
      case UInt8(ascii: "\n"): append("\\n")
      case UInt8(ascii: "\r"): append("\\r")
      case UInt8(ascii: "\t"): append("\\t")
      case 0..<0x10: append("\\u000" + String(byte, radix: 16))
      case 0x10..<0x20: append("\\u00" + String(byte, radix: 16))
      default: bytes.append(byte)
      }
    }
    append("\"")
  }

  private mutating func append(_ text: String) {
    bytes.append(contentsOf: text.utf8)
  }
}
