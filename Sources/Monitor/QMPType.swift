import JSON

/// The type of an argument or a result, as QEMU's schema language has it (docs/devel/qapi-code-gen.rst).
public indirect enum QMPType: Equatable, Sendable {
  /// A string.
  case string
  /// A whole number of 64 bits with sign.
  case integer
  /// A Boolean.
  case bool
  /// Any JSON value.
  case any
  /// One of some strings.
  case enumeration(String, values: [String])
  /// An array.
  case array(QMPType)
  /// An object.
  case object(String, members: [Member])

  /// A member of an object.
  public struct Member: Equatable, Sendable {
    /// Its key.
    public let name: String
    /// Its type.
    public let type: QMPType
    /// Whether it may be left out.
    public let isOptional: Bool

    /// A member that must be there.
    public static func required(_ name: String, _ type: QMPType) -> Member {
      Member(name: name, type: type, isOptional: false)
    }

    /// A member that may be left out.
    public static func optional(_ name: String, _ type: QMPType) -> Member {
      Member(name: name, type: type, isOptional: true)
    }
  }

  /// An object without members.
  public static let empty = QMPType.object("q_empty", members: [])

  /// The name in the schema.
  var name: String {
    switch self {
    case .string: "str"
    case .integer: "int"
    case .bool: "bool"
    case .any: "any"
    case .enumeration(let name, _), .object(let name, _): name
    case .array(let element): "[\(element.name)]"
    }
  }

  /// Checks what a client sent; `name` is how the error calls it.
  public func validate(_ value: JSONValue, as name: String) throws(MonitorError) {
    switch (self, value) {
    case (.string, .string), (.integer, .integer), (.bool, .bool), (.any, _): break
    case (.enumeration(_, let values), .string(let value)):
      guard values.contains(value) else { throw .parameterValue(name, value: value) }
    case (.array(let element), .array(let values)):
      for (index, value) in values.enumerated() { try element.validate(value, as: "\(name)[\(index)]") }
    case (.object(_, let members), .object(let object)):
      try Self.validate(object, members, prefix: name + ".")
    default: throw .parameterType(name, expected: expectation)
    }
  }

  /// Checks an object's members; `prefix` goes before their names in an error.
  static func validate(_ object: JSONObject, _ members: [Member], prefix: String = "") throws(MonitorError) {
    for member in members {
      if let value = object[member.name] {
        try member.type.validate(value, as: prefix + member.name)
      } else if !member.isOptional {
        throw .parameterMissing(prefix + member.name)
      }
    }
    for key in object.keys where !members.contains(where: { $0.name == key }) {
      throw .parameterUnexpected(prefix + key)
    }
  }

  private var expectation: String {
    switch self {
    case .string, .enumeration: "string"
    case .integer: "integer"
    case .bool: "boolean"
    case .any: "any value"
    case .array: "array"
    case .object: "object"
    }
  }
}
