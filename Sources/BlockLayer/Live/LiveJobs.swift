/// Copies what a disk reads from some of its lower layers into the top one, and drops those layers.
final class StreamJob: LiveJob {
  private let top: LiveNode
  /// What stays below; nil for nothing.
  private let base: LiveNode?
  private let depth: Int
  private let baseName: String?

  init(
    _ id: String, _ disk: LiveDisk, base: LiveNode?, baseName: String?, graph: BlockGraph
  ) throws(BlockError) {
    top = disk.top
    self.base = base
    let chain = top.chain
    guard top.qcow2 != nil else { throw .unsupported(path: top.path, .operation("a backing file")) }
    if let base {
      guard let index = chain.firstIndex(where: { $0 === base }), index > 0 else {
        throw .notBelow(base.name, of: top.name)
      }
      depth = index
      self.baseName = baseName ?? BlockGraph.reference(to: base.path, from: top.path)
    } else {
      depth = chain.count
      self.baseName = nil
    }
    let granularity = max(Self.minimumGranularity, top.qcow2?.clusterSize ?? 0)
    super.init(id, .stream, disk, graph: graph, granularity: granularity)
  }

  override func willStart() throws(BlockError) {
    disk.beginClaiming()
    if depth <= 1 { skipScan() }
  }

  override func scan(_ range: Range<UInt64>) throws(BlockError) {
    var offset = range.lowerBound
    while offset < range.upperBound {
      let found = try top.node.chainExtent(at: offset, length: range.upperBound - offset)
      if isWanted(found) { todo.set(offset, found.extent.length) }
      offset += found.extent.length
    }
  }

  /// What no layer has, the base has as little; without a base it reads as zeros with or without the layers.
  private func isWanted(_ found: ChainExtent) -> Bool {
    found.depth > 0 && found.depth < depth && found.extent.isAllocated
  }

  override func move(_ range: Range<UInt64>, _ buffer: DiskBuffer, then: @escaping (BlockError?) -> Void) {
    // A write of the guest's in the same place would be overwritten by what it has replaced.
    disk.lock(range) { [self] claim in
      StretchCopy(source: top.node, target: top.node, buffer: buffer).copy(range, where: isWanted) { [self] error in
        disk.unlock(claim)
        then(error)
      }
    }
  }

  override func conclude(then: @escaping (BlockError?) -> Void) {
    top.node.submit(
      BlockRequest(.flush) { [self] error in
        if let error { return then(error) }
        disk.hold { [self] in
          defer { disk.release() }
          let dropped = top.backing
          do throws(BlockError) {
            try top.qcow2?.setBacking(name: baseName, format: base?.format.rawValue)
            try graph.setBacking(of: top, to: base)
            if let dropped { graph.drop(dropped) }
            then(nil)
          } catch {
            then(error)
          }
        }
      })
  }

  override func didEnd(succeeded: Bool) { disk.endClaiming() }
}

/// Writes what some layers hold into the one below them, and drops them. The disk's top layer is among them: then the guest
/// writes on, and the job waits for `complete`.
final class CommitJob: LiveJob, WriteGuard {
  private let top: LiveNode
  private let base: LiveNode
  /// Layers from `top` on that are written into `base`.
  private let layers: Int
  private let isActive: Bool
  private let result: CommitResult

  init(
    _ id: String, _ disk: LiveDisk, top: LiveNode, base: LiveNode, result: CommitResult, graph: BlockGraph
  ) throws(BlockError) {
    let chain = disk.top.chain
    guard let first = chain.firstIndex(where: { $0 === top }) else { throw .notBelow(top.name, of: disk.top.name) }
    guard let last = chain.firstIndex(where: { $0 === base }), last > first else {
      throw .notBelow(base.name, of: top.name)
    }
    // Others see a layer as it was, and its contents would change below them.
    if let shared = chain[first...last].first(where: { $0.users > 1 }) { throw .nodeInUse(shared.name) }
    self.top = top
    self.base = base
    self.result = result
    layers = last - first
    isActive = first == 0
    let granularity = max(Self.minimumGranularity, base.qcow2?.clusterSize ?? 0)
    super.init(id, .commit, disk, graph: graph, granularity: granularity)
  }

