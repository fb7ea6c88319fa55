import JSON

/// One line of the conversation with the agent in a guest (docs/agent.md): a request, or the answer to one.
public enum AgentMessage: Equatable, Sendable {
  /// `{"id": N, "request": NAME, ...}`: the other members are its arguments.
  case request(id: UInt64, name: String, arguments: JSONObject)
  /// `{"id": N, "result": VALUE}`.
  case result(id: UInt64, JSONValue)
  /// `{"id": N, "error": TEXT}`.
  case failure(id: UInt64, String)
  /// `{"event": NAME, ...}`: nobody answers.
  case event(name: String, arguments: JSONObject)

  /// Bytes of a line at most, its end included.
  public static let longestLine = 16 << 10
  /// Names are short.
  public static let longestName = 64
  /// The protocol's version, which `hello` names.
  public static let version = 1

  /// Reads a line without its end.
  ///
  /// - Throws: what is wrong with it.
  public init(line: some Sequence<UInt8>) throws(AgentError) {
    var parser = JSONParser(limits: .init(depth: 8, bytes: Self.longestLine))
    var value: JSONValue?
    do throws(JSONError) {
      for byte in line {
        guard let found = try parser.feed(byte) else { continue }
        guard value == nil else { throw .trailing(offset: 0) }
        value = found
      }
      if let last = try parser.finish() { value = last }
    } catch {
      throw .json(error)
    }
    guard var object = value?.objectValue else { throw .notAnObject }
    if let name = object["event"]?.stringValue {
      guard object["id"] == nil, Self.isName(name) else { throw .member("event") }
      object["event"] = nil
      self = .event(name: name, arguments: object)
      return
    }
    guard let id = object["id"]?.unsignedValue else { throw .member("id") }
    object["id"] = nil
    if let request = object["request"] {
      guard let name = request.stringValue, Self.isName(name) else { throw .member("request") }
      object["request"] = nil
      self = .request(id: id, name: name, arguments: object)
    } else if let result = object["result"] {
      self = .result(id: id, result)
    } else if let text = object["error"]?.stringValue {
      self = .failure(id: id, text)
    } else {
      throw .member("request, result or error")
    }
  }

  private static func isName(_ text: String) -> Bool {
    !text.isEmpty && text.utf8.count <= longestName
      && text.utf8.allSatisfy { (0x61...0x7a).contains($0) || (0x30...0x39).contains($0) || $0 == 0x2d }
  }

  /// The line, with its end.
  public var line: [UInt8] {
    let object: JSONObject
    switch self {
    case .request(let id, let name, let arguments):
      object = Self.joined(["id": JSONValue(id), "request": .string(name)], arguments)
    case .result(let id, let value): object = ["id": JSONValue(id), "result": value]
    case .failure(let id, let text): object = ["id": JSONValue(id), "error": .string(text)]
    case .event(let name, let arguments): object = Self.joined(["event": .string(name)], arguments)
    }
    return Array((JSONValue.object(object).serialized() + "\n").utf8)
  }

  private static func joined(_ object: JSONObject, _ more: JSONObject) -> JSONObject {
    var object = object
    for key in more.keys where object[key] == nil { object[key] = more[key] }
    return object
  }
}

/// What is wrong with a line of an agent's.
public enum AgentError: Error, Equatable, Sendable, CustomStringConvertible {
  /// No JSON, or beyond the limits.
  case json(JSONError)
  /// JSON of another kind.
  case notAnObject
  /// A member is missing or of the wrong kind.
  case member(String)
  /// Longer than a line may be.
  case tooLong(limit: Int)

  /// One line.
  public var description: String {
    switch self {
    case .json(let error): "no JSON: \(error)"
    case .notAnObject: "no JSON object"
    case .member(let name): "the member \(name) is missing or wrong"
    case .tooLong(let limit): "longer than \(limit) bytes"
    }
  }
}

/// Makes lines of the bytes that come from a guest. What it keeps is bounded, whatever comes.
public struct AgentLines: Sendable {
  /// The beginning of a line whose end has not come.
  public private(set) var line: [UInt8] = []
  /// That line is longer than one may be.
  public private(set) var isDropping = false

  /// At the start of a line.
  public init() {}

  /// In the midst of a line, which is cut at the longest that one may be.
  public init(line: [UInt8], isDropping: Bool) {
    self.line = Array(line.prefix(AgentMessage.longestLine - 1))
    self.isDropping = isDropping
  }

  /// Takes bytes and hands on each whole line's message, or what is wrong with it. Empty lines are nothing.
  public mutating func feed(_ bytes: [UInt8], _ body: (Result<AgentMessage, AgentError>) -> Void) {
    for byte in bytes {
      guard byte == 0x0a else {
        if line.count < AgentMessage.longestLine - 1 {
          line.append(byte)
        } else {
          isDropping = true
        }
        continue
      }
      if isDropping {
        body(.failure(.tooLong(limit: AgentMessage.longestLine)))
      } else if !line.isEmpty {
        body(Result { () throws(AgentError) in try AgentMessage(line: line) })
      }
      line.removeAll(keepingCapacity: true)
      isDropping = false
    }
  }
}
