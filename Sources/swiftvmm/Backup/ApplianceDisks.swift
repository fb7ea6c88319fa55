import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// A backup's temporary snapshots as hot-plugged disks of a second machine.
final class ApplianceDisks {
  private let machine: BackupMachine
  private let journal: BackupJournal
  private var plugged: [String] = []

  init(_ socket: String, _ journal: BackupJournal, timeout: Int) throws(Failure) {
    machine = try BackupMachine(socket, timeout: timeout)
    self.journal = journal
  }

  /// Plugs the disks in and waits until the second machine has let go of them, or has ended.
  func lend() throws(Failure) {
    do throws(Failure) {
      for disk in journal.disks { try plugIn(disk) }
      try waitUntilGone(isAsked: false)
    } catch {
      // What is left there must not hold the snapshots.
      for name in plugged { _ = try? machine.execute("device_del", ["id": .string(name)]) }
      try? waitUntilGone(isAsked: true)
      throw error
    }
  }

  private func plugIn(_ disk: BackupJournal.Disk) throws(Failure) {
    let uri: String
    do throws(HostError) {
      uri = NBDURI(try StreamEndpoint("unix:" + journal.socket), export: disk.name).description
    } catch {
      throw .host(error)
    }
    try machine.execute(
      "blockdev-add",
      ["driver": "raw", "node-name": .string(disk.name), "file": ["driver": "file", "filename": .string(uri)]])
    plugged.append(disk.name)
    try machine.execute(
      "device_add",
      ["driver": "virtio-blk-pci", "id": .string(disk.name), "drive": .string(disk.name), "serial": .string(disk.name)])
  }

  /// `isAsked`: the second machine has been asked to let go, and gets 30 seconds for it.
  private func waitUntilGone(isAsked: Bool) throws(Failure) {
    let deadline = monotonicNanoseconds() + 30_000_000_000
    while !isAsked || monotonicNanoseconds() < deadline {
      if !isAsked { try BackupCancel.check() }
      let disks: [BackupMachine.Disk]
      do throws(Failure) { disks = try machine.describe().disks } catch {
        // It has ended, and its connections with it.
        if case .backup(.machine(.closed(_))) = error { return }
        throw error
      }
      if !disks.contains(where: { plugged.contains($0.device) }) { break }
      usleep(50_000)
    }
    for name in plugged { _ = try? machine.execute("blockdev-del", ["node-name": .string(name)]) }
    plugged = []
  }
}
