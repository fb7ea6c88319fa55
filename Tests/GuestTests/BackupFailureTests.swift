import Foundation
import Testing

/// What a backup does where the host fails it, and how much it moves.
@Suite(
  .enabled(
    if: VMM.isBuilt && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct BackupFailureTests {
  typealias Writer = BackupTests.Writer

  /// A file system of a size, until its owner goes.
  private final class SmallFileSystem {
    let path: String
    private let folder: TemporaryFolder

    init(_ kilobytes: Int) throws {
      folder = try TemporaryFolder()
      path = folder.path + "/mounted"
      try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
      let mounted = try hostTool("mount", "-t", "tmpfs", "-o", "size=\(kilobytes)K", "none", path)
      try #require(mounted.status == 0, "\(mounted.output)")
    }

    deinit { _ = try? hostTool("umount", "-l", path) }

    func resize(_ kilobytes: Int) throws {
      #expect(try hostTool("mount", "-o", "remount,size=\(kilobytes)K", path).status == 0)
    }
  }

  static let canMount = geteuid() == 0 && access("/bin/mount", X_OK) == 0

  @Test(.enabled(if: canMount, "mounts a tmpfs, which root may"), arguments: BackupTests.engines)
  func theTargetIsFull(engine: String) throws {
    let small = try SmallFileSystem(512)
    let writer = try Writer(engine)
    let failed = try writer.backUp("--target", small.path + "/b/")
    #expect(failed.status == 74, "\(failed.errors)")
    for part in [small.path + "/b/", "No space left on device", "was given up", "make room there"] {
      #expect(failed.errors.contains(part), "\(failed.errors)")
    }
    #expect(try FileManager.default.contentsOfDirectory(atPath: small.path + "/b").isEmpty)
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty)
    writer.goesOn()
    try small.resize(16384)
    let before = writer.machine.text
    #expect(try writer.backUp("--target", small.path + "/b/").status == 0)
    try BackupTests.verify(BackupTests.restore(small.path + "/b", writer.folder, "again"), flushed: before)
    let text = try writer.end()
    try BackupTests.verify(writer.images, flushed: text)
  }

  /// The guest stands still by the disk's policy, the line names the file, and with more room everything goes on.
  @Test(.enabled(if: canMount, "mounts a tmpfs, which root may"), arguments: BackupTests.engines)
  func theOverlaysFileSystemIsFull(engine: String) throws {
    let small = try SmallFileSystem(16384)
    let writer = try Writer(engine, in: small.path)
    // The disks are there; overlays have less room than what the guest writes.
    let used = try hostTool("du", "-sk", small.path).output.split(separator: "\t").first.flatMap { Int($0) }
    try small.resize(try #require(used) + 900)
    let backup = try BackgroundProcess([
      "backup", writer.socket, "-q", "--target", writer.folder.path + "/b/", "-r", "64K",
    ])
    let event = try writer.machine.event("BLOCK_IO_ERROR") { $0["nospace"] as? Bool == true }
    #expect(event["action"] as? String == "stop", "\(event)")
    let reason = event["reason"] as? String ?? ""
    #expect(reason.contains(".backup-overlay") && reason.contains("No space left"), "\(event)")
    _ = try writer.machine.event("STOP")
    let status = try writer.machine.execute("query-status") as? [String: Any]
    #expect(status?["status"] as? String == "io-error", "\(status ?? [:])")
    for _ in 0..<500 where !writer.machine.text.contains("stands still") { usleep(10_000) }
    let line = writer.machine.text.split(separator: "\n").first { $0.contains("stands still") } ?? ""
    #expect(line.contains(".backup-overlay") && line.contains("swiftvmm resume"), "\(line)")
    try small.resize(16384)
    try writer.machine.execute("cont")
    backup.signal(SIGINT)
    #expect(backup.waitUntilExit() == 130, "\(backup.text)")
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty, "\(writer.leftovers)")
    writer.goesOn()
    let text = try writer.end()
    #expect(text.components(separatedBy: "stands still").count == 2)
    try BackupTests.verify(writer.images, flushed: text, wasKilled: true)
  }

  /// No room for the way back either: nothing is lost, the line says what to do, and with room `--recover` ends it.
  @Test(.enabled(if: canMount, "mounts a tmpfs, which root may"))
  func theWayBackHasNoRoom() throws {
    let small = try SmallFileSystem(16384)
    let writer = try Writer("soft", in: small.path)
    let used = try hostTool("du", "-sk", small.path).output.split(separator: "\t").first.flatMap { Int($0) }
    try small.resize(try #require(used) + 900)
    let backup = try BackgroundProcess([
      "backup", writer.socket, "-q", "--target", writer.folder.path + "/b/", "-r", "256K",
    ])
    _ = try writer.machine.event("BLOCK_IO_ERROR") { $0["nospace"] as? Bool == true }
    let status = backup.waitUntilExit()
    if status != 0 {
      #expect(status == 74 && backup.text.contains("--recover"), "\(backup.text)")
      #expect(backup.text.contains(small.path), "\(backup.text)")
    }
    try small.resize(16384)
    let recovered = try VMM.run("backup", "--recover", writer.socket)
    #expect(recovered.status == 0, "\(recovered.errors)")
    try writer.machine.execute("cont")
    writer.goesOn()
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty, "\(writer.leftovers)")
    #expect(try writer.backUp("--target", writer.folder.path + "/c/").status == 0)
    let text = try writer.end()
    // Clusters that were taken before the room was gone may have no user.
    try BackupTests.verify(writer.images, flushed: text, wasKilled: true)
  }

  /// The server that takes the copy ends in the middle of it.
  @Test(arguments: BackupTests.engines)
  func thePeerIsGone(engine: String) throws {
    let writer = try Writer(engine)
    let raw = writer.folder.path + "/export.raw"
    try #require(hostTool("qemu-img", "create", "-q", "-f", "raw", raw, "32M").status == 0)
    let socket = writer.folder.path + "/nbd"
    let server = try BackgroundProcess(["-t", "-f", "raw", "-k", socket, raw], tool: "/usr/bin/qemu-nbd")
    for _ in 0..<1000 where !FileManager.default.fileExists(atPath: socket) { usleep(10_000) }
    let uri = "nbd+unix:///?socket=\(socket)"
    let backup = try BackgroundProcess([
      "backup", writer.socket, "-q", "--disk", "d1", "--target", uri, "-r", "256K",
    ])
    for _ in 0..<1000 where try writer.depths() != [0, 1] { usleep(10_000) }
    usleep(300_000)
    server.signal(SIGKILL)
    #expect(backup.waitUntilExit() == 74, "\(backup.text)")
    #expect(backup.text.contains(socket) && backup.text.contains("was given up"), "\(backup.text)")
    #expect(backup.text.split(separator: "\n").count == 1, "\(backup.text)")
    #expect(try writer.depths() == [0, 0])
    #expect(writer.leftovers.isEmpty)
    writer.goesOn()
    let text = try writer.end()
    try BackupTests.verify(writer.images, flushed: text)
  }

  /// A hundredth of a disk of 4 GiB is written anew: the increment moves that, and at most twice as much, and the restored disk is
  /// the machine's, byte for byte.
  @Test func anIncrementMovesWhatHasChanged() throws {
    let size: UInt64 = 4 << 30
    let folder = try TemporaryFolder()
    let disk = folder.path + "/disk"
    let target = folder.path + "/b/"
    try #require(hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", disk, "4G").status == 0)
    try #require(hostTool("qemu-io", "-c", "write -q -P 7 64M 256M", "-c", "write -q -P 8 3G 64M", disk).status == 0)
    // 8 KiB each.
    let records = size / 100 / 8192
    let machine = try RunningVMM([
      "disk", "--engine", "soft", "--time-limit", "300", "--disk", disk + ",id=d0", "--paused", "--append",
      "mode=write records=\(records) flush=0 sectors=16 passes=1000 rate=0",
    ])
    func moved(_ more: String...) throws -> UInt64 {
      let made = try VMM.run(["backup", machine.socket, "-q", "--json", "--target", target] + more)
      #expect(made.status == 0 && made.errors.isEmpty, "\(made.errors)")
      let json = try #require(try JSONSerialization.jsonObject(with: Data(made.output.utf8)) as? [String: Any])
      let disks = try #require(json["disks"] as? [[String: Any]])
      return try #require(disks.first?["moved"] as? UInt64)
    }
    #expect(try moved() >= 320 << 20)
    try machine.execute("cont")
    #expect(machine.waitFor("generation 1"), "\(machine.text)")
    try machine.execute("stop")
    let increment = try moved("--incremental")
    #expect(increment >= records * 8192 && increment <= size / 50, "\(increment)")
    #expect(try moved("--incremental") == 0)
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0)
    let restored = try VMM.run("restore-backup", target, "--into", folder.path + "/again", "-q")
    #expect(restored.status == 0, "\(restored.errors)")
    let compared = try hostTool("qemu-img", "compare", disk, folder.path + "/again/d0.qcow2")
    #expect(compared.status == 0, "\(compared.output)")
  }
}
