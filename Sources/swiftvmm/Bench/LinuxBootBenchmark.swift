import Glibc
import Host
import JSON

/// Debian's kernel, from process start to the first line of its init and to power-off, on our software engine and QEMU's.
struct LinuxBootBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "to-userland", unit: "s", digits: 2), .init(name: "to-power-off", unit: "s", digits: 2),
      .init(name: "cpu", unit: "s", digits: 2), .init(name: "instructions", unit: "million", digits: 0),
      .init(name: "rate", unit: "million/s", digits: 0),
    ])
    let linux = try GuestCatalogue.linux()
    let report = try TemporaryFile()
    for cpus in ["1", "2"] {
      let vcpus = cpus == "1" ? "1 vCPU" : "\(cpus) vCPUs"
      for (name, options) in [
        ("", []), (", in turns", ["--smp-threads", "off"]), (", deterministic", ["--deterministic"]),
      ] where cpus != "1" || options != ["--smp-threads", "off"] {
        try add(
          &table, "swiftvmm soft, \(vcpus)\(name)",
          .soft(
            kernel: linux.kernel, append: "console=ttyS0",
            more: ["--initrd", linux.initramfs, "--cpus", cpus, "--report", report.path] + options),
          report: report.path)
      }
      try add(
        &table, "qemu tcg q35, \(vcpus)",
        .qemu(kernel: linux.kernel, append: "console=ttyS0", more: ["-initrd", linux.initramfs, "-smp", cpus]))
    }
    return table
  }

  private func add(
    _ table: inout BenchTable, _ name: String, _ process: BenchProcess, report: String? = nil
  ) throws(Failure) {
    var figures: [[Double]] = Array(repeating: [], count: 5)
    for _ in 0..<min(runs, 5) {
      var notes: [String] = []
      guard let child = try process.run({ notes.append($0) }) else {
        table.add(name, Array(repeating: nil, count: 5), note: notes.joined(separator: "; "))
        return
      }
      guard let userland = child.nanoseconds(until: "HELLO-FROM-INIT") else {
        table.add(name, Array(repeating: nil, count: 5), note: "it ended before userland")
        return
      }
      figures[0].append(Double(userland) / 1e9)
      figures[1].append(Double(child.wallNanoseconds) / 1e9)
      figures[2].append(Double(child.cpuMicroseconds) / 1e6)
      if let report, let text = readText(report), let json = try? JSONValue(parsing: text),
        let instructions = json["instructions"]?.numberValue
      {
        figures[3].append(instructions / 1e6)
        figures[4].append(instructions / Double(child.wallNanoseconds) * 1000)
      }
    }
    table.add(name, figures.map { $0.isEmpty ? nil : Samples($0) })
  }
}
