import Glibc

/// Long work on disks, in steps, with many requests in flight: the command line waits for it, a machine's I/O loop
/// goes on meanwhile. It belongs to the thread of its disks.
///
/// A subclass says in `begin` what is to be done at one place of the disk; this class goes over the disk, keeps enough
/// requests in flight and no more than the speed allows, and collects errors.
public class BlockJob {
  /// Bytes that one stretch of data has at most, where no cluster is larger: what is in flight stays in the processor's caches.
  static let stretch = 1 << 20
  /// The largest cluster.
  static let largestStretch = 2 << 20

  /// Bytes to be gone over.
  public let total: UInt64
  /// Bytes that are done or need nothing.
  public var done: UInt64 { position - min(position, pending) }
  /// Bytes a second; 0 for no limit.
  public var bytesPerSecond: UInt64 = 0
  /// Bytes that were copied or zeroed, or are under way.
  public private(set) var moved: UInt64 = 0
  /// Stretches in flight.
  public var parallel = 4
  /// The first error, with which the job ended.
  public private(set) var error: BlockError?
  /// No more requests are begun.
  public private(set) var isCancelled = false
  /// Called once, when nothing is under way any more.
  public var onEnd: (() -> Void)?

  private var position: UInt64 = 0
  /// Bytes under way.
  private var pending: UInt64 = 0
  private var inFlight = 0
  private var isPumping = false
  private var hasEnded = false
  private var buffers: [DiskBuffer] = []
  private var startedAt: UInt64 = 0
  /// Bytes that one stretch of data has at most.
  let stretch: Int

  init(total: UInt64, stretch: Int = stretch) {
    self.total = total
    self.stretch = stretch
  }

  /// Begins what is to be done at `position` by way of `started`, and says how many bytes that covers; they count as
  /// done once every request of it has ended.
  func begin(at position: UInt64) throws(BlockError) -> UInt64 {
    total - position
  }

  /// Whether what follows would change nothing any more.
  var isSettled: Bool { false }

  /// Nothing is left to do, or an error or `cancel` has ended the job.
  public var isFinished: Bool { hasEnded }

  /// Begins no more requests; the job has ended when those under way have.
  public func cancel() {
    isCancelled = true
    pump()
  }

  /// Begins requests until enough are in flight. Call it first, and again after `delay`.
  public func pump() {
    guard !isPumping, !hasEnded else { return }
    isPumping = true
    while isGoingOn, hasRoom, delay == nil {
      // Held, so that a stretch whose requests complete at once does not end the job from within.
      inFlight += 1
      do throws(BlockError) {
        let covered = try begin(at: position)
        guard covered > 0 else { throw .io(call: "go over", path: "the disk", errno: EIO) }
        position += covered
      } catch {
        fail(error)
      }
      inFlight -= 1
    }
    isPumping = false
    if !isGoingOn, inFlight == 0 {
      hasEnded = true
      buffers = []
      onEnd?()
    }
  }

  /// Small stretches may be more, as long as they are no more bytes.
  private var hasRoom: Bool {
    inFlight < parallel
      || inFlight < parallel * Self.smallStretches && pending + UInt64(stretch) <= UInt64(parallel * stretch)
  }
  private static let smallStretches = 16

  private var isGoingOn: Bool { position < total && error == nil && !isCancelled && !isSettled }

  /// Nanoseconds until the speed allows more; nil where it does now.
  public var delay: UInt64? {
    guard bytesPerSecond > 0, isGoingOn else { return nil }
    let now = Self.now()
    if startedAt == 0 { startedAt = now }
    let due = startedAt &+ UInt64(Double(moved) / Double(bytesPerSecond) * 1e9)
    return due > now ? due - now : nil
  }

  private static func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
  }

  /// A stretch of `length` bytes is under way; `finished` ends it.
  func started(_ length: UInt64) {
    inFlight += 1
    moved += length
    pending += length
  }

  /// A stretch has ended.
  func finished(_ length: UInt64, _ error: BlockError?) {
    inFlight -= 1
    pending -= length
    if let error { fail(error) }
    pump()
  }

  private func fail(_ error: BlockError) {
    if self.error == nil { self.error = error }
  }

  func takeBuffer() -> DiskBuffer { buffers.popLast() ?? DiskBuffer(count: stretch) }
  func giveBack(_ buffer: DiskBuffer) { buffers.append(buffer) }

  /// Runs the job to its end, with a call to `progress` now and then.
  public func run(on queue: any IOQueue, progress: () -> Void = {}) throws(BlockError) {
    pump()
    while !hasEnded {
      progress()
      if !queue.wait() {
        guard let delay else { break }
        usleep(UInt32(min(delay / 1000 + 1, 100_000)))
      }
      pump()
    }
    progress()
    if let error { throw error }
  }
}

/// Reads of one stretch, which may come from several layers, into one buffer.
final class StretchRead {
  private var outstanding = 1
  private var error: BlockError?
  private let then: (BlockError?) -> Void

  init(then: @escaping (BlockError?) -> Void) { self.then = then }

  func read(_ layer: any BlockNode, at offset: UInt64, length: UInt64, into target: UnsafeMutableRawPointer) {
    outstanding += 1
    let request = BlockRequest(.read, offset: offset, length: length) { [self] error in end(error) }
    request.isBulk = true
    request.memory.append(target, Int(length))
    layer.submit(request)
  }

  func fail(_ error: BlockError) {
    if self.error == nil { self.error = error }
  }

  /// Everything has been begun.
  func commit() { end(nil) }

  private func end(_ error: BlockError?) {
    if let error { fail(error) }
    outstanding -= 1
    if outstanding == 0 { then(self.error) }
  }
}

/// Where bytes are all zero.
enum Zeros {
  static func fill(_ start: UnsafeRawPointer, _ count: Int) -> Bool {
    let head = min(count, 16)
    for index in 0..<head where start.load(fromByteOffset: index, as: UInt8.self) != 0 { return false }
    return count <= 16 || memcmp(start, start + 16, count - 16) == 0
  }

  /// How many bytes from `offset` on, in blocks of `granularity`, are all zero or all not.
  static func run(
    _ start: UnsafeRawPointer, from offset: Int, to end: Int, granularity: Int
  ) -> (isZero: Bool, length: Int) {
    func blockEnd(_ position: Int) -> Int { min(position + granularity, end) }
    var position = blockEnd(offset)
    let isZero = fill(start + offset, position - offset)
    while position < end, fill(start + position, blockEnd(position) - position) == isZero {
      position = blockEnd(position)
    }
    return (isZero, position - offset)
  }
}
