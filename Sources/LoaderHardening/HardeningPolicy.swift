import Accelerator
import GuestMemory
import JSON
import MemoryViews

/// What a hardened machine forbids, and what happens to who tries: docs/hardening.md has the format.
public struct HardeningPolicy: Equatable, Sendable {
  /// What happens after a violation.
  public enum Reaction: String, Sendable, CaseIterable {
    /// #GP(0) at the instruction.
    case generalProtection = "gp"
    /// The machine stops.
    case stop
    /// It is allowed and written down; the page stays open.
    case log
  }

  /// What becomes of interrupts while a vCPU is in the loader.
  public enum InterruptRule: String, Sendable, CaseIterable {
    /// They wait, up to a bound.
    case hold
    /// They are taken: the handler runs in the kernel's view, and returns to where the loader was.
    case resume
  }

  /// Memory with fewer rights than the rest, in both views.
  public struct Protection: Equatable, Sendable {
    /// Its name in the audit.
    public var name: String
    /// Whole pages.
    public var range: GuestRange
    /// What may be done with it.
    public var rights: PageRights
  }

  /// What happens after a violation.
  public var reaction = Reaction.generalProtection
  /// Whether, from the lock on, no page is writable and executable, and only what was made so is executable.
  public var exclusive = true
  /// Whether the loader may make pages executable only after it had a module verified.
  public var requiresSignature = false
  /// Ed25519 public keys that modules may be signed with.
  public var keys: [[UInt8]] = []
  /// What becomes of interrupts in the loader.
  public var interrupts = InterruptRule.hold
  /// Milliseconds after which held interrupts are taken all the same.
  public var interruptBound = 100
  /// Ranges that the policy protects from the start.
  public var protections: [Protection] = []
  /// Registers that do not change after the lock.
  public var pins: Set<PinnedRegister> = []
  /// Where the audit goes; nil for the command line's choice.
  public var audit: String?

  /// The strictest reaction of all that guests survive, without signatures.
  public init() {}

  private static let version: Int64 = 1

  /// Reads a policy.
  ///
  /// - Throws: what is wrong with it; members that are not known are refused.
  public init(parsing bytes: [UInt8]) throws(HardeningError) {
    let value: JSONValue
    do { value = try JSONValue(parsing: bytes) } catch { throw .json(error) }
    let object = try Self.object(
      value, "the policy",
      ["version", "reaction", "wx", "signatures", "interrupts", "protect", "pin", "audit"])
    guard object["version"]?.integerValue == Self.version else {
      throw .version(object["version"]?.integerValue, known: Int(Self.version))
    }
    reaction = try Self.choice(object["reaction"], "reaction", default: .generalProtection)
    exclusive = try Self.bool(object["wx"], "wx", default: true)
    if let value = object["signatures"] {
      let signatures = try Self.object(value, "signatures", ["required", "keys"])
      requiresSignature = try Self.bool(signatures["required"], "signatures.required", default: true)
      guard let texts = (signatures["keys"] ?? .array([])).arrayValue else {
        throw .value(key: "signatures.keys", expected: "an array of public keys")
      }
      for (index, text) in texts.enumerated() {
        guard let key = text.stringValue.flatMap(Hexadecimal.bytes), key.count == Ed25519.publicSize else {
          throw .key(index: index)
        }
        keys.append(key)
      }
      if requiresSignature, keys.isEmpty { throw .keysMissing }
    }
    if let value = object["interrupts"] {
      let rule = try Self.object(value, "interrupts", ["rule", "bound-ms"])
      interrupts = try Self.choice(rule["rule"], "interrupts.rule", default: .hold)
      if let bound = rule["bound-ms"] {
        guard let number = bound.integerValue, (1...10_000).contains(number) else {
          throw .value(key: "interrupts.bound-ms", expected: "1 to 10000 milliseconds")
        }
        interruptBound = Int(number)
      }
    }
    if let value = object["protect"] {
      guard let ranges = value.arrayValue else { throw .value(key: "protect", expected: "an array of ranges") }
      for (index, value) in ranges.enumerated() { protections.append(try Self.protection(value, index)) }
    }
    if let value = object["pin"] {
      let known = PinnedRegister.allCases.map(\.rawValue).joined(separator: ", ")
      guard let names = value.arrayValue else { throw .value(key: "pin", expected: "an array of \(known)") }
      for name in names {
        guard let register = name.stringValue.flatMap(PinnedRegister.init(rawValue:)) else {
          throw .value(key: "pin", expected: "an array of \(known)")
        }
        pins.insert(register)
      }
    }
    if let value = object["audit"] {
      guard let path = value.stringValue, !path.isEmpty else { throw .value(key: "audit", expected: "a path") }
      audit = path
    }
  }

