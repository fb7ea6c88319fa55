import Glibc
import Host
import JSON
import Monitor

/// A running machine, as a backup sees it.
final class BackupMachine {
  /// A layer of a disk.
  struct Layer {
    var node: String
    var file: String
    var format: String
    var bitmaps: [String]
  }

  /// A disk, with its layers from the top.
  struct Disk {
    var device: String
    var size: UInt64
    var isReadOnly: Bool
    var layers: [Layer]
  }

  let socket: String
  private var client: QMPClient

  init(_ socket: String, timeout seconds: Int) throws(Failure) {
    self.socket = socket.hasPrefix("unix:") ? String(socket.dropFirst(5)) : socket
    do {
      client = try QMPClient.connect(to: StreamEndpoint("unix:" + self.socket), timeout: seconds)
    } catch let error as MonitorError {
      throw .backup(.machine(error))
    } catch let error as HostError {
      throw .host(error)
    } catch {
      throw .control("\(error)")
    }
  }

  @discardableResult
  func execute(_ command: String, _ arguments: JSONObject = [:]) throws(Failure) -> JSONValue {
    do throws(MonitorError) { return try client.execute(command, arguments) } catch { throw .backup(.machine(error)) }
  }

  /// Its disks, and how it was started.
  func describe() throws(Failure) -> (disks: [Disk], configuration: JSONValue) {
    let answer = try execute("x-swiftvmm-query-backup")
    let disks = (answer["disks"]?.arrayValue ?? []).map { disk in
      Disk(
        device: disk["device"]?.stringValue ?? "", size: disk["size"]?.unsignedValue ?? 0,
        isReadOnly: disk["read-only"]?.boolValue ?? false,
        layers: (disk["layers"]?.arrayValue ?? []).map { layer in
          Layer(
            node: layer["node"]?.stringValue ?? "", file: layer["file"]?.stringValue ?? "",
            format: layer["format"]?.stringValue ?? "",
            bitmaps: (layer["bitmaps"]?.arrayValue ?? []).compactMap(\.stringValue))
        })
    }
    return (disks, answer["configuration"] ?? [:])
  }

  /// What a bitmap says has changed.
  func dirtyRanges(node: String, bitmap: String) throws(Failure) -> [Range<UInt64>] {
    var ranges: [Range<UInt64>] = []
    var offset: UInt64 = 0
    while true {
      let answer = try execute(
        "x-swiftvmm-query-dirty",
        ["node": .string(node), "bitmap": .string(bitmap), "offset": JSONValue(offset)])
      for range in answer["ranges"]?.arrayValue ?? [] {
        let numbers = (range.arrayValue ?? []).compactMap(\.unsignedValue)
        guard numbers.count == 2, let end = Optional(numbers[0].addingReportingOverflow(numbers[1])), !end.overflow
        else { continue }
        ranges.append(numbers[0]..<end.partialValue)
      }
      guard let next = answer["next"]?.unsignedValue, next > offset else { return ranges }
      offset = next
    }
  }

  /// Merges the overlays of a backup into the layers below them, while the guest writes on.
  func merge(_ disks: [BackupJournal.Disk], bitmap: String?) throws(Failure) {
    var waiting = Set(disks.map(\.job))
    let running = try jobs()
    for disk in disks where running[disk.job] == nil {
      var arguments: JSONObject = [
        "device": .string(disk.device), "job-id": .string(disk.job), "top": .string(disk.overlay),
        "replacing": .string(BackupJournal.bitmapPrefix),
      ]
      if let bitmap { arguments["bitmap"] = .string(bitmap) }
      try execute("x-swiftvmm-merge", arguments)
    }
    var failure: Failure?
    while !waiting.isEmpty {
      let jobs = try jobs()
      for disk in disks where waiting.contains(disk.job) {
        switch jobs[disk.job]?.status {
        case "ready":
          // One that has gone on since the question refuses, and the next answer shows where it is.
          _ = try? execute("block-job-complete", ["device": .string(disk.job)])
        case "concluded":
          if let reason = jobs[disk.job]?.error {
            failure = failure ?? .backup(.job(device: disk.device, reason: reason))
          }
          try execute("job-dismiss", ["id": .string(disk.job)])
          waiting.remove(disk.job)
        case nil: waiting.remove(disk.job)
        default: break
        }
      }
      if !waiting.isEmpty { usleep(2000) }
    }
    if let failure { throw failure }
  }

  /// Waits until no schedule merges snapshots of these disks.
  func waitForMerges(of devices: [String]) throws(Failure) {
    while try jobs().keys.contains(where: { job in devices.contains { job == SnapshotSchedule.job(of: $0) } }) {
      try BackupCancel.check()
      usleep(10_000)
    }
  }

  /// The jobs under way, or not yet dismissed, by id.
  func jobs() throws(Failure) -> [String: (status: String, error: String?)] {
    var jobs: [String: (status: String, error: String?)] = [:]
    for job in try execute("query-jobs").arrayValue ?? [] {
      jobs[job["id"]?.stringValue ?? ""] = (job["status"]?.stringValue ?? "", job["error"]?.stringValue)
    }
    return jobs
  }
}
