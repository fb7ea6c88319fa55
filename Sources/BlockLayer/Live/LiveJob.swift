import Glibc
import Host

/// Long work on a disk that a guest uses: in stretches, between the guest's requests, on the disk's thread.
///
/// What is to be moved is a bitmap, which a subclass fills as the job comes by and the guest's writes may add to. QEMU's job
/// states (job.json) say how far it is.
public class LiveJob {
  /// What a job does, in QEMU's words (`JobType`).
  public enum Kind: String, Sendable {
    case stream, commit, backup, mirror
  }

  /// How far it is, in QEMU's words (`JobStatus`).
  public enum Status: String, Sendable, CaseIterable {
    case created, running, paused, ready, standby, waiting, pending, aborting, concluded, null
  }

  /// What happens to a job.
  public enum Event {
    /// It has another status.
    case status(Status)
    /// Nothing is left to move: `complete` would end it at once.
    case ready
    /// It has ended; it had an error, or none.
    case completed(BlockError?)
    /// It was cancelled.
    case cancelled
  }

  /// Blocks of what is to be moved, in bytes, at least.
  static let minimumGranularity: UInt64 = 64 << 10
  /// Bytes of one stretch.
  static let stretch: UInt64 = 1 << 20
  private static let parallel = 4
  /// Blocks that are looked at in one go.
  private static let scanBlocks = 1024

  /// Unique among the jobs.
  public let id: String
  /// What it does.
  public let kind: Kind
  /// The disk that it works on.
  public let disk: LiveDisk
  /// Bytes a second; 0 for no limit.
  public var speed: UInt64 = 0 {
    didSet { (slotStart, slotBytes) = (0, 0) }
  }
  /// How far it is.
  public private(set) var status = Status.created
  /// The first error.
  public private(set) var error: BlockError?
  /// Bytes that were moved.
  public private(set) var offset: UInt64 = 0
  /// The job stays after its end until it is dismissed.
  public var staysConcluded = false
  /// The job stays pending until it is finalized.
  public var staysPending = false

  /// Told once of the end.
  private var onEnd: (BlockError?) -> Void = { _ in }

  let graph: BlockGraph
  let todo: DirtyBitmap
  private var scanned = 0
  private var cursor = 0
  private var inFlight = 0
  private var pauses = 0
  private var isCancelled = false
  private var isCompleting = false
  private var isPreparing = false
  private var isSettling = false
  private var isConcluding = false
  private var buffers: [DiskBuffer] = []
  private var slotStart: UInt64 = 0
  private var slotBytes: UInt64 = 0
  private var timer: EventLoop.Timer?

  init(_ id: String, _ kind: Kind, _ disk: LiveDisk, graph: BlockGraph, granularity: UInt64) {
    self.id = id
    self.kind = kind
    self.disk = disk
    self.graph = graph
    todo = DirtyBitmap(size: disk.size, granularity: granularity)
  }

  // MARK: What a subclass says

  /// The disk is held: guards and claims begin.
  func willStart() throws(BlockError) {}
  /// Sets in `todo` what is to be moved of the bytes.
  func scan(_ range: Range<UInt64>) throws(BlockError) { todo.set(range.lowerBound, UInt64(range.count)) }
  /// Moves the bytes, whose bits have been cleared; `then` once.
  func move(_ range: Range<UInt64>, _ buffer: DiskBuffer, then: @escaping (BlockError?) -> Void) { then(nil) }
  /// Whether the job goes over the disk, or waits for the guest's writes.
  var movesByItself: Bool { true }
  /// Whether the job waits for `complete` when nothing is left to move.
  var waitsForComplete: Bool { false }
  /// Little is left: does what would take long at the end, while the guest goes on.
  func prepareEnd(then: @escaping (BlockError?) -> Void) { then(nil) }
  /// Everything has been moved: changes the layers, and calls `then`.
  func conclude(then: @escaping (BlockError?) -> Void) { then(nil) }
  /// The job is over, however it ended: guards and claims end. The disk is held.
  func didEnd(succeeded: Bool) {}

