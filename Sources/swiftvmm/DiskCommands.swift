import BlockLayer
import JSON
import Monitor
import TLS

/// QMP's commands on the disks of a machine (QEMU's block-core.json, block.json and qdev.json).
enum DiskCommands {
  /// The catalogue: a command is one entry.
  static func all(_ control: DiskControl) -> [QMPCommand] {
    layers(control) + devices(control) + snapshots(control) + bitmaps(control) + JobCommands.all(control)
  }

  // MARK: Layers

  private static let cache = QMPType.object(
    "BlockdevCacheOptions", members: [.optional("direct", .bool), .optional("no-flush", .bool)])

  private static func layers(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand(
        "blockdev-add",
        [
          .required("driver", .enumeration("BlockdevDriver", values: ["file", "nbd", "qcow2", "raw"])),
          .required("node-name", .string), .optional("read-only", .bool), .optional("auto-read-only", .bool),
          .optional("discard", .string), .optional("detect-zeroes", .string), .optional("cache", cache),
          .optional("aio", .string), .optional("locking", .string), .optional("filename", .string),
          .optional("file", .any), .optional("backing", .any), .optional("server", .any), .optional("export", .string),
          .optional("tls-creds", .string), .optional("tls-hostname", .string),
        ]
      ) { _, arguments throws(MonitorError) in
        let isFile = arguments.text("driver") == "file"
        try control.add(options(arguments, control), isFile: isFile)
        return [:]
      },
      QMPCommand("blockdev-del", [.required("node-name", .string)]) { _, arguments throws(MonitorError) in
        try control.delete(arguments.text("node-name"))
        return [:]
      },
      QMPCommand("query-block", returns: .array(.any)) { _, _ throws(MonitorError) in
        .array(try control.run { DiskReport.disks($0) })
      },
      QMPCommand(
        "query-named-block-nodes", [.optional("flat", .bool), .optional("x-swiftvmm-all", .bool)], returns: .array(.any)
      ) { _, arguments throws(MonitorError) in
        let isFlat = arguments["flat"]?.boolValue ?? false
        let showsAll = arguments["x-swiftvmm-all"]?.boolValue ?? false
        return .array(try control.run { DiskReport.nodes($0, isFlat: isFlat, showsAll: showsAll) })
      },
      QMPCommand(
        "block_resize",
        [.optional("device", .string), .optional("node-name", .string), .required("size", .integer)]
      ) { _, arguments throws(MonitorError) in
        let name = try arguments.disk()
        guard let size = arguments["size"]?.unsignedValue else {
          throw .parameterValue("size", value: "\(arguments["size"]?.integerValue ?? 0)")
        }
        try control.wait { graph, done in
          do throws(BlockError) {
            let disk = try graph.disk(name)
            try graph.requireNoMirror(of: disk)
            disk.hold {
              var failure: BlockError?
              do throws(BlockError) { try disk.resize(to: size, on: graph.queue) } catch { failure = error }
              disk.release()
              done(failure)
            }
          } catch {
            done(error)
          }
        }
        return [:]
      },
    ]
  }

  private static func options(
    _ arguments: JSONObject, _ control: DiskControl
  ) throws(MonitorError) -> BlockGraph.Options {
    let driver = arguments.text("driver")
    var options: BlockGraph.Options
    if driver == "file" || driver == "nbd" {
      options = BlockGraph.Options(path: try path(driver, arguments, control), access: FileAccess(writable: true))
      if driver == "nbd" { options.format = .raw }
    } else {
      switch arguments["file"] {
      case .string(let name): options = try control.file(name)
      case .object(let file):
        let driver = file["driver"]?.stringValue ?? "file"
        guard driver == "file" || driver == "nbd" else { throw .parameterValue("file.driver", value: driver) }
        options = BlockGraph.Options(path: try path(driver, file, control, "file."), access: FileAccess(writable: true))
        apply(file, to: &options)
      default: throw .parameterMissing("file")
      }
      options.format = ImageFormat(rawValue: driver)
    }
    options.name = arguments.text("node-name")
    apply(arguments, to: &options)
    switch arguments["backing"] {
    case nil: break
    case .null: options.backing = .none
    case .string(let name): options.backing = .layer(name)
    default: throw .parameterType("backing", expected: "a node name or null")
    }
    return options
  }

  /// The file that a protocol's driver means: a path, or an export's URI.
  private static func path(
    _ driver: String, _ arguments: JSONObject, _ control: DiskControl, _ prefix: String = ""
  ) throws(MonitorError) -> String {
    guard driver == "nbd" else {
      if let path = arguments["filename"]?.stringValue { return path }
      throw .parameterMissing("\(prefix)filename")
    }
    guard let server = arguments["server"]?.objectValue else { throw .parameterMissing("\(prefix)server") }
    let endpoint = try ExportCommands.endpoint(server, type: server.text("type"), "\(prefix)server.")
    var tls: NBDURI.TLS?
    if let id = arguments["tls-creds"]?.stringValue {
      let credentials = try control.objects.credentials(id, .client)
      tls = NBDURI.TLS(
        certificates: credentials.directory, hostName: arguments["tls-hostname"]?.stringValue,
        verifiesPeer: credentials.verifiesPeer)
    }
    return "\(NBDURI(endpoint, export: arguments.text("export"), tls: tls))"
  }

  private static func apply(_ arguments: JSONObject, to options: inout BlockGraph.Options) {
    if let isReadOnly = arguments["read-only"]?.boolValue { options.access.writable = !isReadOnly }
    guard let cache = arguments["cache"]?.objectValue else { return }
    if let direct = cache["direct"]?.boolValue { options.access.direct = direct }
    if let ignores = cache["no-flush"]?.boolValue { options.access.ignoresFlushes = ignores }
  }

  // MARK: Devices

  private static func devices(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand(
        "device_add",
        [
          .required("driver", .string), .required("id", .string), .optional("drive", .string),
          .optional("serial", .string), .optional("bus", .string),
        ]
      ) { _, arguments throws(MonitorError) in
        let driver = arguments.text("driver")
        guard driver == "virtio-blk-pci" || driver == "virtio-blk" else {
          throw .parameterValue("driver", value: driver)
        }
        guard let layer = arguments["drive"]?.stringValue else { throw .parameterMissing("drive") }
        try control.plugIn(arguments.text("id"), layer: layer, serial: arguments["serial"]?.stringValue)
        return [:]
      },
      QMPCommand("device_del", [.required("id", .string)]) { _, arguments throws(MonitorError) in
        try control.unplug(arguments.text("id"))
        return [:]
      },
    ]
  }

  // MARK: Snapshots

  private static let snapshotSync: [QMPType.Member] = [
    .optional("device", .string), .optional("node-name", .string), .required("snapshot-file", .string),
    .optional("snapshot-node-name", .string), .optional("format", .enumeration("ImageFormat", values: ["qcow2"])),
    .optional("mode", .enumeration("NewImageMode", values: ["existing", "absolute-paths"])),
  ]
  private static let snapshot: [QMPType.Member] = [.required("node", .string), .required("overlay", .string)]

  private static func snapshots(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand("blockdev-snapshot-sync", snapshotSync) { _, arguments throws(MonitorError) in
        try transact([Action(type: "blockdev-snapshot-sync", data: arguments)], control)
      },
      QMPCommand("blockdev-snapshot", snapshot) { _, arguments throws(MonitorError) in
        try transact([Action(type: "blockdev-snapshot", data: arguments)], control)
      },
      QMPCommand(
        "transaction", [.required("actions", .array(.any)), .optional("properties", .any)]
      ) { _, arguments throws(MonitorError) in
        var actions: [Action] = []
        for (index, action) in (arguments["actions"]?.arrayValue ?? []).enumerated() {
          guard let type = action.objectValue?["type"]?.stringValue, let data = action.objectValue?["data"]?.objectValue
          else { throw .parameterType("actions[\(index)]", expected: "an object with type and data") }
          guard let members = transactable[type] else { throw .parameterValue("actions[\(index)].type", value: type) }
          try QMPType.object(type, members: members).validate(.object(data), as: "actions[\(index)].data")
          actions.append(Action(type: type, data: data))
        }
        return try transact(actions, control)
      },
    ]
  }

  /// New overlays for disks, all put on at one instant.
  static func snapshot(_ files: [(disk: String, file: String)], _ control: DiskControl) throws(MonitorError) {
    try transact(
      files.map { disk, file in
        Action(type: "blockdev-snapshot-sync", data: ["device": .string(disk), "snapshot-file": .string(file)])
      }, control)
  }

  /// What a transaction may consist of.
  private static let transactable: [String: [QMPType.Member]] = [
    "blockdev-snapshot-sync": snapshotSync, "blockdev-snapshot": snapshot, "block-dirty-bitmap-add": bitmapAdd,
    "block-dirty-bitmap-clear": bitmap, "block-dirty-bitmap-enable": bitmap, "block-dirty-bitmap-disable": bitmap,
    "block-dirty-bitmap-remove": bitmap, "block-dirty-bitmap-merge": bitmapMerge,
    "blockdev-backup": JobCommands.backup, "abort": [],
  ]

  private struct Action {
    let type: String
    let data: JSONObject
  }

  /// What is done while the disks are held, and how it is undone.
  private struct Step {
    let body: () throws(BlockError) -> (() -> Void)
    init(_ body: @escaping () throws(BlockError) -> (() -> Void)) { self.body = body }
  }

  /// Does all steps, or none.
  private static func run(_ steps: [Step]) -> (error: BlockError?, undo: () -> Void) {
    var undos: [() -> Void] = []
    let undo = { for undo in undos.reversed() { undo() } }
    do throws(BlockError) {
      for step in steps { undos.append(try step.body()) }
    } catch {
      undo()
      return (error, {})
    }
    return (nil, undo)
  }

  /// Makes the files of new overlays, while the disks' thread goes on.
  private static func makeFiles(
    _ actions: [Action], _ control: DiskControl
  ) throws(MonitorError) -> [Int: BlockGraph.OverlayHeader] {
    var headers: [Int: BlockGraph.OverlayHeader] = [:]
    for (index, action) in actions.enumerated() {
      guard action.type == "blockdev-snapshot-sync", action.data["mode"]?.stringValue != "existing" else { continue }
      let name = try action.data.disk()
      let path = action.data.text("snapshot-file")
      let header = try control.run { graph throws(BlockError) in try graph.overlayHeader(of: graph.disk(name)) }
      do throws(BlockError) {
        try BlockGraph.makeOverlayFile(path, header, queue: control.disks.thread.queue)
      } catch {
        throw .refused("\(error)")
      }
      headers[index] = header
    }
    return headers
  }

  /// Carries out actions at one instant: what can fail is done first, then every disk is held, then all is done.
  @discardableResult
  private static func transact(_ actions: [Action], _ control: DiskControl) throws(MonitorError) -> JSONValue {
    if actions.contains(where: { $0.type == "abort" }) { throw .refused("\(BlockError.aborted)") }
    let headers = try makeFiles(actions, control)
    try control.wait { graph, done in
      var overlays: [BlockGraph.Overlay] = []
      var steps: [Step] = []
      var disks: [LiveDisk] = []
      do throws(BlockError) {
        for (index, action) in actions.enumerated() {
          let data = action.data
          switch action.type {
          case "blockdev-snapshot-sync":
            let disk = try graph.disk(data["node-name"]?.stringValue ?? data.text("device"))
            overlays.append(
              try graph.openOverlay(
                of: disk, path: data.text("snapshot-file"), name: data["snapshot-node-name"]?.stringValue,
                madeFrom: headers[index]))
          case "blockdev-snapshot":
            overlays.append((try graph.disk(data.text("node")), try graph.node(data.text("overlay"))))
          case "blockdev-backup":
            let disk = try graph.disk(data.text("device"))
            disks.append(disk)
            steps.append(
              Step { () throws(BlockError) in
                let job = try JobCommands.startBackup(data, graph)
                return { job.cancel() }
              })
          default:
            let node = try graph.node(data.text("node"))
            disks += graph.disks.values.filter { $0.top === node }
            steps.append(try bitmapStep(action.type, data, node, graph))
          }
        }
        try graph.check(overlays)
      } catch {
        discard(overlays, graph)
        return done(error)
      }
      let held = disks + overlays.map(\.disk)
      var waiting = held.count
      let act = {
        let (failure, undo) = run(steps)
        if let failure {
          discard(overlays, graph)
          done(failure)
        } else {
          graph.snapshot(overlays) { error in
            if error != nil {
              undo()
              discard(overlays, graph)
            }
            done(error)
          }
        }
        for disk in held { disk.release() }
      }
      if held.isEmpty { return act() }
      for disk in held {
        disk.hold {
          waiting -= 1
          if waiting == 0 { act() }
        }
      }
    }
    return [:]
  }

  /// Closes overlays that were opened for a transaction that has failed.
  private static func discard(_ overlays: [BlockGraph.Overlay], _ graph: BlockGraph) {
    for overlay in overlays { graph.drop(overlay.layer) }
  }

  // MARK: Bitmaps

  private static let bitmap: [QMPType.Member] = [.required("node", .string), .required("name", .string)]
  private static let bitmapAdd: [QMPType.Member] =
    bitmap + [
      .optional("granularity", .integer), .optional("persistent", .bool), .optional("disabled", .bool),
    ]
  private static let bitmapMerge: [QMPType.Member] = [
    .required("node", .string), .required("target", .string), .required("bitmaps", .array(.any)),
  ]

  private static func bitmaps(_ control: DiskControl) -> [QMPCommand] {
    [
      ("add", bitmapAdd), ("remove", bitmap), ("clear", bitmap), ("enable", bitmap), ("disable", bitmap),
      ("merge", bitmapMerge),
    ].map { verb, members in
      let name = "block-dirty-bitmap-\(verb)"
      return QMPCommand(name, members) { _, arguments throws(MonitorError) in
        try transact([Action(type: name, data: arguments)], control)
      }
    }
  }

  private static func bitmapStep(
    _ type: String, _ data: JSONObject, _ node: LiveNode, _ graph: BlockGraph
  ) throws(BlockError) -> Step {
    let name = data.text("name")
    var sources: [(node: LiveNode, name: String)] = []
    for source in data["bitmaps"]?.arrayValue ?? [] {
      if let name = source.stringValue {
        sources.append((node, name))
      } else {
        let source = source.objectValue ?? [:]
        sources.append((try graph.node(source.text("node")), source.text("name")))
      }
    }
    return Step { () throws(BlockError) in
      let undo = node.rememberBitmaps()
      do throws(BlockError) {
        switch type {
        case "block-dirty-bitmap-add":
          try node.addBitmap(
            name, granularity: data["granularity"]?.unsignedValue, isPersistent: data["persistent"]?.boolValue ?? false)
          if data["disabled"]?.boolValue == true { try node.setRecording(name, false) }
        case "block-dirty-bitmap-remove": try node.removeBitmap(name)
        case "block-dirty-bitmap-merge":
          let target = data.text("target")
          for source in sources { try node.mergeBitmap(target, source.node.dirtyBitmap(source.name)) }
        case "block-dirty-bitmap-enable": try node.setRecording(name, true)
        case "block-dirty-bitmap-disable": try node.setRecording(name, false)
        default: try node.clearBitmap(name)
        }
      } catch {
        undo()
        throw error
      }
      return undo
    }
  }
}

extension JSONObject {
  /// A string that the command's types promise; empty where it is left out.
  func text(_ key: String) -> String { self[key]?.stringValue ?? "" }

  /// The disk that a command means: by `node-name` or by `device`.
  func disk() throws(MonitorError) -> String {
    guard let name = self["node-name"]?.stringValue ?? self["device"]?.stringValue else {
      throw .parameterMissing("device")
    }
    return name
  }
}
