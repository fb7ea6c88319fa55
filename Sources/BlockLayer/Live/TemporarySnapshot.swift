import Glibc
import Host

/// What a backup needs of a machine's layers: a disk's state with a layer of its own above, and the way back.
extension BlockGraph {
  /// What a file for an overlay of a layer has to say.
  public func overlayHeader(above layer: LiveNode) -> OverlayHeader {
    OverlayHeader(size: layer.node.size, backing: (layer.path, layer.format))
  }

  /// Opens the file of a temporary snapshot, made by `makeOverlayFile`, above a layer that takes no more writes.
  ///
  /// Whoever uses it may write: only its own file changes. It is thrown away after a crash, so nothing waits for the host's disk.
  public func openTemporary(
    _ path: String, name: String, above layer: LiveNode, isWritable: Bool = true
  ) throws(BlockError) -> LiveNode {
    guard layer.node.isReadOnly else { throw .nodeInUse(layer.name) }
    var options = Options(path: path, format: .qcow2, access: FileAccess(writable: isWritable, ignoresFlushes: true))
    options.name = name
    options.backing = .layer(layer.name)
    return try open(options)
  }

  /// How the files end of the overlays that take a guest's writes during a backup.
  public static let backupOverlaySuffix = ".backup-overlay"
  /// How the files end of the layers that a backup's readers write to.
  public static let backupTemporarySuffix = ".backup-temporary"

  /// A name that means the same file in every folder.
  public static func absolutePath(_ path: String) -> String { NBDURI.isURI(path) ? path : absolute(path) }
}

extension LiveNode {
  /// Whether a backup has put it on its disk.
  public var isBackupOverlay: Bool { path.hasSuffix(BlockGraph.backupOverlaySuffix) }
  /// Whether it is what a backup is read from.
  public var isBackupTemporary: Bool { path.hasSuffix(BlockGraph.backupTemporarySuffix) }
}

extension LiveDisk {
  /// Whether a backup leads its writes beside it now.
  public var isBackedUp: Bool { top.chain.contains { $0.isBackupOverlay } }
}

/// What the end of a commit leaves behind besides the merged layer.
public struct CommitResult: Sendable {
  /// The committed layer's file is removed when its contents are durable below and before anything newer is written there.
  /// So where the file is, it says what the disk holds; where it is not, the layer below does.
  public var removesTop = false
  /// A persistent bitmap of this name begins in the layer below before anything is written there.
  public var bitmap: String?
  /// Bitmaps with names that begin so are given up for it.
  public var replacing = ""

  /// The layer's file stays, as QEMU has it.
  public init() {}

  /// Changes the bitmaps of an image that takes writes: nothing where it cannot keep any.
  public func changeBitmaps(of image: Qcow2Image) throws(BlockError) {
    guard let bitmap, image.header.version >= 3 else { return }
    let names = image.bitmaps.map(\.name)
    if names.contains(bitmap) { return }
    for name in names where name.hasPrefix(replacing) { try image.removeBitmap(name) }
    try image.addBitmap(bitmap, granularity: min(max(image.clusterSize, 4096), 65536))
  }

  /// Removes a file, and makes that durable as far as the host can.
  public static func removeFile(_ path: String) throws(BlockError) {
    try removeName(path)
    Folder(of: path)?.flush()
  }

  static func removeName(_ path: String) throws(BlockError) {
    guard unlink(path) == 0 || errno == ENOENT else { throw .io(call: "remove", path: path, errno: errno) }
  }
}

/// The folder that a file is in.
private final class Folder {
  let descriptor: FileDescriptor

  init?(of path: String) {
    let slash = path.lastIndex(of: "/")
    let folder = slash.map { path[..<$0].isEmpty ? "/" : String(path[..<$0]) } ?? "."
    do throws(HostError) { descriptor = try FileDescriptor.open(folder, O_RDONLY | O_DIRECTORY) } catch { return nil }
  }

  // Nobody can go back once a name is gone, so there is nothing to be done about an error.
  func flush() { fsync(descriptor.rawValue) }
}

extension BlockGraph {
  /// Makes it durable that a file's name is gone, as far as the host can, and calls `then`; the disks' thread goes on meanwhile.
  func makeRemovalDurable(of path: String, then: @escaping () -> Void) {
    guard let folder = Folder(of: path) else { return then() }
    removals.insert(path)
    let request = BlockRequest(.flush) { [self] _ in
      removals.remove(path)
      withExtendedLifetime(folder) { then() }
    }
    request.syncsAll = true
    queue.start(request, descriptor: folder.descriptor.rawValue, path: path)
  }

  /// Waits for it: whoever opens the layers next knows of no name that might be there again.
  func waitForRemovals() {
    for path in removals { Folder(of: path)?.flush() }
  }
}
