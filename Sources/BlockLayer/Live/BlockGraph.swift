import Glibc
import Host

/// The layers and disks of a machine, by name. It belongs to the thread of its layers.
public final class BlockGraph {
  /// How an image is opened.
  public struct Options {
    /// What QMP calls it; nil for a name of the graph's own.
    public var name: String?
    /// The image's path.
    public var path: String
    /// Its format; nil to look.
    public var format: ImageFormat?
    /// How its file is opened.
    public var access: FileAccess
    /// What is below it.
    public var backing = Backing.named
    /// The layer goes when nothing uses it any more; else when it is closed.
    public var isImplicit = false

    /// What is below an image.
    public enum Backing {
      /// What it names.
      case named
      /// Nothing for now: a snapshot's overlay.
      case none
      /// An open layer.
      case layer(String)
    }

    /// An image with what it names below it.
    public init(path: String, format: ImageFormat? = nil, access: FileAccess) {
      self.path = path
      self.format = format
      self.access = access
    }
  }

  /// Where requests wait.
  public let queue: any IOQueue
  /// The layers by name.
  public private(set) var nodes: [String: LiveNode] = [:]
  /// The disks by name.
  public private(set) var disks: [String: LiveDisk] = [:]
  /// The jobs by id.
  public private(set) var jobs: [String: LiveJob] = [:]
  /// Told of what happens to jobs.
  public var onJob: (LiveJob, LiveJob.Event) -> Void = { _, _ in }
  /// Told of disks that have new layers on top, while they are held: what was the top is a snapshot of this moment.
  public var onCut: ([LiveDisk]) -> Void = { _ in }
  /// Told of a commit that is about to begin: the disk, the layer that is merged and the lowest one that it goes into.
  public var onCommit: (LiveDisk, LiveNode, LiveNode) -> Void = { _, _, _ in }
  /// Told of a disk whose top layer is about to go; the guest goes on.
  public var onPivot: (LiveDisk) -> Void = { _ in }
  /// Files whose names are gone, but not yet durably.
  var removals: Set<String> = []
  private let loop: EventLoop?
  private var nextNumber = 0

  /// A graph without anything. Jobs with a speed limit need the thread's loop.
  public init(queue: any IOQueue, loop: EventLoop? = nil) {
    self.queue = queue
    self.loop = loop
  }

  /// The layer of a name, or the top one of the disk of that name.
  public func node(_ name: String) throws(BlockError) -> LiveNode {
    if let node = nodes[name] ?? disks[name]?.top { return node }
    throw .noNode(name)
  }

  /// The disk of a name, or the one whose top layer has it.
  public func disk(_ name: String) throws(BlockError) -> LiveDisk {
    if let disk = disks[name] ?? disks.values.first(where: { $0.top.name == name }) { return disk }
    throw .noDisk(name)
  }

  /// Whether a layer may take a name.
  public func requireFree(_ name: String) throws(BlockError) {
    guard nodes[name] == nil, disks[name] == nil else { throw .nodeNameTaken(name) }
  }

  private func newName() -> String {
    nextNumber += 1
    let name = "#block\(nextNumber)"
    return nodes[name] == nil ? name : newName()
  }

  // MARK: Opening and closing

  /// Opens an image, and what is below it.
  public func open(_ options: Options) throws(BlockError) -> LiveNode {
    if let name = options.name { try requireFree(name) }
    let opensBacking = if case .named = options.backing { true } else { false }
    let chain = try BlockChain(
      path: options.path, format: options.format, access: options.access, backing: opensBacking, queue: queue)
    var layers: [LiveNode] = []
    for (index, layer) in chain.layers.enumerated() {
      let isTop = index == 0
      layers.append(
        LiveNode(
          name: (isTop ? options.name : nil) ?? newName(), path: layer.path, format: layer.format, node: layer.node,
          file: layer.file, isImplicit: !isTop || options.isImplicit))
    }
    for (upper, lower) in zip(layers, layers.dropFirst()) {
      upper.backing = lower
      lower.users += 1
    }
    for layer in layers { nodes[layer.name] = layer }
    if case .layer(let name) = options.backing {
      do throws(BlockError) {
        try setBacking(of: layers[0], to: node(name))
      } catch {
        try? close(layers[0])
        throw error
      }
    }
    return layers[0]
  }

