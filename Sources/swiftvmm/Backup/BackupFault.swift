import Glibc
import Host
import Monitor

/// Why a backup, its recovery or its restoring failed.
enum BackupFault: Error {
  case machine(MonitorError)
  case noDisk(String, known: [String])
  case noDisks
  case remoteDisk(device: String, file: String)
  case readOnlyDisk(device: String)
  case unfinished(journal: String)
  case running(journal: String)
  case needsRecovery(image: String, overlay: String)
  case targetExists(String)
  case targetNeedsFolder(String, disks: Int)
  case incrementalNeedsFolder(String)
  case file(call: String, path: String, errno: Int32)
  case malformed(path: String, reason: String)
  case noBackup(id: String, path: String)
  case cancelled
  case job(device: String, reason: String)
  case undone(why: String, isNoSpace: Bool)
  case notUndone(why: String, then: String, image: String)
  case foreignOverlay(path: String, image: String)

  var status: ExitStatus {
    switch self {
    case .machine(.unreachable), .machine(.notQMP): .unavailable
    case .noDisk, .noDisks, .remoteDisk, .readOnlyDisk, .targetNeedsFolder, .incrementalNeedsFolder, .targetExists:
      .usage
    case .malformed, .noBackup, .needsRecovery: .badInput
    case .cancelled: .interrupted
    case .machine, .unfinished, .running, .file, .job, .undone, .notUndone, .foreignOverlay: .inputOutput
    }
  }

  /// One line: what failed, the value, the cause, what to do.
  var text: String {
    switch self {
    case .machine(let error): "\(error)"
    case .noDisk(let name, let known):
      "--disk \(name): the machine has no such disk; it has \(known.joined(separator: ", "))"
    case .noDisks: "the machine has no disk that could be backed up"
    case .remoteDisk(let device, let file):
      "the disk \(device) is on a server (\(file)), and its writes cannot be led beside it; name the others with --disk"
    case .readOnlyDisk(let device):
      "the disk \(device) takes no writes, so its file can be copied as it is; name the others with --disk"
    case .unfinished(let journal):
      "an earlier backup has left \(journal): run swiftvmm backup --recover with the same socket first"
    case .running(let journal): "another backup is under way (\(journal)); wait for its end"
    case .needsRecovery(let image, let overlay):
      "a backup of \(image) was cut off, and the guest's newest writes are in \(overlay): run swiftvmm backup --recover \(image)"
    case .targetExists(let path): "the target \(path) is there already; name another one, or a folder"
    case .targetNeedsFolder(let path, let disks):
      "--target \(path): \(disks) disks do not fit in one; name a folder, or one disk with --disk"
    case .incrementalNeedsFolder(let path):
      "--incremental --target \(path): an increment stands on the backups before it; name their folder"
    case .file(let call, let path, let code): "cannot \(call) \(path): \(HostError.reason(code))"
    case .malformed(let path, let reason): "\(path) is no record of backups: \(reason)"
    case .noBackup(let id, let path): id.isEmpty ? "\(path) has no backup" : "\(path) has no backup \(id)"
    case .cancelled: "the backup was cancelled; the machine's disks are as they were"
    case .job(let device, let reason): "the layers of the disk \(device) could not be merged: \(reason)"
    case .undone(let why, let isNoSpace):
      "\(why); the backup was given up, and the machine's disks are as they were\(isNoSpace ? "; make room there, or name another target" : "")"
    case .notUndone(let why, let then, let image):
      "\(why); then \(then); the guest's disks are sound, and swiftvmm backup --recover with the socket, or when the machine has ended with \(image), shortens their chains"
    case .foreignOverlay(let path, let image):
      "\(path) holds a guest's writes, but this machine does not use it: end the machine and run swiftvmm backup --recover \(image)"
    }
  }
}