  private static func protection(_ value: JSONValue, _ index: Int) throws(HardeningError) -> Protection {
    let place = "protect[\(index)]"
    let object = try object(value, place, ["name", "start", "size", "rights"])
    guard let start = number(object["start"]), let size = number(object["size"]), size > 0,
      (start | size) & 0xfff == 0, let range = GuestRange(start: GuestPhysicalAddress(start), size: size)
    else { throw .range(index: index) }
    guard let text = object["rights"]?.stringValue, let rights = PageRights(text) else {
      throw .value(key: "\(place).rights", expected: "three of r, w, x and -, such as r-x")
    }
    return Protection(name: object["name"]?.stringValue ?? "\(index)", range: range, rights: rights)
  }

  private static func object(
    _ value: JSONValue, _ place: String, _ known: [String]
  ) throws(HardeningError) -> JSONObject {
    guard let object = value.objectValue else { throw .notAnObject(where: place) }
    for key in object.keys where !known.contains(key) { throw .unknownKey(key, where: place, known: known) }
    return object
  }

  private static func bool(_ value: JSONValue?, _ key: String, default standard: Bool) throws(HardeningError) -> Bool {
    guard let value else { return standard }
    guard let bool = value.boolValue else { throw .value(key: key, expected: "true or false") }
    return bool
  }

  private static func choice<Choice: RawRepresentable & CaseIterable>(
    _ value: JSONValue?, _ key: String, default standard: Choice
  ) throws(HardeningError) -> Choice where Choice.RawValue == String {
    guard let value else { return standard }
    guard let choice = value.stringValue.flatMap(Choice.init(rawValue:)) else {
      throw .value(key: key, expected: Choice.allCases.map(\.rawValue).joined(separator: " or "))
    }
    return choice
  }

  /// A whole number, or one in a string, such as "0x1000": JSON has no hexadecimal.
  private static func number(_ value: JSONValue?) -> UInt64? {
    guard let text = value?.stringValue else { return value?.unsignedValue }
    return text.hasPrefix("0x") ? UInt64(text.dropFirst(2), radix: 16) : UInt64(text)
  }
}

extension PageRights {
  /// As `description` writes them.
  public init?(_ text: String) {
    let letters: [(Character, PageRights)] = [("r", .read), ("w", .write), ("x", .execute)]
    guard text.count == 3 else { return nil }
    self = []
    for (letter, (wanted, right)) in zip(text, letters) {
      if letter == wanted { insert(right) } else if letter != "-" { return nil }
    }
  }
}

/// Bytes as text.
public enum Hexadecimal {
  /// Two digits a byte; nil where the text is something else.
  public static func bytes(_ text: String) -> [UInt8]? {
    let digits = Array(text.utf8)
    guard digits.count % 2 == 0 else { return nil }
    var bytes: [UInt8] = []
    for index in stride(from: 0, to: digits.count, by: 2) {
      guard let high = digit(digits[index]), let low = digit(digits[index + 1]) else { return nil }
      bytes.append(high << 4 | low)
    }
    return bytes
  }

  /// Two digits a byte.
  public static func text(_ bytes: [UInt8]) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
  }

  private static func digit(_ byte: UInt8) -> UInt8? {
    switch byte {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): byte - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): byte - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): byte - UInt8(ascii: "A") + 10
    default: nil
    }
  }
}