  /// Puts a layer below another one, in memory only.
  func setBacking(of upper: LiveNode, to lower: LiveNode?) throws(BlockError) {
    guard let image = upper.qcow2 else { throw .unsupported(path: upper.path, .operation("a backing file")) }
    guard lower.map({ $0.chain.contains { $0 === upper } }) != true else { throw .chainLoop(path: upper.path) }
    lower?.users += 1
    upper.backing?.users -= 1
    upper.backing = lower
    image.backing = lower?.node
  }

  /// Closes a layer that nobody uses, and what was opened for it alone.
  public func close(_ node: LiveNode) throws(BlockError) {
    guard node.users == 0 else { throw .nodeInUse(node.name) }
    nodes[node.name] = nil
    for disk in disks.values { disk.forget(node) }
    let backing = node.backing
    node.backing = nil
    backing?.users -= 1
    var first: BlockError?
    do throws(BlockError) { try node.node.close() } catch { first = error }
    if let backing, backing.isImplicit, backing.users == 0 {
      do throws(BlockError) { try close(backing) } catch { first = first ?? error }
    }
    if let first { throw first }
  }

  /// Closes everything, the top layers first; the first error counts. Nothing is under way.
  public func closeAll() throws(BlockError) {
    for disk in disks.values { removeDisk(disk) }
    var first: BlockError?
    waitForRemovals()
    while let node = nodes.values.first(where: { $0.users == 0 }) {
      do throws(BlockError) { try close(node) } catch { first = first ?? error }
    }
    if let first { throw first }
  }

  // MARK: Disks

  /// Makes a disk of a layer.
  public func addDisk(_ name: String, on node: LiveNode) throws(BlockError) -> LiveDisk {
    guard disks[name] == nil else { throw .nodeNameTaken(name) }
    guard node.users == 0 else { throw .nodeInUse(node.name) }
    let disk = LiveDisk(name: name, top: node)
    disks[name] = disk
    return disk
  }

  /// The device is gone; the layers stay.
  public func removeDisk(_ disk: LiveDisk) {
    disks[disk.name] = nil
    disk.top.users -= 1
    leaveFilled(disk)
  }

  // MARK: Jobs

  /// Copies what a disk has in the layers above `base`, nil for all, into its top layer and drops them (`block-stream`).
  public func stream(
    _ id: String, _ disk: LiveDisk, base: LiveNode?, baseName: String? = nil, configure: (LiveJob) -> Void = { _ in }
  ) throws(BlockError) {
    try requireJob(id, on: disk)
    if disk.isBackedUp { throw .diskIsBackedUp(disk.name) }
    begin(try StreamJob(id, disk, base: base, baseName: baseName, graph: self), configure)
  }

  /// Writes the layers from `top` to above `base` into `base` and drops them (`block-commit`).
  public func commit(
    _ id: String, _ disk: LiveDisk, top: LiveNode, base: LiveNode, result: CommitResult = CommitResult(),
    configure: (LiveJob) -> Void = { _ in }
  ) throws(BlockError) {
    try requireJob(id, on: disk)
    let isOwnWayBack = result.removesTop && top === disk.top && disk.top.isBackupOverlay
    if disk.isBackedUp, !isOwnWayBack { throw .diskIsBackedUp(disk.name) }
    let job = try CommitJob(id, disk, top: top, base: base, result: result, graph: self)
    onCommit(disk, top, base)
    begin(job, configure)
  }

