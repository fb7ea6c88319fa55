/// One ordered writing of everything that is dirty. What is named becomes durable before what names it:
/// refcount blocks and guest data, refcount table, L2 tables, L1 table. Only then is what nothing names any more freed.
final class Qcow2WriteBack {
  enum Stage: Int {
    case blocks, table, l2, l1, done
  }

  var stage = Stage.blocks
  var blocks: [TableCopy] = []
  var table: [TableSector] = []
  var l2: [TableCopy] = []
  var l1: [TableSector] = []
  var frees: [UInt64] = []
  var flushes: [BlockRequest] = []

  func isEmpty(_ stage: Stage) -> Bool {
    switch stage {
    case .blocks: blocks.isEmpty
    case .table: table.isEmpty
    case .l2: l2.isEmpty
    case .l1: l1.isEmpty
    case .done: true
    }
  }

  /// Writes one stage's tables.
  func write(_ stage: Stage, to file: any BlockFile) throws(BlockError) {
    switch stage {
    case .blocks: try Self.write(blocks, to: file)
    case .table: try Self.write(table, to: file)
    case .l2: try Self.write(l2, to: file)
    case .l1: try Self.write(l1, to: file)
    case .done: break
    }
  }

  private static func write(_ copies: [TableCopy], to file: any BlockFile) throws(BlockError) {
    for copy in copies.sorted(by: { $0.offset < $1.offset }) {
      try file.write(at: copy.offset, from: UnsafeRawBufferPointer(copy.buffer.bytes))
    }
  }

  private static func write(_ sectors: [TableSector], to file: any BlockFile) throws(BlockError) {
    for sector in sectors { try file.writeArray(at: sector.offset, sector.bytes) }
  }
}

/// Holds back freed clusters until every transfer that began before they were freed has ended: a late transfer must not
/// meet a cluster's next use.
struct GracePeriods {
  private var counts = [0, 0]
  private var current = 0
  private var waiting: [UInt64] = []
  private var next: [UInt64] = []

  /// A transfer begins; the value is given back at its end.
  mutating func begin() -> Int {
    counts[current] += 1
    return current
  }

  /// A transfer ends. Clusters that nothing can touch any more.
  mutating func end(_ period: Int) -> [UInt64] {
    counts[period] -= 1
    return settle()
  }

  /// Clusters to be freed; those that nothing can touch any more come back at once.
  mutating func add(_ clusters: [UInt64]) -> [UInt64] {
    guard !clusters.isEmpty else { return [] }
    next += clusters
    return settle()
  }

  private mutating func settle() -> [UInt64] {
    var ready: [UInt64] = []
    while true {
      guard counts[1 - current] == 0 else { return ready }
      ready += waiting
      waiting = []
      guard !next.isEmpty else { return ready }
      waiting = next
      next = []
      current = 1 - current
    }
  }

  var hasPending: Bool { !waiting.isEmpty || !next.isEmpty }
}

extension Qcow2Image {
  /// Gives up a reference to a host cluster, once the write-back has made durable that nothing names it.
  func free(_ cluster: UInt64) { pendingFrees.append(cluster) }

  var hasDirtyTables: Bool {
    l2Cache.hasDirty || !dirtyL1.isEmpty || refcounts.cache.hasDirty || !refcounts.dirtyTable.isEmpty
      || !pendingFrees.isEmpty
  }

  func submitFlush(_ request: BlockRequest) {
    if isReadOnly { return request.completion(nil) }
    waitingFlushes.append(request)
    if writeBack == nil { beginWriteBack(withRefcounts: !header.usesLazyRefcounts) }
  }

  /// Begins a write-back for every flush that waits. There is none under way.
  private func beginWriteBack(withRefcounts: Bool) {
    let job = takeWriteBack(withRefcounts: withRefcounts)
    advance(job)
  }