  override func willStart() throws(BlockError) {
    try base.setWritable(true)
    if let image = base.qcow2 { try result.changeBitmaps(of: image) }
    if base.node.size < top.node.size { try base.node.resize(to: top.node.size, on: graph.queue) }
    if isActive {
      disk.beginClaiming()
      disk.add(self)
    }
  }

  override func scan(_ range: Range<UInt64>) throws(BlockError) {
    var offset = range.lowerBound
    while offset < range.upperBound {
      guard offset < top.node.size else { return }
      let found = try top.node.chainExtent(at: offset, length: min(range.upperBound, top.node.size) - offset)
      if isWanted(found) { todo.set(offset, found.extent.length) }
      offset += found.extent.length
    }
  }

  private func isWanted(_ found: ChainExtent) -> Bool { found.depth < layers }

  func willWrite(_ range: Range<UInt64>, proceed: @escaping () -> Void) {
    todo.set(range.lowerBound, UInt64(range.count))
    proceed()
    pump()
  }

  override func move(_ range: Range<UInt64>, _ buffer: DiskBuffer, then: @escaping (BlockError?) -> Void) {
    let range = range.clamped(to: 0..<top.node.size)
    let copy = StretchCopy(source: top.node, target: base.node, buffer: buffer)
    guard isActive else { return copy.copy(range, where: isWanted, then: then) }
    disk.lock(range) { [self] claim in
      copy.copy(range, where: isWanted) { [self] error in
        disk.unlock(claim)
        then(error)
      }
    }
  }

  override var waitsForComplete: Bool { isActive }

  /// What the bulk of the merge has written must not be waited for while the disk is held.
  override func prepareEnd(then: @escaping (BlockError?) -> Void) {
    base.node.submit(BlockRequest(.flush, completion: then))
  }

  override func conclude(then: @escaping (BlockError?) -> Void) {
    if isActive { graph.onPivot(disk) }
    // Once more while the guest goes on, so that it waits for little.
    moveLeft { [self] error in
      if let error { return then(error) }
      base.node.submit(
        BlockRequest(.flush) { [self] error in
          if let error { then(error) } else { disk.hold { [self] in moveLast(then: then) } }
        })
    }
  }

  /// The disk is held.
  private func moveLast(then: @escaping (BlockError?) -> Void) {
    moveRest(from: top.node, to: base.node, where: isWanted) { [self] error in
      if let error {
        disk.release()
        return then(error)
      }
      base.node.submit(
        BlockRequest(.flush) { [self] error in
          if error == nil {
            dropLayers(then: then)
            disk.release()
          } else {
            disk.release()
            then(error)
          }
        })
    }
  }

  /// What the layers hold is durable below. The disk is held, but not until `then`.
  private func dropLayers(then: @escaping (BlockError?) -> Void) {
    do throws(BlockError) {
      if isActive {
        if result.removesTop { try CommitResult.removeName(top.path) }
        disk.replaceTop(base)
        disk.forget(top)
      } else if let upper = disk.top.chain.first(where: { $0.backing === top }) {
        let wasReadOnly = upper.node.isReadOnly
        try upper.setWritable(true)
        try upper.qcow2?.setBacking(
          name: BlockGraph.reference(to: base.path, from: upper.path), format: base.format.rawValue)
        if wasReadOnly { try upper.setWritable(false) }
        try graph.setBacking(of: upper, to: base)
        if result.removesTop { try CommitResult.removeName(top.path) }
      } else {
        return then(nil)
      }
    } catch {
      return then(error)
    }
    let path = top.path
    guard result.removesTop else {
      graph.drop(top)
      return then(nil)
    }
    (top.file as? HostFile)?.giveUp()
    graph.drop(top)
    disk.beginRemoval()
    graph.makeRemovalDurable(of: path) { [self] in
      disk.endRemoval()
      then(nil)
    }
  }

  override func didEnd(succeeded: Bool) {
    if isActive {
      disk.remove(self)
      disk.endClaiming()
    }
    if base !== disk.top { try? base.setWritable(false) }
  }
}

