import JSON

/// One client's conversation, without the transport: bytes in, replies out (QEMU's docs/interop/qmp-spec.rst).
public struct QMPSession: Sendable {
  private let context: QMPCommand.Context
  private var parser = JSONParser()
  private var isSkipping = false
  /// Whether the client has sent `qmp_capabilities`: only then it gets events.
  public private(set) var isNegotiated = false

  /// A conversation that has not begun.
  public init(_ context: QMPCommand.Context) {
    self.context = context
  }

  /// What the server says first.
  public var greeting: JSONValue {
    ["QMP": ["version": QMPCommand.version(package: context.package), "capabilities": []]]
  }

  /// Takes the next byte.
  ///
  /// What is not JSON gets an error, and the rest of its line is skipped.
  /// - Returns: The reply to the request that this byte ends.
  public mutating func receive(_ byte: UInt8) -> JSONValue? {
    if isSkipping {
      isSkipping = byte != UInt8(ascii: "\n")
      return nil
    }
    do throws(JSONError) {
      guard let request = try parser.feed(byte) else { return nil }
      return reply(to: request)
    } catch {
      isSkipping = byte != UInt8(ascii: "\n")
      return Self.reply(.failure(.syntax(error)), id: nil)
    }
  }

  private mutating func reply(to request: JSONValue) -> JSONValue {
    do throws(MonitorError) {
      return Self.reply(.success(try execute(request)), id: request["id"])
    } catch {
      return Self.reply(.failure(error), id: request["id"])
    }
  }

  private mutating func execute(_ request: JSONValue) throws(MonitorError) -> JSONValue {
    guard let request = request.objectValue else { throw .notAnObject }
    for key in request.keys where !["execute", "arguments", "id"].contains(key) { throw .memberUnexpected(key) }
    guard let execute = request["execute"] else { throw .lacksExecute }
    guard let name = execute.stringValue else { throw .memberType("execute", expected: "a string") }
    guard let arguments = (request["arguments"] ?? [:]).objectValue else {
      throw .memberType("arguments", expected: "an object")
    }
    let isNegotiation = name == QMPCommand.negotiation
    guard let command = context.commands.first(where: { $0.name == name }) else { throw .unknownCommand(name) }
    guard isNegotiated || isNegotiation else { throw .negotiationExpected }
    guard !(isNegotiated && isNegotiation) else { throw .negotiationComplete }
    try QMPType.validate(arguments, command.arguments)
    let result = try command.body(context, arguments)
    isNegotiated = true
    return result
  }

  private static func reply(_ result: Result<JSONValue, MonitorError>, id: JSONValue?) -> JSONValue {
    var reply: JSONObject
    switch result {
    case .success(let value): reply = ["return": value]
    case .failure(let error):
      reply = ["error": ["class": .string(error.errorClass), "desc": .string(error.description)]]
    }
    reply["id"] = id
    return .object(reply)
  }
}