  private func takeWriteBack(withRefcounts: Bool) -> Qcow2WriteBack {
    let job = Qcow2WriteBack()
    if withRefcounts {
      job.blocks = refcounts.cache.takeDirty()
      job.table = refcounts.dirtyTable.take(from: refcounts.table, at: refcounts.tableOffset)
    }
    job.l2 = l2Cache.takeDirty()
    job.l1 = dirtyL1.take(from: l1, at: header.l1Offset)
    job.frees = pendingFrees
    pendingFrees = []
    job.flushes = waitingFlushes
    waitingFlushes = []
    writeBack = job
    return job
  }

  /// Goes on from the job's stage, with barriers that are waited for on the loop.
  private func advance(_ job: Qcow2WriteBack) {
    let stage = job.stage
    do throws(BlockError) {
      try job.write(stage, to: file)
    } catch {
      return end(job, error)
    }
    if stage != .blocks, job.isEmpty(stage) { return barrierDone(job, stage, nil) }
    let barrier = BlockRequest(.flush) { [self] error in barrierDone(job, stage, error) }
    file.submit(barrier)
  }

  private func barrierDone(_ job: Qcow2WriteBack, _ stage: Qcow2WriteBack.Stage, _ error: BlockError?) {
    // Somebody who could not wait has gone past this stage meanwhile.
    guard writeBack === job, job.stage == stage else { return }
    if let error { return end(job, error) }
    job.stage = Qcow2WriteBack.Stage(rawValue: stage.rawValue + 1) ?? .done
    if job.stage == .done { end(job, nil) } else { advance(job) }
  }

  private func end(_ job: Qcow2WriteBack, _ error: BlockError?) {
    job.stage = .done
    writeBack = nil
    refcounts.cache.finishWriting(job.blocks, failed: error != nil)
    l2Cache.finishWriting(job.l2, failed: error != nil)
    if error == nil {
      release(grace.add(job.frees))
    } else {
      refcounts.dirtyTable.mark(Set(job.table.map(\.sector)))
      dirtyL1.mark(Set(job.l1.map(\.sector)))
      pendingFrees = job.frees + pendingFrees
    }
    for flush in job.flushes { flush.completion(error) }
    if !waitingFlushes.isEmpty, writeBack == nil { beginWriteBack(withRefcounts: !header.usesLazyRefcounts) }
  }

  /// Writes everything back and waits: for callers that need room in a cache or an order of their own.
  func writeBackNow(withRefcounts: Bool) throws(BlockError) {
    if let job = writeBack { try finishNow(job) }
    guard hasDirtyTables || !waitingFlushes.isEmpty else { return }
    try finishNow(takeWriteBack(withRefcounts: withRefcounts))
  }

  private func finishNow(_ job: Qcow2WriteBack) throws(BlockError) {
    do throws(BlockError) {
      while job.stage != .done {
        let stage = job.stage
        try job.write(stage, to: file)
        if stage == .blocks || !job.isEmpty(stage) { try file.flush() }
        job.stage = Qcow2WriteBack.Stage(rawValue: stage.rawValue + 1) ?? .done
      }
    } catch {
      end(job, error)
      throw error
    }
    end(job, nil)
  }

  /// Lowers the refcounts of clusters that nothing durable names, and gives those that are free back to the host.
  func release(_ clusters: [UInt64]) {
    var free: [UInt64] = []
    for cluster in clusters {
      do throws(BlockError) {
        if try refcounts.release(cluster) { free.append(cluster) }
      } catch {
        // The image is marked as damaged, or the refcount could not be read: a leak at worst.
        continue
      }
    }
    guard options.punchesHoles, !free.isEmpty else { return }
    var start = 0
    free.sort()
    for index in 1...free.count where index == free.count || free[index] != free[index - 1] + 1 {
      // Before anybody can be given the clusters again; a host that cannot do it keeps the storage.
      _ = try? file.punchHole(at: free[start] << clusterBits, length: UInt64(index - start) << clusterBits)
      start = index
    }
  }

  func adoptRefcountTable(offset: UInt64, clusters: UInt32) throws(BlockError) {
    header.refcountTableOffset = offset
    header.refcountTableClusters = clusters
    try writeHeader()
  }
}
