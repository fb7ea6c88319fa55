import BlockLayer
import Glibc
import Host
import JSON

/// What a backup is about to change, on disk before it does: whoever finds it can undo or end the backup.
///
/// The disks need no journal to be sound: a disk's overlay is a file exactly as long as it holds what the guest has written since
/// the cut (`CommitResult.removesTop`). The journal says what else there is to be removed.
struct BackupJournal {
  /// How far a backup is.
  enum Phase: String {
    /// Overlays are being put on the disks.
    case cut
    /// The disks' state at the cut is being copied.
    case copy
    /// The copy is whole: what is left is the way back.
    case merge
  }

  /// A disk of the backup.
  struct Disk {
    var device: String
    /// The image that was the top layer.
    var image: String
    /// Where the guest's writes go meanwhile.
    var overlay: String { image + BackupJournal.overlaySuffix }
    /// The layer of whoever reads the state at the cut.
    var temporary: String { image + BlockGraph.backupTemporarySuffix }
    /// Its name, and its export's.
    var name: String { "backup-\(device)" }
    /// The job that merges the overlay.
    var job: String { name }
  }

  static let overlaySuffix = BlockGraph.backupOverlaySuffix
  private static let suffix = ".backup-journal"

  let id: String
  var phase = Phase.cut
  var disks: [Disk]
  /// The socket that the disks are read by.
  var socket: String
  /// Files of the target that are of no use before the phase `merge`.
  var unfinished: [String] = []
  /// The target's record of backups, if it has one: a backup that is there is whole.
  var record: String?
  private let path: String

  init(id: String, disks: [Disk], socket: String) {
    self.id = id
    self.disks = disks
    self.socket = socket
    path = Self.path(besides: disks.first?.image ?? "")
  }

  /// The name of the bitmap that notes what has changed since a backup's cut.
  static let bitmapPrefix = "swiftvmm-backup-"
  var bitmap: String { Self.bitmapPrefix + id }
  /// Its file.
  var file: String { path }

  /// Where the journal of a backup is whose first disk has this image.
  static func path(besides image: String) -> String { image + suffix }

  /// Removes what a backup has left that was killed before it had a journal.
  static func removeUnborn(besides image: String) { unlink(path(besides: image) + ".new") }

  /// Refuses disks with a layer that an earlier backup works on, or has left.
  static func requireNone(_ images: [String]) throws(Failure) {
    for image in images {
      let path = path(besides: image)
      if BackupFiles.exists(path) {
        _ = try lock(path)
        throw .backup(.unfinished(journal: path))
      }
      let overlay = image + overlaySuffix
      if BackupFiles.exists(overlay) { throw .backup(.unfinished(journal: overlay)) }
    }
  }

  /// Holds a journal that is there, so that nobody else works on it.
  static func lock(_ path: String) throws(Failure) -> FileDescriptor {
    do throws(HostError) {
      let file = try FileDescriptor.open(path, O_RDWR)
      guard flock(file.rawValue, LOCK_EX | LOCK_NB) == 0 else { throw .path("lock", path: path, errno: errno) }
      return file
    } catch {
      if error.errno == EWOULDBLOCK { throw .backup(.running(journal: path)) }
      throw .backup(.file(call: "open", path: path, errno: error.errno))
    }
  }

  /// Writes it: the first time, `isNew`, only where there is none. What it returns keeps others away.
  func save(isNew: Bool = false) throws(Failure) -> FileDescriptor {
    let disks = disks.map { JSONValue.object(["device": .string($0.device), "image": .string($0.image)]) }
    let json: JSONValue = [
      "version": 1, "id": .string(id), "phase": .string(phase.rawValue), "disks": .array(disks),
      "socket": .string(socket), "unfinished": .array(unfinished.map { .string($0) }),
      "record": record.map { .string($0) } ?? .null,
    ]
    return try BackupFiles.replace(path, json, isNew: isNew)
  }

  /// Reads one.
  init(reading path: String) throws(Failure) {
    let json = try BackupFiles.read(path)
    guard json["version"]?.integerValue == 1, let id = json["id"]?.stringValue,
      let phase = (json["phase"]?.stringValue).flatMap(Phase.init(rawValue:)), let disks = json["disks"]?.arrayValue,
      let socket = json["socket"]?.stringValue
    else { throw .backup(.malformed(path: path, reason: "its version, id, phase, disks or socket is missing")) }
    self.id = id
    self.phase = phase
    self.disks = disks.compactMap { disk in
      guard let device = disk["device"]?.stringValue, let image = disk["image"]?.stringValue else { return nil }
      return Disk(device: device, image: image)
    }
    self.socket = socket
    unfinished = (json["unfinished"]?.arrayValue ?? []).compactMap(\.stringValue)
    record = json["record"]?.stringValue
    self.path = path
  }

  /// Whether the copy is whole and stays: an increment can stand on it.
  var hasCopy: Bool {
    guard let record, let found = try? BackupRecord(at: record) else { return false }
    return found.backups.contains { $0.id == id }
  }

  /// The backup is over.
  func remove() throws(Failure) {
    // Of a writing that was cut off.
    unlink(path + ".new")
    try BackupFiles.remove(path)
  }
}