  // MARK: Life

  /// Bytes to be moved in all, as far as is known.
  public var length: UInt64 {
    offset + todo.dirtyBytes + UInt64(todo.blocks - scanned) * todo.granularity
  }

  /// Begins.
  func start() {
    set(.running)
    disk.hold { [self] in
      do throws(BlockError) { try willStart() } catch { fail(error) }
      disk.release()
      pump()
    }
  }

  /// Stops beginning stretches, or goes on.
  public func pause(_ isPaused: Bool) throws(BlockError) {
    guard [.running, .paused, .ready, .standby].contains(status), isPaused || pauses > 0 else {
      throw .jobState(id, status.rawValue)
    }
    pauses += isPaused ? 1 : -1
    switch (status, pauses > 0) {
    case (.running, true): set(.paused)
    case (.ready, true): set(.standby)
    case (.paused, false): set(.running)
    case (.standby, false): set(.ready)
    default: break
    }
    pump()
  }

  /// Gives up. A job that is ready then leaves the disk as it is. One that is not told to hurry, `isForced`, may first do what is
  /// left, if it is of use without the disk.
  public func cancel(isForced: Bool) {
    guard !isForced, status == .ready, detach() else { return cancel() }
    isCompleting = true
    pump()
  }

  /// Gives up at once.
  public func cancel() {
    // Once the layers are being changed it is too late.
    guard ![.concluded, .aborting, .null].contains(status), !isConcluding else { return }
    isCancelled = true
    pauses = 0
    if status == .pending { return end() }
    pump()
  }

  /// Ends a job that is ready.
  public func complete() throws(BlockError) {
    guard status == .ready else { throw .jobState(id, status.rawValue) }
    isCompleting = true
    pump()
  }

  /// From now on the job ends as if completed, and leaves the disk as it is; false where that makes no sense.
  func detach() -> Bool { false }

  /// Ends a job that is ready without a change of the disk, and calls `then` when all is done.
  func finish(then: @escaping (BlockError?) -> Void) {
    guard status == .ready, detach() else { return then(.jobState(id, status.rawValue)) }
    onEnd = then
    // Nobody waits for the job's user now, nor for its speed.
    (staysPending, staysConcluded, speed) = (false, false, 0)
    isCompleting = true
    pump()
  }

  /// Carries out what a pending job has left to do.
  public func finalize() throws(BlockError) {
    guard status == .pending, !isConcluding else { throw .jobState(id, status.rawValue) }
    carryOut()
  }

  /// Forgets a concluded job.
  public func dismiss() throws(BlockError) {
    guard status == .concluded else { throw .jobState(id, status.rawValue) }
    set(.null)
    graph.remove(self)
  }

  func fail(_ error: BlockError) {
    if self.error == nil { self.error = error }
  }

  private func set(_ status: Status) {
    self.status = status
    graph.onJob(self, .status(status))
  }

  private var isOver: Bool { isSettling || error != nil || isCancelled }

  /// Begins stretches until enough are under way.
  func pump() {
    while movesByItself, !isOver, pauses == 0, inFlight < Self.parallel, !isNearEnd, !isTooFast {
      do throws(BlockError) {
        guard let range = try nextStretch() else { break }
        begin(range)
      } catch {
        fail(error)
      }
    }
    if waitsForComplete, !isCompleting, status == .running, !isOver, pauses == 0, isSmall { prepare() }
    guard inFlight == 0, !isSettling, status != .created else { return }
    if error != nil || isCancelled {
      isSettling = true
      return end()
    }
    guard movesByItself, pauses == 0, scanned >= todo.blocks, todo.count == 0 || isNearEnd else { return }
    if waitsForComplete, !isCompleting { return }
    isSettling = true
    set(.waiting)
    set(.pending)
    if !staysPending { carryOut() }
  }

