import ArgumentParser
import JSON

struct BenchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "bench",
    abstract: "Run benchmarks, each beside a peer in the same run where the peer is installed.",
    discussion: "Example: swiftvmm bench start exits --json")

  @Argument(
    help:
      "start, exits, cpu, linux-boot, disk, disk-requests, nbd, views, snapshot, backup, recover, migrate, save, net; all of them without a name."
  )
  var names: [Benchmark] = []

  @Flag(help: "Print one JSON document instead of tables.")
  var json = false

  @Option(help: "Counted runs of each row.")
  var runs = 15

  func validate() throws {
    if !(1...1000).contains(runs) { throw ValidationError("--runs \(runs): expected 1 to 1000") }
  }

  func run() throws {
    var document = JSONObject()
    for benchmark in names.isEmpty ? Benchmark.allCases : names {
      let table = try benchmark.measure(runs: runs)
      document[benchmark.rawValue] = table.json
      if !json { print(table.text(title: benchmark.title)) }
    }
    if json { print(JSONValue.object(document).serialized(pretty: true)) }
  }
}

/// The catalogue of benchmarks: a new one is a case here and a file beside this one.
enum Benchmark: String, CaseIterable, ExpressibleByArgument {
  case start, exits, cpu
  case linuxBoot = "linux-boot"
  case disk, nbd, views, snapshot, backup, recover, migrate, save, net
  case diskRequests = "disk-requests"

  var title: String {
    switch self {
    case .start: "start: process start to guest exit"
    case .exits: "exits: what leaving the guest costs"
    case .cpu: "cpu: million guest instructions a second; of copies by rep movsq, gigabytes"
    case .linuxBoot: "linux-boot: process start to userland, and to power-off"
    case .disk: "disk: whole commands on images of 1 GiB of data, all allocated"
    case .nbd: "nbd: a whole disk read by nbdcopy over a unix socket"
    case .diskRequests: "disk-requests: thousand requests of 4 KiB a second all over 1 GiB, without the host's cache"
    case .snapshot: "snapshot: live snapshots of a 4 GiB qcow2 disk"
    case .backup: "backup: disks of a running machine, and what its guest notices"
    case .recover: "recover: a guest gets a snapshot of its own disk"
    case .migrate: "migrate: a running machine to another process"
    case .net: "net: frames through the switch"
    case .save: "save: a running machine to a file, and from there"
    case .views: "views: changes of view and of rights"
    }
  }

  func measure(runs: Int) throws(Failure) -> BenchTable {
    switch self {
    case .start: try StartBenchmark(runs: runs).measure()
    case .exits: try ExitsBenchmark(runs: runs).measure()
    case .cpu: try CPUBenchmark(runs: runs).measure()
    case .linuxBoot: try LinuxBootBenchmark(runs: runs).measure()
    case .disk: try DiskBenchmark(runs: runs).measure()
    case .nbd: try NBDBenchmark(runs: runs).measure()
    case .diskRequests: try DiskRequestsBenchmark(runs: runs).measure()
    case .snapshot: try SnapshotBenchmark(runs: runs).measure()
    case .backup: try BackupBenchmark(runs: runs).measure()
    case .recover: try RecoverBenchmark(runs: runs).measure()
    case .migrate: try MigrateBenchmark(runs: runs).measure()
    case .net: try NetBenchmark(runs: runs).measure()
    case .save: try SaveBenchmark(runs: runs).measure()
    case .views: try ViewsBenchmark(runs: runs).measure()
    }
  }
}
