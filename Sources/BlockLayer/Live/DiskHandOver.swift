/// Disks whose images another process has for now: before a machine has come from there, or once it is on its way there. Their
/// requests wait.
extension BlockGraph {
  /// A disk whose image is opened later, by `makePresent`.
  public func addAbsentDisk(_ name: String, _ options: Options) throws(BlockError) -> LiveDisk {
    let disk = try addDisk(name, on: openForLooking(options))
    disk.absence = options
    disk.hold {}
    return disk
  }

  /// Closes a disk's image, with all below it, for another process. No request is under way, and what was written is durable.
  public func makeAbsent(_ disk: LiveDisk) throws(BlockError) {
    guard disk.absence == nil else { return }
    let layer = disk.top
    if let job = jobs.values.first(where: { $0.disk === disk }) { throw .diskHasJob(disk.name, job: job.id) }
    guard layer.users == 1 else { throw .nodeInUse(layer.name) }
    var options = Options(path: layer.path, format: layer.format, access: layer.access)
    options.access.writable = !disk.isReadOnly
    options.name = layer.name
    options.isImplicit = true
    let placeholder = try openForLooking(options)
    disk.hold {}
    disk.replaceTop(placeholder)
    disk.absence = options
    try close(layer)
  }

  /// Opens the image of an absent disk, so that another machine's disk can be copied into it. The disk stays absent.
  public func fill(_ disk: LiveDisk) throws(BlockError) -> LiveNode {
    if let layer = disk.filled { return layer }
    guard let options = disk.absence else { throw .nodeInUse(disk.top.name) }
    let layer = try open(options)
    layer.users += 1
    disk.filled = layer
    return layer
  }

  /// Opens the image of an absent disk, unless it has been filled; its requests go on.
  public func makePresent(_ disk: LiveDisk) throws(BlockError) {
    guard let options = disk.absence else { return }
    let layer: LiveNode
    if let filled = disk.filled { layer = filled } else { layer = try open(options) }
    leaveFilled(disk)
    let placeholder = disk.top
    let size = disk.size
    disk.absence = nil
    disk.replaceTop(layer)
    // It has never been written to.
    try? close(placeholder)
    if disk.size != size { disk.onResize() }
    disk.release()
  }

  /// Nobody fills the disk's image any more.
  func leaveFilled(_ disk: LiveDisk) {
    disk.filled?.users -= 1
    disk.filled = nil
  }

  /// Opens an image that another process writes to, to see how large it is.
  private func openForLooking(_ options: Options) throws(BlockError) -> LiveNode {
    var options = options
    options.name = nil
    options.isImplicit = true
    options.access = FileAccess(sharesAll: true)
    return try open(options)
  }
}