  private func prepare() {
    guard !isPreparing else { return }
    isPreparing = true
    inFlight += 1
    prepareEnd { [self] error in
      isPreparing = false
      inFlight -= 1
      if let error { fail(error) }
      if status == .running, !isOver, pauses == 0 {
        set(.ready)
        graph.onJob(self, .ready)
      }
      pump()
    }
  }

  /// The rest may be moved while the disk is held: a guest that writes on cannot put the end off for ever.
  private var isNearEnd: Bool { isCompleting && isSmall }

  /// So little is left that the guest may wait for it.
  private var isSmall: Bool { scanned >= todo.blocks && (todo.count <= 1 || todo.dirtyBytes <= 1 << 20) }

  /// Something that the guest's writes made necessary is under way, until `endGuarded`.
  func beginGuarded() { inFlight += 1 }

  func endGuarded(_ bytes: UInt64, _ error: BlockError?) {
    inFlight -= 1
    if let error { fail(error) } else { offset += bytes }
    pump()
  }

  private func carryOut() {
    isConcluding = true
    conclude { [self] error in
      if let error { fail(error) }
      end()
    }
  }

  private func end() {
    timer?.cancel()
    let succeeded = error == nil && !isCancelled
    if !succeeded { set(.aborting) }
    // Reads of the guest's under way would keep a layer from being for reading only again.
    disk.hold { [self] in
      didEnd(succeeded: succeeded)
      disk.release()
      graph.onJob(self, isCancelled && error == nil ? .cancelled : .completed(error))
      buffers = []
      set(.concluded)
      if !staysConcluded {
        set(.null)
        graph.remove(self)
      }
      let onEnd = onEnd
      self.onEnd = { _ in }
      onEnd(error ?? (succeeded ? nil : .jobState(id, status.rawValue)))
    }
  }

  private func nextStretch() throws(BlockError) -> Range<UInt64>? {
    while true {
      if let first = todo.next(from: cursor) ?? todo.next(from: 0) {
        var end = first + 1
        let most = max(1, Int(Self.stretch / todo.granularity))
        while end < todo.blocks, end - first < most, todo[end] { end += 1 }
        cursor = end
        return todo.range(first).lowerBound..<todo.range(end - 1).upperBound
      }
      guard scanned < todo.blocks else { return nil }
      let end = min(scanned + Self.scanBlocks, todo.blocks)
      let range = todo.range(scanned).lowerBound..<todo.range(end - 1).upperBound
      scanned = end
      try scan(range)
    }
  }

  /// Moves what is left, once over, while the guest goes on; what it writes again meanwhile stays.
  func moveLeft(from start: Int = 0, then: @escaping (BlockError?) -> Void) {
    guard let block = todo.next(from: start) else { return then(nil) }
    let range = todo.range(block)
    todo[block] = false
    let buffer = DiskBuffer(count: range.count)
    move(range, buffer) { [self] error in
      // The writes have read from it until now.
      withExtendedLifetime(buffer) {}
      if let error { then(error) } else { moveLeft(from: block + 1, then: then) }
    }
  }

  /// Copies what is left, a few blocks at a time. The disk is held.
  func moveRest(
    from source: any BlockNode, to target: any BlockNode,
    where isWanted: @escaping (ChainExtent) -> Bool = { _ in true },
    then: @escaping (BlockError?) -> Void
  ) {
    var lanes = Self.parallel
    var first: BlockError?
    for _ in 0..<lanes {
      moveLane(source, target, isWanted) { error in
        first = first ?? error
        lanes -= 1
        if lanes == 0 { then(first) }
      }
    }
  }

