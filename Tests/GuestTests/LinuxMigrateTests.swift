import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz", "disk.ext4"].allSatisfy { access(linux + $0, R_OK) == 0 }
private let hasTools: Bool = access("/usr/sbin/e2fsck", X_OK) == 0

/// Debian's kernel, with its agent and a mounted disk, moves while it works. `SWIFTVMM_LINUX_MOVES` sets how often.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt && hasTools, "needs the release build, scripts/build-guests and e2fsprogs"), .serialized)
struct LinuxMigrateTests {
  private static let moves =
    ProcessInfo.processInfo.environment["SWIFTVMM_LINUX_MOVES"].flatMap { Int($0) } ?? 4

  private func arguments(_ disk: String, cpus: Int) -> [String] {
    let commands = [
      "mkdir /mnt", "mount -t ext4 /dev/vda /mnt", "swiftvmm-agent &",
      // Files that were read, and a program on a disk that runs, for a hundredth of the time.
      "cat $(find /mnt -type f) $(find /mnt -type f) > /dev/null",
      "chroot /mnt /bin/fio --name=a --ioengine=cpuio --cpuload=1 --time_based --runtime=1000 > /dev/null &",
      "until grep -q libaio /proc/[0-9]*/maps; do sleep 1; done",
      "dd if=/dev/urandom of=/tmp/a bs=1k count=2048", "md5sum /tmp/a > /tmp/sum", "echo ready", "i=0",
      "while md5sum -c /tmp/sum > /tmp/log && cp /tmp/a /mnt/b && cmp /tmp/a /mnt/b; do i=$((i+1)); echo pass $i; done",
      "echo BROKEN",
    ]
    let script = commands.joined(separator: "; ").replacingOccurrences(of: "&;", with: "&")
    return [
      linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--cpus", "\(cpus)", "--memory",
      "512M",
      "--agent", "--time-limit", "600", "--disk", disk + ",id=d0", "--append",
      "console=ttyS0 quiet virtio run=\"\(script)\"",
    ]
  }

  private func state(_ machine: RunningVMM) throws -> [String: Any] {
    try #require(try machine.execute("query-migrate") as? [String: Any])
  }

  @Test(arguments: [1, 2])
  func linuxMovesWhileItWorks(cpus: Int) throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk"
    let made = try hostTool(
      VMM.path, "disk", "create", "-q", "-f", "qcow2", "-b", linux + "disk.ext4", "-F", "raw", disk)
    try #require(made.status == 0, "\(made.output)")
    let arguments = arguments(disk, cpus: cpus)
    var machine = try RunningVMM(arguments)
    #expect(machine.waitFor("pass 2"), "\(machine.text)")
    for index in 0..<Self.moves {
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try RunningVMM(arguments + ["--incoming", uri])
      // Every second time it goes on before its pages have come.
      let isPostCopy = index % 2 == 1 && PostCopyHost.hasFaults
      try machine.execute(
        "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": isPostCopy]]])
      let path = "\(folder.path)/trace\(index)"
      try machine.execute("migrate-set-parameters", ["x-swiftvmm-trace": path, "x-swiftvmm-hint-wait": 60_000])
      try machine.execute("migrate", ["uri": uri])
      if isPostCopy { try machine.execute("migrate-start-postcopy") }
      while let status = try state(machine)["status"] as? String, !["completed", "failed"].contains(status) {
        usleep(5000)
      }
      let result = try state(machine)
      try #require(result["status"] as? String == "completed", "\(result) \(machine.text.suffix(2000))")
      let own = try #require(result["x-swiftvmm"] as? [String: Any])
      // The agent has said which pages are free, and which hold files, of programs that run or of no matter.
      #expect(own["ignored"] as? Int ?? 0 > 10_000, "\(own)")
      let trace = try MigrationTraceReader(path, pages: 512 << 8)
      #expect(trace.firstRoundIsInOrder)
      if !isPostCopy {
        #expect(trace.sent.count { $0 == 0 } > 10_000)
        #expect(trace.first["prioritized"] ?? 0 > 0 && trace.first["deprioritized"] ?? 0 > 10_000, "\(trace.first)")
      }
      #expect(next.waitFor("pass", count: 2), "move \(index): \(next.text.suffix(2000))")
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0)
      machine = next
      #expect(try machine.execute("x-swiftvmm-agent", ["request": "ping"]) is [String: Any])
    }
    let text = machine.text
    for word in ["BROKEN", "FAILED", "BUG:", "Oops", "clocksource: timekeeping watchdog", "rcu_sched"] {
      #expect(!text.contains(word), "\(text.suffix(3000))")
    }
    try machine.execute("x-swiftvmm-agent", ["request": "fs-freeze"])
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
    let raw = folder.path + "/raw"
    #expect(try hostTool("qemu-img", "convert", "-O", "raw", disk, raw).status == 0)
    let checked = try hostTool("e2fsck", "-fn", raw)
    #expect(checked.status == 0, "\(checked.output)")
  }
}
