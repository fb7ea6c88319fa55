import Accelerator
import Glibc
import Host
import JSON

/// Bare exits in this process, then the same kinds through the whole machine (guest `exits`) beside QEMU.
struct ExitsBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([.init(name: "time", unit: "ns", digits: 0)])
    do {
      for kind in ExitLoop.Kind.allCases {
        var values: [Double] = []
        for _ in 0..<min(runs, 7) { values.append(try ExitLoop.measure(kind, rounds: 2000)) }
        table.add("bare \(kind.rawValue)", [Samples(values)])
      }
    } catch {
      table.notes.append("bare rows left out: \(error)")
    }
    let guest = try GuestCatalogue.path(of: "exits")
    let ours = ["/proc/self/exe", "run", guest, "--engine", "kvm"]
    try addRows(&table, "swiftvmm", ours)
    let peer = [
      "qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display",
      "none", "-no-reboot", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", guest,
    ]
    try addRows(&table, "qemu-microvm", peer)
    return table
  }

  /// The guest prints one JSON line an exit kind; the process is run several times.
  private func addRows(_ table: inout BenchTable, _ name: String, _ command: [String]) throws(Failure) {
    var values: [String: [Double]] = [:]
    var order: [String] = []
    for _ in 0..<min(runs, 5) {
      let child: ChildProcess
      do {
        child = try ChildProcess.run(command, keepingOutput: true)
      } catch .path(_, _, ENOENT) {
        table.notes.append("\(name) rows left out: \(command[0]) is not installed")
        return
      } catch {
        throw .host(error)
      }
      for line in String(decoding: child.output, as: UTF8.self).split(whereSeparator: \.isNewline) {
        guard line.hasPrefix("{"), let row = try? JSONValue(parsing: String(line)),
          let exit = row["exit"]?.stringValue, let total = row["nanoseconds"]?.numberValue,
          let count = row["count"]?.numberValue, count > 0
        else { continue }
        if values[exit] == nil { order.append(exit) }
        values[exit, default: []].append(total / count)
      }
    }
    if order.isEmpty { table.notes.append("\(name) rows left out: the guest printed none") }
    for exit in order { table.add("\(name) \(exit)", [Samples(values[exit] ?? [])]) }
  }
}
