import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// QMP's commands for backups: what `swiftvmm backup` asks of a machine besides QEMU's commands.
enum BackupCommands {
  /// The catalogue: a command is one entry.
  static func all(_ control: DiskControl) -> [QMPCommand] { queries(control) + snapshots(control) + merges(control) }

  // MARK: Asking

  /// Ranges that one answer holds at most.
  private static let mostRanges = 4096

  private static func queries(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand("x-swiftvmm-query-backup", returns: .any) { _, _ throws(MonitorError) in
        let disks = try control.run { graph in
          graph.disks.values.filter { !GuestSnapshots.isOwn($0) }.sorted { $0.name < $1.name }.map {
            JSONValue.object(describe($0))
          }
        }
        return ["disks": .array(disks), "configuration": .object(configuration())]
      },
      QMPCommand(
        "x-swiftvmm-query-dirty",
        [.required("node", .string), .required("bitmap", .string), .required("offset", .integer)], returns: .any
      ) { _, arguments throws(MonitorError) in
        guard let start = arguments["offset"]?.unsignedValue else {
          throw .parameterValue("offset", value: "\(arguments["offset"]?.integerValue ?? 0)")
        }
        return try control.run { graph throws(BlockError) in
          let node = try graph.node(arguments.text("node"))
          return .object(try dirty(node, arguments.text("bitmap"), from: start))
        }
      },
    ]
  }

  private static func describe(_ disk: LiveDisk) -> JSONObject {
    let layers = disk.top.chain.map { layer -> JSONValue in
      let bitmaps = layer.bitmapStates.filter { $0.isPersistent && $0.isRecording && !$0.isInconsistent }.map(\.name)
      return [
        "node": .string(layer.name), "file": .string(BlockGraph.absolutePath(layer.path)),
        "format": .string(layer.format.rawValue), "bitmaps": .array(bitmaps.map { .string($0) }),
      ]
    }
    return [
      "device": .string(disk.name), "size": JSONValue(disk.size), "read-only": .bool(disk.isReadOnly),
      "layers": .array(layers),
    ]
  }

  /// How the machine was started.
  private static func configuration() -> JSONObject {
    var folder = ""
    if let path = getcwd(nil, 0) {
      folder = String(cString: path)
      free(path)
    }
    return [
      "version": .string(Version.text), "folder": .string(folder),
      "arguments": .array(CommandLine.arguments.dropFirst().map { .string($0) }),
    ]
  }

  private static func dirty(_ node: LiveNode, _ bitmap: String, from start: UInt64) throws(BlockError) -> JSONObject {
    guard node.hasBitmap(bitmap) else { throw .unknown(what: "bitmap", name: bitmap, path: node.path) }
    let size = node.node.size
    var ranges: [JSONValue] = []
    var offset = start
    while offset < size, ranges.count < mostRanges {
      guard let run = node.dirtyRun(bitmap, at: offset, length: size - offset), run.length > 0 else { break }
      if run.isDirty { ranges.append([JSONValue(offset), JSONValue(run.length)]) }
      offset += run.length
    }
    return ["ranges": .array(ranges), "next": JSONValue(offset)]
  }

  // MARK: Temporary snapshots

  private static func snapshots(_ control: DiskControl) -> [QMPCommand] {
    let disk = QMPType.object(
      "SwiftVMMTemporarySnapshot",
      members: [.required("node", .string), .required("file", .string), .required("name", .string)])
    return [
      QMPCommand(
        "x-swiftvmm-backup-open",
        [.required("socket", .string), .required("disks", .array(disk)), .optional("writable", .bool)]
      ) { _, arguments throws(MonitorError) in
        let isWritable = arguments["writable"]?.boolValue ?? false
        let socket = "unix:" + arguments.text("socket")
        let endpoint: StreamEndpoint
        do throws(HostError) { endpoint = try StreamEndpoint(socket) } catch { throw .refused("\(error)") }
        try control.backups.start(endpoint, clientLimit: 0)
        for disk in arguments["disks"]?.arrayValue ?? [] {
          try open(disk.objectValue ?? [:], isWritable: isWritable, control)
        }
        return [:]
      },
      QMPCommand("x-swiftvmm-backup-close", [.required("names", .array(.string))]) {
        _, arguments throws(MonitorError) in
        let names = (arguments["names"]?.arrayValue ?? []).compactMap(\.stringValue)
        // A backup that was cut off may have opened none of them.
        if control.backups.isRunning { try control.backups.stop() }
        try control.run { graph throws(BlockError) in
          for name in names { if let node = graph.nodes[name] { try graph.close(node) } }
        }
        return [:]
      },
    ]
  }

  private static func open(_ disk: JSONObject, isWritable: Bool, _ control: DiskControl) throws(MonitorError) {
    let (file, name, node) = (disk.text("file"), disk.text("name"), disk.text("node"))
    let header = try control.run { graph throws(BlockError) in
      let layer = try graph.node(node)
      try graph.requireFree(name)
      return graph.overlayHeader(above: layer)
    }
    do throws(BlockError) {
      try BlockGraph.makeOverlayFile(file, header, isTemporary: true, queue: control.disks.thread.queue)
    } catch {
      throw .refused("\(error)")
    }
    try control.run { graph throws(BlockError) in
      _ = try graph.openTemporary(file, name: name, above: graph.node(node))
    }
    var export = DiskExports.Request(id: name, node: name, name: name)
    export.description = "temporary snapshot"
    export.isWritable = isWritable
    try control.backups.add(export)
  }

  // MARK: The way back

  private static func merges(_ control: DiskControl) -> [QMPCommand] {
    [
      QMPCommand(
        "x-swiftvmm-merge",
        [
          .required("device", .string), .required("job-id", .string), .required("top", .string),
          .optional("bitmap", .string), .optional("replacing", .string), .optional("speed", .integer),
        ]
      ) { _, arguments throws(MonitorError) in
        try control.run { graph throws(BlockError) in
          let disk = try graph.disk(arguments.text("device"))
          let path = arguments.text("top")
          guard let top = disk.top.chain.first(where: { $0.isCalled(path) }), let base = top.backing else {
            throw .notBelow(path, of: disk.top.name)
          }
          var result = CommitResult()
          result.removesTop = true
          result.bitmap = arguments["bitmap"]?.stringValue
          result.replacing = arguments.text("replacing")
          try graph.commit(arguments.text("job-id"), disk, top: top, base: base, result: result) { job in
            job.speed = arguments["speed"]?.unsignedValue ?? 0
            job.staysConcluded = true
          }
        }
        return [:]
      }
    ]
  }
}
