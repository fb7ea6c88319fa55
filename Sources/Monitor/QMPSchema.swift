import JSON

/// Builds what `query-qmp-schema` returns: a `SchemaInfo` (QEMU's introspect.json) for each command, event and type.
struct QMPSchema {
  private(set) var entries: [JSONValue] = []
  private var known: Set<String> = []

  init(commands: [QMPCommand], events: [(name: String, data: [QMPType.Member])]) {
    for command in commands {
      let arguments = arguments(of: command.name, command.arguments)
      entries.append([
        "name": .string(command.name), "meta-type": "command", "arg-type": .string(arguments),
        "ret-type": .string(add(command.returns)), "allow-oob": false,
      ])
    }
    for event in events {
      let data = arguments(of: event.name, event.data)
      entries.append(["name": .string(event.name), "meta-type": "event", "arg-type": .string(data)])
    }
  }

  private mutating func arguments(of name: String, _ members: [QMPType.Member]) -> String {
    add(members.isEmpty ? .empty : .object("q_obj_\(name)-arg", members: members))
  }

  /// Adds a type and those it is made of, once each.
  private mutating func add(_ type: QMPType) -> String {
    guard known.insert(type.name).inserted else { return type.name }
    var entry: JSONObject = ["name": .string(type.name)]
    switch type {
    case .string: entry["json-type"] = "string"
    case .integer: entry["json-type"] = "int"
    case .bool: entry["json-type"] = "boolean"
    case .any: entry["json-type"] = "value"
    case .enumeration(_, let values):
      entry["meta-type"] = "enum"
      entry["members"] = .array(values.map { ["name": .string($0)] })
      entry["values"] = .array(values.map(JSONValue.string))
    case .array(let element):
      entry["meta-type"] = "array"
      entry["element-type"] = .string(add(element))
    case .object(_, let members):
      entry["meta-type"] = "object"
      entry["members"] = .array(
        members.map { member in
          var info: JSONObject = ["name": .string(member.name), "type": .string(add(member.type))]
          if member.isOptional { info["default"] = .null }
          return .object(info)
        })
    }
    if entry["meta-type"] == nil { entry["meta-type"] = "builtin" }
    entries.append(.object(entry))
    return type.name
  }
}
