import Host

/// A thread for what waits for the disks' thread.
final class RecoveryWorker: @unchecked Sendable {
  private let loop: EventLoop
  private var thread: HostThread?

  init() throws(HostError) {
    loop = try EventLoop()
    let loop = loop
    thread = try HostThread(name: "recovery") { loop.run() }
  }

  deinit {
    loop.stop()
    thread?.join()
  }

  func run(_ body: @escaping @Sendable () -> Void) { loop.execute(body) }

  /// A timer that fires on the thread.
  func makeTimer(_ fire: @escaping @Sendable () -> Void) -> EventLoop.Timer { loop.makeTimer(fire) }

  /// Runs `body` on the thread and waits for what it returns.
  func wait<Result>(_ body: @escaping () -> Result) -> Result {
    let outcome = Condition<Carried<Result>?>(nil)
    let work = Carried(body)
    loop.execute {
      let result = Carried(work.value())
      outcome.withLock { $0 = result }
    }
    return outcome.wait { $0 }.value
  }

  private struct Carried<Value>: @unchecked Sendable {
    let value: Value
    init(_ value: Value) { self.value = value }
  }
}
