import Host
import JSON
import Monitor
import TLS

/// QMP's commands on the NBD server of a machine (QEMU's block-export.json).
enum ExportCommands {
  private static let address = QMPType.object(
    "SocketAddressLegacy",
    members: [
      .required("type", .enumeration("SocketAddressLegacyKind", values: ["inet", "unix"])), .required("data", .any),
    ])
  private static let mode = QMPType.enumeration("BlockExportRemoveMode", values: ["safe", "hard"])
  private static let info = QMPType.object(
    "BlockExportInfo",
    members: [
      .required("id", .string), .required("type", .enumeration("BlockExportType", values: ["nbd"])),
      .required("node-name", .string), .required("shutting-down", .bool),
    ])

  /// The catalogue: a command is one entry.
  static func all(_ exports: DiskExports, _ objects: TLSObjects) -> [QMPCommand] {
    [
      QMPCommand(
        "nbd-server-start",
        [.required("addr", address), .optional("max-connections", .integer), .optional("tls-creds", .string)]
      ) { _, arguments throws(MonitorError) in
        let limit = arguments["max-connections"]?.integerValue ?? 0
        guard (0...65535).contains(limit) else { throw .parameterValue("max-connections", value: "\(limit)") }
        let credentials = try arguments["tls-creds"]?.stringValue.map { id throws(MonitorError) in
          try objects.credentials(id, .server)
        }
        try exports.start(endpoint(arguments["addr"]?.objectValue ?? [:]), clientLimit: Int(limit), credentials)
        return [:]
      },
      QMPCommand(
        "nbd-server-add",
        [
          .required("device", .string), .optional("name", .string), .optional("description", .string),
          .optional("writable", .bool), .optional("bitmap", .string),
        ]
      ) { _, arguments throws(MonitorError) in
        let device = arguments.text("device")
        let name = arguments["name"]?.stringValue ?? device
        var request = DiskExports.Request(id: name, node: device, name: name)
        request.description = arguments.text("description")
        request.isWritable = arguments["writable"]?.boolValue ?? false
        if let bitmap = arguments["bitmap"]?.stringValue { request.bitmaps = [bitmap] }
        try exports.add(request)
        return [:]
      },
      QMPCommand(
        "block-export-add",
        [
          .required("type", .enumeration("BlockExportType", values: ["nbd"])), .required("id", .string),
          .required("node-name", .string), .optional("writable", .bool), .optional("name", .string),
          .optional("description", .string), .optional("bitmaps", .array(.string)),
        ]
      ) { _, arguments throws(MonitorError) in
        let node = arguments.text("node-name")
        var request = DiskExports.Request(
          id: arguments.text("id"), node: node, name: arguments["name"]?.stringValue ?? node)
        request.description = arguments.text("description")
        request.isWritable = arguments["writable"]?.boolValue ?? false
        request.bitmaps = (arguments["bitmaps"]?.arrayValue ?? []).compactMap(\.stringValue)
        try exports.add(request)
        return [:]
      },
      QMPCommand(
        "nbd-server-remove", [.required("name", .string), .optional("mode", mode)]
      ) { _, arguments throws(MonitorError) in
        try exports.remove(id: arguments.text("name"), isSafe: arguments.text("mode") != "hard")
        return [:]
      },
      QMPCommand(
        "block-export-del", [.required("id", .string), .optional("mode", mode)]
      ) { _, arguments throws(MonitorError) in
        try exports.remove(id: arguments.text("id"), isSafe: arguments.text("mode") != "hard")
        return [:]
      },
      QMPCommand("nbd-server-stop") { _, _ throws(MonitorError) in
        try exports.stop()
        return [:]
      },
      QMPCommand("query-block-exports", returns: .array(info)) { _, _ in
        .array(
          exports.list.map {
            ["id": .string($0.id), "type": "nbd", "node-name": .string($0.node), "shutting-down": false]
          })
      },
    ]
  }

  private static func endpoint(_ address: JSONObject) throws(MonitorError) -> StreamEndpoint {
    guard let data = address["data"]?.objectValue else {
      throw .parameterType("addr.data", expected: "object")
    }
    return try endpoint(data, type: address.text("type"), "addr.data.")
  }

  /// What a `SocketAddress` means; `prefix` is where it stands among the arguments.
  static func endpoint(_ data: JSONObject, type: String, _ prefix: String) throws(MonitorError) -> StreamEndpoint {
    guard type == "unix" || type == "inet" else { throw .parameterValue("\(prefix)type", value: type) }
    let keys = type == "unix" ? ["path"] : ["host", "port"]
    for key in keys where data[key]?.stringValue == nil { throw .parameterMissing("\(prefix)\(key)") }
    do throws(HostError) {
      if type == "unix" { return try StreamEndpoint("unix:" + data.text("path")) }
      let host = data.text("host")
      return try StreamEndpoint("tcp:" + (host.contains(":") ? "[\(host)]" : host) + ":" + data.text("port"))
    } catch {
      throw .refused("\(error)")
    }
  }
}
