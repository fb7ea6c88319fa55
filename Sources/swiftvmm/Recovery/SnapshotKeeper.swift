import BlockLayer
import Host
import JSON
import Monitor
import Synchronization

/// Keeps the catalogues of a machine's snapshots true, whoever makes, merges or drops them.
final class SnapshotKeeper: @unchecked Sendable {
  /// A snapshot of a disk.
  struct Snapshot {
    var entry: SnapshotCatalogue.Entry
    var disk: String
    var parent: String?
    var node: String

    var json: JSONValue {
      [
        "id": .string(entry.id), "name": .string(entry.name), "disk": .string(disk),
        "parent": parent.map { .string($0) } ?? .null, "time": JSONValue(entry.time),
        "utc": .string(RecoveryTime.text(entry.time)), "size": JSONValue(entry.size), "format": .string(entry.format),
        "generation": JSONValue(entry.generation), "scheduled": .bool(entry.isScheduled),
      ]
    }
  }

  let control: DiskControl
  /// For what waits for the disks' thread, or for the host's disk.
  let worker: RecoveryWorker
  // These are the disks' thread's.
  private var catalogues: [String: SnapshotCatalogue] = [:]
  private var cuts: [String: SnapshotCatalogue.Cut] = [:]
  /// What the schedule's cuts are called, by the overlays that they put on.
  private var expected: [String: String] = [:]
  /// The revision of each disk's catalogue that is in its file.
  private let saved = Mutex<[String: UInt64]>([:])

  init(_ control: DiskControl) throws(Failure) {
    self.control = control
    do throws(HostError) { worker = try RecoveryWorker() } catch { throw .host(error) }
    control.disks.thread.perform { [self] in
      let graph = control.disks.graph
      graph.onCut = { [weak self] disks in self?.wasCut(disks) }
      graph.onCommit = { [weak self] disk, top, base in self?.merges(disk, top, base) }
      graph.onPivot = { [weak self] disk in self?.pivots(disk) }
      look(graph)
    }
    control.onJobEnd = { [weak self] in
      self?.saved.withLock { saved in
        for disk in saved.keys where saved[disk] == .max { saved[disk] = 0 }
      }
      self?.refresh()
    }
  }

  // MARK: What happens to the chains

  private func wasCut(_ disks: [LiveDisk]) {
    let time = RecoveryTime.now()
    for disk in disks where !disk.top.isBackupOverlay {
      guard let layer = disk.top.backing else { continue }
      var cut = SnapshotCatalogue.Cut(time: time)
      if let name = expected.removeValue(forKey: BackupFiles.real(disk.top.path)) {
        (cut.name, cut.isScheduled) = (name, true)
        cut.id = "\(disk.name).\(RecoveryTime.compact(cut.time))"
      }
      cuts[BackupFiles.real(layer.path)] = cut
    }
    refresh()
  }

  private func merges(_ disk: LiveDisk, _ top: LiveNode, _ base: LiveNode) {
    guard !top.isBackupOverlay else { return }
    look(control.disks.graph)
    guard var catalogue = catalogues[disk.name] else { return }
    let chain = disk.top.chain
    guard let first = chain.firstIndex(where: { $0 === top }), let last = chain.firstIndex(where: { $0 === base })
    else { return }
    let files = chain[(first + 1)...last].map { BackupFiles.real($0.path) }
    catalogue.beginMerge(of: BackupFiles.real(top.path), losing: files, into: files.last ?? "")
    catalogues[disk.name] = catalogue
    // Before the first byte: what is overwritten must not be taken for a snapshot after a crash.
    save(disk.name, catalogue)
  }

  private func pivots(_ disk: LiveDisk) {
    guard !disk.top.isBackupOverlay, let catalogue = catalogues[disk.name] else { return }
    saved.withLock { saved in
      catalogue.forget()
      // None until the job has ended.
      saved[disk.name] = .max
    }
  }

  /// Looks at the chains, and writes what has changed, soon.
  func refresh() { worker.run { [weak self] in self?.update() } }

  /// What was to be written soon is written. While the disks' thread runs.
  func finish() { worker.wait {} }

  /// On the worker.
  func update() {
    let changed = control.disks.thread.perform { [self] in
      look(control.disks.graph)
      return catalogues
    }
    for (disk, catalogue) in changed { save(disk, catalogue) }
  }

  private func save(_ disk: String, _ catalogue: SnapshotCatalogue) {
    let failure = saved.withLock { saved -> Failure? in
      guard catalogue.revision > saved[disk] ?? 0 else { return nil }
      do throws(Failure) { try catalogue.save() } catch { return error }
      saved[disk] = catalogue.revision
      return nil
    }
    // What is in memory holds as long as the machine, and what is in the chain longer.
    if let failure { printError("swiftvmm: the catalogue of the snapshots of \(disk): \(failure.text)") }
  }