  /// Copies a disk as it is now (`blockdev-backup`); `mode` in QEMU's words: full, top, none, incremental.
  @discardableResult
  public func backup(
    _ id: String, _ disk: LiveDisk, to target: LiveNode, mode: String, bitmap: String?,
    configure: (LiveJob) -> Void = { _ in }
  ) throws(BlockError) -> LiveJob {
    try requireJob(id, on: disk)
    if disk.isBackedUp { throw .diskIsBackedUp(disk.name) }
    guard let mode = BackupJob.Mode(rawValue: mode == "bitmap" ? "incremental" : mode) else {
      throw .invalid(what: "sync", value: mode, expected: "full, top, none or incremental")
    }
    let job = try BackupJob(id, disk, to: target, mode: mode, bitmap: bitmap, graph: self)
    begin(job, configure)
    return job
  }

  func requireJob(_ id: String, on disk: LiveDisk) throws(BlockError) {
    guard jobs[id] == nil else { throw .jobExists(id) }
    if let job = jobs.values.first(where: { $0.disk === disk }) { throw .diskHasJob(disk.name, job: job.id) }
  }

  func begin(_ job: LiveJob, _ configure: (LiveJob) -> Void) {
    configure(job)
    jobs[job.id] = job
    onJob(job, .status(.created))
    job.start()
  }

  /// The job of an id.
  public func job(_ id: String) throws(BlockError) -> LiveJob {
    if let job = jobs[id] { return job }
    throw .noJob(id)
  }

  func remove(_ job: LiveJob) { jobs[job.id] = nil }

  func makeTimer(_ fire: @escaping () -> Void) -> EventLoop.Timer? {
    // It fires on the loop's thread, which is the graph's.
    let body = OnThread(fire)
    return loop?.makeTimer { body.value() }
  }

  private struct OnThread: @unchecked Sendable {
    let value: () -> Void
    init(_ value: @escaping () -> Void) { self.value = value }
  }

  /// A layer has left its disk: closed where nobody uses it nor closes it.
  public func drop(_ layer: LiveNode) {
    guard layer.users == 0, layer.isImplicit else { return }
    // What it held is elsewhere.
    try? close(layer)
  }

  // MARK: Snapshots

  /// A disk, and the layer that is to be its next top one.
  public typealias Overlay = (disk: LiveDisk, layer: LiveNode)

  /// What a new overlay's file says: a disk's size and top layer.
  public struct OverlayHeader: Sendable {
    let size: UInt64
    let backing: (path: String, format: ImageFormat)
  }

  /// What a file for an overlay of the disk has to say now.
  public func overlayHeader(of disk: LiveDisk) throws(BlockError) -> OverlayHeader {
    OverlayHeader(size: disk.size, backing: (disk.top.path, disk.top.format))
  }

  /// Makes an overlay's file and makes it durable: on any thread, so that the disks' own goes on meanwhile. One that `isTemporary` is
  /// of no use after a crash, and nothing waits for the host's disk.
  public static func makeOverlayFile(
    _ path: String, _ header: OverlayHeader, isTemporary: Bool = false, queue: any IOQueue
  ) throws(BlockError) {
    var options = Qcow2CreateOptions(size: header.size)
    // A guest's small writes do not copy whole clusters from below.
    options.extendedL2 = true
    options.backingName = reference(to: header.backing.path, from: path)
    options.backingFormat = header.backing.format.rawValue
    try HostFile.create(path)
    let access = FileAccess(writable: true, ignoresFlushes: isTemporary)
    let file = try HostFile(path: path, access: access, queue: queue)
    defer { file.close() }
    try Qcow2Image.create(options, in: file)
  }

  /// Opens an overlay's file, which was made for a disk's top layer or has existed before, without what is below it.
  public func openOverlay(
    of disk: LiveDisk, path: String, name: String?, madeFrom header: OverlayHeader? = nil
  ) throws(BlockError) -> Overlay {
    if let name { try requireFree(name) }
    var options = Options(path: path, format: .qcow2, access: FileAccess(writable: true))
    options.access.direct = disk.top.access.direct
    options.name = name
    options.backing = .none
    options.isImplicit = true
    let layer = try open(options)
    if let header, header.backing.path != disk.top.path {
      // A job has ended since.
      try layer.qcow2?.setBacking(name: Self.reference(to: disk.top.path, from: path), format: disk.top.format.rawValue)
    }
    return (disk, layer)
  }

