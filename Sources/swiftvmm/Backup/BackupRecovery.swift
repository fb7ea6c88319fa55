import BlockLayer
import Glibc
import Host
import JSON

/// The way back from a backup, whole or cut off at any moment: the disks' chains get their former length and what was made
/// for the backup goes. Each step may be taken again.
enum BackupRecovery {
  /// What is left of a backup of a running machine.
  static func finish(_ journal: BackupJournal, _ machine: BackupMachine) throws(Failure) {
    try machine.execute("x-swiftvmm-backup-close", ["names": .array(journal.disks.map { .string($0.name) })])
    let (known, _) = try machine.describe()
    var merging: [BackupJournal.Disk] = []
    for disk in journal.disks {
      try BackupFiles.remove(disk.temporary)
      let layers = known.first { $0.device == disk.device }?.layers ?? []
      if layers.contains(where: { $0.file == disk.overlay }) {
        merging.append(disk)
      } else if BackupFiles.exists(disk.overlay) {
        try removeUnused(disk)
      }
    }
    // Jobs of disks that are merged already may wait to be dismissed.
    let jobs = try machine.jobs()
    merging += journal.disks.filter { disk in jobs[disk.job] != nil && !merging.contains { $0.job == disk.job } }
    try machine.merge(merging, bitmap: journal.hasCopy ? journal.bitmap : nil)
    try removeRest(journal)
  }

  /// An overlay that was made for a cut that did not come.
  private static func removeUnused(_ disk: BackupJournal.Disk) throws(Failure) {
    if try holdsData(disk.overlay) { throw .backup(.foreignOverlay(path: disk.overlay, image: disk.image)) }
    try BackupFiles.remove(disk.overlay)
  }

  private static func holdsData(_ overlay: String) throws(Failure) -> Bool {
    do {
      let queue = try makeIOQueue()
      let chain = try BlockChain(path: overlay, format: .qcow2, backing: false, queue: queue)
      return try withChain(chain) {
        var offset: UInt64 = 0
        while offset < chain.top.size {
          let extent = try chain.top.extent(at: offset, length: chain.top.size - offset)
          if extent.isAllocated { return true }
          offset += extent.length
        }
        return false
      }
    } catch {
      if isTorn(error) { return false }
      throw Failure(error)
    }
  }

  /// Its making was cut off: a disk uses only an overlay whose file is whole.
  private static func isTorn(_ error: any Error) -> Bool {
    if case .malformed? = error as? BlockError { return true }
    return false
  }

  private static func removeRest(_ journal: BackupJournal) throws(Failure) {
    if journal.phase != .merge, !journal.hasCopy {
      for path in journal.unfinished { try BackupFiles.remove(path) }
    }
    try journal.remove()
  }

  // MARK: Cut off

  /// Recovers what a running machine's disks show of a backup.
  ///
  /// - Returns: The ids of the backups that were ended or undone.
  static func recover(_ machine: BackupMachine) throws(Failure) -> [String] {
    var done: [String] = []
    let images = Set(try machine.describe().disks.flatMap { $0.layers.map(\.file) })
    for image in images.sorted() {
      let path = BackupJournal.path(besides: image)
      guard BackupFiles.exists(path) else {
        BackupJournal.removeUnborn(besides: image)
        continue
      }
      let lock = try BackupJournal.lock(path)
      defer { withExtendedLifetime(lock) {} }
      let journal = try BackupJournal(reading: path)
      try finish(journal, machine)
      done.append(journal.id)
    }
    return done
  }

  /// Recovers the disks of a machine that is not there any more.
  ///
  /// - Returns: The overlays that were merged.
  static func recover(image: String) throws(Failure) -> [String] {
    let image = BlockGraph.absolutePath(image)
    let path = BackupJournal.path(besides: image)
    guard BackupFiles.exists(path) else {
      BackupJournal.removeUnborn(besides: image)
      // A disk of a backup whose journal is beside another one.
      return try merge(BackupJournal.Disk(device: "", image: image), bitmap: nil)
    }
    let lock = try BackupJournal.lock(path)
    defer { withExtendedLifetime(lock) {} }
    let journal = try BackupJournal(reading: path)
    let bitmap = journal.hasCopy ? journal.bitmap : nil
    var merged: [String] = []
    for disk in journal.disks { merged += try merge(disk, bitmap: bitmap) }
    try BackupFiles.remove(journal.socket)
    try removeRest(journal)
    return merged
  }

  private static func merge(_ disk: BackupJournal.Disk, bitmap: String?) throws(Failure) -> [String] {
    var merged: [String] = []
    if BackupFiles.exists(disk.overlay) {
      do {
        try commit(disk, bitmap)
        merged = [disk.overlay]
      } catch {
        guard isTorn(error) else { throw Failure(error) }
      }
      try BackupFiles.remove(disk.overlay)
    }
    try BackupFiles.remove(disk.temporary)
    return merged
  }

  private static func commit(_ disk: BackupJournal.Disk, _ bitmap: String?) throws {
    let queue = try makeIOQueue()
    // Alone first, so that what is said of its bytes is not of those below.
    let alone = try BlockChain(path: disk.overlay, format: .qcow2, backing: false, queue: queue)
    try alone.close()
    let chain = try BlockChain(
      path: disk.overlay, format: .qcow2, access: FileAccess(writable: true), writableDepth: 1, queue: queue)
    try withChain(chain) {
      guard chain.layers.count > 1 else { throw Failure.diskHasNoBacking(path: disk.overlay) }
      let base = chain.layers[1].node
      if let bitmap, let image = chain.layers[1].qcow2 {
        var result = CommitResult()
        (result.bitmap, result.replacing) = (bitmap, BackupJournal.bitmapPrefix)
        try result.changeBitmaps(of: image)
      }
      if base.size < chain.top.size { try base.resize(to: chain.top.size, on: queue) }
      var options = CopyJob.Options()
      options.layers = 1
      try CopyJob(from: chain.top, to: base, options).run(on: queue)
      try base.perform(.flush, on: queue)
    }
  }
}
