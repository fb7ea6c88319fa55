/// Copies a disk to another image and keeps the two in step while the guest writes on.
///
/// Ready, it waits: `complete` has the guest go on with the copy, `detach` leaves the copy as the disk is at that moment.
final class MirrorJob: LiveJob, WriteGuard {
  /// What is copied, in QEMU's words (`MirrorSyncMode`).
  enum Mode: String, CaseIterable {
    case full, top, none
  }

  private let mode: Mode
  private let source: LiveNode
  let target: LiveNode
  private var isDetached = false
  private var hasPivoted = false

  init(
    _ id: String, _ disk: LiveDisk, to target: LiveNode, mode: Mode, graph: BlockGraph
  ) throws(BlockError) {
    guard target.node.size == disk.size else {
      throw .invalid(what: "size of \(target.path)", value: "\(target.node.size)", expected: "\(disk.size), the disk's")
    }
    guard !target.node.isReadOnly else { throw .readOnly(path: target.path) }
    guard target.users == 0 else { throw .nodeInUse(target.name) }
    self.mode = mode
    self.target = target
    source = disk.top
    let granularity = max(Self.minimumGranularity, target.qcow2?.clusterSize ?? 0)
    super.init(id, .mirror, disk, graph: graph, granularity: granularity)
    target.users += 1
  }

  override func willStart() throws(BlockError) {
    if mode == .none { skipScan() }
    disk.beginClaiming()
    disk.add(self)
  }

  override func scan(_ range: Range<UInt64>) throws(BlockError) {
    guard mode == .top else { return todo.set(range.lowerBound, UInt64(range.count)) }
    var offset = range.lowerBound
    while offset < range.upperBound {
      let extent = try source.node.extent(at: offset, length: range.upperBound - offset)
      if extent.isAllocated { todo.set(offset, extent.length) }
      offset += extent.length
    }
  }

  func willWrite(_ range: Range<UInt64>, proceed: @escaping () -> Void) {
    todo.set(range.lowerBound, UInt64(range.count))
    proceed()
    pump()
  }

  override func move(_ range: Range<UInt64>, _ buffer: DiskBuffer, then: @escaping (BlockError?) -> Void) {
    disk.lock(range) { [self] claim in
      StretchCopy(source: source.node, target: target.node, buffer: buffer).copy(range) { [self] error in
        disk.unlock(claim)
        then(error)
      }
    }
  }

  override var waitsForComplete: Bool { true }

  override func detach() -> Bool {
    isDetached = true
    return true
  }

  /// What the bulk of the copy has written must not be waited for while the disk is held.
  override func prepareEnd(then: @escaping (BlockError?) -> Void) {
    target.node.submit(BlockRequest(.flush, completion: then))
  }

  override func conclude(then: @escaping (BlockError?) -> Void) {
    if !isDetached { graph.onPivot(disk) }
    disk.hold { [self] in
      // A write may have come between the last stretch and the hold.
      moveRest(from: source.node, to: target.node) { [self] error in
        if let error {
          disk.release()
          return then(error)
        }
        target.node.submit(
          BlockRequest(.flush) { [self] error in
            defer { disk.release() }
            if error == nil, !isDetached { pivot() }
            then(error)
          })
      }
    }
  }

  private func pivot() {
    disk.replaceTop(target)
    disk.forget(source)
    graph.drop(source)
    hasPivoted = true
  }

  override func didEnd(succeeded: Bool) {
    disk.remove(self)
    disk.endClaiming()
    target.users -= 1
    if !hasPivoted { graph.drop(target) }
  }
}

extension BlockGraph {
  /// Copies a disk to another image and keeps them in step (`blockdev-mirror`); `mode` in QEMU's words: full, top, none.
  public func mirror(
    _ id: String, _ disk: LiveDisk, to target: LiveNode, mode: String, configure: (LiveJob) -> Void = { _ in }
  ) throws(BlockError) {
    try requireJob(id, on: disk)
    if disk.isBackedUp { throw .diskIsBackedUp(disk.name) }
    guard let mode = MirrorJob.Mode(rawValue: mode) else {
      throw .invalid(what: "sync", value: mode, expected: "full, top or none")
    }
    begin(try MirrorJob(id, disk, to: target, mode: mode, graph: self), configure)
  }

  /// Whether a disk has a mirror, and whether the two are in step.
  public func mirrorState(of disk: LiveDisk) -> (exists: Bool, isReady: Bool) {
    let job = mirrorJob(of: disk)
    return (job != nil, job?.status == .ready)
  }

  /// Refuses what would change a disk's size below its mirror.
  public func requireNoMirror(of disk: LiveDisk) throws(BlockError) {
    if let job = mirrorJob(of: disk) { throw .diskHasJob(disk.name, job: job.id) }
  }

  /// Ends a disk's mirror, which is ready: the copy is what the disk is now, and closed, so that another process may have it.
  public func finishMirror(of disk: LiveDisk, then: @escaping (BlockError?) -> Void) {
    guard let job = mirrorJob(of: disk) else { return then(.noMirror(disk.name)) }
    job.finish { [self] error in
      if let error { return then(error) }
      do throws(BlockError) {
        if nodes[job.target.name] === job.target { try close(job.target) }
        then(nil)
      } catch {
        then(error)
      }
    }
  }

  private func mirrorJob(of disk: LiveDisk) -> MirrorJob? {
    jobs.values.lazy.compactMap { $0 as? MirrorJob }.first { $0.disk === disk && $0.status != .concluded }
  }
}
