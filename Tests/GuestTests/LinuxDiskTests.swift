import Foundation
import Testing

/// Debian's kernel, its initramfs and a file system with fio, as `scripts/fetch-linux` leaves them.
private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz", "disk.ext4"].allSatisfy { access(linux + $0, R_OK) == 0 }
private let hasTools: Bool = access("/usr/sbin/e2fsck", X_OK) == 0 && access("/usr/bin/qemu-img", X_OK) == 0

/// Linux's own virtio-blk driver and ext4 on our disks, on the software engine.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt && hasTools, "needs the release build, scripts/build-guests, e2fsprogs and qemu-utils"),
  .serialized)
struct LinuxDiskTests {
  private func arguments(_ commands: [String], cpus: Int, disks: [String]) -> [String] {
    let append = "console=ttyS0 quiet virtio run=\"\(commands.joined(separator: "; "))\""
    return [
      "run", linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--memory", "512M", "--cpus",
      "\(cpus)", "--time-limit", "300", "--append", append,
    ] + disks.flatMap { ["--disk", $0] }
  }

  private static let mount = [
    "mkdir /mnt", "mount -t ext4 /dev/vda /mnt && echo mounted", "mount -t devtmpfs dev /mnt/dev",
    "mount -t proc proc /mnt/proc",
  ]
  private static let unmount = ["umount /mnt/dev /mnt/proc /mnt && echo unmounted"]

  /// A disk with fio's file system: a copy of it, or an overlay.
  private func disk(_ folder: TemporaryFolder, format: String) throws -> String {
    let path = folder.path + "/disk"
    let made =
      format == "raw"
      ? try hostTool("cp", "--sparse=always", linux + "disk.ext4", path)
      : try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", "-b", linux + "disk.ext4", "-F", "raw", path)
    try #require(made.status == 0, "\(made.output)")
    return path
  }

  /// The file system as QEMU reads it.
  private func fileSystem(_ disk: String, format: String) throws -> String {
    // What comes next does not wait until the kernel has ended a killed process's transfers.
    try #require(hostTool(VMM.path, "disk", "info", disk).status == 0)
    if format == "raw" { return disk }
    let checked = try hostTool("qemu-img", "check", disk)
    #expect(checked.status == 0 || checked.status == 3, "\(checked.output)")
    let converted = try hostTool("qemu-img", "convert", "-O", "raw", disk, disk + ".raw")
    try #require(converted.status == 0, "\(converted.output)")
    return disk + ".raw"
  }

  private func file(_ path: String, in fileSystem: String) throws -> Data {
    let dumped = try hostTool("/usr/sbin/debugfs", "-R", "dump \(path) \(fileSystem).file", fileSystem)
    try #require(dumped.status == 0, "\(dumped.output)")
    return try Data(contentsOf: URL(fileURLWithPath: fileSystem + ".file"))
  }

  @Test(arguments: [("raw", 1), ("qcow2", 1), ("qcow2", 2)])
  func fioVerifiesOnExt4(format: String, cpus: Int) throws {
    let folder = try TemporaryFolder()
    let disk = try disk(folder, format: format)
    let pattern = try folder.file("pattern", (0..<(2 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 0x9e37_79b1 >> 13) })
    let fio = [
      "chroot /mnt /bin/fio --name=check --directory=/data --size=8M --bs=4k --rw=randwrite --ioengine=libaio",
      "--iodepth=16 --direct=1 --fsync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0",
      "--output=/tmp/fio.txt",
    ].joined(separator: " ")
    let commands =
      Self.mount + [
        fio, "echo fio:$?", "grep err= /mnt/tmp/fio.txt", "ls /sys/block/vda/mq | wc -l | sed s/^/queues:/",
        "echo serial:$(cat /sys/block/vdb/serial)", "echo cache:$(cat /sys/block/vda/queue/write_cache)",
        "echo readonly:$(cat /sys/block/vdb/ro)", "dd if=/dev/vdb of=/mnt/data/copy bs=64k 2>/dev/null", "sync",
        "md5sum /mnt/data/check.0.0", "rm /mnt/tmp/fio.txt", "fstrim /mnt",
        "echo trimmed:$?",
      ] + Self.unmount
    let result = try VMM.run(
      arguments(
        commands, cpus: cpus,
        disks: ["\(disk),format=\(format)", "\(pattern),format=raw,id=pattern,readonly=on"]))
    let text = result.output
    #expect(result.status == 0, "\(text.suffix(4000)) \(result.errors)")
    for line in [
      "mounted", "fio:0", "err= 0", "queues:\(cpus)", "serial:pattern", "cache:write back", "readonly:1", "trimmed:0",
      "unmounted",
    ] {
      #expect(text.contains(line), "\(line) in \(text.suffix(4000))")
    }
    #expect(!text.contains("I/O error"), "\(text.suffix(4000))")

    let fileSystem = try fileSystem(disk, format: format)
    let checked = try hostTool("/usr/sbin/e2fsck", "-fn", fileSystem)
    #expect(checked.status == 0, "\(checked.output)")
    #expect(try file("/data/copy", in: fileSystem) == Data(contentsOf: URL(fileURLWithPath: pattern)))
    _ = try file("/data/check.0.0", in: fileSystem)
    let sum = try hostTool("md5sum", fileSystem + ".file").output.prefix(32)
    #expect(text.contains("\(sum)  /mnt/data/check.0.0"), "\(text.suffix(4000))")
  }

