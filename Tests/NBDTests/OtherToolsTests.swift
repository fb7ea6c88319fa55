import BlockLayer
import Foundation
import Host
import Testing

@testable import NBD

/// Our server, judged by libnbd's tools and QEMU's.
@Suite(
  .serialized,
  .enabled(
    if: isInstalled("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "qemu-nbd"), "needs libnbd-bin and qemu-utils"))
struct OtherToolsTests {
  /// Base, overlay with zero clusters, and holes: 24 MiB in two qcow2 layers of these clusters.
  private func makeChain(_ folder: TemporaryFolder, clusterSize: Int = 65536) throws -> String {
    let (base, top) = (folder.path + "/base", folder.path + "/top")
    for arguments in [
      ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=\(clusterSize)", base, "20M"],
      ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 3M", "-c", "write -P 2 8M 100k", base],
      [
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=\(clusterSize)", "-b", base, "-F", "qcow2", top,
        "24M",
      ],
      ["qemu-img", "bitmap", "--add", top, "bits"],
      ["qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 64k", "-c", "write -z 2M 1M", "-c", "write -P 4 21M 64k", top],
      ["qemu-img", "bitmap", "--disable", top, "bits"],
    ] {
      let result = try hostTool(arguments)
      try #require(result.status == 0, "\(result.output)")
    }
    return top
  }

  private func makeSparse(_ folder: TemporaryFolder) throws -> String {
    let path = folder.path + "/raw"
    for arguments in [
      ["truncate", "-s", "64M", path],
      ["qemu-io", "-f", "raw", "-c", "write -P 5 1M 9M", "-c", "write -P 6 40M 64k", "-c", "write -P 7 63M 1M", path],
    ] { try #require(try hostTool(arguments).status == 0) }
    return path
  }

  @Test func nbdinfoSaysWhatIsServed() throws {
    let folder = try TemporaryFolder()
    let server = try TestServer(makeChain(folder), in: folder, bitmaps: ["bits"])
    let result = try hostTool(["nbdinfo", "--json", server.uri])
    #expect(result.status == 0, "\(result.output)")
    let document = try #require(try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any])
    #expect(document["structured"] as? Bool == true)
    let export = try #require((document["exports"] as? [[String: Any]])?.first)
    #expect(export["export-size"] as? Int == 24 << 20)
    #expect(export["contexts"] as? [String] == ["base:allocation", "qemu:dirty-bitmap:bits"])
    #expect(export["is_read_only"] as? Bool == true)
    #expect(export["can_multi_conn"] as? Bool == true)
    #expect(export["can_df"] as? Bool == true)
    #expect(export["block_size_maximum"] as? Int == 32 << 20)
    try server.stop()
  }

  /// The maps that nbdinfo prints for our server and for qemu-nbd are the same.
  @Test(arguments: ["base:allocation", "qemu:dirty-bitmap:bits"])
  func mapsAreQemuNBDs(context: String) throws {
    let folder = try TemporaryFolder()
    let image = try makeChain(folder)
    let server = try TestServer(image, in: folder, bitmaps: ["bits"])
    let ours = try hostTool(["nbdinfo", "--map=\(context)", server.uri])
    try server.stop()
    let theirs = try withQemuNBD(["-r", "-f", "qcow2", "-B", "bits", image], folder) { uri in
      try hostTool(["nbdinfo", "--map=\(context)", uri])
    }
    #expect(ours.status == 0, "\(ours.output)")
    #expect(ours.output == theirs.output)
    #expect(ours.output.split(separator: "\n").count > 2)
  }

  @Test(arguments: [512, 65536, 2 << 20])
  func nbdcopyAndConvertGetTheDisk(clusterSize: Int) throws {
    let folder = try TemporaryFolder()
    let image = try makeChain(folder, clusterSize: clusterSize)
    let server = try TestServer(image, in: folder)
    let copy = folder.path + "/copy"
    for arguments in [
      ["nbdcopy", server.uri, copy], ["nbdcopy", "--request-size=\(1 << 20)", "--no-extents", server.uri, copy],
      ["qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, copy],
    ] {
      let result = try hostTool(arguments)
      #expect(result.status == 0, "\(result.output)")
      let compared = try hostTool(["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image, copy])
      #expect(compared.status == 0, "\(compared.output)")
      unlink(copy)
    }
    let compared = try hostTool(["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image, server.uri])
    #expect(compared.status == 0, "\(compared.output)")
    try server.stop()
  }

  @Test(arguments: [ImageFormat.raw, .qcow2])
  func othersWriteIntoOurDisk(format: ImageFormat) throws {
    let folder = try TemporaryFolder()
    let source = try makeSparse(folder)
    let target = folder.path + "/target"
    try #require(try hostTool(["qemu-img", "create", "-q", "-f", format.rawValue, target, "64M"]).status == 0)
    let server = try TestServer(target, format: format, in: folder, writable: true)
    for arguments in [
      ["qemu-io", "-f", "raw", "-c", "write -P 9 0 64M", server.uri],
      ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri],
      ["qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri],
      ["qemu-io", "-f", "raw", "-c", "write -f -P 8 1000 3000", "-c", "discard 40M 64k", "-c", "flush", server.uri],
      ["qemu-io", "-f", "raw", "-c", "read -P 8 1000 3000", "-c", "write -z -u 1M 512k", server.uri],
      ["qemu-io", "-f", "raw", "-c", "read -P 0 1M 512k", "-c", "read -P 5 1536k 1M", server.uri],
      ["nbdcopy", source, server.uri],
      ["qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri],
    ] {
      let result = try hostTool(arguments)
      #expect(result.status == 0 && !result.output.contains("failed"), "\(arguments) \(result.output)")
    }
    try server.stop()
    let compared = try hostTool(["qemu-img", "compare", "-f", "raw", "-F", format.rawValue, source, target])
    #expect(compared.status == 0, "\(compared.output)")
    if format == .qcow2 { #expect(try hostTool(["qemu-img", "check", target]).status == 0) }
  }

  /// Connections that vanish, at any point of what they say, disturb nobody.
  @Test func clientsThatVanishDisturbNobody() throws {
    let folder = try TemporaryFolder()
    let server = try TestServer(makeSparse(folder), format: .raw, in: folder, writable: true)
    let talk =
      Wire.flags(3) + Wire.option(.structuredReply) + Wire.option(.go, Wire.string("") + [0, 0])
      + (0..<40).flatMap { Wire.request(.read, cookie: $0, at: $0 << 20, length: 1 << 20) }
      + Wire.request(.write, length: 100_000) + [UInt8](repeating: 5, count: 50_000)
    for length in [0, 1, 3, 4, 10, 30, 50, 100, 1000, talk.count] {
      let socket = try NBDURI(server.uri).endpoint.connect()
      let part = Array(talk[..<length])
      // The server may have hung up already; that is no failure of the test.
      _ = part.withUnsafeBytes { send(socket.rawValue, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
    }
    let result = try hostTool(["qemu-io", "-f", "raw", "-c", "read -P 5 1M 9M", server.uri])
    #expect(result.status == 0, "\(result.output)")
    try server.stop()
    #expect(server.thread.queue.wait() == false)
  }

  @Test func anExportThatGoesTakesItsClientsAlong() throws {
    let folder = try TemporaryFolder()
    let server = try TestServer(makeSparse(folder), format: .raw, in: folder)
    let socket = try NBDURI(server.uri).endpoint.connect()
    let talk = Wire.flags(3) + Wire.option(.exportName)
    talk.withUnsafeBytes { #expect(send(socket.rawValue, $0.baseAddress, $0.count, 0) == talk.count) }
    var bytes = [UInt8](repeating: 0, count: 28)
    #expect(recv(socket.rawValue, &bytes, 28, Int32(MSG_WAITALL)) == 28)
    let count = server.thread.perform {
      defer { try? server.server.remove("") }
      return server.server.clientCount(of: "")
    }
    #expect(count == 1)
    #expect(recv(socket.rawValue, &bytes, 1, 0) == 0)
    #expect(try hostTool(["nbdinfo", server.uri]).status != 0)
    try server.stop()
  }
}

/// Runs `body` with the URI of a qemu-nbd of these arguments.
func withQemuNBD<Result>(_ arguments: [String], _ folder: TemporaryFolder, _ body: (String) throws -> Result) throws
  -> Result
{
  let socket = folder.path + "/qemu-nbd"
  let process = Process()
  process.executableURL = URL(fileURLWithPath: "/usr/bin/qemu-nbd")
  process.arguments = ["-t", "-e", "4", "-k", socket] + arguments
  try process.run()
  defer {
    // A test thread blocks signals, and its children inherit that: SIGTERM would wait for ever.
    kill(process.processIdentifier, SIGKILL)
    process.waitUntilExit()
    unlink(socket)
  }
  // The file is there before anybody listens.
  for _ in 0..<500 where (try? StreamEndpoint.unix(path: socket).connect().rawValue) == nil { usleep(10_000) }
  return try body("nbd+unix:///?socket=\(socket)")
}
