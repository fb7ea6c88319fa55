import GuestMemory
import JSON
import Synchronization

/// One thing that a hardened machine saw: a line of JSON in the audit.
public struct AuditEvent: Equatable, Sendable {
  /// What happened.
  public enum Kind: String, Sendable, CaseIterable {
    case register, lock, enter, leave, suspend, resume, permission, verify, denied, bound, note
  }

  /// Nanoseconds since the machine was made.
  public var time: UInt64
  /// What happened.
  public var kind: Kind
  /// On which vCPU; nil for a device.
  public var vcpu: Int?
  /// The instruction pointer.
  public var rip: UInt64?
  /// The guest-physical address.
  public var address: UInt64?
  /// Bytes, where there is a range.
  public var size: UInt64?
  /// The active set: kernel or loader.
  public var view: String
  /// Rights that were asked for or are missing, as `rwx`.
  public var rights: String?
  /// Why, or what the guest said.
  public var reason: String?
  /// What was done about it.
  public var reaction: String?

  /// The event as JSON.
  public var json: JSONValue {
    var object = JSONObject()
    object["time"] = JSONValue(time)
    object["event"] = .string(kind.rawValue)
    object["vcpu"] = vcpu.map { JSONValue($0) }
    object["rip"] = rip.map(Self.hex)
    object["address"] = address.map(Self.hex)
    object["size"] = size.map { JSONValue($0) }
    object["view"] = .string(view)
    object["rights"] = rights.map { .string($0) }
    object["reason"] = reason.map { .string($0) }
    object["reaction"] = reaction.map { .string($0) }
    return .object(object)
  }

  /// Reads what `json` makes; nil for anything else.
  public init?(_ json: JSONValue) {
    guard let time = json["time"]?.unsignedValue, let name = json["event"]?.stringValue,
      let kind = Kind(rawValue: name), let view = json["view"]?.stringValue
    else { return nil }
    self.init(time: time, kind: kind, view: view)
    vcpu = json["vcpu"]?.integerValue.flatMap { Int(exactly: $0) }
    rip = json["rip"]?.stringValue.flatMap(Self.number)
    address = json["address"]?.stringValue.flatMap(Self.number)
    size = json["size"]?.unsignedValue
    rights = json["rights"]?.stringValue
    reason = json["reason"]?.stringValue
    reaction = json["reaction"]?.stringValue
  }

  init(time: UInt64, kind: Kind, view: String) {
    self.time = time
    self.kind = kind
    self.view = view
  }

  private static func hex(_ value: UInt64) -> JSONValue { .string("0x" + String(value, radix: 16)) }
  private static func number(_ text: String) -> UInt64? {
    text.hasPrefix("0x") ? UInt64(text.dropFirst(2), radix: 16) : nil
  }
}
