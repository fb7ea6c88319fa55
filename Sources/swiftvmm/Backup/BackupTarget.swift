import BlockLayer
import Glibc

/// Where a backup's disks go.
enum BackupTarget {
  /// Images in a folder, with a record of the backups beside them.
  case folder(String)
  /// One image, with the record beside it.
  case file(String)
  /// An export of an NBD server, which the disk's bytes go into.
  case export(String)

  /// What a word means for so many disks.
  init(_ text: String, disks: Int, isIncremental: Bool) throws(Failure) {
    // The journal names its files wherever it is read.
    let text = BlockGraph.absolutePath(text)
    if NBDURI.isURI(text) {
      self = .export(text)
    } else if BackupFiles.isFolder(text) || text.hasSuffix("/") {
      self = .folder(text.hasSuffix("/") && text.count > 1 ? String(text.dropLast()) : text)
      return
    } else {
      self = .file(text)
      if BackupFiles.exists(text) { throw .backup(.targetExists(text)) }
    }
    if disks > 1 { throw .backup(.targetNeedsFolder(text, disks: disks)) }
    if isIncremental { throw .backup(.incrementalNeedsFolder(text)) }
  }

  /// The image for a disk of a backup; nil for an export.
  func image(_ device: String, id: String) -> String? {
    switch self {
    case .folder(let path): "\(path)/\(id)-\(device).qcow2"
    case .file(let path): path
    case .export: nil
    }
  }

  /// The record of what is there; nil for an export.
  func record() throws(Failure) -> BackupRecord? {
    switch self {
    case .folder(let path):
      try BackupFiles.makeFolder(path)
      return try BackupRecord(of: path)
    case .file(let path): return try BackupRecord(of: path)
    case .export: return nil
    }
  }
}
