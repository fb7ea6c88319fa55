import BlockLayer
import Glibc
import Host

/// A whole disk read over a unix socket by nbdcopy, from our server and qemu-nbd in turns, on the same files.
struct NBDBenchmark {
  let runs: Int
  private static let mebibytes: UInt64 = 1024
  /// Every fourth mebibyte of the sparse disk has data.
  private static let sparsity: UInt64 = 4

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "swiftvmm", unit: "GiB/s", digits: 2), .init(name: "qemu-nbd", unit: "GiB/s", digits: 2),
    ])
    table.notes = ["GiB of data, in the page cache; several connections, as nbdcopy opens where the server allows them"]
    let folder = try TemporaryDirectory()
    do throws(BlockError) {
      try makeImages(folder.path)
    } catch {
      throw .disk(error)
    }
    try add(&table, "raw", "raw", folder.path + "/raw", folder.path)
    try add(&table, "qcow2", "qcow2", folder.path + "/qcow2", folder.path)
    if let reason = BenchCertificates.make(in: folder.path) {
      table.notes.append(reason)
    } else {
      try add(&table, "raw, by TLS", "raw", folder.path + "/raw", folder.path, certificates: folder.path)
    }
    try add(&table, "raw, 4 GiB with 1 GiB of data", "raw", folder.path + "/sparse", folder.path)
    return table
  }

  private func makeImages(_ folder: String) throws(BlockError) {
    let queue = try makeIOQueue()
    try HostFile.create("\(folder)/raw", length: Self.mebibytes << 20)
    try HostFile.create("\(folder)/sparse", length: (Self.mebibytes * Self.sparsity) << 20)
    try HostFile.create("\(folder)/qcow2")
    let file = try HostFile(path: "\(folder)/qcow2", access: FileAccess(writable: true), queue: queue)
    try Qcow2Image.create(Qcow2CreateOptions(size: Self.mebibytes << 20), in: file)
    file.close()
    let buffer = DiskBuffer(count: 1 << 20)
    memset(buffer.start, 7, 1 << 20)
    for (name, format, sparsity) in [
      ("raw", ImageFormat.raw, 1), ("qcow2", .qcow2, 1), ("sparse", .raw, Self.sparsity),
    ] {
      let chain = try BlockChain(
        path: "\(folder)/\(name)", format: format, access: FileAccess(writable: true), queue: queue)
      for index in 0..<Self.mebibytes {
        try chain.top.perform(.write, at: (index * sparsity) << 20, memory: buffer.bytes, on: queue)
      }
      try chain.close()
    }
  }

  private func add(
    _ table: inout BenchTable, _ name: String, _ format: String, _ image: String, _ folder: String,
    certificates: String? = nil
  ) throws(Failure) {
    let socket = folder + "/socket"
    let options = ["-r", "-t", "-e", "8", "-f", format, "-k", socket, image]
    let tls = certificates.map { NBDURI.TLS(certificates: $0, hostName: "localhost") }
    let uri = "\(NBDURI(.unix(path: socket), export: "", tls: tls))"
    let client = BenchProcess(name: "nbdcopy", command: ["timeout", "60", "nbdcopy", uri, "null:"])
    let ours = certificates.map { ["--tls-creds", $0] } ?? []
    let theirs =
      certificates.map { ["--object", "tls-creds-x509,id=t0,endpoint=server,dir=\($0)", "--tls-creds", "t0"] } ?? []
    var figures: [[Double]] = [[], []]
    var note = ""
    for _ in 0..<min(runs, 9) {
      for (index, program) in [["/proc/self/exe", "disk", "serve"] + ours, ["qemu-nbd"] + theirs].enumerated()
      where note.isEmpty || index == 0 {
        let server: ServerProcess
        do {
          server = try ServerProcess(program + options, socket: socket)
        } catch {
          note = "\(program[0]) left out: \(error)"
          continue
        }
        let child = try client.run { note = $0 }
        server.end()
        if let child { figures[index].append(Double(Self.mebibytes) / 1024 / (Double(child.wallNanoseconds) / 1e9)) }
      }
    }
    table.add(name, figures.map { $0.isEmpty ? nil : Samples($0) }, note: note)
  }
}
