import JSON

/// A QMP command: its name, its types, and what it does. Arguments reach `body` validated.
public struct QMPCommand: Sendable {
  /// What a command may use besides its arguments.
  public struct Context: Sendable {
    /// The machine.
    public let target: any MonitorTarget
    /// Every command of this monitor.
    public let commands: [QMPCommand]
    /// The program and its version, for `query-version`.
    public let package: String

    /// What commands may use.
    public init(target: any MonitorTarget, commands: [QMPCommand], package: String) {
      self.target = target
      self.commands = commands
      self.package = package
    }
  }

  /// Runs on the monitor's thread; the result has the type `returns`.
  public typealias Body = @Sendable (Context, JSONObject) throws(MonitorError) -> JSONValue

  /// The name.
  public let name: String
  /// The arguments.
  public let arguments: [QMPType.Member]
  /// The result's type.
  public let returns: QMPType
  /// What it does.
  public let body: Body

  /// A command for the catalogue.
  public init(
    _ name: String, _ arguments: [QMPType.Member] = [], returns: QMPType = .empty, _ body: @escaping Body
  ) {
    self.name = name
    self.arguments = arguments
    self.returns = returns
    self.body = body
  }
}

extension QMPCommand {
  /// The catalogue.
  public static let standard = general + views

  /// What every machine has: a command is one entry.
  private static let general: [QMPCommand] = [
    QMPCommand(negotiation, [.optional("enable", .array(.enumeration("QMPCapability", values: ["oob"])))]) {
      _, arguments throws(MonitorError) in
      if let name = arguments["enable"]?.arrayValue?.first?.stringValue { throw .capability(name) }
      return [:]
    },
    QMPCommand("query-version", returns: Types.version) { context, _ in version(package: context.package) },
    QMPCommand("query-commands", returns: .array(Types.commandInfo)) { context, _ in
      .array(context.commands.map { ["name": .string($0.name)] })
    },
    QMPCommand("query-qmp-schema", returns: .array(Types.schemaInfo)) { context, _ in
      .array(QMPSchema(commands: context.commands, events: QMPEvent.catalogue).entries)
    },
    QMPCommand("query-status", returns: Types.statusInfo) { context, _ in
      let state = context.target.runState
      return ["running": .bool(state == .running), "status": .string(state.rawValue)]
    },
    QMPCommand("query-kvm", returns: Types.kvmInfo) { context, _ in
      ["enabled": .bool(context.target.usesKVM), "present": true]
    },
    QMPCommand("query-cpus-fast", returns: .array(Types.cpuInfo)) { context, _ in
      .array(
        context.target.virtualCPUs.map { vcpu in
          [
            "cpu-index": JSONValue(vcpu.index), "qom-path": .string("/machine/cpu[\(vcpu.index)]"),
            "thread-id": JSONValue(vcpu.threadID), "target": "x86_64",
          ]
        })
    },
    QMPCommand("stop") { context, _ throws(MonitorError) in
      try context.target.pause()
      return [:]
    },
    QMPCommand("cont") { context, _ throws(MonitorError) in
      try context.target.resume()
      return [:]
    },
    QMPCommand("system_powerdown") { context, _ throws(MonitorError) in
      try context.target.powerDown()
      return [:]
    },
    QMPCommand("system_reset") { context, _ throws(MonitorError) in
      try context.target.reset()
      return [:]
    },
    QMPCommand("quit") { context, _ in
      context.target.quit()
      return [:]
    },
    QMPCommand(
      "human-monitor-command", [.required("command-line", .string), .optional("cpu-index", .integer)], returns: .string
    ) { _, _ throws(MonitorError) in throw .noHumanMonitor },
    QMPCommand("x-swiftvmm-query-exits", returns: .array(Types.exitCount)) { context, _ in
      .array(context.target.exitCounts.map { ["reason": .string($0.reason), "count": JSONValue($0.count)] })
    },
  ]

  /// The command that ends the negotiation.
  static let negotiation = "qmp_capabilities"

  /// `VersionInfo`: the QEMU release whose commands have the meaning that they have here, and this program.
  static func version(package: String) -> JSONValue {
    ["qemu": ["major": 7, "minor": 2, "micro": 0], "package": .string(package)]
  }

  /// The results' types, by QEMU's names.
  private enum Types {
    static let versionTriple = QMPType.object(
      "VersionTriple",
      members: [.required("major", .integer), .required("minor", .integer), .required("micro", .integer)])
    static let version = QMPType.object(
      "VersionInfo", members: [.required("qemu", versionTriple), .required("package", .string)])
    static let commandInfo = QMPType.object("CommandInfo", members: [.required("name", .string)])
    static let schemaInfo = QMPType.object(
      "SchemaInfo",
      members: [
        .required("name", .string), .required("meta-type", .string), .optional("json-type", .string),
        .optional("arg-type", .string), .optional("ret-type", .string), .optional("allow-oob", .bool),
        .optional("element-type", .string), .optional("members", .array(.any)), .optional("values", .array(.string)),
      ])
    static let statusInfo = QMPType.object(
      "StatusInfo",
      members: [
        .required("running", .bool),
        .required("status", .enumeration("RunState", values: RunState.allCases.map(\.rawValue))),
      ])
    static let kvmInfo = QMPType.object(
      "KvmInfo", members: [.required("enabled", .bool), .required("present", .bool)])
    static let cpuInfo = QMPType.object(
      "CpuInfoFast",
      members: [
        .required("cpu-index", .integer), .required("qom-path", .string), .required("thread-id", .integer),
        .required("target", .string),
      ])
    static let exitCount = QMPType.object(
      "ExitCount", members: [.required("reason", .string), .required("count", .integer)])
  }
}
