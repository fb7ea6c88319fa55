import BlockLayer
import Glibc
import Host
import JSON
import Monitor
import Synchronization

/// One backup: cut, copy, merge, with a journal on disk before each step, and everything undone where one fails.
final class BackupSession {
  /// What is asked for.
  struct Options {
    var disks: [String] = []
    var target: String?
    var isIncremental = false
    /// The control socket of a machine that the temporary snapshots are plugged into.
    var appliance: String?
    var timeout = 120
  }

  /// What was done with a disk.
  struct Result {
    var device: String
    var size: UInt64
    var moved: UInt64
    var isIncremental: Bool
  }

  private let machine: BackupMachine
  private let options: Options
  private let progress: DiskProgress
  private let id = BackupRecord.newID()

  init(_ machine: BackupMachine, _ options: Options, progress: DiskProgress) {
    self.machine = machine
    self.options = options
    self.progress = progress
  }

  /// A disk with where its copy goes.
  private struct Work {
    var disk: BackupMachine.Disk
    var entry: BackupJournal.Disk
    var path: String?
    /// The backup that an increment stands on, and what has changed since.
    var parent: (file: String, bitmap: String)?
  }

  /// Makes the backup.
  ///
  /// - Returns: Its id, and what was done with each disk.
  func run() throws(Failure) -> (id: String, disks: [Result]) {
    let (known, configuration) = try machine.describe()
    let disks = try chosen(known)
    let entries = disks.map { BackupJournal.Disk(device: $0.device, image: $0.layers[0].file) }
    try BackupJournal.requireNone(disks.flatMap { $0.layers.map(\.file) })
    let target = try options.target.map { text throws(Failure) in
      try BackupTarget(text, disks: disks.count, isIncremental: options.isIncremental)
    }
    let record = try target?.record()
    let work = zip(disks, entries).map { disk, entry in
      Work(
        disk: disk, entry: entry, path: target?.image(disk.device, id: id),
        parent: options.isIncremental ? parent(of: disk, record) : nil)
    }
    for work in work {
      if let path = work.path, BackupFiles.exists(path) { throw .backup(.targetExists(path)) }
    }
    var journal = BackupJournal(id: id, disks: entries, socket: machine.socket + ".backup")
    journal.unfinished = work.compactMap(\.path)
    journal.record = record?.path
    let lock = Lock(try journal.save(isNew: true))
    defer { withExtendedLifetime(lock) {} }
    do throws(Failure) {
      let results = try make(work, target, record, configuration, &journal, lock)
      return (id, results)
    } catch {
      throw undo(journal, after: error)
    }
  }

  /// Keeps others from the journal while this process lives.
  private final class Lock {
    var file: FileDescriptor
    init(_ file: consuming FileDescriptor) { self.file = file }
  }

  private func chosen(_ known: [BackupMachine.Disk]) throws(Failure) -> [BackupMachine.Disk] {
    var chosen: [BackupMachine.Disk] = []
    for name in options.disks {
      guard let disk = known.first(where: { $0.device == name }) else {
        throw .backup(.noDisk(name, known: known.map(\.device)))
      }
      if !chosen.contains(where: { $0.device == name }) { chosen.append(disk) }
    }
    if options.disks.isEmpty { chosen = known.filter { !$0.isReadOnly } }
    guard !chosen.isEmpty else { throw .backup(.noDisks) }
    for disk in chosen {
      let file = disk.layers.first?.file ?? ""
      if NBDURI.isURI(file) { throw .backup(.remoteDisk(device: disk.device, file: file)) }
      if disk.isReadOnly { throw .backup(.readOnlyDisk(device: disk.device)) }
    }
    return chosen
  }

  /// What an increment of a disk can stand on: the last backup there, where the disk has noted all changes since.
  private func parent(of disk: BackupMachine.Disk, _ record: BackupRecord?) -> (file: String, bitmap: String)? {
    if let last = record?.last(disk.device), last.disk.size == disk.size {
      let bitmap = BackupJournal.bitmapPrefix + last.id
      if disk.layers[0].bitmaps.contains(bitmap) { return (last.disk.file, bitmap) }
    }
    printError(
      "swiftvmm: \(disk.device): nothing says what has changed since the last backup there, so all of it is copied")
    return nil
  }

  // MARK: The steps

  private func make(
    _ work: [Work], _ target: BackupTarget?, _ record: BackupRecord?, _ configuration: JSONValue,
    _ journal: inout BackupJournal, _ lock: Lock
  ) throws(Failure) -> [Result] {
    try cut(work)
    journal.phase = .copy
    lock.file = try journal.save()
    try expose(work, journal)
    var results: [Result] = []
    if let target {
      for work in work { results.append(try copy(work, target, journal)) }
    }
    if let appliance = options.appliance {
      try ApplianceDisks(appliance, journal, timeout: options.timeout).lend()
    }
    if var record {
      let disks = zip(work, results).map { work, result in
        BackupRecord.Disk(
          device: result.device, file: BackupFiles.name(of: work.path ?? ""), size: result.size,
          parent: result.isIncremental ? work.parent?.file : nil, moved: result.moved)
      }
      record.backups.append(BackupRecord.Backup(id: id, disks: disks, configuration: configuration))
      try record.save()
    }
    // From here on the copy is whole, and a way back that is cut off is taken up again rather than undone.
    journal.phase = .merge
    lock.file = try journal.save()
    try BackupRecovery.finish(journal, machine)
    return results
  }