  // MARK: What there is

  /// A disk's layers, without what a backup has put there.
  private static func layers(of disk: LiveDisk) -> (top: String, below: [LiveNode]) {
    var chain = disk.top.chain
    // That is gone soon, and with it this state of the disk.
    if chain[0].isBackupOverlay, chain.count > 1 { chain.removeFirst() }
    return (BackupFiles.real(chain[0].path), chain.dropFirst().reversed())
  }

  private func look(_ graph: BlockGraph) {
    let disks = graph.disks.filter { !GuestSnapshots.isOwn($0.value) }
    for name in catalogues.keys where disks[name] == nil {
      catalogues[name] = nil
      saved.withLock { $0[name] = nil }
    }
    for disk in disks.values {
      let (top, below) = Self.layers(of: disk)
      let layers = below.map { layer in
        SnapshotCatalogue.Layer(
          file: BackupFiles.real(layer.path), node: layer.name, size: layer.node.size,
          format: layer.format.rawValue)
      }
      var catalogue = catalogues[disk.name] ?? SnapshotCatalogue(top: top, layers: layers)
      catalogue.follow(top: top, layers: layers, cuts: cuts)
      catalogues[disk.name] = catalogue
    }
  }

  /// Every snapshot, the oldest first. On any thread but the disks'.
  func snapshots() throws(MonitorError) -> [Snapshot] {
    let all = try control.run { [self] graph in
      look(graph)
      return graph.disks.values.flatMap { disk -> [Snapshot] in
        let nodes = Self.layers(of: disk).below
        var parent: String?
        return (catalogues[disk.name]?.entries ?? []).compactMap { entry in
          guard let node = nodes.first(where: { BackupFiles.real($0.path) == entry.file }) else { return nil }
          defer { parent = entry.id }
          return Snapshot(entry: entry, disk: disk.name, parent: parent, node: node.name)
        }
      }
    }
    // What was made again of the chain may have equal times, and keeps the chain's order.
    return all.enumerated().sorted { one, other in
      (one.element.entry.time, one.offset) < (other.element.entry.time, other.offset)
    }.map(\.element)
  }

  /// The runs of the machine that the disks' next snapshots would be of.
  var generations: JSONObject {
    control.disks.thread.perform { [self] in
      var object: JSONObject = [:]
      for (disk, catalogue) in catalogues { object[disk] = JSONValue(catalogue.generation) }
      return object
    }
  }

  // MARK: Changes

  /// The cuts that are called so are those with these overlays.
  func expectCuts(_ overlays: [String], name: String) {
    control.disks.thread.perform { [self] in
      expected = Dictionary(uniqueKeysWithValues: overlays.map { ($0, name) })
    }
  }

  private func rename(_ id: String, _ name: String) throws(MonitorError) {
    guard name.utf8.count <= SnapshotCatalogue.longestName, name.allSatisfy({ $0 >= " " }) else {
      throw .parameterValue("name", value: String(name.prefix(64)))
    }
    let isFound = try control.run { [self] graph in
      look(graph)
      var isFound = false
      for disk in catalogues.keys where catalogues[disk]?.rename(id, name) == true { isFound = true }
      return isFound
    }
    guard isFound else { throw .refused(RecoveryFault.noSnapshot("called \(id.prefix(128))").text) }
    worker.wait { [self] in update() }
  }

  /// What only `all` shows: what a backup has made, which is gone at its end.
  private func temporary() throws(MonitorError) -> [JSONValue] {
    try control.run { graph in
      graph.nodes.values.filter { $0.isBackupOverlay || $0.isBackupTemporary }.sorted { $0.path < $1.path }.map {
        [
          "node": .string($0.name), "file": .string(BackupFiles.real($0.path)),
          "size": JSONValue($0.node.size), "kind": $0.isBackupTemporary ? "backup-temporary" : "backup-overlay",
        ]
      }
    }
  }

  /// QMP's commands on the machine's snapshots.
  var commands: [QMPCommand] {
    [
      QMPCommand(
        "x-swiftvmm-query-snapshots", [.optional("all", .bool)], returns: .any
      ) { [self] _, arguments throws(MonitorError) in
        let snapshots = try snapshots().map { snapshot -> JSONValue in
          var object = snapshot.json.objectValue ?? [:]
          object["file"] = .string(snapshot.entry.file)
          return .object(object)
        }
        var answer: JSONObject = ["snapshots": .array(snapshots)]
        if arguments["all"]?.boolValue == true { answer["temporary"] = .array(try temporary()) }
        return .object(answer)
      },
      QMPCommand(
        "x-swiftvmm-snapshot-name", [.required("id", .string), .required("name", .string)]
      ) { [self] _, arguments throws(MonitorError) in
        try rename(arguments.text("id"), arguments.text("name"))
        return [:]
      },
    ]
  }
}
