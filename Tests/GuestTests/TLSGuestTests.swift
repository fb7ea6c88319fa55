import Foundation
import TestCertificates
import Testing

/// The real executable with TLS: machines and disks on their way, and sides that do not fit.
@Suite(
  .enabled(
    if: VMM.isBuilt && TestCertificates.canBeMade && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, scripts/build-guests, openssl and qemu-utils"), .serialized)
struct TLSGuestTests {
  private let folder: TemporaryFolder
  private let certificates: TestCertificates

  init() throws {
    folder = try TemporaryFolder()
    certificates = try TestCertificates()
  }

  private let dirty = [
    "dirty", "--engine", "soft", "--memory", "96M", "--time-limit", "600", "--append",
    "set=16 fill=16 readonly=4 free=4 reuse=50 pattern=hot seconds=0 jump=20000 skew=20000",
  ]

  /// Back and forth with several links, and with pages that follow.
  @Test(arguments: PostCopyHost.hasFaults ? [false, true] : [false])
  func aBusyGuestMovesBackAndForth(postCopy: Bool) throws {
    var machine = try RunningVMM(dirty)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    for index in 0..<3 {
      let isUnix = index % 2 == 0
      let uri = isUnix ? "unix:\(folder.path)/move" : "tcp:127.0.0.1:\(try freePort())"
      let next = try RunningVMM(dirty + ["--incoming", uri, "--tls-creds", certificates.path])
      let moved = try hostTool(
        [VMM.path, "migrate", machine.socket, uri, "--tls-creds", certificates.path, "--links", "3"]
          + (isUnix ? ["--tls-hostname", "localhost"] : []) + (postCopy ? ["--postcopy"] : []))
      try #require(moved.status == 0, "\(moved.output) \(machine.text) \(next.text)")
      #expect(machine.waitUntilExit() == 0, "\(machine.text)")
      #expect(next.waitFor("dirty: pass", count: 2), "\(next.text)")
      #expect(!next.text.contains("FAIL"), "\(next.text)")
      machine = next
    }
    try machine.execute("quit")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
  }

  /// Whoever does not fit is told why in one line; the machine runs on, and the destination takes the next one.
  @Test func whoDoesNotFitIsTurnedAway() throws {
    let other = try TestCertificates()
    let machine = try RunningVMM(dirty)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    let uri = "tcp:127.0.0.1:\(try freePort())"
    let next = try RunningVMM(dirty + ["--incoming", uri, "--tls-creds", certificates.path])
    func refusal(_ options: String...) throws -> String {
      let result = try hostTool([VMM.path, "migrate", machine.socket, uri] + options)
      #expect(result.status != 0 && result.output.split(separator: "\n").count == 1, "\(result.output)")
      #expect(try (machine.execute("query-status") as? [String: Any])?["status"] as? String == "running")
      return result.output
    }
    #expect(try refusal().contains("by TLS alone"))
    #expect(try refusal("--tls-creds", other.path).contains("no CA of ca-cert.pem has signed it"))
    #expect(try refusal("--tls-creds", certificates.path, "--tls-hostname", "other").contains("not one of other"))
    #expect(try refusal("--tls-creds", folder.path).contains("cannot read \(folder.path)/ca-cert.pem"))
    // What a command was given has gone with it.
    let parameters = try #require(try machine.execute("query-migrate-parameters") as? [String: Any])
    #expect(parameters["tls-creds"] as? String == "" && parameters["tls-hostname"] as? String == "")
    let moved = try hostTool(VMM.path, "migrate", machine.socket, uri, "--tls-creds", certificates.path)
    #expect(moved.status == 0, "\(moved.output)")
    #expect(next.waitFor("dirty: pass"), "\(next.text)")
    #expect(next.text.contains("a source was turned away"), "\(next.text)")
    try next.execute("quit")
    let plain = try VMM.run(["run"] + dirty + ["--tls-creds", certificates.path])
    #expect(plain.status == 64 && plain.errors.contains("--tls-creds needs --incoming"))
  }

  /// QEMU's way, and a disk that is copied, all by TLS.
  @Test func theControlSocketDoesItQEMUsWay() throws {
    func image(_ name: String) throws -> String {
      let path = folder.path + "/" + name
      try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "qcow2", path, "32M").status == 0)
      return path
    }
    func arguments(_ image: String) -> [String] {
      [
        "disk", "--engine", "soft", "--memory", "64M", "--time-limit", "600", "--disk", "\(image),id=d0", "--append",
        "mode=rewrite passes=100000 records=200 flush=10 sectors=16",
      ]
    }
    let machine = try RunningVMM(arguments(try image("here")))
    #expect(machine.waitFor("flushed 200"), "\(machine.text)")
    let (uri, disks) = ("tcp:127.0.0.1:\(try freePort())", "tcp:127.0.0.1:\(try freePort())")
    let next = try RunningVMM(
      arguments(try image("there")) + [
        "--incoming", uri, "--incoming-disks", disks, "--tls-creds", certificates.path,
      ])
    func add(_ id: String, _ endpoint: String) throws {
      try machine.execute(
        "object-add", ["qom-type": "tls-creds-x509", "id": id, "dir": certificates.path, "endpoint": endpoint])
    }
    try add("c0", "client")
    try add("s0", "server")
    #expect(
      try machine.refusal(
        "object-add", ["qom-type": "tls-creds-x509", "id": "c0", "dir": certificates.path]
      ).contains("already"))
    #expect(
      try machine.refusal("object-add", ["qom-type": "tls-creds-x509", "id": "x", "dir": "/nowhere"]).contains(
        "cannot read /nowhere/ca-cert.pem"))
    let address: [String: Any] = ["type": "inet", "data": ["host": "127.0.0.1", "port": "\(try freePort())"]]
    for (id, reason) in [
      ("c0", "Expected TLS credentials for a server"), ("none", "No TLS credentials with id 'none'"),
    ] {
      #expect(try machine.refusal("nbd-server-start", ["addr": address, "tls-creds": id]).contains(reason))
    }
    // A disk of the running machine, for QEMU.
    try machine.execute("nbd-server-start", ["addr": address, "tls-creds": "s0"])
    try machine.execute("nbd-server-add", ["device": "d0"])
    let data = try #require(address["data"] as? [String: String])
    let info = try hostTool(
      "qemu-img", "info", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir=\(certificates.path)", "--image-opts",
      "driver=nbd,host=127.0.0.1,port=\(data["port"] ?? ""),export=d0,tls-creds=tls0")
    #expect(info.status == 0 && info.output.contains("32 MiB"), "\(info.output)")
    let plain = try hostTool("qemu-img", "info", "nbd://127.0.0.1:\(data["port"] ?? "")/d0")
    #expect(plain.status != 0, "\(plain.output)")
    try machine.execute("nbd-server-stop")
    // An id that means nothing, and one that means the other end.
    for (id, reason) in [("none", "No TLS credentials with id"), ("s0", "Expected TLS credentials for a client")] {
      try machine.execute("migrate-set-parameters", ["tls-creds": id])
      #expect(try machine.refusal("migrate", ["uri": uri]).contains(reason))
    }
    try machine.execute("migrate-set-parameters", ["tls-creds": ""])
    try machine.execute("object-del", ["id": "c0"])
    #expect(try machine.refusal("object-del", ["id": "c0"]).contains("not found"))
    let moved = try hostTool(
      VMM.path, "migrate", machine.socket, uri, "--copy-disks", disks, "--tls-creds", certificates.path)
    try #require(moved.status == 0, "\(moved.output) \(machine.text.suffix(500)) \(next.text)")
    #expect(next.waitFor("flushed", count: 40), "\(next.text)")
    #expect(!next.text.contains("FAIL"), "\(next.text)")
    try next.execute("quit")
    #expect(next.waitUntilExit() == 0)
  }

  /// `disk serve` and a guest's disk behind it.
  @Test func aDiskIsServedToAGuest() throws {
    let path = folder.path + "/disk"
    try #require(try hostTool(VMM.path, "disk", "create", "-q", "-f", "raw", path, "32M").status == 0)
    let port = try freePort()
    let server = Process()
    server.executableURL = URL(fileURLWithPath: VMM.path)
    server.arguments =
      ["disk", "serve", "--tls-creds", certificates.path, "--port", "\(port)", "-f", "raw", "--persistent", path]
    let output = Pipe()
    server.standardOutput = output
    try server.run()
    defer { server.terminate() }
    let line = String(decoding: output.fileHandleForReading.availableData, as: UTF8.self)
    #expect(line == "nbds://127.0.0.1:\(port)/\n")
    let uri = "nbds://127.0.0.1:\(port)/?tls-certificates=\(certificates.path)"
    for mode in ["write", "verify"] {
      let result = try VMM.run(
        "run", "disk", "--engine", "soft", "--disk", "\(uri),format=raw", "--append",
        "mode=\(mode) records=500 flush=50")
      #expect(result.status == 0 && result.output.contains("disk: all passed"), "\(result)")
    }
    let plain = try VMM.run("disk", "info", "nbd://127.0.0.1:\(port)/")
    #expect(plain.status == 74 && plain.errors.contains("use nbds:// with tls-certificates"), "\(plain)")
    let missing = try VMM.run("disk", "serve", "--tls-creds", folder.path, path)
    #expect(missing.status == 66 && missing.errors.contains("/ca-cert.pem"), "\(missing)")
  }
}
