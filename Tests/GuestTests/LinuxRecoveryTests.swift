import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz", "disk.ext4"].allSatisfy { access(linux + $0, R_OK) == 0 }

/// A guest that gets snapshots of its own disk as second disks.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct LinuxRecoveryTests {
  /// `scripts/linux-recover` itself, which says what it has seen.
  @Test func aFileComesBackFromASnapshot() throws {
    let result = try hostTool("env", "SWIFTVMM=" + VMM.path, "bash", VMM.checkout + "/scripts/linux-recover")
    #expect(result.status == 0, "\(result.output)")
    #expect(result.output.contains("serial disk.qcow2"), "\(result.output)")
  }

  /// Each refusal with its line in the audit, and nothing else of the machine changed.
  @Test func whatIsNotTheGuestsIsRefused() throws {
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk"
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "16M").status == 0)
    let audit = folder.path + "/audit"
    func request(_ arguments: String) -> String { "swiftvmm-agent snapshots \(arguments)" }
    let before = [
      request("list"), request("attach --snapshot ../disk"), request("attach --snapshot other"),
      request("attach --before nonsense"), request("attach"), request("attach --before 1970-01-01T00:00:00Z"),
      request("detach --serial snapshot-9"), "echo REFUSED",
    ]
    let granted = Array(repeating: request("attach --snapshot disk"), count: 5) + ["echo ASKED", "sleep 1000"]
    let append = "console=ttyS0 quiet virtio run=\"\((before + ["sleep 3"] + granted).joined(separator: "; "))\""
    let machine = try RunningVMM([
      linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--memory", "512M", "--agent",
      "--recovery-audit", audit, "--time-limit", "300", "--disk", disk + ",id=d0", "--append", append,
    ])
    #expect(machine.waitFor("REFUSED"), "\(machine.text)")
    try machine.execute("x-swiftvmm-snapshot-right", ["id": "elsewhere", "allowed": false])
    try machine.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": folder.path + "/top"])
    let hash = try hostTool("sha256sum", disk).output
    #expect(machine.waitFor("ASKED"), "\(machine.text)")
    let lines = try String(contentsOfFile: audit, encoding: .utf8).split(separator: "\n").map {
      try #require(try JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any])
    }
    let refused = lines.compactMap { $0["refused"] as? String }
    #expect(refused.count == 7, "\(refused)")
    for reason in [
      "a snapshot's id is letters", "called other", "no time", "say which one", "before 1970-01-01T00:00:00Z",
      "attached as snapshot-9", "4 snapshots are attached",
    ] { #expect(refused.contains { $0.contains(reason) }, "\(reason): \(refused)") }
    #expect(lines.contains { $0["right"] as? String == "revoked" })
    #expect(lines.filter { ($0["granted"] as? [String: Any])?["serial"] != nil }.count == 4)
    let message = try machine.refusal("block-commit", ["device": "d0", "base": disk])
    #expect(message.contains("in use"), "\(message)")
    #expect(try hostTool("sha256sum", disk).output == hash)
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }
}
