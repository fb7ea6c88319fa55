import BlockLayer
import Glibc
import JSON

/// The backups of a folder, or the one beside a single file: what each holds and how its machine was started.
struct BackupRecord {
  /// One disk's part of a backup.
  struct Disk {
    var device: String
    /// Relative to the record's folder.
    var file: String
    var size: UInt64
    /// The backup before it that its file stands on; nil for a full one.
    var parent: String?
    /// Bytes that were moved.
    var moved: UInt64
  }

  /// A backup.
  struct Backup {
    var id: String
    var disks: [Disk]
    var configuration: JSONValue
  }

  static let fileName = "backups.json"
  let path: String
  var backups: [Backup] = []

  var folder: String { BackupFiles.folder(of: path) }

  /// The record of a folder, or of one file; without backups where there is none yet.
  init(of target: String) throws(Failure) {
    try self.init(at: BackupFiles.isFolder(target) ? target + "/" + Self.fileName : target + ".json")
  }

  /// The record that is in a file; without backups where there is none.
  init(at path: String) throws(Failure) {
    self.path = BlockGraph.absolutePath(path)
    guard BackupFiles.exists(path) else { return }
    let json = try BackupFiles.read(path)
    guard json["version"]?.integerValue == 1, let backups = json["backups"]?.arrayValue else {
      throw .backup(.malformed(path: path, reason: "its version or list of backups is missing"))
    }
    for backup in backups {
      guard let id = backup["id"]?.stringValue, let disks = backup["disks"]?.arrayValue else {
        throw .backup(.malformed(path: path, reason: "a backup has no id or no disks"))
      }
      var read = Backup(id: id, disks: [], configuration: backup["configuration"] ?? [:])
      for disk in disks {
        guard let device = disk["device"]?.stringValue, let file = disk["file"]?.stringValue, !file.contains("/") else {
          throw .backup(.malformed(path: path, reason: "a disk of \(id) has no device or no file"))
        }
        read.disks.append(
          Disk(
            device: device, file: file, size: disk["size"]?.unsignedValue ?? 0, parent: disk["parent"]?.stringValue,
            moved: disk["moved"]?.unsignedValue ?? 0))
      }
      self.backups.append(read)
    }
  }

  func save() throws(Failure) {
    let list = backups.map { backup -> JSONValue in
      let disks = backup.disks.map { disk -> JSONValue in
        [
          "device": .string(disk.device), "file": .string(disk.file), "size": JSONValue(disk.size),
          "parent": disk.parent.map { .string($0) } ?? .null, "moved": JSONValue(disk.moved),
        ]
      }
      return ["id": .string(backup.id), "disks": .array(disks), "configuration": backup.configuration]
    }
    try BackupFiles.replace(path, ["version": 1, "backups": .array(list)])
  }

  /// The last backup of a disk.
  func last(_ device: String) -> (id: String, disk: Disk)? {
    for backup in backups.reversed() {
      if let disk = backup.disks.first(where: { $0.device == device }) { return (backup.id, disk) }
    }
    return nil
  }

  /// The time in UTC, with four hexadecimal digits that keep two of one second apart.
  static func newID() -> String {
    var now = time(nil)
    var parts = tm()
    gmtime_r(&now, &parts)
    func two(_ value: Int32) -> String { value < 10 ? "0\(value)" : "\(value)" }
    let day = "\(parts.tm_year + 1900)\(two(parts.tm_mon + 1))\(two(parts.tm_mday))"
    let clock = two(parts.tm_hour) + two(parts.tm_min) + two(parts.tm_sec)
    let digits = String(UInt32(UInt16.random(in: 0...UInt16.max)) | 0x10000, radix: 16).dropFirst()
    return "\(day)T\(clock)Z-\(digits)"
  }
}