/// Copies a disk as it is when the job begins, while the guest writes on.
final class BackupJob: LiveJob, WriteGuard {
  /// What is copied, in QEMU's words (`MirrorSyncMode`).
  enum Mode: String, CaseIterable {
    case full, top, none, incremental
  }

  private let mode: Mode
  private let target: LiveNode
  private let bitmap: String?
  private let source: LiveNode
  /// What the bitmap said at the start.
  private var taken: DirtyBitmap?
  /// Blocks that are being copied, and who waits for them.
  private var copying: [Int: [() -> Void]] = [:]
  private var isOver = false

  init(
    _ id: String, _ disk: LiveDisk, to target: LiveNode, mode: Mode, bitmap: String?, graph: BlockGraph
  ) throws(BlockError) {
    guard target.node.size >= disk.size else {
      throw .invalid(what: "size of \(target.path)", value: "\(target.node.size)", expected: "\(disk.size), the disk's")
    }
    guard !target.node.isReadOnly else { throw .readOnly(path: target.path) }
    guard target.users == 0 else { throw .nodeInUse(target.name) }
    self.mode = mode
    self.target = target
    self.bitmap = bitmap
    source = disk.top
    if mode == .incremental {
      guard let bitmap else {
        throw .invalid(what: "bitmap", value: "none", expected: "one, for an incremental backup")
      }
      _ = try disk.top.dirtyBitmap(bitmap)
    }
    let granularity = max(Self.minimumGranularity, target.qcow2?.clusterSize ?? 0)
    super.init(id, .backup, disk, graph: graph, granularity: granularity)
    target.users += 1
  }

  override func willStart() throws(BlockError) {
    switch mode {
    case .full: todo.setAll()
    case .none: todo.setAll()
    case .top:
      var offset: UInt64 = 0
      while offset < disk.size {
        let extent = try source.node.extent(at: offset, length: disk.size - offset)
        if extent.isAllocated { todo.set(offset, extent.length) }
        offset += extent.length
      }
    case .incremental:
      let bits = try source.dirtyBitmap(bitmap ?? "")
      todo.merge(bits)
      taken = bits
      try source.clearBitmap(bitmap ?? "")
    }
    skipScan()
    disk.add(self)
  }

  /// Else only what is overwritten is copied, until the job is cancelled.
  override var movesByItself: Bool { mode != .none }

  func willWrite(_ range: Range<UInt64>, proceed: @escaping () -> Void) {
    guard !isOver else { return proceed() }
    let blocks = Int(range.lowerBound / todo.granularity)...Int((range.upperBound - 1) / todo.granularity)
    guard let block = blocks.first(where: { todo[$0] || copying[$0] != nil }) else { return proceed() }
    if copying[block] != nil {
      copying[block]?.append { [self] in willWrite(range, proceed: proceed) }
      return
    }
    todo[block] = false
    let bytes = todo.range(block)
    let buffer = DiskBuffer(count: bytes.count)
    beginGuarded()
    move(bytes, buffer) { [self] error in
      withExtendedLifetime(buffer) { willWrite(range, proceed: proceed) }
      endGuarded(UInt64(bytes.count), error)
    }
  }

  override func move(_ range: Range<UInt64>, _ buffer: DiskBuffer, then: @escaping (BlockError?) -> Void) {
    let blocks = Int(range.lowerBound / todo.granularity)...Int((range.upperBound - 1) / todo.granularity)
    for block in blocks { copying[block] = [] }
    StretchCopy(source: disk.top.node, target: target.node, buffer: buffer).copy(range) { [self] error in
      if error != nil { isOver = true }
      let waiting = blocks.flatMap { copying.removeValue(forKey: $0) ?? [] }
      then(error)
      for body in waiting { body() }
    }
  }

  override func conclude(then: @escaping (BlockError?) -> Void) {
    target.node.submit(BlockRequest(.flush, completion: then))
  }

  override func didEnd(succeeded: Bool) {
    isOver = true
    disk.remove(self)
    target.users -= 1
    let waiting = copying.values.flatMap { $0 }
    copying = [:]
    for body in waiting { body() }
    // What a backup that failed has not saved is still to be saved.
    if !succeeded, let taken, let bitmap { try? source.mergeBitmap(bitmap, taken) }
  }
}
