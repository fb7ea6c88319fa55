import Accelerator
import Glibc
import Host
import JSON

/// Bare exits in this process, then the same kinds through the whole machine (guest `exits`) beside QEMU with that guest.
struct ExitsBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "swiftvmm", unit: "ns", digits: 0), .init(name: "qemu-q35", unit: "ns", digits: 0),
    ])
    do {
      for kind in ExitLoop.Kind.allCases {
        var values: [Double] = []
        for _ in 0..<min(runs, 7) { values.append(try ExitLoop.measure(kind, rounds: 2000)) }
        table.add("bare \(kind.rawValue)", [Samples(values), nil])
      }
    } catch {
      table.notes.append("bare rows left out: \(error)")
    }
    let guest = try GuestCatalogue.path(of: "exits")
    let ours = try rows(["/proc/self/exe", "run", guest, "--engine", "kvm"], status: 0, notes: &table.notes)
    // Not its microvm, which has no PM timer; and its default CPU model, since not every host can do `-cpu host`.
    let peer = [
      "qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot",
      "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", guest,
    ]
    // The guest powers off by ACPI, which QEMU reports with 0 too.
    let theirs = try rows(peer, status: 0, notes: &table.notes)
    for (exit, samples) in ours {
      table.add("guest \(exit)", [samples, theirs.first { $0.exit == exit }?.samples])
    }
    return table
  }

  /// The guest prints one JSON line an exit kind; the process is run several times.
  private func rows(
    _ command: [String], status: Int32, notes: inout [String]
  ) throws(Failure) -> [(exit: String, samples: Samples)] {
    var values: [String: [Double]] = [:]
    var order: [String] = []
    for _ in 0..<min(runs, 5) {
      let child: ChildProcess
      do {
        child = try ChildProcess.run(command, keepingOutput: true)
      } catch .path(_, _, ENOENT) {
        notes.append("\(command[0]) left out: it is not installed")
        return []
      } catch {
        throw .host(error)
      }
      guard child.status == status else {
        notes.append("\(command[0]) left out: it exited with \(child.status) instead of \(status)")
        return []
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
    return order.map { ($0, Samples(values[$0] ?? [])) }
  }
}