  /// Puts layers on top of their disks, all at one instant: no request is under way on any of them then. The layers below
  /// take no more writes. Undoing is not needed: what can fail has been done before.
  public func snapshot(_ overlays: [Overlay], then: @escaping (BlockError?) -> Void) {
    do throws(BlockError) { try check(overlays) } catch { return then(error) }
    var waiting = overlays.count
    guard waiting > 0 else { return then(nil) }
    for overlay in overlays {
      overlay.disk.hold { [self] in
        waiting -= 1
        guard waiting == 0 else { return }
        let old = overlays.map(\.disk.top)
        for ((disk, layer), old) in zip(overlays, old) {
          // Cannot fail: `refusal` has seen to it.
          try? setBacking(of: layer, to: old)
          disk.replaceTop(layer)
        }
        onCut(overlays.map(\.disk))
        for (disk, _) in overlays { disk.release() }
        var retiring = overlays.count
        for (overlay, layer) in zip(overlays, old) {
          retire(layer, of: overlay.disk) {
            retiring -= 1
            // Nobody is told before, so that what comes next does not meet it on its way.
            if retiring == 0 { then(nil) }
          }
        }
      }
    }
  }

  /// Says why layers cannot be put on their disks.
  public func check(_ overlays: [Overlay]) throws(BlockError) {
    for (index, overlay) in overlays.enumerated() {
      if let error = refusal(of: overlay) { throw error }
      for other in overlays[..<index] {
        if other.disk === overlay.disk { throw .diskTwice(overlay.disk.name) }
        if other.layer === overlay.layer { throw .nodeInUse(overlay.layer.name) }
      }
    }
  }

  /// What is no top layer any more is made durable and lets others read it. Where that fails, the disk's next flush tries again.
  private func retire(_ layer: LiveNode, of disk: LiveDisk, then: @escaping () -> Void) {
    guard !layer.node.isReadOnly else { return then() }
    flush(layer, times: 2) { error in
      if error != nil { return then() }
      // Reads of the guest's under way would keep clusters from being freed while the image can still say so.
      disk.hold {
        if (try? layer.setWritable(false)) != nil { disk.forget(layer) }
        disk.release()
        then()
      }
    }
  }

  /// What a flush frees, the next one makes durable.
  private func flush(_ layer: LiveNode, times: Int, then: @escaping (BlockError?) -> Void) {
    layer.node.submit(
      BlockRequest(.flush) { [self] error in
        if error != nil || times == 1 { then(error) } else { flush(layer, times: times - 1, then: then) }
      })
  }

  private func refusal(of overlay: Overlay) -> BlockError? {
    let layer = overlay.layer
    if layer.qcow2 == nil { return .unsupported(path: layer.path, .operation("a backing file")) }
    if overlay.disk.isBackedUp { return .diskIsBackedUp(overlay.disk.name) }
    if let job = jobs.values.first(where: { $0.disk === overlay.disk && $0.kind != .backup }) {
      return .diskHasJob(overlay.disk.name, job: job.id)
    }
    if layer.users > 0 { return .nodeInUse(layer.name) }
    if layer.backing != nil { return .overlayHasBacking(layer.name) }
    if layer.node.isReadOnly { return .readOnly(path: layer.path) }
    if layer.node.size != overlay.disk.size {
      return .invalid(
        what: "size of \(layer.path)", value: "\(layer.node.size)", expected: "\(overlay.disk.size), the disk's")
    }
    return nil
  }

  /// A path that means the same in every folder.
  public static func absolute(_ path: String) -> String {
    guard !path.hasPrefix("/"), let folder = getcwd(nil, 0) else { return path }
    defer { free(folder) }
    return String(cString: folder) + "/" + path
  }

  /// How an image names another: by its last part where both are in one folder, else by its whole path.
  static func reference(to path: String, from other: String) -> String {
    let (target, source) = (absolute(path), absolute(other))
    guard let slash = target.lastIndex(of: "/"), let other = source.lastIndex(of: "/"),
      target[..<slash] == source[..<other]
    else { return target }
    return String(target[target.index(after: slash)...])
  }
}
