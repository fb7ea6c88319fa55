/// A JSON value (RFC 8259).
///
/// A number without fraction and exponent is `integer` where it fits, else `unsigned`, else `number`; so equal
/// numbers have one form, and `JSONValue(_:)` makes the same choice.
public enum JSONValue: Equatable, Sendable {
  /// `null`.
  case null
  /// `true` or `false`.
  case bool(Bool)
  /// A whole number that fits in 64 bits with sign.
  case integer(Int64)
  /// A whole number above `Int64.max`.
  case unsigned(UInt64)
  /// Any other number; one that is not finite is written as `null`.
  case number(Double)
  /// A string.
  case string(String)
  /// An array.
  case array([JSONValue])
  /// An object.
  case object(JSONObject)

  /// A whole number; one beyond 64 bits becomes the nearest `number`.
  public init(_ value: some BinaryInteger) {
    if let value = Int64(exactly: value) {
      self = .integer(value)
    } else if let value = UInt64(exactly: value) {
      self = .unsigned(value)
    } else {
      self = .number(Double(value))
    }
  }

  /// The Boolean, where it is one.
  public var boolValue: Bool? {
    if case .bool(let value) = self { value } else { nil }
  }

  /// The whole number, where it is one that fits.
  public var integerValue: Int64? {
    if case .integer(let value) = self { value } else { nil }
  }

  /// The whole number that is not negative, where it is one.
  public var unsignedValue: UInt64? {
    switch self {
    case .integer(let value): UInt64(exactly: value)
    case .unsigned(let value): value
    default: nil
    }
  }

  /// The number, where it is one, rounded to a `Double`.
  public var numberValue: Double? {
    switch self {
    case .integer(let value): Double(value)
    case .unsigned(let value): Double(value)
    case .number(let value): value
    default: nil
    }
  }

  /// The string, where it is one.
  public var stringValue: String? {
    if case .string(let value) = self { value } else { nil }
  }

  /// The array, where it is one.
  public var arrayValue: [JSONValue]? {
    if case .array(let value) = self { value } else { nil }
  }

  /// The object, where it is one.
  public var objectValue: JSONObject? {
    if case .object(let value) = self { value } else { nil }
  }

  /// An object's member; nil where this is no object or has no such key.
  public subscript(key: String) -> JSONValue? {
    objectValue?[key]
  }
}

/// A JSON object, which keeps its keys in the order they came in. Equal objects may have different orders.
public struct JSONObject: Equatable, Sendable {
  /// The keys, in order.
  public private(set) var keys: [String] = []
  private var values: [String: JSONValue] = [:]

  /// An object without members.
  public init() {}

  /// The member with this key. A new key goes last; nil removes.
  public subscript(key: String) -> JSONValue? {
    get { values[key] }
    set {
      let old = newValue.map { values.updateValue($0, forKey: key) } ?? values.removeValue(forKey: key)
      if old == nil, newValue != nil {
        keys.append(key)
      } else if old != nil, newValue == nil {
        keys.removeAll { $0 == key }
      }
    }
  }

  /// How many members there are.
  public var count: Int { keys.count }

  /// Equal where the same keys have the same values.
  public static func == (left: JSONObject, right: JSONObject) -> Bool {
    left.values == right.values
  }
}

extension JSONObject: ExpressibleByDictionaryLiteral {
  /// The last of several members with one key counts.
  public init(dictionaryLiteral elements: (String, JSONValue)...) {
    for (key, value) in elements { self[key] = value }
  }
}

extension JSONValue: ExpressibleByNilLiteral, ExpressibleByBooleanLiteral, ExpressibleByIntegerLiteral,
  ExpressibleByFloatLiteral, ExpressibleByStringInterpolation, ExpressibleByArrayLiteral,
  ExpressibleByDictionaryLiteral
{
  /// `null`.
  public init(nilLiteral: ()) { self = .null }
  /// A Boolean.
  public init(booleanLiteral value: Bool) { self = .bool(value) }
  /// A whole number.
  public init(integerLiteral value: Int64) { self = .integer(value) }
  /// Any number.
  public init(floatLiteral value: Double) { self = .number(value) }
  /// A string.
  public init(stringLiteral value: String) { self = .string(value) }
  /// An array.
  public init(arrayLiteral elements: JSONValue...) { self = .array(elements) }
  /// An object; the last of several members with one key counts.
  public init(dictionaryLiteral elements: (String, JSONValue)...) {
    var object = JSONObject()
    for (key, value) in elements { object[key] = value }
    self = .object(object)
  }
}