  private func moveLane(
    _ source: any BlockNode, _ target: any BlockNode, _ isWanted: @escaping (ChainExtent) -> Bool,
    then: @escaping (BlockError?) -> Void
  ) {
    guard let block = todo.next(from: 0) else { return then(nil) }
    let range = todo.range(block).clamped(to: 0..<source.size)
    todo[block] = false
    let buffer = DiskBuffer(count: range.count)
    StretchCopy(source: source, target: target, buffer: buffer).copy(range, where: isWanted) { [self] error in
      // The writes have read from it until now.
      withExtendedLifetime(buffer) {}
      if let error { then(error) } else { moveLane(source, target, isWanted, then: then) }
    }
  }

  /// Everything has been looked at; only what is in `todo` is moved.
  func skipScan() { scanned = todo.blocks }

  private func begin(_ range: Range<UInt64>) {
    inFlight += 1
    slotBytes += UInt64(range.count)
    let buffer = buffers.popLast() ?? DiskBuffer(count: Int(max(Self.stretch, todo.granularity)))
    todo.clear(range)
    move(range, buffer) { [self] error in
      inFlight -= 1
      buffers.append(buffer)
      if let error { fail(error) } else { offset += UInt64(range.count) }
      pump()
    }
  }

  /// More may be moved only later; `pump` is called then.
  private var isTooFast: Bool {
    guard speed > 0, slotBytes > 0 else { return false }
    let now = monotonicNanoseconds()
    if slotStart == 0 { slotStart = now }
    let due = slotStart &+ UInt64(Double(slotBytes) / Double(speed) * 1e9)
    guard due > now else { return false }
    if timer == nil { timer = graph.makeTimer { [weak self] in self?.pump() } }
    timer?.arm(at: due)
    return true
  }
}

extension DirtyBitmap {
  /// Clears the bits of whole blocks.
  func clear(_ range: Range<UInt64>) {
    guard !range.isEmpty else { return }
    for block in Int(range.lowerBound / granularity)...Int((range.upperBound - 1) / granularity) { self[block] = false }
  }
}

/// Copies a stretch from one disk to another, or to itself: what is zero without reading it.
struct StretchCopy {
  let source: any BlockNode
  let target: any BlockNode
  let buffer: DiskBuffer
  /// Bytes between two parts that are copied with them, because one transfer costs less than two.
  private static let gap: UInt64 = 16 << 10

  /// Copies those parts of the range of which `isWanted` says so, and small gaps between them; `then` once. Nobody writes to
  /// the range meanwhile.
  func copy(
    _ range: Range<UInt64>, where isWanted: (ChainExtent) -> Bool = { _ in true },
    then: @escaping (BlockError?) -> Void
  ) {
    var parts: [(range: Range<UInt64>, isZero: Bool)] = []
    var offset = range.lowerBound
    do throws(BlockError) {
      while offset < range.upperBound {
        let found = try source.chainExtent(at: offset, length: range.upperBound - offset)
        let part = offset..<(offset + found.extent.length)
        if isWanted(found) {
          let gap = found.extent.isZero ? 0 : Self.gap
          if let last = parts.last, last.isZero == found.extent.isZero, offset - last.range.upperBound <= gap {
            parts[parts.count - 1].range = last.range.lowerBound..<part.upperBound
          } else {
            parts.append((part, found.extent.isZero))
          }
        }
        offset = part.upperBound
      }
    } catch {
      return then(error)
    }
    let base = range.lowerBound
    let read = StretchRead { [self, parts] error in
      if let error { return then(error) }
      // The host reads the buffer until the last transfer ends.
      let write = StretchWrite { [buffer] error in withExtendedLifetime(buffer) { then(error) } }
      for part in parts {
        if part.isZero {
          write.writeZeroes(target, at: part.range.lowerBound, length: UInt64(part.range.count))
        } else {
          write.write(
            target, at: part.range.lowerBound, length: UInt64(part.range.count),
            from: buffer.start + Int(part.range.lowerBound - base))
        }
      }
      write.commit()
    }
    for part in parts where !part.isZero {
      read.read(
        source, at: part.range.lowerBound, length: UInt64(part.range.count),
        into: buffer.start + Int(part.range.lowerBound - base))
    }
    read.commit()
  }
}
