import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz", "disk.ext4"].allSatisfy { access(linux + $0, R_OK) == 0 }

/// Backups of a Linux guest that writes all the time.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct LinuxBackupTests {
  private let folder: TemporaryFolder
  private var disk: String { folder.path + "/disk" }

  init() throws {
    folder = try TemporaryFolder()
    let made = try hostTool(
      VMM.path, "disk", "create", "-q", "-f", "qcow2", "-b", linux + "disk.ext4", "-F", "raw", folder.path + "/disk")
    try #require(made.status == 0, "\(made.output)")
  }

  private static let start = """
    #!/bin/busybox sh
    /bin/busybox --install -s /bin
    export PATH=/bin
    mount -t proc proc /proc
    """

  /// The first program of a machine that boots from its disk.
  private static let booted = """
    \(start)
    echo "ROOT $(sed -n 's/^\\([^ ]*\\) \\/ \\(ext4\\) rw.*/\\1 \\2/p' /proc/mounts)"
    md5sum -c /sums >/tmp/checked && echo "WHOLE $(grep -c OK /tmp/checked)"
    echo "LIBRARIES $(fio --version)"
    echo written >/file && sync && echo "WRITES $(cat /file)"
    poweroff -f
    """

  /// Finds the root file system on the disk and goes on there.
  private static let bootsFromDisk = """
    \(start)
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    while read -r module; do insmod "/modules/$module"; done </modules/order
    mkdir /root
    mount -t ext4 /dev/vda /root
    mount --move /dev /root/dev
    exec switch_root /root /sbin/init
    """

  /// The initramfs with these programs besides.
  private func initramfs() throws -> String {
    let file = try linuxInitramfs(
      folder, ["booted": Self.booted, "boot-from-disk": Self.bootsFromDisk])
    return file
  }

  private func machine(_ append: String, disk: String? = nil) throws -> RunningVMM {
    try RunningVMM(
      [
        linux + "vmlinuz", "--initrd", initramfs(), "--engine", "soft", "--memory", "512M", "--time-limit", "300",
        "--append", "console=ttyS0 quiet \(append)",
      ] + (disk.map { ["--disk", $0 + ",id=d0"] } ?? []))
  }

  private func commands(_ commands: [String]) -> String { "virtio run=\"\(commands.joined(separator: "; "))\"" }

  /// A file system that can be booted from, to which files are written all the time.
  private func writer() throws -> RunningVMM {
    let loop = [
      "dd if=/dev/urandom of=/mnt/f$i bs=4k count=16 conv=fsync 2>/dev/null", "(cd /mnt && md5sum f$i) >> /mnt/sums",
      "sync", "echo synced-$i.", "i=$((i+1))",
    ]
    return try machine(
      commands([
        "mkdir /mnt", "mount -t ext4 /dev/vda /mnt", "mkdir -p /mnt/sbin /mnt/sys", "cp /bin/busybox /mnt/bin",
        "cp /booted /mnt/sbin/init", "i=0", "while [ $i -lt 1000 ]; do \(loop.joined(separator: "; ")); done",
        "sleep 1000",
      ]), disk: disk)
  }

  /// No agent holds it still, so the backup is as after a power cut: Linux boots from the restored disk, finds every file whole that
  /// was synced before, runs what is there, with its libraries, and writes.
  @Test func aMachineBootsFromItsBackup() throws {
    let writer = try writer()
    let target = folder.path + "/b/"
    for (round, synced) in [10, 30].enumerated() {
      #expect(writer.waitFor("synced-\(synced)."), "\(writer.text)")
      let backup = try VMM.run(
        ["backup", writer.socket, "-q", "--target", target] + (round == 1 ? ["--incremental"] : []))
      #expect(backup.status == 0 && backup.errors.isEmpty, "\(backup.errors)")
      let restored = try VMM.run("restore-backup", target, "--into", "\(folder.path)/again\(round)", "-q")
      #expect(restored.status == 0, "\(restored.errors)")
      let again = try machine("rdinit=/boot-from-disk", disk: "\(folder.path)/again\(round)/d0.qcow2")
      #expect(again.waitUntilExit() == 0, "\(again.text)")
      #expect(again.text.contains("ROOT /dev/vda ext4"), "\(again.text)")
      let whole = again.text.split(separator: "WHOLE ").last?.prefix { $0.isNumber }
      #expect(whole.flatMap { Int($0) } ?? 0 > synced, "\(again.text)")
      #expect(again.text.contains("LIBRARIES fio-") && again.text.contains("WRITES written"), "\(again.text)")
    }
    try writer.execute("quit")
    #expect(writer.waitUntilExit() == 0, "\(writer.text)")
  }

  /// Linux in a second machine mounts what is lent to it, for which it replays the journal, and writes: into a layer that is thrown
  /// away. The first machine's volume does not change, and its guest writes on.
  @Test func aSecondLinuxReplaysTheJournal() throws {
    let writer = try writer()
    let component = try machine(
      commands([
        "mkdir /mnt", "echo waiting", "until [ -b /dev/vda ]; do sleep 1; done", "cat /sys/block/vda/serial; echo",
        "mount -t ext4 /dev/vda /mnt", "dmesg | grep -o 'EXT4-fs (vda): recovery complete'",
        "cd /mnt && md5sum -c sums >/tmp/checked && echo WHOLE-$(grep -c OK /tmp/checked).",
        "echo replayed >/mnt/file; sync; cat /mnt/file; cd /; umount /mnt && echo done-$((1+1))",
        "while [ -b /dev/vda ]; do sleep 1; done",
      ]))
    #expect(component.waitFor("waiting"), "\(component.text)")
    #expect(writer.waitFor("synced-20."), "\(writer.text)")
    let backup = try BackgroundProcess(["backup", writer.socket, "-q", "--to-vm", component.socket])
    for _ in 0..<3000 where !component.text.contains("backup-d0") { usleep(10_000) }
    let hash = try hostTool("sha256sum", disk).output
    #expect(component.waitFor("done-2"), "\(component.text) \(backup.text)")
    #expect(component.text.contains("recovery complete") && component.text.contains("replayed"), "\(component.text)")
    let whole = component.text.split(separator: "WHOLE-").last?.prefix { $0.isNumber }
    #expect(whole.flatMap { Int($0) } ?? 0 >= 20, "\(component.text)")
    #expect(try hostTool("sha256sum", disk).output == hash)
    try component.execute("device_del", ["id": "backup-d0"])
    #expect(component.waitUntilExit() == 0, "\(component.text)")
    #expect(backup.waitUntilExit() == 0, "\(backup.text)")
    let count = writer.text.components(separatedBy: "synced-").count
    #expect(writer.waitFor("synced-", count: count + 3), "\(writer.text)")
    try writer.execute("quit")
    #expect(writer.waitUntilExit() == 0, "\(writer.text)")
  }
}

/// The initramfs of `scripts/fetch-linux` with more files, in a folder; each may be run.
func linuxInitramfs(_ folder: TemporaryFolder, _ files: [String: String], copying paths: [String] = []) throws -> String
{
  let tree = folder.path + "/tree"
  try FileManager.default.createDirectory(atPath: tree, withIntermediateDirectories: true)
  for (name, text) in files { _ = try folder.file("tree/" + name, Array(text.utf8)) }
  for path in paths { try #require(hostTool("cp", path, tree).status == 0) }
  let made = try hostTool(
    "sh", "-c",
    "cd \(tree) && chmod 755 * && find . | cpio --create --format=newc --quiet | gzip | cat \(linux)initramfs.gz - >../initramfs"
  )
  try #require(made.status == 0, "\(made.output)")
  return folder.path + "/initramfs"
}
