import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz"].allSatisfy { access(linux + $0, R_OK) == 0 }

/// Disks that come and go while the guest runs.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct HotplugTests {
  static let engines: [String] = VMM.hasKVM ? ["soft", "kvm"] : ["soft"]

  private func image(_ folder: TemporaryFolder, _ name: String) throws -> String {
    let path = folder.path + "/" + name
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", path, "16M").status == 0)
    return path
  }

  private func plugIn(_ machine: RunningVMM, _ id: String, _ path: String) throws {
    let file = ["driver": "file", "filename": path]
    try machine.execute("blockdev-add", ["driver": "qcow2", "node-name": "n-\(id)", "file": file])
    try machine.execute("device_add", ["driver": "virtio-blk-pci", "id": id, "drive": "n-\(id)"])
  }

  private func unplug(_ machine: RunningVMM, _ id: String) throws {
    try machine.execute("device_del", ["id": id])
    #expect(try machine.event("DEVICE_DELETED")["device"] as? String == id)
    try machine.execute("blockdev-del", ["node-name": "n-\(id)"])
  }

  @Test(arguments: engines, ["split", "packed"])
  func aGuestUsesWhatIsPluggedIn(engine: String, queue: String) throws {
    let folder = try TemporaryFolder()
    let images = [try image(folder, "a"), try image(folder, "b")]
    let options = "queue=\(queue) records=100 flush=10"
    let machine = try RunningVMM([
      "disk", "--engine", engine, "--time-limit", "120", "--append", "mode=plugged plugs=4 \(options)",
    ])
    // The first disk comes twice: what was flushed before it went is there again.
    for (round, image) in [images[0], images[1], images[0]].enumerated() {
      #expect(machine.waitFor("waiting for a disk", count: round + 1))
      try plugIn(machine, "disk\(round)", image)
      #expect(machine.waitFor("flushed 100 generation", count: 2 * (round + 1)), "\(machine.text)")
      #expect(try machine.refusal("blockdev-del", ["node-name": "n-disk\(round)"]).contains("in use"))
      try unplug(machine, "disk\(round)")
    }
    #expect(machine.waitFor("waiting for a disk", count: 4))
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    #expect(machine.text.contains("found 100 of 100 records"), "\(machine.text)")
    for image in images {
      let checked = try hostTool("qemu-img", "check", image)
      #expect(checked.status == 0, "\(checked.output)")
      let verified = try VMM.run(
        "run", "disk", "--engine", "soft", "--disk", image, "--append", "mode=verify \(options)")
      #expect(verified.status == 0 && verified.output.contains("found 100 of 100"), "\(verified.output)")
    }
  }

  /// Debian's own drivers: ACPI's hot-plug finds the disk, and gives it up when it is asked to.
  @Test(.enabled(if: isFetched, "needs scripts/fetch-linux"), arguments: [1, 2])
  func linuxUsesWhatIsPluggedIn(cpus: Int) throws {
    let folder = try TemporaryFolder()
    let image = try image(folder, "disk")
    let commands = [
      "echo READY-$((1+1))", "while [ ! -e /dev/vda ]; do mdev -s 2>/dev/null; sleep 0.1; done",
      "dd if=/bin/busybox of=/dev/vda bs=64k conv=fsync 2>/dev/null", "echo serial:$(cat /sys/block/vda/serial)",
      "head -c $(stat -c %s /bin/busybox) /dev/vda | md5sum", "md5sum < /bin/busybox", "echo WRITTEN-$((1+1))",
      "while [ -e /sys/block/vda ]; do sleep 0.1; done", "echo GONE-$((1+1))",
    ]
    let machine = try RunningVMM([
      linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--memory", "512M", "--cpus",
      "\(cpus)", "--time-limit", "120", "--append",
      "console=ttyS0 quiet virtio run=\"\(commands.joined(separator: "; "))\"",
    ])
    #expect(machine.waitFor("READY-2"), "\(machine.text)")
    try plugIn(machine, "plugged", image)
    #expect(machine.waitFor("WRITTEN-2"), "\(machine.text)")
    #expect(machine.text.contains("serial:plugged"), "\(machine.text)")
    try unplug(machine, "plugged")
    #expect(machine.waitFor("GONE-2"), "\(machine.text)")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    let sums = machine.text.split(whereSeparator: \.isNewline).filter { $0.hasSuffix("  -") }
    #expect(sums.count == 2 && sums[0] == sums[1], "\(machine.text)")
    let checked = try hostTool("qemu-img", "check", image)
    #expect(checked.status == 0, "\(checked.output)")
  }

  @Test func whatCannotBePluggedInIsRefused() throws {
    let folder = try TemporaryFolder()
    let image = try image(folder, "disk")
    let machine = try RunningVMM(["ticks", "--engine", "soft", "--paused"])
    func refused(_ command: String, _ arguments: [String: Any], _ part: String) throws {
      let text = try machine.refusal(command, arguments)
      #expect(text.contains(part), "\(text)")
    }
    let file = ["driver": "file", "filename": image]
    try refused(
      "blockdev-add", ["driver": "qcow2", "node-name": "n", "file": ["driver": "file", "filename": image + "0"]],
      "No such file")
    try refused("blockdev-add", ["driver": "vmdk", "node-name": "n", "file": file], "vmdk")
    try machine.execute("blockdev-add", ["driver": "qcow2", "node-name": "n", "file": file])
    try refused("blockdev-add", ["driver": "qcow2", "node-name": "n", "file": file], "already")
    try refused("blockdev-add", ["driver": "qcow2", "node-name": "m", "file": file], "in use by another process")
    try refused("device_add", ["driver": "e1000", "id": "d", "drive": "n"], "e1000")
    try refused("device_add", ["driver": "virtio-blk-pci", "id": "d", "drive": "m"], "'m'")
    try refused("device_del", ["id": "d"], "'d' not found")
    try machine.execute("device_add", ["driver": "virtio-blk-pci", "id": "d", "drive": "n"])
    try refused("device_add", ["driver": "virtio-blk-pci", "id": "e", "drive": "n"], "in use")
    try refused("blockdev-del", ["node-name": "n"], "in use")
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
  }
}