  /// One instant for all disks; what the guest has flushed is below, what it writes from then on above.
  private func cut(_ work: [Work]) throws(Failure) {
    let actions = work.map { work -> JSONValue in
      [
        "type": "blockdev-snapshot-sync",
        "data": ["device": .string(work.disk.device), "snapshot-file": .string(work.entry.overlay)],
      ]
    }
    try machine.waitForMerges(of: work.map(\.disk.device))
    let isFrozen = try freeze()
    // The agent thaws by itself after a while, so a machine whose backup is killed here goes on too.
    defer { if isFrozen { _ = try? machine.execute("x-swiftvmm-agent", ["request": "fs-thaw"]) } }
    try machine.execute("transaction", ["actions": .array(actions)])
  }

  /// Has the guest write its file systems out and hold them still, where an agent answers there.
  private func freeze() throws(Failure) -> Bool {
    guard let agent = try? machine.execute("x-swiftvmm-query-agent"), agent["open"]?.boolValue == true else {
      return false
    }
    do throws(Failure) {
      try machine.execute("x-swiftvmm-agent", ["request": "fs-freeze"])
      return true
    } catch {
      guard case .backup(.machine(let reason)) = error, case .reply(_, let text) = reason else { throw error }
      printError("swiftvmm: the guest's file systems are not frozen (\(text)): the backup is as after a power cut")
      return false
    }
  }

  private func expose(_ work: [Work], _ journal: BackupJournal) throws(Failure) {
    let disks = work.map { work -> JSONValue in
      [
        "node": .string(work.disk.layers[0].node), "file": .string(work.entry.temporary),
        "name": .string(work.entry.name),
      ]
    }
    try machine.execute(
      "x-swiftvmm-backup-open",
      ["socket": .string(journal.socket), "disks": .array(disks), "writable": .bool(options.appliance != nil)])
  }

  private func copy(_ work: Work, _ target: BackupTarget, _ journal: BackupJournal) throws(Failure) -> Result {
    try BackupCancel.check()
    var options = CopyJob.Options()
    if let parent = work.parent {
      options.ranges = try machine.dirtyRanges(node: work.disk.layers[0].node, bitmap: parent.bitmap)
    }
    options.targetReadsZero = work.parent == nil && work.path != nil
    do {
      let queue = try makeIOQueue()
      let uri = NBDURI(try .init("unix:" + journal.socket), export: work.entry.name).description
      let source = try BlockChain(path: uri, format: .raw, queue: queue)
      let moved = try withChain(source) { try copy(source, work, target, options, queue) }
      if let path = work.path { try BackupFiles.flush(folder: BackupFiles.folder(of: path)) }
      return Result(
        device: work.disk.device, size: work.disk.size, moved: moved, isIncremental: work.parent != nil)
    } catch {
      throw Failure(error)
    }
  }

  private func copy(
    _ source: BlockChain, _ work: Work, _ target: BackupTarget, _ options: CopyJob.Options, _ queue: any IOQueue
  ) throws -> UInt64 {
    var path = work.path ?? ""
    var format = ImageFormat.qcow2
    if case .export(let uri) = target {
      (path, format) = (uri, .raw)
    } else {
      try HostFile.create(path)
      var image = Qcow2CreateOptions(size: source.top.size)
      image.backingName = work.parent?.file
      image.backingFormat = work.parent == nil ? nil : ImageFormat.qcow2.rawValue
      let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
      defer { file.close() }
      try Qcow2Image.create(image, in: file)
    }
    // With what is below an increment: zeros there must hide it.
    let result = try BlockChain(path: path, format: format, access: FileAccess(writable: true), queue: queue)
    return try withChain(result) {
      guard result.top.size >= source.top.size else {
        throw BlockError.outOfRange(offset: 0, length: source.top.size, size: result.top.size)
      }
      let job = CopyJob(from: source.top, to: result.top, options)
      try progress.run(job, on: queue) { if BackupCancel.isWished { job.cancel() } }
      try BackupCancel.check()
      try result.top.perform(.flush, on: queue)
      return job.moved
    }
  }

  // MARK: Undoing

  private func undo(_ journal: BackupJournal, after failure: Failure) -> Failure {
    do throws(Failure) {
      try BackupRecovery.finish(journal, machine)
    } catch {
      return .backup(
        .notUndone(why: failure.text, then: error.text, image: journal.disks.first?.image ?? ""))
    }
    if case .backup(.cancelled) = failure { return failure }
    return .backup(.undone(why: failure.text, isNoSpace: failure.isNoSpace))
  }
}

// A signal's handler can reach nothing else.
private let wish = Atomic<Bool>(false)

/// Whether somebody wishes the backup to end: SIGINT, SIGTERM or SIGHUP.
enum BackupCancel {
  static var isWished: Bool { wish.load(ordering: .relaxed) }

  /// From now on the signals are wishes.
  static func listen() {
    var numbers = sigset_t()
    sigemptyset(&numbers)
    for number in [SIGINT, SIGTERM, SIGHUP] {
      signal(number) { _ in wish.store(true, ordering: .relaxed) }
      sigaddset(&numbers, number)
    }
    // Whoever started this may have blocked them.
    pthread_sigmask(SIG_UNBLOCK, &numbers, nil)
    signal(SIGPIPE, SIG_IGN)
  }

  static func check() throws(Failure) {
    if isWished { throw .backup(.cancelled) }
  }
}
