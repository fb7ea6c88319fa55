import BlockLayer
import JSON
import Monitor

/// QMP's commands on jobs (QEMU's block-core.json and job.json).
enum JobCommands {
  private static let common: [QMPType.Member] = [
    .optional("speed", .integer), .optional("auto-finalize", .bool), .optional("auto-dismiss", .bool),
  ]

  static let backup: [QMPType.Member] =
    [
      .optional("job-id", .string), .required("device", .string), .required("target", .string),
      .required("sync", .enumeration("MirrorSyncMode", values: ["full", "top", "none", "incremental", "bitmap"])),
      .optional("bitmap", .string), .optional("bitmap-mode", .string),
    ] + common

  private static let mirror: [QMPType.Member] =
    [
      .optional("job-id", .string), .required("device", .string), .required("target", .string),
      .required("sync", .enumeration("MirrorSyncMode", values: ["full", "top", "none"])),
      .optional("copy-mode", .enumeration("MirrorCopyMode", values: ["background"])),
    ] + common

  static func all(_ control: DiskControl) -> [QMPCommand] {
    starters(control) + verbs(control) + queries(control)
  }

  // MARK: Beginning

  private static func starters(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand(
        "block-stream",
        [
          .optional("job-id", .string), .required("device", .string), .optional("base", .string),
          .optional("base-node", .string), .optional("backing-file", .string),
        ] + common
      ) { _, arguments throws(MonitorError) in
        try control.run { graph throws(BlockError) in
          let disk = try graph.disk(arguments.text("device"))
          let base = try layer(arguments, "base", of: disk, graph)
          try graph.stream(
            id(arguments, disk), disk, base: base, baseName: arguments["backing-file"]?.stringValue,
            configure: configure(arguments))
        }
        return [:]
      },
      QMPCommand(
        "block-commit",
        [
          .optional("job-id", .string), .required("device", .string), .optional("base", .string),
          .optional("base-node", .string), .optional("top", .string), .optional("top-node", .string),
        ] + common
      ) { _, arguments throws(MonitorError) in
        try control.run { graph throws(BlockError) in
          let disk = try graph.disk(arguments.text("device"))
          let top = try layer(arguments, "top", of: disk, graph) ?? disk.top
          let base = try layer(arguments, "base", of: disk, graph) ?? disk.top.chain[disk.top.chain.count - 1]
          try graph.commit(id(arguments, disk), disk, top: top, base: base, configure: configure(arguments))
        }
        return [:]
      },
      QMPCommand("blockdev-backup", backup) { _, arguments throws(MonitorError) in
        try control.run { graph throws(BlockError) in _ = try startBackup(arguments, graph) }
        return [:]
      },
      QMPCommand("blockdev-mirror", mirror) { _, arguments throws(MonitorError) in
        try control.run { graph throws(BlockError) in
          let disk = try graph.disk(arguments.text("device"))
          try graph.mirror(
            id(arguments, disk), disk, to: graph.node(arguments.text("target")), mode: arguments.text("sync"),
            configure: configure(arguments))
        }
        return [:]
      },
    ]
  }

  @discardableResult
  static func startBackup(_ arguments: JSONObject, _ graph: BlockGraph) throws(BlockError) -> LiveJob {
    let disk = try graph.disk(arguments.text("device"))
    return try graph.backup(
      id(arguments, disk), disk, to: graph.node(arguments.text("target")), mode: arguments.text("sync"),
      bitmap: arguments["bitmap"]?.stringValue, configure: configure(arguments))
  }

  private static func id(_ arguments: JSONObject, _ disk: LiveDisk) -> String {
    arguments["job-id"]?.stringValue ?? disk.name
  }

  private static func configure(_ arguments: JSONObject) -> (LiveJob) -> Void {
    { job in
      job.speed = arguments["speed"]?.unsignedValue ?? 0
      job.staysPending = arguments["auto-finalize"]?.boolValue == false
      job.staysConcluded = arguments["auto-dismiss"]?.boolValue == false
    }
  }

  /// A layer of the disk by its node name (`KEY-node`) or its file (`KEY`); nil where neither is given.
  private static func layer(
    _ arguments: JSONObject, _ key: String, of disk: LiveDisk, _ graph: BlockGraph
  ) throws(BlockError) -> LiveNode? {
    if let name = arguments["\(key)-node"]?.stringValue { return try graph.node(name) }
    guard let path = arguments[key]?.stringValue else { return nil }
    if let layer = disk.top.chain.first(where: { $0.isCalled(path) }) { return layer }
    throw .notBelow(path, of: disk.top.name)
  }

  // MARK: Going on

  private static func verbs(_ control: DiskControl) -> [QMPCommand] {
    func verb(
      _ verb: String, more: [QMPType.Member] = [],
      _ body: @escaping @Sendable (LiveJob, JSONObject) throws(BlockError) -> Void
    ) -> [QMPCommand] {
      [("job-\(verb)", "id"), ("block-job-\(verb)", verb == "dismiss" || verb == "finalize" ? "id" : "device")].map {
        name, key in
        QMPCommand(name, [.required(key, .string)] + more) { _, arguments throws(MonitorError) in
          try control.run { graph throws(BlockError) in try body(graph.job(arguments.text(key)), arguments) }
          return [:]
        }
      }
    }
    return verb("pause") { job, _ throws(BlockError) in try job.pause(true) }
      + verb("resume") { job, _ throws(BlockError) in try job.pause(false) }
      + verb("cancel", more: [.optional("force", .bool)]) { job, arguments in
        // As QEMU's: of the two names, the one about jobs in general hurries.
        job.cancel(isForced: arguments["id"] != nil || arguments["force"]?.boolValue == true)
      }
      + verb("complete") { job, _ throws(BlockError) in try job.complete() }
      + verb("dismiss") { job, _ throws(BlockError) in try job.dismiss() }
      + verb("finalize") { job, _ throws(BlockError) in try job.finalize() }
      + [
        QMPCommand(
          "block-job-set-speed", [.required("device", .string), .required("speed", .integer)]
        ) { _, arguments throws(MonitorError) in
          try control.run { graph throws(BlockError) in
            try graph.job(arguments.text("device")).speed = arguments["speed"]?.unsignedValue ?? 0
          }
          return [:]
        }
      ]
  }

  // MARK: Asking

  private static func queries(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand("query-jobs", returns: .array(.any)) { _, _ throws(MonitorError) in
        try control.run { graph in
          .array(
            sorted(graph).map { job in
              var entry: JSONObject = [
                "id": .string(job.id), "type": .string(job.kind.rawValue), "status": .string(job.status.rawValue),
                "current-progress": JSONValue(job.offset), "total-progress": JSONValue(job.length),
              ]
              if let error = job.error { entry["error"] = .string("\(error)") }
              return .object(entry)
            })
        }
      },
      QMPCommand("query-block-jobs", returns: .array(.any)) { _, _ throws(MonitorError) in
        try control.run { graph in
          .array(
            sorted(graph).map { job in
              let isReady = job.status == .ready || job.status == .standby
              var entry: JSONObject = [
                "device": .string(job.id), "type": .string(job.kind.rawValue), "len": JSONValue(job.length),
                "offset": JSONValue(job.offset), "busy": .bool(job.status == .running),
                "paused": .bool(job.status == .paused || job.status == .standby), "speed": JSONValue(job.speed),
                "io-status": "ok", "ready": .bool(isReady), "status": .string(job.status.rawValue),
                "auto-finalize": .bool(!job.staysPending), "auto-dismiss": .bool(!job.staysConcluded),
              ]
              if let error = job.error { entry["error"] = .string("\(error)") }
              return .object(entry)
            })
        }
      },
    ]
  }

  private static func sorted(_ graph: BlockGraph) -> [LiveJob] { graph.jobs.values.sorted { $0.id < $1.id } }
}