  /// Snapshots, merges in every direction and a hot-plugged disk, while fio writes and verifies on ext4.
  @Test func layersChangeUnderFio() throws {
    let folder = try TemporaryFolder()
    let disk = try disk(folder, format: "qcow2")
    let pattern = try folder.file("pattern", (0..<(1 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 0x9e37_79b1 >> 13) })
    let fio = [
      "chroot /mnt /bin/fio --name=check --directory=/data --size=4M --bs=4k --rw=randwrite --ioengine=libaio",
      "--iodepth=16 --direct=1 --fsync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0",
      "--output=/tmp/fio.txt",
    ].joined(separator: " ")
    let commands =
      Self.mount + [
        "n=0; while [ ! -e /sys/block/vdb ]; do \(fio) || break; n=$((n+1)); echo round:$n; done", "echo fio:$?",
        "echo plugged:$(md5sum < /dev/vdb)", "md5sum /mnt/data/check.0.0",
      ] + Self.unmount
    let all = arguments(commands, cpus: 1, disks: ["\(disk),format=qcow2,id=d0"])
    let machine = try RunningVMM(Array(all.dropFirst()))
    func goesOn() {
      let rounds = machine.text.components(separatedBy: "round:").count - 1
      #expect(machine.waitFor("round:", count: rounds + 1), "\(machine.text.suffix(2000))")
    }
    func snapshot(_ name: String) throws {
      try machine.execute(
        "blockdev-snapshot-sync",
        ["device": "d0", "snapshot-file": "\(folder.path)/\(name)", "snapshot-node-name": name])
    }
    func completes(_ event: String = "BLOCK_JOB_COMPLETED") throws {
      let data = try machine.event(event)
      #expect(data["error"] == nil, "\(data)")
    }
    goesOn()
    for name in ["s1", "s2", "s3"] {
      try snapshot(name)
      goesOn()
    }
    try machine.execute("block-commit", ["device": "d0", "top-node": "s2", "base-node": "s1"])
    try completes()
    goesOn()
    try machine.execute("block-stream", ["device": "d0", "base": disk])
    try completes()
    goesOn()
    try snapshot("s4")
    goesOn()
    try machine.execute("block-commit", ["device": "d0", "base": disk])
    try completes("BLOCK_JOB_READY")
    try machine.execute("block-job-complete", ["device": "d0"])
    try completes()
    goesOn()
    try machine.execute(
      "blockdev-add", ["driver": "raw", "node-name": "p", "file": ["driver": "file", "filename": pattern]])
    try machine.execute("device_add", ["driver": "virtio-blk-pci", "drive": "p", "id": "p0"])
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(4000))")
    let text = machine.text
    #expect(text.contains("fio:0") && text.contains("unmounted"), "\(text.suffix(4000))")
    #expect(!text.contains("I/O error"), "\(text.suffix(4000))")
    #expect(text.contains("plugged:\(try hostTool("md5sum", pattern).output.prefix(32))"), "\(text.suffix(4000))")

    let fileSystem = try fileSystem(disk, format: "qcow2")
    let checked = try hostTool("/usr/sbin/e2fsck", "-fn", fileSystem)
    #expect(checked.status == 0, "\(checked.output)")
    _ = try file("/data/check.0.0", in: fileSystem)
    let sum = try hostTool("md5sum", fileSystem + ".file").output.prefix(32)
    #expect(text.contains("\(sum)  /mnt/data/check.0.0"), "\(text.suffix(4000))")
  }

  /// The VMM is killed while Linux writes: the journal is replayed, and every file that was synced is there.
  @Test(arguments: ["raw", "qcow2"])
  func syncedFilesSurviveAKill(format: String) throws {
    let folder = try TemporaryFolder()
    let disk = try disk(folder, format: format)
    let loop =
      "i=0; while true; do i=$((i+1)); seq $i $((i+20000)) > /mnt/data/f$i; sync; "
      + "echo synced:$i:$(md5sum < /mnt/data/f$i); done"
    let process = Process()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments = arguments(Self.mount + [loop], cpus: 1, disks: ["\(disk),format=\(format)"])
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = output
    try process.run()
    var text = ""
    while !text.contains("synced:9:") {
      let data = output.fileHandleForReading.availableData
      if data.isEmpty { break }
      text += String(decoding: data, as: UTF8.self)
    }
    kill(process.processIdentifier, SIGKILL)
    text += String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    #expect(process.terminationStatus == SIGKILL, "\(text.suffix(4000))")

    let fileSystem = try fileSystem(disk, format: format)
    // Replays the journal, as the next mount would; then nothing is left to mend.
    _ = try hostTool("/usr/sbin/e2fsck", "-p", fileSystem)
    let checked = try hostTool("/usr/sbin/e2fsck", "-fn", fileSystem)
    #expect(checked.status == 0, "\(checked.output)")
    var synced = 0
    for line in text.split(whereSeparator: \.isNewline) where line.hasPrefix("synced:") {
      let parts = line.split(separator: ":")
      guard parts.count == 3, parts[2].count >= 32 else { continue }
      _ = try file("/data/f\(parts[1])", in: fileSystem)
      #expect(try hostTool("md5sum", fileSystem + ".file").output.prefix(32) == parts[2].prefix(32), "\(line)")
      synced += 1
    }
    #expect(synced >= 8)
  }
}
