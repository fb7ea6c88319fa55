import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// A guest that asks for a snapshot of its own disk: from the request to its first read of the old data, by its own clock.
struct RecoverBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    let engines = ["kvm", "soft"]
    var table = BenchTable(engines.map { .init(name: "swiftvmm-\($0)", unit: "ms", digits: 2) })
    var figures: [Samples?] = []
    for engine in engines {
      do {
        figures.append(Samples(try times(engine)))
      } catch {
        table.notes.append("\(engine) left out: \(Failure(error).text)")
        figures.append(nil)
      }
    }
    table.add("request to first read of the old data", figures)
    return table
  }

  private func times(_ engine: String) throws -> [Double] {
    let folder = try TemporaryDirectory()
    let (image, socket) = ("\(folder.path)/disk", "\(folder.path)/socket")
    try SnapshotBenchmark.makeImage(image)
    let machine = try ServerProcess(
      [
        "/proc/self/exe", "run", GuestCatalogue.path(of: "recover"), "--engine", engine, "--memory", "256M", "--agent",
        "--time-limit", "120", "--disk", "\(image),id=d0", "--control", "unix:\(socket)", "--append",
        "timed=1 rounds=\(runs)",
      ], socket: socket, output: folder.path + "/output")
    defer { machine.end() }
    var client = try QMPClient.connect(to: .unix(path: socket))
    func text() -> String { SnapshotBenchmark.output(of: folder.path, from: 0) }
    for _ in 0..<1000 where !text().contains("written") { usleep(10_000) }
    _ = try client.execute(
      "blockdev-snapshot-sync", ["device": "d0", "snapshot-file": .string("\(folder.path)/top")])
    for _ in 0..<10_000 where !text().contains("all passed") && !text().contains("FAIL") { usleep(10_000) }
    let times = text().split(separator: "\n").compactMap { line -> Double? in
      let words = line.split(separator: " ")
      return words.count == 4 && words[1] == "in" ? Double(words[2]).map { $0 / 1000 } : nil
    }
    guard times.count == runs else { throw Failure.control("the guest ended early: \(text().suffix(200))") }
    return times
  }
}
