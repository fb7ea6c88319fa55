import JSON
import Migration
import PageClasses

/// What is told of a migration: `query-migrate`'s result.
enum MigrationReport {
  private static let pageSize: UInt64 = 4096

  /// `MigrationInfo` of QEMU's migration.json, and what is ours in `x-swiftvmm`.
  static func json(_ progress: MigrationProgress.Snapshot) -> JSONValue {
    var object: JSONObject = ["status": .string(progress.status.rawValue)]
    if let error = progress.error { object["error-desc"] = .string(error) }
    // A destination knows no more than that.
    guard progress.memory > 0 else {
      if let postCopy = progress.postCopy { object["x-swiftvmm"] = ["postcopy": json(postCopy)] }
      return .object(object)
    }
    let sum = { (count: (MigrationProgress.Round) -> Int) in progress.rounds.reduce(0) { $0 + count($1) } }
    let (zeros, whole, changed) = (sum(\.zeros), sum(\.whole), sum(\.changed))
    let seconds = max(Double(progress.total) / 1e9, 1e-9)
    let pagesLeft = progress.postCopy?.left ?? progress.rounds.last?.dirty ?? Int(progress.memory / pageSize)
    let remaining = UInt64(pagesLeft) * pageSize
    var ram: JSONObject = [
      "transferred": JSONValue(progress.bytes), "total": JSONValue(progress.memory),
      "remaining": JSONValue(remaining), "duplicate": JSONValue(zeros), "normal": JSONValue(whole),
      "normal-bytes": JSONValue(UInt64(whole) * pageSize), "skipped": JSONValue(0),
      "dirty-sync-count": JSONValue(progress.rounds.count), "page-size": JSONValue(pageSize),
      "mbps": .number(Double(progress.bytes) * 8 / seconds / 1e6),
    ]
    if let postCopy = progress.postCopy { ram["postcopy-requests"] = JSONValue(postCopy.requests) }
    object["ram"] = .object(ram)
    object["total-time"] = JSONValue(progress.total / 1_000_000)
    object["setup-time"] = JSONValue(progress.setup / 1_000_000)
    object["expected-downtime"] = JSONValue(progress.expectedDowntime / 1_000_000)
    if progress.downtime > 0 { object["downtime"] = JSONValue(progress.downtime / 1_000_000) }
    var own: JSONObject = [
      "order": .string(progress.order), "ignored": JSONValue(progress.ignored), "resent": JSONValue(progress.resent),
      "changed": JSONValue(changed), "downtime-us": JSONValue(progress.downtime / 1000),
      "total-us": JSONValue(progress.total / 1000), "classes": classes(progress.classes),
      "rounds": .array(progress.rounds.map(round)),
    ]
    if let postCopy = progress.postCopy { own["postcopy"] = json(postCopy) }
    if let stall = progress.stall { own["stall"] = .string(stall) }
    object["x-swiftvmm"] = .object(own)
    return .object(object)
  }

  private static func json(_ postCopy: MigrationProgress.PostCopy) -> JSONValue {
    [
      "pages": JSONValue(postCopy.pages), "remaining": JSONValue(postCopy.left),
      "requests": JSONValue(postCopy.requests), "faults": JSONValue(postCopy.faults),
      "stall-us": JSONValue(postCopy.stall / 1000), "longest-stall-us": JSONValue(postCopy.longest / 1000),
    ]
  }

  private static func round(_ round: MigrationProgress.Round) -> JSONValue {
    [
      "round": JSONValue(round.number), "start-us": JSONValue(round.start / 1000),
      "time-us": JSONValue(round.nanoseconds / 1000), "pages": JSONValue(round.pages),
      "zeros": JSONValue(round.zeros), "whole": JSONValue(round.whole), "changed": JSONValue(round.changed),
      "bytes": JSONValue(round.bytes), "dirty": JSONValue(round.dirty), "throttle": JSONValue(round.throttle),
      "classes": classes(round.classes),
    ]
  }

  private static func classes(_ counts: [PageClass: Int]) -> JSONValue {
    var object: JSONObject = [:]
    for pageClass in PageClass.allCases {
      if let count = counts[pageClass], count > 0 { object["\(pageClass)"] = JSONValue(count) }
    }
    return .object(object)
  }
}
