import CLinux
import Glibc
import Synchronization

/// An epoll(7) loop with timers: one thread runs it, any thread may add to it.
///
/// Handlers run on the loop's thread, one at a time. Changes made while a batch of events is being
/// handled take effect at once: a handler removed by an earlier one is not called.
public final class EventLoop: Sendable {
  /// What a descriptor is watched for.
  public struct Interest: OptionSet, Sendable {
    /// Bits of `struct epoll_event.events`.
    public let rawValue: UInt32
    /// Bits of `struct epoll_event.events`.
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    /// Data to read, a connection to accept, or the end of the stream.
    public static let readable = Interest(rawValue: EPOLLIN.rawValue)
    /// Room to write.
    public static let writable = Interest(rawValue: EPOLLOUT.rawValue)
    /// Error or hang-up; always reported.
    public static let failed = Interest(rawValue: EPOLLERR.rawValue | EPOLLHUP.rawValue)
  }

  /// Called with what happened to the descriptor.
  public typealias Handler = @Sendable (Interest) -> Void

  private struct State {
    var handlers: [UInt64: (descriptor: Int32, handler: Handler)] = [:]
    var tokens: [Int32: UInt64] = [:]
    var nextToken: UInt64 = 1
    var work: [@Sendable () -> Void] = []
    var timers: [ArmedTimer] = []
    var nextArming: UInt64 = 0
    var stopped = false
  }

  private struct ArmedTimer {
    var deadline: UInt64
    /// Rises with every arming: the order of equal deadlines, and what tells a timer that was armed by the present batch.
    var arming: UInt64
    var timer: Timer
  }

  private static let wakeToken: UInt64 = 0
  private let epoll: FileDescriptor
  private let wake: EventNotifier
  private let state = Mutex(State())

  /// Makes a loop that nothing runs yet.
  public init() throws(HostError) {
    epoll = FileDescriptor(owning: try check("epoll_create1", epoll_create1(Int32(EPOLL_CLOEXEC))))
    wake = try EventNotifier()
    try control(EPOLL_CTL_ADD, wake.descriptor.rawValue, .readable, token: Self.wakeToken)
  }

  /// Watches a descriptor, which the caller keeps open until `remove`; EEXIST for one that is watched already.
  public func add(_ descriptor: Int32, _ interest: Interest, _ handler: @escaping Handler) throws(HostError) {
    let token = try state.withLock { state throws(HostError) in
      guard state.tokens[descriptor] == nil else { throw .systemCall("epoll_ctl", errno: EEXIST) }
      let token = state.nextToken
      state.nextToken += 1
      state.handlers[token] = (descriptor, handler)
      state.tokens[descriptor] = token
      return token
    }
    do {
      try control(EPOLL_CTL_ADD, descriptor, interest, token: token)
    } catch {
      forget(descriptor)
      throw error
    }
  }

  /// Changes what a watched descriptor is watched for.
  public func modify(_ descriptor: Int32, _ interest: Interest) throws(HostError) {
    guard let token = state.withLock({ $0.tokens[descriptor] }) else { return }
    try control(EPOLL_CTL_MOD, descriptor, interest, token: token)
  }

  /// Stops watching a descriptor; unknown ones are ignored.
  public func remove(_ descriptor: Int32) {
    guard forget(descriptor) else { return }
    var event = epoll_event()
    _ = epoll_ctl(epoll.rawValue, EPOLL_CTL_DEL, descriptor, &event)
  }

  /// Runs `work` on the loop's thread, soon.
  public func execute(_ work: @escaping @Sendable () -> Void) {
    state.withLock { $0.work.append(work) }
    wake.signal()
  }

  /// Makes a timer that calls `fire` on the loop's thread; it starts disarmed.
  public func makeTimer(_ fire: @escaping @Sendable () -> Void) -> Timer {
    Timer(loop: self, fire: fire)
  }

