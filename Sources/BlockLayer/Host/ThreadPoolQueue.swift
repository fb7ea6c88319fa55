import CLinux
import Glibc
import Host

/// An `IOQueue` on threads that wait in preadv(2) and pwritev(2), for hosts without io_uring.
public final class ThreadPoolQueue: IOQueue {
  /// A request on its way to a thread and back: only one thread has it at a time.
  fileprivate struct Job: @unchecked Sendable {
    let request: BlockRequest
    let path: String
    var result: Int32 = 0
  }

  fileprivate struct State {
    var todo: [Job] = []
    var done: [Job] = []
    var ends = false

    mutating func takeDone() -> [Job] {
      defer { done = [] }
      return done
    }
  }

  private let state = Condition(State())
  private let event: EventNotifier
  private var threads: [HostThread] = []
  private var inFlight = 0

  /// Starts the threads.
  public init(threads count: Int = 4) throws(HostError) {
    event = try EventNotifier()
    let state = state
    let descriptor = event.descriptor.rawValue
    for index in 0..<count {
      threads.append(try HostThread(name: "disk-\(index)") { Self.work(state, notifier: descriptor) })
    }
  }

  deinit {
    state.withLock { $0.ends = true }
    for thread in threads { thread.join() }
  }

  /// The eventfd that completions signal.
  public var notifier: Int32 { event.descriptor.rawValue }

  /// Begins a request.
  public func start(_ request: BlockRequest, descriptor: Int32, path: String) {
    request.descriptor = descriptor
    request.position = request.offset
    inFlight += 1
    state.withLock { $0.todo.append(Job(request: request, path: path)) }
  }

  /// Completes what is done.
  public func poll() {
    event.drain()
    complete(state.withLock { state in state.takeDone() })
  }

  /// Waits for one completion, and completes what is done.
  public func wait() -> Bool {
    guard inFlight > 0 else { return false }
    complete(state.wait { state in state.done.isEmpty ? nil : state.takeDone() })
    return true
  }

  private func complete(_ jobs: [Job]) {
    for job in jobs {
      inFlight -= 1
      let operation = job.request.operation
      job.request.completion(job.result == 0 ? nil : .io(call: operation.verb, path: job.path, errno: job.result))
    }
  }

  private static func work(_ state: Condition<State>, notifier: Int32) {
    while true {
      let next: Job?? = state.wait { state in
        if !state.todo.isEmpty { return .some(state.todo.removeFirst()) }
        return state.ends ? .some(nil) : nil
      }
      guard let next, var job = next else { return }
      job.result = transfer(job.request)
      state.withLock { $0.done.append(job) }
      EventNotifier.signal(notifier)
    }
  }

  /// 0, or an `errno`.
  private static func transfer(_ request: BlockRequest) -> Int32 {
    if request.operation == .flush {
      let status = request.syncsAll ? fsync(request.descriptor) : fdatasync(request.descriptor)
      return status == 0 ? 0 : errno
    }
    if request.allocates, let length = Int64(exactly: request.length) {
      // The write says what the host has no room for.
      _ = clinux_allocate(request.descriptor, Int64(request.position), length)
    }
    while request.memory.count > 0 {
      let pieces = Int32(min(request.memory.count, 1024))
      let count =
        request.operation == .read
        ? preadv(request.descriptor, request.memory.pointer, pieces, off_t(request.position))
        : pwritev(request.descriptor, request.memory.pointer, pieces, off_t(request.position))
      if count < 0 {
        if errno == EINTR { continue }
        // What has no positions: the eventfd by which an NBD connection tells of answers.
        if errno == ESPIPE, readv(request.descriptor, request.memory.pointer, pieces) == request.memory.byteCount {
          return 0
        }
        return errno
      }
      if count == 0 {
        guard request.operation == .read else { return ENOSPC }
        request.memory.zero(from: 0, length: request.memory.byteCount)
        return 0
      }
      request.position += UInt64(count)
      request.memory.dropFirst(count)
    }
    return 0
  }
}

/// The host's best queue: io_uring, or threads where it is absent or forbidden.
public func makeIOQueue() throws(BlockError) -> any IOQueue {
  do {
    return try IOUringQueue()
  } catch {
    do {
      return try ThreadPoolQueue()
    } catch {
      throw .queue(error)
    }
  }
}
