import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz", "disk.ext4"].allSatisfy { access(linux + $0, R_OK) == 0 }

/// Backups of a Linux guest that writes all the time.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct LinuxBackupTests {
  private func machine(_ commands: [String], _ disk: String) throws -> RunningVMM {
    try RunningVMM([
      linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--memory", "512M", "--time-limit",
      "300", "--disk", disk + ",id=d0", "--append",
      "console=ttyS0 quiet virtio run=\"\(commands.joined(separator: "; "))\"",
    ])
  }

  /// No agent holds it still: the backup is as after a power cut, Linux mounts it and finds every file whole that was synced before.
  @Test func whatWasSyncedIsInTheBackup() throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk"
    let made = try hostTool(
      VMM.path, "disk", "create", "-q", "-f", "qcow2", "-b", linux + "disk.ext4", "-F", "raw", disk)
    try #require(made.status == 0, "\(made.output)")
    let loop = [
      "dd if=/dev/urandom of=/mnt/f$i bs=4k count=16 conv=fsync 2>/dev/null", "md5sum /mnt/f$i >> /mnt/sums", "sync",
      "echo synced-$i.", "i=$((i+1))",
    ]
    let writer = try machine(
      [
        "mkdir /mnt", "mount -t ext4 /dev/vda /mnt", "i=0",
        "while [ $i -lt 300 ]; do \(loop.joined(separator: "; ")); done", "sleep 1000",
      ], disk)
    let target = folder.path + "/b/"
    for (round, synced) in [10, 30].enumerated() {
      #expect(writer.waitFor("synced-\(synced)."), "\(writer.text)")
      let backup = try VMM.run(
        ["backup", writer.socket, "-q", "--target", target] + (round == 1 ? ["--incremental"] : []))
      #expect(backup.status == 0 && backup.errors.isEmpty, "\(backup.errors)")
      let restored = try VMM.run("restore-backup", target, "--into", "\(folder.path)/again\(round)", "-q")
      #expect(restored.status == 0, "\(restored.errors)")
      let reader = try machine(
        [
          "mkdir /mnt", "mount -t ext4 /dev/vda /mnt && echo mounted-$((1+1))",
          "md5sum -c /mnt/sums && echo WHOLE-$((1+1))",
        ], "\(folder.path)/again\(round)/d0.qcow2")
      #expect(reader.waitUntilExit() == 0, "\(reader.text)")
      #expect(reader.text.contains("mounted-2") && reader.text.contains("WHOLE-2"), "\(reader.text)")
      #expect(reader.text.contains("/mnt/f\(synced): OK"), "\(reader.text)")
    }
    try writer.execute("quit")
    #expect(writer.waitUntilExit() == 0, "\(writer.text)")
  }
}
