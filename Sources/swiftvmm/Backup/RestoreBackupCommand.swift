import ArgumentParser
import BlockLayer
import Glibc
import JSON

/// `swiftvmm restore-backup`: runnable disks from a backup.
struct RestoreBackupCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "restore-backup",
    abstract: "Make runnable disks from a backup, full or incremental.",
    discussion: "Example: swiftvmm restore-backup /backups/vm --into /vm-again")

  @Argument(help: "The backups' folder, or the one file of a backup.")
  var source: String

  @Option(help: "The folder for the disks; made where it is missing.")
  var into: String

  @Option(help: "The backup's id; else the last one.")
  var backup: String?

  @Flag(name: .customLong("list"), help: "Only print what backups there are.")
  var lists = false

  @OptionGroup var progress: DiskProgress

  func run() throws {
    let record = try BackupRecord(of: source)
    if lists {
      for backup in record.backups {
        let disks = backup.disks.map { "\($0.device) \($0.parent == nil ? "full" : "incremental")" }
        print("\(backup.id): \(disks.joined(separator: ", "))")
      }
      return
    }
    let found = backup.map { id in record.backups.first { $0.id == id } } ?? record.backups.last
    guard let found else { throw Failure.backup(.noBackup(id: backup ?? "", path: record.path)) }
    try BackupFiles.makeFolder(into)
    let queue = try makeIOQueue()
    for disk in found.disks {
      let path = "\(into)/\(disk.device).qcow2"
      if BackupFiles.exists(path) { throw Failure.backup(.targetExists(path)) }
      do {
        try restore(record.folder + "/" + disk.file, to: path, queue)
      } catch {
        // A part of a disk is of no use.
        unlink(path)
        throw error
      }
    }
    try BackupFiles.replace("\(into)/configuration.json", found.configuration)
    progress.say("restored \(found.id); run it with:")
    progress.say(Self.command(found, folder: into))
  }

  private func restore(_ image: String, to path: String, _ queue: any IOQueue) throws {
    let source = try BlockChain(path: image, format: .qcow2, queue: queue)
    try withChain(source) {
      try HostFile.create(path)
      let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
      do {
        defer { file.close() }
        try Qcow2Image.create(Qcow2CreateOptions(size: source.top.size), in: file)
      }
      let result = try BlockChain(path: path, format: .qcow2, access: FileAccess(writable: true), queue: queue)
      try withChain(result) {
        var options = CopyJob.Options()
        options.targetReadsZero = true
        try progress.run(CopyJob(from: source.top, to: result.top, options), on: queue)
        try result.top.perform(.flush, on: queue)
      }
    }
  }

  /// How the machine was started, with the restored disks in place of the old ones.
  static func command(_ backup: BackupRecord.Backup, folder: String) -> String {
    var words = ["swiftvmm"]
    var isValue = false
    for argument in (backup.configuration["arguments"]?.arrayValue ?? []).compactMap(\.stringValue) {
      if isValue {
        isValue = false
      } else if argument == "--disk" || argument == "--control" {
        isValue = true
      } else if !argument.hasPrefix("--disk=") && !argument.hasPrefix("--control=") {
        words.append(quoted(argument))
      }
    }
    for disk in backup.disks { words += ["--disk", quoted("\(folder)/\(disk.device).qcow2,id=\(disk.device)")] }
    return words.joined(separator: " ")
  }

  private static func quoted(_ word: String) -> String {
    let isPlain =
      !word.isEmpty
      && word.utf8.allSatisfy { byte in
        byte >= 0x80 || (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte) || (0x61...0x7a).contains(byte)
          || "-._/,:=+@".utf8.contains(byte)
      }
    return isPlain
      ? word : "'" + word.split(separator: "'", omittingEmptySubsequences: false).joined(separator: "'\\''") + "'"
  }
}