  /// Handles events until `stop`; work queued before the stop is done first.
  public func run() {
    var events = [epoll_event](repeating: epoll_event(), count: 64)
    while true {
      let (timeout, stopped) = state.withLock { ($0.work.isEmpty ? Self.timeout($0) : 0, $0.stopped) }
      if stopped {
        runWork()
        return
      }
      let count = clinux_epoll_wait(epoll.rawValue, &events, Int32(events.count), timeout)
      for index in 0..<max(0, Int(count)) {
        let token = events[index].data.u64
        if token == Self.wakeToken {
          wake.drain()
        } else if let handler = state.withLock({ $0.handlers[token]?.handler }) {
          handler(Interest(rawValue: events[index].events))
        }
      }
      runWork()
      runTimers()
    }
  }

  /// Makes `run` return once it is done with what it is doing.
  public func stop() {
    state.withLock { $0.stopped = true }
    wake.signal()
  }

  private func control(
    _ operation: Int32, _ descriptor: Int32, _ interest: Interest, token: UInt64
  ) throws(HostError) {
    var event = epoll_event(events: interest.rawValue, data: epoll_data(u64: token))
    _ = try check("epoll_ctl", epoll_ctl(epoll.rawValue, operation, descriptor, &event))
  }

  @discardableResult
  private func forget(_ descriptor: Int32) -> Bool {
    state.withLock { state in
      guard let token = state.tokens.removeValue(forKey: descriptor) else { return false }
      state.handlers[token] = nil
      return true
    }
  }

  private func runWork() {
    let work = state.withLock { state in
      defer { state.work = [] }
      return state.work
    }
    for item in work { item() }
  }

  /// Fires what is due, by deadline. One at a time, so that a timer may cancel another that is due as well; those armed
  /// meanwhile wait for the next round, so that one that always re-arms itself starves nobody.
  private func runTimers() {
    let now = monotonicNanoseconds()
    let firstNew = state.withLock { $0.nextArming }
    while let timer = state.withLock({ Self.takeDue(&$0, now: now, before: firstNew) }) { timer.fire() }
  }

  private static func takeDue(_ state: inout State, now: UInt64, before firstNew: UInt64) -> Timer? {
    let due = state.timers.indices.filter { state.timers[$0].deadline <= now && state.timers[$0].arming < firstNew }
    let first = due.min { a, b in
      (state.timers[a].deadline, state.timers[a].arming) < (state.timers[b].deadline, state.timers[b].arming)
    }
    return first.map { state.timers.remove(at: $0).timer }
  }

  /// Nanoseconds until the earliest timer, 0 when it is due, -1 without one.
  private static func timeout(_ state: State) -> Int64 {
    guard let earliest = state.timers.lazy.map(\.deadline).min() else { return -1 }
    let now = monotonicNanoseconds()
    return earliest > now ? Int64(clamping: earliest - now) : 0
  }

  fileprivate func arm(_ timer: Timer, at deadline: UInt64) {
    state.withLock { state in
      state.timers.removeAll { $0.timer === timer }
      state.timers.append(ArmedTimer(deadline: deadline, arming: state.nextArming, timer: timer))
      state.nextArming += 1
    }
    wake.signal()
  }

  fileprivate func cancel(_ timer: Timer) {
    state.withLock { state in state.timers.removeAll { $0.timer === timer } }
  }

  /// A one-shot timer of an event loop.
  public final class Timer: Sendable {
    private unowned let loop: EventLoop
    fileprivate let fire: @Sendable () -> Void

    fileprivate init(loop: EventLoop, fire: @escaping @Sendable () -> Void) {
      self.loop = loop
      self.fire = fire
    }

    /// Fires once at `deadline` (monotonic nanoseconds), replacing an earlier deadline.
    public func arm(at deadline: UInt64) {
      loop.arm(self, at: deadline)
    }

    /// Fires no more; a call already under way on the loop's thread completes.
    public func cancel() {
      loop.cancel(self)
    }
  }
}
