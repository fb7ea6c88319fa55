import Glibc
import Host
import JSON
import Monitor

/// Live migration between two processes over a unix socket, and saving to a file: ours and QEMU's with the same guest in turns.
struct MigrateBenchmark {
  let runs: Int

  /// What the guest does meanwhile.
  private struct Load {
    let name: String
    let append: String
  }

  /// The guest's RAM holds 512 MiB of random data, of which it writes a part again and again.
  private static let loads = [
    Load(name: "idle", append: "set=1 fill=511 rate=1 \(endless)"),
    Load(name: "64 MiB written", append: "set=64 fill=448 \(endless)"),
    Load(name: "256 MiB written", append: "set=256 fill=256 \(endless)"),
  ]
  private static let mixed = Load(
    name: "128 MiB read-only, 64 freed, 64 hot",
    append: "set=64 fill=256 readonly=128 free=64 pattern=hot \(endless)")
  private static let endless = "seconds=0 jump=100000000 skew=100000000"
  private static let hasKVM = access("/dev/kvm", R_OK | W_OK) == 0

  /// What one move took: milliseconds, mebibytes.
  private struct Figures {
    var total: [Double] = []
    var downtime: [Double] = []
    var sent: [Double] = []
    /// The longest that something waited for a page, with post-copy.
    var stalls: [Double] = []
  }

