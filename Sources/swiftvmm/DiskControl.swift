import BlockLayer
import Host
import Machine
import Monitor
import Synchronization
import Virtio

/// The disks of a running machine as QMP's commands see them: each call runs on the disks' thread and waits for it.
final class DiskControl: @unchecked Sendable {
  let machine: Machine
  let disks: RunDisks
  let objects: TLSObjects
  /// What NBD clients are offered.
  private(set) lazy var exports = DiskExports(self)
  /// What backups read: a server of their own.
  private(set) lazy var backups = DiskExports(self)
  /// Told, on the machine's thread, of a disk that the guest has let go of. Set before the machine runs.
  var onDeviceDeleted: (String) -> Void = { _ in }
  /// Told, on the disks' thread, of a job that has ended. Set before the machine runs.
  var onJobEnd: () -> Void = {}
  private var graph: BlockGraph { disks.graph }
  private let emit = Mutex<@Sendable (QMPEvent) -> Void>({ _ in })
  /// Files that `blockdev-add` has named and no format stands on; the disks' thread's.
  private var files: [String: BlockGraph.Options] = [:]

  init(_ machine: Machine, _ disks: RunDisks, _ objects: TLSObjects) {
    self.machine = machine
    self.disks = disks
    self.objects = objects
    disks.thread.perform { [self] in
      graph.onJob = { [weak self] job, event in self?.tell(job, event) }
    }
  }

  /// Where events go.
  func connect(_ emit: @escaping @Sendable (QMPEvent) -> Void) { self.emit.withLock { $0 = emit } }

  private func tell(_ job: LiveJob, _ event: LiveJob.Event) {
    let emit = emit.withLock { $0 }
    for event in JobEvents.events(job, event) { emit(event) }
    if case .completed = event { onJobEnd() }
    if case .cancelled = event { onJobEnd() }
  }

  /// Tells every client of the control socket.
  func tell(_ event: QMPEvent) { emit.withLock { $0 }(event) }

  // MARK: Threads

  /// Runs `body` on the disks' thread.
  func run<Result>(_ body: @escaping (BlockGraph) throws(BlockError) -> Result) throws(MonitorError) -> Result {
    let outcome = disks.thread.perform { [self] in
      Swift.Result { () throws(BlockError) in try body(graph) }
    }
    do { return try outcome.get() } catch { throw .refused("\(error)") }
  }

  /// Runs `body` on the disks' thread and waits until it calls back.
  func wait(_ body: @escaping (BlockGraph, @escaping (BlockError?) -> Void) -> Void) throws(MonitorError) {
    let outcome = Condition<BlockError??>(nil)
    disks.thread.perform { [self] in
      body(graph) { error in outcome.withLock { $0 = .some(error) } }
    }
    if let error = outcome.wait({ $0 }) { throw .refused("\(error)") }
  }

  // MARK: Layers

  /// Opens an image, or names a file for a format to stand on.
  func add(_ options: BlockGraph.Options, isFile: Bool) throws(MonitorError) {
    try run { [self] graph throws(BlockError) in
      guard isFile, let name = options.name else {
        _ = try graph.open(options)
        return
      }
      try graph.requireFree(name)
      guard files[name] == nil else { throw .nodeNameTaken(name) }
      // Whether it can be opened is said now.
      try HostFile(path: options.path, access: options.access, queue: graph.queue).close()
      files[name] = options
    }
  }

  /// The file that was named so.
  func file(_ name: String) throws(MonitorError) -> BlockGraph.Options {
    try run { [self] _ throws(BlockError) in
      guard let file = files[name] else { throw .noNode(name) }
      return file
    }
  }

  func delete(_ name: String) throws(MonitorError) {
    try run { [self] graph throws(BlockError) in
      if files.removeValue(forKey: name) != nil { return }
      try graph.close(graph.node(name))
    }
  }

  // MARK: Devices

  /// Plugs a disk in over a layer; `quota` limits what the guest writes to it.
  func plugIn(_ id: String, layer: String, serial: String?, quota: WriteQuota? = nil) throws(MonitorError) {
    let live = try run { [self] graph throws(BlockError) in
      if let file = files.removeValue(forKey: layer) {
        var options = file
        options.format = .raw
        _ = try graph.open(options)
      }
      let disk = try graph.addDisk(id, on: graph.node(layer))
      quota?.cover(disk)
      return Unchecked(disk)
    }
    var disk = MachineDisk(name: id, node: live.value)
    if let serial { disk.serial = serial }
    // A guest that has used up what it was granted is told so, and goes on.
    if quota != nil { disk.writeErrors = .report }
    do throws(MachineError) {
      try machine.plugIn(disk, on: disks.thread)
    } catch {
      try run { graph in
        quota?.release(live.value)
        graph.removeDisk(live.value)
      }
      throw .refused("\(error)")
    }
  }

  func unplug(_ id: String) throws(MonitorError) {
    do throws(MachineError) { try machine.requestUnplug(id) } catch { throw .deviceNotFound(id) }
  }

  /// The machine has lost a disk; its layers are free.
  func deviceDeleted(_ id: String) {
    disks.thread.perform { [self] in
      guard let disk = graph.disks[id] else { return }
      exports.diskGone(disk, graph)
      backups.diskGone(disk, graph)
      for job in graph.jobs.values where job.disk === disk { job.cancel() }
      disk.leaveQuota()
      graph.removeDisk(disk)
      graph.drop(disk.top)
    }
    onDeviceDeleted(id)
  }

  private struct Unchecked<Value>: @unchecked Sendable {
    let value: Value
    init(_ value: Value) { self.value = value }
  }
}

/// What a job's life looks like on the control socket.
enum JobEvents {
  static func events(_ job: LiveJob, _ event: LiveJob.Event) -> [QMPEvent] {
    switch event {
    case .status(let status): [.jobStatusChange(id: job.id, status: status.rawValue)]
    case .ready: [.blockJob("READY", job.progress, error: nil)]
    case .cancelled: [.blockJob("CANCELLED", job.progress, error: nil)]
    case .completed(let error): [.blockJob("COMPLETED", job.progress, error: error.map { "\($0)" })]
    }
  }
}

extension LiveJob {
  var progress: QMPEvent.BlockJob {
    QMPEvent.BlockJob(id: id, type: kind.rawValue, length: length, offset: offset, speed: speed)
  }
}
