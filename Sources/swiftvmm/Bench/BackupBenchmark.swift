import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// Backups of a running machine: how fast, beside `qemu-img convert` of the same chain, and how long a guest that writes waits at the
/// cut and at the merge's end, beside QEMU's snapshot and commit.
struct BackupBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([.init(name: "swiftvmm", unit: "ms", digits: 2), .init(name: "QEMU", unit: "ms", digits: 2)])
    do {
      try addRates(&table)
      try addStalls(&table)
    } catch {
      throw Failure(error)
    }
    return table
  }

  // MARK: Rates

  private static let changed: UInt64 = 64 << 20

  private func addRates(_ table: inout BenchTable) throws {
    let folder = try TemporaryDirectory()
    try DiskBenchmark.makeImages(folder.path)
    let (chain, socket, copy) = ("\(folder.path)/c5", "\(folder.path)/socket", "\(folder.path)/copy")
    let append = "mode=write passes=1000000 records=\(Self.changed >> 13) sectors=16 flush=0"
    let machine = try ServerProcess(
      [
        "/proc/self/exe", "run", GuestCatalogue.path(of: "disk"), "--engine", "soft", "--memory", "256M", "--disk",
        "\(chain),id=d0", "--control", "unix:\(socket)", "--paused", "--append", append,
      ], socket: socket, output: folder.path + "/output")
    defer { machine.end() }
    var client = try QMPClient.connect(to: .unix(path: socket))
    var full: [Double] = []
    var increment: [Double] = []
    var convert: [Double] = []
    var note = ""
    for run in 0..<min(runs, 5) {
      let target = try TemporaryDirectory()
      if let time = try backup(socket, target.path, incremental: false, &note) { full.append(time) }
      // A pass of the guest's, from wherever it was stopped.
      let flushed = count("flushed", in: folder.path)
      _ = try client.execute("cont")
      for _ in 0..<6000 where count("flushed", in: folder.path) < flushed + (run == 0 ? 1 : 2) { usleep(10_000) }
      _ = try client.execute("stop")
      if let time = try backup(socket, target.path, incremental: true, &note) { increment.append(time) }
      sync()
      let peer = BenchProcess(
        name: "qemu-img", command: ["qemu-img", "convert", "-q", "-U", "-O", "qcow2", chain, copy])
      if let child = try peer.run({ note = $0 }) { convert.append(Double(child.wallNanoseconds) / 1e6) }
      unlink(copy)
    }
    let peer = convert.isEmpty ? nil : Samples(convert)
    table.add(
      "full backup of 6 layers, 1 GiB; qemu-img convert", [full.isEmpty ? nil : Samples(full), peer], note: note)
    table.add(
      "incremental backup of 64 MiB changed; qemu-img convert of all",
      [increment.isEmpty ? nil : Samples(increment), peer])
  }

  /// Milliseconds of the whole command: cut, copy and merge.
  private func backup(
    _ socket: String, _ target: String, incremental: Bool, _ note: inout String
  ) throws(Failure) -> Double? {
    sync()
    let process = BenchProcess(
      name: "backup",
      command: ["/proc/self/exe", "backup", socket, "-q", "--target", target] + (incremental ? ["--incremental"] : []))
    var reason = ""
    let child = try process.run { reason = $0 }
    if !reason.isEmpty { note = reason }
    return child.map { Double($0.wallNanoseconds) / 1e6 }
  }

  private func count(_ word: String, in folder: String) -> Int {
    SnapshotBenchmark.output(of: folder, from: 0).split(separator: "\n").count { $0.hasPrefix(word) }
  }

  // MARK: Stalls

  private func addStalls(_ table: inout BenchTable) throws {
    let guest = try GuestCatalogue.path(of: "disk")
    var figures: [[[Double]]] = []
    for vmm in SnapshotBenchmark.vmms(guest) {
      do {
        figures.append(try stalls(vmm))
      } catch {
        table.notes.append("\(vmm.name) left out: \(error)")
        figures.append([[], [], []])
      }
    }
    let names = [
      "slowest request of a writer at rest", "slowest request over a backup's cut",
      "slowest request over the merge's pivot",
    ]
    for (row, name) in names.enumerated() {
      table.add(name, figures.map { $0[row].isEmpty ? nil : Samples($0[row]) })
    }
    table.notes.append("the writer on the software engines, images without the host's cache")
  }

  /// A snapshot and the commit of the active layer, again and again: ours as a backup does it, which removes the overlay's file too.
  private func stalls(_ vmm: SnapshotBenchmark.VMM) throws -> [[Double]] {
    let append = "mode=write passes=1000000 records=4096 flush=32 timed=1"
    let benchmark = SnapshotBenchmark(runs: runs)
    return try benchmark.withMachine(vmm, isOnKVM: false, append) { client, folder in
      var figures: [[Double]] = [[], [], []]
      for index in 0..<runs {
        let overlay = folder + (vmm.isOurs ? "/base" + BlockGraph.backupOverlaySuffix : "/s\(index)")
        try add(&figures[0], folder) { usleep(20_000) }
        try add(&figures[1], folder) {
          let data: JSONObject = [
            "node-name": "d0", "snapshot-file": .string(overlay),
            "snapshot-node-name": .string("s\(index)"), "format": "qcow2",
          ]
          _ = try client.execute(
            "transaction", ["actions": [["type": "blockdev-snapshot-sync", "data": .object(data)]]])
        }
        usleep(200_000)
        if vmm.isOurs {
          _ = try client.execute(
            "x-swiftvmm-merge", ["job-id": "merge", "device": "d0", "top": .string(overlay), "replacing": ""])
        } else {
          _ = try client.execute("block-commit", ["job-id": "merge", "device": .string("s\(index)")])
        }
        while try status(&client) != "ready" { usleep(1000) }
        try add(&figures[2], folder) {
          _ = try client.execute("job-complete", ["id": "merge"])
          while ![nil, "concluded"].contains(try status(&client)) { usleep(1000) }
        }
        if vmm.isOurs { _ = try client.execute("job-dismiss", ["id": "merge"]) }
      }
      return figures
    }
  }

  private func status(_ client: inout QMPClient) throws -> String? {
    try client.execute("query-jobs").arrayValue?.first?["status"]?.stringValue
  }

  /// The longest of what the guest tells of from the last line before `body` on, until a line that began after it.
  private func add(_ figures: inout [Double], _ folder: String, _ body: () throws -> Void) throws {
    let start = SnapshotBenchmark.length(of: folder)
    try body()
    let end = SnapshotBenchmark.length(of: folder)
    for _ in 0..<500 {
      usleep(10_000)
      let after = SnapshotBenchmark.times(SnapshotBenchmark.output(of: folder, from: end))
      if after.count >= 2 {
        let during = SnapshotBenchmark.times(SnapshotBenchmark.output(of: folder, from: start, to: end))
        return figures.append((during + after.prefix(2)).max().map { $0 / 1000 } ?? 0)
      }
    }
  }
}
