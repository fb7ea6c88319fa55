import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz", "disk.ext4"].allSatisfy { access(linux + $0, R_OK) == 0 }
private let package = VMM.checkout + "/build/agent/swiftvmm-agent.deb"
private let hasTools: Bool = access("/usr/sbin/e2fsck", X_OK) == 0

/// The agent in Debian's kernel, over its own virtio-console driver.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt && hasTools, "needs the release build, scripts/build-guests and e2fsprogs"), .serialized)
struct LinuxAgentTests {
  private func arguments(
    _ commands: [String], disks: [String] = [], initramfs: String = linux + "initramfs.gz"
  ) -> [String] {
    let append = "console=ttyS0 quiet virtio run=\"\(commands.joined(separator: "; "))\""
    return [
      linux + "vmlinuz", "--initrd", initramfs, "--engine", "soft", "--memory", "512M", "--agent",
      "--time-limit", "300", "--append", append,
    ] + disks.flatMap { ["--disk", $0] }
  }

  private func state(_ machine: RunningVMM) throws -> [String: Any] {
    try #require(try machine.execute("x-swiftvmm-query-agent") as? [String: Any])
  }

  @Test func theAgentAnswersWhateverCameBeforeIt() throws {
    let garbage = "for p in /sys/class/virtio-ports/*; do dd if=/dev/urandom of=/dev/${p##*/} bs=1k count=256; done"
    let machine = try RunningVMM(
      arguments([
        "cat /sys/class/virtio-ports/*/name", garbage, "echo garbage sent",
        "swiftvmm-agent ask ping '{\\\"a\\\": 7}'", "swiftvmm-agent ask nothing", "echo asked",
        "swiftvmm-agent & sleep 1000",
      ]))
    #expect(machine.waitFor("garbage sent"), "\(machine.text)")
    #expect(machine.waitFor("asked"), "\(machine.text)")
    #expect(machine.text.contains("org.swiftvmm.agent.0"))
    #expect(machine.text.contains("unknown request nothing"), "\(machine.text)")
    for _ in 0..<2000 where try state(machine)["hello"] as? [String: Any] == nil { usleep(10_000) }
    let state = try state(machine)
    #expect((state["hello"] as? [String: Any])?["system"] as? String == "linux")
    #expect((state["malformed"] as? Int ?? 0) > 100)
    #expect(try machine.execute("x-swiftvmm-agent", ["request": "ping"]) is [String: Any])
    #expect(try machine.refusal("x-swiftvmm-agent", ["request": "nothing"]).contains("unknown request"))
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }

  /// The Debian package's unit runs the agent, others ask the host through it at the same time, and it is there again whenever the
  /// guest has started again.
  @Test(.enabled(if: access(package, R_OK) == 0, "needs scripts/build-agent"))
  func thePackageServesAndAsks() throws {
    let folder = try TemporaryFolder()
    let script = """
      dpkg-deb -x /swiftvmm-agent.deb / && echo unpacked
      $(sed -n s/^ExecStart=//p /usr/lib/systemd/system/swiftvmm-agent.service) &
      until [ -S /run/swiftvmm-agent.socket ]; do sleep 1; done
      ls -l /run/swiftvmm-agent.socket
      agent=/usr/sbin/swiftvmm-agent
      $agent snapshots list
      $agent ask nothing
      for turn in 10 11 12 13 14 15 16 17 18 19; do $agent ask ping --turn $turn || echo LOST; done
      echo ASKED
      sleep 3
      reboot -f
      """
    let initramfs = try linuxInitramfs(folder, ["script": script], copying: [package])
    let machine = try RunningVMM(arguments(["sh /script"], initramfs: initramfs))
    for round in 1...2 {
      try #require(machine.waitFor("srw-------", count: round), "\(machine.text)")
      for _ in 0..<1000 where try state(machine)["hello"] as? [String: Any] == nil { usleep(10_000) }
      for _ in 0..<20 { try machine.execute("x-swiftvmm-agent", ["request": "ping"]) }
      #expect(machine.waitFor("ASKED", count: round), "\(machine.text)")
      for part in ["unknown request nothing", "\"snapshots\"", "19}"] {
        #expect(machine.text.components(separatedBy: part).count == round + 1, "\(part): \(machine.text)")
      }
    }
    #expect(!machine.text.contains("LOST"), "\(machine.text)")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }

  /// A backup of a mounted file system holds what was written to it before, and needs no recovery.
  @Test func aBackupIsOfFrozenFileSystems() throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk"
    let made = try hostTool(
      VMM.path, "disk", "create", "-q", "-f", "qcow2", "-b", linux + "disk.ext4", "-F", "raw", disk)
    try #require(made.status == 0, "\(made.output)")
    let machine = try RunningVMM(
      arguments(
        [
          "mkdir /mnt", "mount -t ext4 /dev/vda /mnt && echo mounted", "swiftvmm-agent & sleep 1",
          "i=0; while echo line $i >> /mnt/log; do i=$((i+1)); [ $((i % 100)) = 0 ] && echo written; done",
        ], disks: [disk + ",id=d0"]))
    #expect(machine.waitFor("written"), "\(machine.text)")
    let backup = try VMM.run("backup", machine.socket, "-q", "--target", folder.path + "/b/")
    #expect(backup.status == 0 && backup.errors.isEmpty, "\(backup.errors)")
    let restored = try VMM.run("restore-backup", folder.path + "/b", "--into", folder.path + "/again", "-q")
    #expect(restored.status == 0, "\(restored.errors)")
    let raw = folder.path + "/raw"
    try #require(hostTool(VMM.path, "disk", "convert", "-q", folder.path + "/again/d0.qcow2", raw).status == 0)
    let header = try hostTool("/usr/sbin/dumpe2fs", "-h", raw)
    #expect(header.output.contains("has_journal") && !header.output.contains("needs_recovery"), "\(header.output)")
    let checked = try hostTool("/usr/sbin/e2fsck", "-f", "-n", raw)
    #expect(checked.status == 0, "\(checked.output)")
    let log = try hostTool("/usr/sbin/debugfs", "-R", "cat /log", raw)
    #expect(log.output.contains("line 99\n"), "\(log.output.suffix(200))")
    // Nobody thaws what a host that is gone has frozen: the guest does, after 10 seconds.
    #expect(try machine.execute("x-swiftvmm-agent", ["request": "fs-freeze"]) as? [String: Int] == ["frozen": 1])
    sleep(1)
    let count = machine.text.components(separatedBy: "written").count
    sleep(3)
    #expect(machine.text.components(separatedBy: "written").count == count)
    #expect(machine.waitFor("written", count: count), "\(machine.text)")
    #expect(try machine.execute("x-swiftvmm-agent", ["request": "fs-thaw"]) as? [String: Int] == ["thawed": 0])
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }
}
