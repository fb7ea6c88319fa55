import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// `--snapshot-every` and `--keep`: snapshots of all disks at intervals, of which the oldest are merged away while the guest runs.
final class SnapshotSchedule: @unchecked Sendable {
  /// The job that merges a disk's oldest snapshot, which a backup waits for.
  static func job(of disk: String) -> String { "snapshot-merge-\(disk)" }

  private let keeper: SnapshotKeeper
  private let agent: AgentControl?
  /// Nanoseconds between two snapshots.
  private let interval: UInt64
  private let keep: Int
  private let name: String
  // These are the worker's.
  private var timer: EventLoop.Timer?
  private var next: UInt64 = 0
  private var lastError = ""

  init(_ keeper: SnapshotKeeper, _ agent: AgentControl?, _ interval: SnapshotInterval, keep: Int) {
    self.keeper = keeper
    self.agent = agent
    self.interval = interval.seconds * 1_000_000_000
    self.keep = keep
    name = "every \(interval.text)"
  }

  /// Begins: the first snapshot is made an interval from now.
  func start() {
    keeper.worker.run { [self] in
      next = monotonicNanoseconds() + interval
      let timer = keeper.worker.makeTimer { [weak self] in self?.fire() }
      timer.arm(at: next)
      self.timer = timer
    }
    let refresh = keeper.control.onJobEnd
    keeper.control.onJobEnd = { [weak self] in
      refresh()
      if let self { keeper.worker.run { self.prune() } }
    }
  }

  /// No more snapshots; one that is being made is made.
  func stop() { keeper.worker.wait { [self] in timer?.cancel() } }

  private func fire() {
    do throws(MonitorError) {
      if try isBackingUp() { throw .refused("a backup of the machine's disks is under way, or was cut off") }
      try cut()
      lastError = ""
    } catch {
      complain("\(error)")
    }
    prune()
    // Intervals that have passed meanwhile are left out.
    let now = monotonicNanoseconds()
    next += interval
    if next <= now { next = now + interval }
    timer?.arm(at: next)
  }

  /// The same reason every ten minutes would help nobody.
  private func complain(_ reason: String) {
    if reason != lastError { printError("swiftvmm: the scheduled snapshot was not made: \(reason)") }
    lastError = reason
  }

  /// Disks that take writes and have files of this host, without those that are being backed up.
  private static func isMeant(_ disk: LiveDisk) -> Bool {
    !GuestSnapshots.isOwn(disk) && !disk.isReadOnly && !disk.isBackedUp && !NBDURI.isURI(disk.top.path)
  }

  /// A backup has a journal before it cuts, and expects no merge then.
  private func isBackingUp() throws(MonitorError) -> Bool {
    try keeper.control.run { graph in
      graph.disks.values.contains { disk in
        disk.isBackedUp
          || disk.top.chain.contains {
            BackupFiles.exists(BackupJournal.path(besides: BlockGraph.absolutePath($0.path)))
          }
      }
    }
  }

  private func cut() throws(MonitorError) {
    let stamp = RecoveryTime.compact(RecoveryTime.now())
    let files = try keeper.control.run { graph in
      graph.disks.values.filter { Self.isMeant($0) }.sorted { $0.name < $1.name }.map { disk in
        (disk.name, Self.overlay(of: disk, stamp))
      }
    }
    guard !files.isEmpty else { return }
    let isFrozen = freeze()
    defer { if isFrozen { _ = try? agent?.ask("fs-thaw", [:], milliseconds: 5000) } }
    keeper.expectCuts(files.map(\.1), name: name)
    do throws(MonitorError) {
      try DiskCommands.snapshot(files, keeper.control)
    } catch {
      // All disks have new layers, or none.
      for (_, file) in files { unlink(file) }
      throw error
    }
  }

  /// As the machine's disk is called that the schedule began with, and when.
  private static func overlay(of disk: LiveDisk, _ stamp: String) -> String {
    let bottom = disk.top.chain.last { !NBDURI.isURI($0.path) }?.path ?? disk.top.path
    let folder = BackupFiles.folder(of: BackupFiles.real(disk.top.path))
    let stem = "\(folder)/\(BackupFiles.name(of: bottom)).\(stamp)"
    var path = stem + ".qcow2"
    var number = 2
    while BackupFiles.exists(path) {
      path = "\(stem)-\(number).qcow2"
      number += 1
    }
    return path
  }

  /// An agent that has said hello holds the guest's file systems still; else the snapshot is as after a power cut.
  private func freeze() -> Bool {
    guard let agent, agent.state["hello"]?.objectValue != nil else { return false }
    return (try? agent.ask("fs-freeze", [:], milliseconds: 5000)) != nil
  }

  // MARK: The oldest

  /// Merges one snapshot a disk away that is too many; the end of the merge calls again.
  private func prune() {
    do throws(MonitorError) {
      if try isBackingUp() { return }
      let snapshots = try keeper.snapshots()
      try keeper.control.run { graph in
        for disk in graph.disks.values where Self.isMeant(disk) {
          guard !graph.jobs.values.contains(where: { $0.disk === disk }) else { continue }
          let own = snapshots.filter { $0.disk == disk.name && $0.entry.isScheduled }
          let torn = snapshots.first { $0.disk == disk.name && $0.entry.into != nil }
          guard let lowest = torn?.entry.into ?? (own.count > self.keep ? own.first?.entry.file : nil) else { continue }
          self.merge(into: lowest, disk, graph)
        }
      }
    } catch {
      complain("\(error)")
    }
  }

  private func merge(into file: String, _ disk: LiveDisk, _ graph: BlockGraph) {
    guard let upper = disk.top.chain.first(where: { $0.backing.map { BackupFiles.real($0.path) } == file }),
      upper !== disk.top,
      let base = upper.backing, upper.users == 1, base.users == 1
    else { return }
    var result = CommitResult()
    result.removesTop = true
    // What a guest has attached stays; the next interval tries again.
    try? graph.commit(Self.job(of: disk.name), disk, top: upper, base: base, result: result)
  }
}

/// The value of `--snapshot-every`: a number with s, m, h or d.
struct SnapshotInterval {
  let text: String
  let seconds: UInt64

  init(_ text: String) throws(Failure) {
    let units: [Character: UInt64] = ["s": 1, "m": 60, "h": 3600, "d": 86400]
    guard let unit = text.last.flatMap({ units[$0] }), text.utf8.dropLast().allSatisfy({ (0x30...0x39).contains($0) }),
      let number = UInt64(text.dropLast()), (1...365 * 86400).contains(number.multipliedReportingOverflow(by: unit).0),
      number <= 365 * 86400
    else {
      throw .badValue(
        option: "--snapshot-every", value: text, expected: "a number with s, m, h or d, such as 10m; 365d at most")
    }
    (self.text, seconds) = (text, number * unit)
  }

  static let defaultKeep = 24

  /// The value of `--keep`.
  static func checkKeep(_ keep: Int) throws(Failure) {
    guard (1...256).contains(keep) else { throw .badValue(option: "--keep", value: "\(keep)", expected: "1 to 256") }
  }
}