  private struct Side {
    let command: (_ socket: String, _ append: String, _ incoming: String?) -> [String]
    /// What the source is told before it begins.
    let parameters: JSONObject
    /// Of a source: where its certificates are, which `parameters` name.
    var certificates: String?
    let downtime: (JSONObject) -> Double?
    let total: (JSONObject) -> Double?
  }

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([.init(name: "swiftvmm", unit: "", digits: 1), .init(name: "QEMU", unit: "", digits: 1)])
    table.notes = [
      "RAM of 1 GiB, one vCPU on \(Self.hasKVM ? "KVM" : "the software engines"), one link, no limit of bandwidth, downtime-limit 300 ms"
    ]
    do {
      let guest = try GuestCatalogue.path(of: "dirty")
      let qemu = Self.qemu(guest)
      for load in Self.loads {
        let ours = try moves(Self.ours(guest, "classed"), load)
        var theirs: Figures?
        do { theirs = try moves(qemu, load) } catch { table.notes.append("QEMU left out for \(load.name): \(error)") }
        add(load.name, [ours, theirs], &table)
      }
      for load in Self.loads.dropFirst() {
        let ours = try moves(Self.ours(guest, "classed"), load, isPostCopy: true)
        var theirs: Figures?
        do { theirs = try moves(qemu, load, isPostCopy: true) } catch {
          table.notes.append("QEMU's post-copy left out for \(load.name): \(error)")
        }
        add("\(load.name), post-copy", [ours, theirs], &table)
        table.add("\(load.name), post-copy: longest wait for a page ms", [Samples(ours.stalls), nil])
      }
      let certificates = try TemporaryDirectory()
      if let reason = BenchCertificates.make(in: certificates.path) {
        table.notes.append(reason)
      } else {
        for load in [Self.loads[0], Self.loads[2]] {
          add("\(load.name), by TLS", [try moves(Self.ours(guest, "classed", certificates.path), load), nil], &table)
        }
      }
      for order in ["classed", "linear"] {
        add("\(Self.mixed.name), \(order) order", [try moves(Self.ours(guest, order), Self.mixed), nil], &table)
      }
    } catch let failure as Failure {
      throw failure
    } catch {
      throw Failure(error)
    }
    return table
  }

  private func add(_ name: String, _ sides: [Figures?], _ table: inout BenchTable) {
    for (what, path) in [
      ("total ms", \Figures.total), ("downtime ms", \Figures.downtime), ("sent MiB", \Figures.sent),
    ] {
      table.add(
        "\(name): \(what)",
        sides.map { side in side.flatMap { $0[keyPath: path].isEmpty ? nil : Samples($0[keyPath: path]) } })
    }
  }

  // MARK: Both sides

  private static func ours(_ guest: String, _ order: String, _ certificates: String? = nil) -> Side {
    var parameters: JSONObject = [
      "x-swiftvmm-order": .string(order), "multifd-channels": 1, "downtime-limit": 300,
    ]
    if certificates != nil { (parameters["tls-creds"], parameters["tls-hostname"]) = ("t0", "localhost") }
    return Side(
      command: { socket, append, incoming in
        [
          "/proc/self/exe", "run", guest, "--engine", hasKVM ? "kvm" : "soft", "--memory", "1G", "--control",
          "unix:\(socket)", "--append", append,
        ] + (incoming.map { ["--incoming", $0] + (certificates.map { ["--tls-creds", $0] } ?? []) } ?? [])
      }, parameters: parameters, certificates: certificates,
      downtime: { microseconds($0, "downtime-us") }, total: { microseconds($0, "total-us") })
  }

  private static func microseconds(_ state: JSONObject, _ name: String) -> Double? {
    state["x-swiftvmm"]?.objectValue?[name]?.numberValue.map { $0 / 1000 }
  }

  private static func qemu(_ guest: String) -> Side {
    Side(
      command: { socket, append, incoming in
        [
          "qemu-system-x86_64", "-M", "q35", "-accel", hasKVM ? "kvm" : "tcg", "-m", "1024", "-nodefaults", "-display",
          "none", "-no-reboot", "-serial", "stdio", "-kernel", guest, "-append", append, "-qmp",
          "unix:\(socket),server=on,wait=off",
        ] + (incoming.map { ["-incoming", $0] } ?? [])
      }, parameters: ["max-bandwidth": JSONValue(UInt64(1) << 40), "downtime-limit": 300],
      downtime: { $0["downtime"]?.numberValue }, total: { $0["total-time"]?.numberValue })
  }

  // MARK: Moves

  /// With `isPostCopy` the guest goes on there at once, with none of its pages.
  private func moves(_ side: Side, _ load: Load, isPostCopy: Bool = false) throws -> Figures {
    var figures = Figures()
    for _ in 0..<min(runs, 5) {
      let folder = try TemporaryDirectory()
      let uri = "unix:\(folder.path)/link"
      let (here, there) = ("\(folder.path)/here", "\(folder.path)/there")
      let source = try ServerProcess(
        side.command(here, load.append, nil), socket: here, output: folder.path + "/output")
      defer { source.end() }
      let destination = try ServerProcess(side.command(there, load.append, uri), socket: there)
      defer { destination.end() }
      for _ in 0..<6000 where !SnapshotBenchmark.output(of: folder.path, from: 0).contains("dirty: pass") {
        usleep(10_000)
      }
      var client = try QMPClient.connect(to: .unix(path: here))
      if let folder = side.certificates {
        _ = try client.execute("object-add", ["qom-type": "tls-creds-x509", "id": "t0", "dir": .string(folder)])
      }
      _ = try client.execute("migrate-set-parameters", side.parameters)
      let capabilities: JSONObject = ["capabilities": [["capability": "postcopy-ram", "state": .bool(isPostCopy)]]]
      _ = try client.execute("migrate-set-capabilities", capabilities)
      if isPostCopy {
        // QEMU wants both sides to know.
        var other = try QMPClient.connect(to: .unix(path: there))
        _ = try other.execute("migrate-set-capabilities", capabilities)
      }
      _ = try client.execute("migrate", ["uri": .string(uri)])
      if isPostCopy { _ = try client.execute("migrate-start-postcopy") }
      let state = try end(&client)
      guard let total = side.total(state), let downtime = side.downtime(state),
        let sent = state["ram"]?.objectValue?["transferred"]?.numberValue,
        // After post-copy QEMU 7.2 sometimes tells the time since the machine's start.
        downtime <= total
      else { continue }
      figures.total.append(total)
      figures.downtime.append(downtime)
      figures.sent.append(sent / Double(1 << 20))
      if let stall = state["x-swiftvmm"]?["postcopy"]?["longest-stall-us"]?.numberValue {
        figures.stalls.append(stall / 1000)
      }
    }
    return figures
  }

  /// Waits a minute at most; returns what the source says of it, or nothing where it did not come to its end.
  private func end(_ client: inout QMPClient) throws -> JSONObject {
    for _ in 0..<6000 {
      usleep(10_000)
      guard let state = try client.execute("query-migrate").objectValue else { continue }
      switch state["status"]?.stringValue {
      // QEMU tells so before it has the figures.
      case "completed" where state["downtime"] != nil && state["total-time"]?.numberValue ?? 0 > 0: return state
      case "failed", "cancelled": return [:]
      default: continue
      }
    }
    return [:]
  }
}
