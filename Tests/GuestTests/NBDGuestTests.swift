import Foundation
import Testing

/// NBD from both sides of a machine: its disks behind a server, and its disks served while it runs.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/nbdcopy", X_OK) == 0 && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests, libnbd-bin and qemu-utils"), .serialized)
struct NBDGuestTests {
  private static let options = "disks=1 records=200 flush=10 sectors=16"

  private func image(_ folder: TemporaryFolder, _ name: String) throws -> String {
    let path = folder.path + "/" + name
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", path, "32M").status == 0)
    return path
  }

  /// A guest writes and verifies on a disk behind `disk serve`.
  @Test func aGuestsDiskMayBeBehindAServer() throws {
    let folder = try TemporaryFolder()
    let path = try image(folder, "disk")
    let server = Process()
    server.executableURL = URL(fileURLWithPath: VMM.path)
    server.arguments = ["disk", "serve", "--persistent", "--shared", "0", "--socket", folder.path + "/s", path]
    let output = Pipe()
    server.standardOutput = output
    try server.run()
    // The URI is printed when clients can connect.
    let uri = String(decoding: output.fileHandleForReading.availableData, as: UTF8.self)
      .trimmingCharacters(in: .newlines)
    try #require(uri.hasPrefix("nbd+unix:"))
    for mode in ["write", "verify"] {
      let run = try VMM.run([
        "run", "disk", "--engine", "soft", "--disk", "\(uri),format=raw", "--append", "mode=\(mode) \(Self.options)",
      ])
      #expect(run.status == 0, "\(mode): \(run.output) \(run.errors)")
    }
    server.terminate()
    server.waitUntilExit()
    #expect(server.terminationStatus == 0)
    let verified = try VMM.run([
      "run", "disk", "--engine", "soft", "--disk", path, "--append", "mode=verify \(Self.options)",
    ])
    #expect(verified.status == 0 && verified.output.contains("all passed"), "\(verified.output) \(verified.errors)")
  }

  /// What a client reads from a paused machine is what the image holds afterwards; it follows snapshots, and shows dirty
  /// bitmaps.
  @Test func aRunningMachineServesItsDisk() throws {
    let folder = try TemporaryFolder()
    let path = try image(folder, "disk")
    let machine = try RunningVMM([
      "disk", "--engine", "soft", "--time-limit", "300", "--disk", "\(path),id=d0", "--append",
      "mode=rewrite passes=100000 \(Self.options)",
    ])
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let socket = folder.path + "/nbd"
    let address: [String: Any] = ["type": "unix", "data": ["path": socket]]
    #expect(try machine.refusal("nbd-server-add", ["device": "d0"]).contains("not running"))
    try machine.execute("nbd-server-start", ["addr": address])
    #expect(try machine.refusal("nbd-server-start", ["addr": address]).contains("already running"))
    try machine.execute("block-dirty-bitmap-add", ["node": "d0", "name": "bits"])
    try machine.execute("nbd-server-add", ["device": "d0", "bitmap": "bits"])
    try machine.execute(
      "block-export-add", ["type": "nbd", "id": "e", "node-name": "d0", "name": "w", "writable": true])
    #expect(machine.waitFor("flushed", count: machine.text.components(separatedBy: "flushed").count + 1))
    let uri = "nbd+unix:///d0?socket=\(socket)"
    let dirty = try hostTool("nbdinfo", "--map=qemu:dirty-bitmap:bits", uri)
    #expect(dirty.status == 0 && dirty.output.contains("dirty"), "\(dirty.output)")
    let overlay = folder.path + "/overlay"
    try machine.execute("blockdev-snapshot-sync", ["device": "d0", "snapshot-file": overlay, "format": "qcow2"])
    #expect(machine.waitFor("flushed", count: machine.text.components(separatedBy: "flushed").count + 1))
    try machine.execute("stop")
    let copy = folder.path + "/copy"
    let copied = try hostTool("nbdcopy", uri, copy)
    #expect(copied.status == 0, "\(copied.output)")
    try machine.execute("nbd-server-remove", ["name": "d0"])
    _ = try machine.event("BLOCK_EXPORT_DELETED") { $0["id"] as? String == "d0" }
    let left = try #require(try machine.execute("query-block-exports") as? [[String: Any]])
    #expect(left.map { $0["id"] as? String } == ["e"])
    try machine.execute("nbd-server-stop")
    #expect(try hostTool("nbdinfo", uri).status != 0)
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text.suffix(2000))")
    let compared = try hostTool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", copy, overlay)
    #expect(compared.status == 0, "\(compared.output)")
  }
}
