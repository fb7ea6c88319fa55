import Glibc
import Host
import JSON
import Monitor

/// Saving a running machine to a file and going on from there; ours and QEMU's (`migrate` to a file) with the same guest in turns.
struct SaveBenchmark {
  let runs: Int

  /// 512 MiB of random data, of which the guest writes a part again and again.
  private static let loads = [("idle", "set=1 fill=511 rate=1"), ("64 MiB written", "set=64 fill=448")]
  private static let endless = "seconds=0 jump=100000000 skew=100000000"
  private static let hasKVM = access("/dev/kvm", R_OK | W_OK) == 0

  /// Milliseconds, and the file's mebibytes.
  private struct Figures {
    var save: [Double] = []
    var pause: [Double] = []
    var restore: [Double] = []
    var size: [Double] = []
  }

  private struct Side {
    /// `saved` is the file to go on from.
    let command: (_ socket: String, _ append: String, _ saved: String?) -> [String]
    /// Saves to a file and returns how long the guest stood, in milliseconds.
    let save: (_ client: inout QMPClient, _ file: String) throws -> Double
  }

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([.init(name: "swiftvmm", unit: "", digits: 1), .init(name: "QEMU", unit: "", digits: 1)])
    table.notes = [
      "RAM of 1 GiB, one vCPU on \(Self.hasKVM ? "KVM" : "the software engines"); ours is durable when the command ends"
    ]
    do {
      let guest = try GuestCatalogue.path(of: "dirty")
      for (name, append) in Self.loads {
        let ours = try figures(Self.ours(guest), append)
        var theirs: Figures?
        do { theirs = try figures(Self.qemu(guest), append) } catch {
          table.notes.append("QEMU left out for \(name): \(error)")
        }
        for (what, path) in [
          ("save ms", \Figures.save), ("the guest stood ms", \Figures.pause),
          ("start from the file until it runs ms", \Figures.restore), ("file MiB", \Figures.size),
        ] {
          table.add("\(name): \(what)", [ours, theirs].map { side in side.map { Samples($0[keyPath: path]) } })
        }
      }
    } catch let failure as Failure {
      throw failure
    } catch {
      throw Failure(error)
    }
    return table
  }

  private static func ours(_ guest: String) -> Side {
    Side(
      command: { socket, append, saved in
        [
          "/proc/self/exe", "run", guest, "--engine", hasKVM ? "kvm" : "soft", "--memory", "1G", "--control",
          "unix:\(socket)", "--append", append,
        ] + (saved.map { ["--restore", $0] } ?? [])
      },
      save: { client, file in
        let report = try client.execute("x-swiftvmm-save", ["file": .string(file)])
        return (report["pause-us"]?.numberValue ?? 0) / 1000
      })
  }

  private static func qemu(_ guest: String) -> Side {
    Side(
      command: { socket, append, saved in
        [
          "qemu-system-x86_64", "-M", "q35", "-accel", hasKVM ? "kvm" : "tcg", "-m", "1024", "-nodefaults", "-display",
          "none", "-no-reboot", "-serial", "stdio", "-kernel", guest, "-append", append, "-qmp",
          "unix:\(socket),server=on,wait=off",
        ] + (saved.map { ["-incoming", "exec:cat '\($0)'"] } ?? [])
      },
      save: { client, file in
        _ = try client.execute("migrate-set-parameters", ["max-bandwidth": JSONValue(UInt64(1) << 40)])
        _ = try client.execute("migrate", ["uri": .string("exec:cat > '\(file)'")])
        while true {
          let state = try client.execute("query-migrate")
          switch state["status"]?.stringValue {
          case "completed":
            if let downtime = state["downtime"]?.numberValue { return downtime }
          case "failed", "cancelled": throw Failure.notMoved(status: "failed", reason: nil)
          default: break
          }
          usleep(1000)
        }
      })
  }

  private func figures(_ side: Side, _ append: String) throws -> Figures {
    var figures = Figures()
    for _ in 0..<min(runs, 5) {
      let folder = try TemporaryDirectory()
      let file = folder.path + "/saved"
      do {
        let socket = folder.path + "/here"
        let server = try ServerProcess(
          side.command(socket, "\(append) \(Self.endless)", nil), socket: socket, output: folder.path + "/output")
        defer { server.end() }
        for _ in 0..<6000 where !SnapshotBenchmark.output(of: folder.path, from: 0).contains("dirty: pass") {
          usleep(10_000)
        }
        var client = try QMPClient.connect(to: .unix(path: socket))
        let started = monotonicNanoseconds()
        figures.pause.append(try side.save(&client, file))
        figures.save.append(Double(monotonicNanoseconds() - started) / 1e6)
      }
      var status = stat()
      guard stat(file, &status) == 0 else { throw HostError.path("look at", path: file, errno: errno) }
      figures.size.append(Double(status.st_blocks) * 512 / Double(1 << 20))
      let socket = folder.path + "/there"
      let started = monotonicNanoseconds()
      let server = try ServerProcess(side.command(socket, "\(append) \(Self.endless)", file), socket: socket)
      defer { server.end() }
      var client = try QMPClient.connect(to: .unix(path: socket))
      while try client.execute("query-status")["running"]?.boolValue != true { usleep(1000) }
      figures.restore.append(Double(monotonicNanoseconds() - started) / 1e6)
    }
    return figures
  }
}
