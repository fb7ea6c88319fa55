import ArgumentParser
import BlockLayer
import JSON

/// `swiftvmm backup`: a machine's disks at one instant, while it runs.
struct BackupCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "backup",
    abstract: "Back up the disks of a running machine, all as they are at one instant, while the guest goes on.",
    discussion: """
      Example: swiftvmm backup /run/vm.sock --target /backups/vm/
      Later, what has changed since: swiftvmm backup /run/vm.sock --target /backups/vm/ --incremental
      After a backup that was cut off: swiftvmm backup --recover /run/vm.sock, or with the disk's file where the machine \
      has ended.
      """)

  @Argument(help: "The socket that run --control was given; with --recover, or a disk's file.")
  var socket: String

  @Option(help: "A folder, a new file for one disk, or an nbd URI.")
  var target: String?

  @Flag(help: "Copy what has changed since the last backup in the target's folder.")
  var incremental = false

  @Option(help: "Only this disk; repeatable.")
  var disk: [String] = []

  @Option(
    name: .customLong("to-vm"),
    help: "Plug the disks' state into the machine with this control socket, until it lets go of them.")
  var appliance: String?

  @Flag(help: "End or undo a backup that was cut off.")
  var recover = false

  @Flag(help: "Print what was done as JSON.")
  var json = false

  @Option(name: .customLong("timeout"), help: "Seconds to wait for each answer of the machine.")
  var seconds = 120

  @OptionGroup var progress: DiskProgress

  func validate() throws {
    if !recover, target == nil, appliance == nil { throw ValidationError("name a --target, or a machine with --to-vm") }
    if recover, target != nil || appliance != nil || incremental || !disk.isEmpty {
      throw ValidationError("--recover takes nothing but the socket or the disk's file")
    }
    if incremental, target == nil { throw ValidationError("--incremental needs a --target, a folder") }
    if !(1...86400).contains(seconds) {
      throw ValidationError("--timeout is 1 to 86400 seconds, not \(seconds)")
    }
  }

  func run() throws {
    if recover { return try recoverAll() }
    BackupCancel.listen()
    var options = BackupSession.Options()
    options.disks = disk
    options.target = target
    options.isIncremental = incremental
    options.appliance = appliance
    options.timeout = seconds
    let machine = try BackupMachine(socket, timeout: seconds)
    let (id, disks) = try BackupSession(machine, options, progress: progress).run()
    if json {
      let list = disks.map { disk -> JSONValue in
        [
          "device": .string(disk.device), "size": JSONValue(disk.size), "moved": JSONValue(disk.moved),
          "incremental": .bool(disk.isIncremental),
        ]
      }
      return print((["id": .string(id), "disks": .array(list)] as JSONValue).serialized(pretty: true))
    }
    for disk in disks {
      progress.say(
        "\(disk.device): \(readableSize(disk.moved)) of \(readableSize(disk.size)) moved\(disk.isIncremental ? " (incremental)" : "")"
      )
    }
    progress.say("backup \(id)")
  }

  private func recoverAll() throws {
    let path = socket.hasPrefix("unix:") ? String(socket.dropFirst(5)) : socket
    if BackupFiles.isSocket(path) || !BackupFiles.exists(path) {
      let ids = try BackupRecovery.recover(BackupMachine(path, timeout: seconds))
      for id in ids { progress.say("recovered from backup \(id)") }
      if ids.isEmpty { progress.say("nothing to recover") }
      return
    }
    let merged = try BackupRecovery.recover(image: path)
    for overlay in merged { progress.say("merged \(overlay)") }
    if merged.isEmpty { progress.say("nothing to merge") }
  }
}
