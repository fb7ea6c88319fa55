import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// `swiftvmm migrate --copy-disks`: the disks of a machine that is to move are copied to where it moves, and kept in step until it does.
struct DiskCopies {
  private let names: [String]

  private static func id(_ disk: String) -> String { "copy-\(disk)" }

  /// Begins to copy every disk that the machine writes to, to the destination's exports of the same names.
  /// `tls` says how, as arguments of `blockdev-add`.
  static func begin(
    to endpoint: StreamEndpoint, _ tls: JSONObject, _ client: inout QMPClient
  ) throws(MonitorError) -> DiskCopies {
    var copies = DiskCopies(names: [])
    let disks = try client.execute("query-block").arrayValue ?? []
    for disk in disks where disk["inserted"]?["ro"]?.boolValue == false {
      guard let name = disk["device"]?.stringValue else { continue }
      copies = DiskCopies(names: copies.names + [name])
      do throws(MonitorError) {
        var target: JSONObject = [
          "driver": "nbd", "node-name": .string(id(name)), "export": .string(name), "server": server(endpoint),
        ]
        for key in tls.keys { target[key] = tls[key] }
        _ = try client.execute("blockdev-add", target)
        _ = try client.execute(
          "blockdev-mirror",
          [
            "job-id": .string(id(name)), "device": .string(name), "target": .string(id(name)), "sync": "full",
            "auto-dismiss": false,
          ])
      } catch {
        copies.giveUp(&client)
        throw error
      }
    }
    return copies
  }

  /// Waits until all copies are in step with their disks.
  func waitUntilReady(_ client: inout QMPClient) throws {
    while true {
      let jobs = try client.execute("query-jobs").arrayValue ?? []
      let mine = names.map { name in jobs.first { $0["id"]?.stringValue == Self.id(name) } }
      for (name, job) in zip(names, mine) {
        let status = job?["status"]?.stringValue ?? "none"
        guard ["none", "aborting", "concluded"].contains(status) else { continue }
        throw Failure.notCopied(disk: name, reason: job?["error"]?.stringValue)
      }
      if mine.allSatisfy({ $0?["status"]?.stringValue == "ready" }) { return }
      usleep(10_000)
    }
  }

  /// Ends what is left of the copies, where the machine does not move.
  func giveUp(_ client: inout QMPClient) {
    for name in names {
      let id: JSONValue = .string(Self.id(name))
      // What is not there any more needs no end.
      _ = try? client.execute("job-cancel", ["id": id])
      for _ in 0..<100 where (try? client.execute("job-dismiss", ["id": id])) == nil {
        guard let jobs = try? client.execute("query-jobs").arrayValue, jobs.contains(where: { $0["id"] == id }) else {
          break
        }
        usleep(10_000)
      }
      _ = try? client.execute("blockdev-del", ["node-name": id])
    }
  }

  private static func server(_ endpoint: StreamEndpoint) -> JSONValue {
    switch endpoint {
    case .unix(let path): ["type": "unix", "path": .string(BlockGraph.absolute(path))]
    case .tcp(let host, let port): ["type": "inet", "host": .string(host), "port": .string("\(port)")]
    }
  }
}
