import Host

/// The thread that disks belong to: a loop, and the queue of requests on host files that it watches.
public final class IOThread: @unchecked Sendable {
  /// What runs on the thread.
  public let loop: EventLoop
  /// For disks of this thread, and before it runs for whoever opens them.
  public let queue: any IOQueue
  private var thread: HostThread?
  private var observers: [(owner: ObjectIdentifier, afterPoll: () -> Void)] = []

  /// A thread that does not run yet, over io_uring, or a pool of threads where the host has none.
  public init() throws(HostError) {
    loop = try EventLoop()
    if let ring = try? IOUringQueue() { queue = ring } else { queue = try ThreadPoolQueue() }
    try loop.add(queue.notifier, .readable) { [unowned self] _ in poll() }
  }

  /// Starts the thread. Once.
  public func start() throws(HostError) {
    let loop = loop
    thread = try HostThread(name: "disks") { loop.run() }
  }

  /// Hands what was begun to the host and completes what is done. On the thread.
  public func poll() {
    queue.poll()
    for observer in observers { observer.afterPoll() }
  }

  /// Has `afterPoll` called whenever requests may have completed. On the thread, or before it runs.
  public func addObserver(_ owner: AnyObject, _ afterPoll: @escaping () -> Void) {
    observers.append((ObjectIdentifier(owner), afterPoll))
  }

  /// Undoes `addObserver`.
  public func removeObserver(_ owner: AnyObject) {
    observers.removeAll { $0.owner == ObjectIdentifier(owner) }
  }

  /// Runs `body` on the thread and waits for what it returns. The thread has let go of `body` then, and of what it holds.
  public func perform<Result>(_ body: @escaping () -> Result) -> Result {
    let outcome = Condition<Transfer<Result>?>(nil)
    let work = Work(body)
    loop.execute { [self] in
      let result = Transfer(work.run())
      poll()
      outcome.withLock { $0 = result }
    }
    return outcome.wait { $0 }.value
  }

  /// Ends the thread; whoever calls then owns the disks.
  public func stop() {
    loop.stop()
    thread?.join()
    thread = nil
  }

  /// What is to be done, once.
  private final class Work<Result>: @unchecked Sendable {
    private var body: (() -> Result)?
    init(_ body: @escaping () -> Result) { self.body = body }

    func run() -> Result {
      defer { body = nil }
      return body.unsafelyUnwrapped()
    }
  }

  /// Something handed from one thread to another, which waits for it.
  private struct Transfer<Value>: @unchecked Sendable {
    let value: Value
    init(_ value: Value) { self.value = value }
  }
}
