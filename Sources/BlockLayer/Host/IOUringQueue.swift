import CLinux
import Glibc
import Host

/// An `IOQueue` on io_uring(7).
public final class IOUringQueue: IOQueue {
  private static let entries: UInt32 = 256
  private var ring = clinux_uring()
  private let event: EventNotifier
  /// Requests by token; free places are nil.
  private var active: [BlockRequest?] = []
  private var paths: [String] = []
  private var free: [Int] = []
  /// Requests for which the submission queue had no room.
  private var waiting: [Int] = []
  private var inFlight = 0

  /// Sets up a ring; fails where the kernel has none or does not let this process use it.
  public init() throws(HostError) {
    event = try EventNotifier()
    _ = try check("io_uring_setup", clinux_uring_open(&ring, Self.entries, event.descriptor.rawValue))
  }

  deinit { clinux_uring_close(&ring) }

  /// The eventfd that completions signal.
  public var notifier: Int32 { event.descriptor.rawValue }

  /// Begins a request.
  public func start(_ request: BlockRequest, descriptor: Int32, path: String) {
    request.descriptor = descriptor
    request.position = request.offset
    let place: Int
    if let last = free.popLast() {
      place = last
      active[place] = request
      paths[place] = path
    } else {
      place = active.count
      active.append(request)
      paths.append(path)
    }
    inFlight += 1
    queue(place)
    // Past this depth it pays to let the kernel begin; below it, what is begun together is submitted together.
    if ring.queued >= 16 { submit(waitFor: 0) }
  }

  private func queue(_ place: Int) {
    guard let request = active[place] else { return }
    let operation: clinux_uring_operation =
      switch request.operation {
      case .read: CLINUX_URING_READ
      case .write: CLINUX_URING_WRITE
      default: request.syncsAll ? CLINUX_URING_SYNC : CLINUX_URING_SYNC_DATA
      }
    if request.allocates {
      guard clinux_uring_queue_allocation(&ring, request.descriptor, request.position, request.length) != 0 else {
        return waiting.append(place)
      }
      request.allocates = false
    }
    let queued = clinux_uring_queue(
      &ring, operation, request.descriptor, request.memory.pointer, UInt32(min(request.memory.count, 1024)),
      request.position, request.isBulk ? 1 : 0, UInt64(place))
    if queued == 0 { waiting.append(place) }
  }

  private func submit(waitFor: UInt32) {
    while ring.queued > 0 || waitFor > 0 {
      if clinux_uring_submit(&ring, waitFor) >= 0 { break }
      // EAGAIN and EBUSY: the kernel wants completions reaped first.
      if errno != EINTR { break }
    }
  }

  /// Submits, and completes what is done.
  public func poll() {
    event.drain()
    submit(waitFor: 0)
    reap()
    if ring.queued > 0 { submit(waitFor: 0) }
  }

  /// Submits, waits for one completion, and completes what is done.
  public func wait() -> Bool {
    guard inFlight > 0 else { return false }
    if !reap() {
      submit(waitFor: 1)
      reap()
    }
    return true
  }

  @discardableResult
  private func reap() -> Bool {
    var token: UInt64 = 0
    var result: Int32 = 0
    var any = false
    while clinux_uring_reap(&ring, &token, &result) != 0 {
      any = true
      finish(Int(token), result)
    }
    let retry = waiting
    waiting.removeAll(keepingCapacity: true)
    for place in retry { queue(place) }
    return any
  }

  private func finish(_ place: Int, _ result: Int32) {
    guard let request = active[place] else { return }
    // The last is a write behind an allocation that an older kernel does not know.
    if result == -EINTR || result == -EAGAIN || result == -ECANCELED {
      queue(place)
      return
    }
    if result >= 0, request.memory.count > 0, Int(result) < request.memory.byteCount {
      if result > 0 {
        request.position += UInt64(result)
        request.memory.dropFirst(Int(result))
        queue(place)
        return
      }
      // The end of the file: the rest reads as zeros, and nothing more can be written.
      if request.operation == .read { request.memory.zero(from: 0, length: request.memory.byteCount) }
    }
    let path = paths[place]
    active[place] = nil
    free.append(place)
    inFlight -= 1
    let shortWrite = result == 0 && request.operation == .write && request.memory.byteCount > 0
    let code = result < 0 ? -result : shortWrite ? ENOSPC : 0
    request.completion(code == 0 ? nil : .io(call: request.operation.verb, path: path, errno: code))
  }
}

extension BlockRequest.Operation {
  /// What messages say was tried.
  var verb: String {
    switch self {
    case .read: "read"
    case .write: "write"
    case .flush: "flush"
    case .discard: "discard blocks of"
    case .writeZeroes: "write zeroes to"
    }
  }
}
