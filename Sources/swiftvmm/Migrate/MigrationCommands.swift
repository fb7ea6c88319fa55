import JSON
import Migration
import Monitor
import PageClasses

/// QMP's commands on migrations, with QEMU's names and shapes, and what is ours beside them.
enum MigrationCommands {
  static func all(_ control: MigrationControl) -> [QMPCommand] {
    [
      QMPCommand(
        "migrate",
        [
          .required("uri", .string), .optional("detach", .bool), .optional("blk", .bool), .optional("inc", .bool),
          .optional("resume", .bool),
        ]
      ) { _, arguments throws(MonitorError) in
        for name in ["blk", "inc"] where arguments[name]?.boolValue == true {
          throw .parameterValue(name, value: "true")
        }
        if arguments["resume"]?.boolValue == true {
          try control.resume(to: arguments.text("uri"))
        } else {
          try control.start(to: arguments.text("uri"))
        }
        return [:]
      },
      QMPCommand("migrate-start-postcopy") { _, _ throws(MonitorError) in
        try control.startPostCopy()
        return [:]
      },
      QMPCommand("migrate-pause") { _, _ throws(MonitorError) in
        try control.pause()
        return [:]
      },
      QMPCommand("migrate-recover", [.required("uri", .string)]) { _, arguments throws(MonitorError) in
        try control.recover(at: arguments.text("uri"))
        return [:]
      },
      QMPCommand("migrate_cancel") { _, _ throws(MonitorError) in
        try control.cancel()
        return [:]
      },
      QMPCommand("query-migrate", returns: .any) { _, _ in
        control.progress.map { MigrationReport.json($0) } ?? [:]
      },
      QMPCommand("migrate-set-parameters", MigrationSettings.members) { _, arguments throws(MonitorError) in
        var parameters = control.parameters
        try MigrationSettings.set(arguments, in: &parameters)
        control.parameters = parameters
        if let id = arguments["tls-creds"]?.stringValue { control.tls.id = id }
        if let name = arguments["tls-hostname"]?.stringValue { control.tls.hostName = name }
        return [:]
      },
      QMPCommand("query-migrate-parameters", returns: .any) { _, _ in
        MigrationSettings.json(control.parameters, control.tls)
      },
      QMPCommand("migrate-set-capabilities", [.required("capabilities", .array(.any))]) {
        _, arguments throws(MonitorError) in
        for entry in arguments["capabilities"]?.arrayValue ?? [] {
          guard let name = entry["capability"]?.stringValue, let isOn = entry["state"]?.boolValue else {
            throw .parameterType("capabilities", expected: "objects with capability and state")
          }
          switch name {
          case "auto-converge": control.parameters.mayThrottle = isOn
          case "postcopy-ram": control.parameters.mayPostCopy = isOn
          // They cannot be had without.
          case "multifd", "xbzrle", "events", "zero-blocks": continue
          default: if isOn { throw .parameterValue("capability", value: name) }
          }
        }
        return [:]
      },
      QMPCommand("query-migrate-capabilities", returns: .array(.any)) { _, _ in
        .array([
          ["capability": "auto-converge", "state": .bool(control.parameters.mayThrottle)],
          ["capability": "postcopy-ram", "state": .bool(control.parameters.mayPostCopy)],
          ["capability": "multifd", "state": true], ["capability": "xbzrle", "state": true],
          ["capability": "events", "state": true],
        ])
      },
      QMPCommand("x-swiftvmm-migrate-reclaim") { _, _ throws(MonitorError) in
        try control.reclaim()
        return [:]
      },
    ]
  }
}

/// `MigrateSetParameters` of QEMU's migration.json, as far as there is something to set, and what is ours.
private enum MigrationSettings {
  static let members: [QMPType.Member] = [
    .optional("max-bandwidth", .integer), .optional("downtime-limit", .integer),
    .optional("multifd-channels", .integer), .optional("multifd-zstd-level", .integer),
    .optional("multifd-compression", .enumeration("MultiFDCompression", values: ["none", "zstd"])),
    .optional("xbzrle-cache-size", .integer), .optional("max-postcopy-bandwidth", .integer),
    .optional("x-swiftvmm-order", .string), .optional("x-swiftvmm-hint-wait", .integer),
    .optional("x-swiftvmm-trace", .string), .optional("tls-creds", .string), .optional("tls-hostname", .string),
  ]

  static func set(_ arguments: JSONObject, in parameters: inout MigrationParameters) throws(MonitorError) {
    func number(_ name: String, _ range: ClosedRange<UInt64>) throws(MonitorError) -> UInt64? {
      guard let value = arguments[name] else { return nil }
      guard let number = value.unsignedValue, range.contains(number) else {
        throw .parameterValue(name, value: value.serialized())
      }
      return number
    }
    if let value = try number("max-bandwidth", 0...(1 << 50)) { parameters.bandwidth = value }
    if let value = try number("max-postcopy-bandwidth", 0...(1 << 50)) { parameters.postCopyBandwidth = value }
    if let value = try number("downtime-limit", 0...2_000_000) { parameters.downtimeLimit = value * 1_000_000 }
    if let value = try number("multifd-channels", 1...16) { parameters.links = Int(value) }
    if let value = try number("multifd-zstd-level", 1...20) { parameters.compression = Int(value) }
    if let value = try number("xbzrle-cache-size", 0...(1 << 40)) { parameters.copies = Int(value) }
    if let value = try number("x-swiftvmm-hint-wait", 0...60_000) { parameters.hintWait = value }
    switch arguments["multifd-compression"]?.stringValue {
    case "none": parameters.compression = 0
    case "zstd": parameters.compression = max(1, parameters.compression)
    default: break
    }
    if let order = arguments["x-swiftvmm-order"]?.stringValue {
      guard PageOrders.names.contains(order) else { throw .parameterValue("x-swiftvmm-order", value: order) }
      parameters.order = order
    }
    if let path = arguments["x-swiftvmm-trace"]?.stringValue { parameters.trace = path.isEmpty ? nil : path }
  }

  static func json(_ parameters: MigrationParameters, _ tls: MigrationControl.TLSChoice) -> JSONValue {
    [
      "max-bandwidth": JSONValue(parameters.bandwidth),
      "max-postcopy-bandwidth": JSONValue(parameters.postCopyBandwidth),
      "downtime-limit": JSONValue(parameters.downtimeLimit / 1_000_000),
      "multifd-channels": JSONValue(parameters.links), "multifd-zstd-level": JSONValue(max(1, parameters.compression)),
      "multifd-compression": parameters.compression > 0 ? "zstd" : "none",
      "xbzrle-cache-size": JSONValue(parameters.copies), "x-swiftvmm-order": .string(parameters.order),
      "x-swiftvmm-hint-wait": JSONValue(parameters.hintWait),
      "x-swiftvmm-trace": .string(parameters.trace ?? ""), "tls-creds": .string(tls.id),
      "tls-hostname": .string(tls.hostName),
    ]
  }
}
