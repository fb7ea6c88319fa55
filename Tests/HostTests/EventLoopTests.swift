import Glibc
import Host
import Synchronization
import Testing

/// What handlers saw, in order, from any thread.
private final class Journal<Entry: Sendable>: Sendable {
  private let entries = Mutex<[Entry]>([])
  var all: [Entry] { entries.withLock { $0 } }
  func add(_ entry: Entry) { entries.withLock { $0.append(entry) } }
}

@Suite struct EventLoops {
  @Test func fireTimersByDeadline() throws {
    let loop = try EventLoop()
    let fired = Journal<Int>()
    let start = monotonicNanoseconds()
    // All due at once, armed in another order than their deadlines.
    let timers = (0..<100).map { number in loop.makeTimer { fired.add(number) } }
    for number in (0..<100).reversed() { timers[number].arm(at: start - 1000 + UInt64(number)) }
    // One that waits, and is the last.
    let last = loop.makeTimer { [unowned loop] in
      fired.add(100)
      loop.stop()
    }
    last.arm(at: start + 1_000_000)
    loop.run()
    #expect(fired.all == Array(0...100))
  }

  @Test func armAgainAndCancelTimers() throws {
    let loop = try EventLoop()
    let fired = Journal<String>()
    let cancelled = loop.makeTimer { fired.add("cancelled") }
    let moved = loop.makeTimer { fired.add("moved") }
    // Both are due in the same round: the first cancels the second.
    let first = loop.makeTimer {
      fired.add("first")
      cancelled.cancel()
    }
    first.arm(at: 1)
    cancelled.arm(at: 2)
    moved.arm(at: 3)
    moved.arm(at: 0)
    let end = loop.makeTimer { [unowned loop] in loop.stop() }
    end.arm(at: 4)
    loop.run()
    #expect(fired.all == ["moved", "first"])
  }

  @Test func starveNobodyByATimerThatReArmsItself() throws {
    let loop = try EventLoop()
    let timer = Mutex<EventLoop.Timer?>(nil)
    let rounds = Atomic(0)
    let again = loop.makeTimer {
      if rounds.add(1, ordering: .relaxed).newValue < 1000 { timer.withLock { $0 }?.arm(at: 0) }
    }
    timer.withLock { $0 = again }
    again.arm(at: 0)
    let seen = Journal<Int>()
    loop.execute { [unowned loop] in
      // Queued from inside the loop, so it is done in the next round, between two of the timer's.
      loop.execute {
        seen.add(rounds.load(ordering: .relaxed))
        loop.stop()
      }
    }
    loop.run()
    #expect(seen.all.count == 1)
    #expect((seen.all.first ?? 1000) < 1000)
    timer.withLock { $0 = nil }
  }

  @Test func removeAHandlerInTheSameBatch() throws {
    let loop = try EventLoop()
    let events = try (0..<8).map { _ in try Event() }
    let called = Journal<Int32>()
    for event in events {
      let own = event.descriptor
      try loop.add(own, .readable) { [unowned loop] _ in
        called.add(own)
        // Every other descriptor of the batch goes, whichever of them comes first.
        for other in events where other.descriptor != own { loop.remove(other.descriptor) }
        loop.stop()
      }
      event.signal()
    }
    loop.run()
    #expect(called.all.count == 1)
  }

  @Test func addModifyAndRemove() throws {
    let loop = try EventLoop()
    let event = try Event()
    let called = Journal<EventLoop.Interest>()
    try loop.add(event.descriptor, .writable) { [unowned loop] interest in
      called.add(interest)
      loop.stop()
    }
    #expect(throws: HostError.systemCall("epoll_ctl", errno: EEXIST)) {
      try loop.add(event.descriptor, .readable) { _ in }
    }
    #expect(throws: HostError.systemCall("epoll_ctl", errno: EBADF)) { try loop.add(-1, .readable) { _ in } }
    loop.run()
    #expect(called.all == [.writable])
    // The first registration stood, and goes.
    try loop.modify(event.descriptor, [.readable, .writable])
    loop.remove(event.descriptor)
    loop.remove(event.descriptor)
    try loop.modify(event.descriptor, .readable)
    try loop.add(event.descriptor, .readable) { _ in }
  }

  @Test func takeWorkFromOtherThreads() throws {
    let loop = try EventLoop()
    let loopThread = Atomic<Int32>(0)
    let runner = try HostThread(name: "loop") {
      loopThread.store(ThreadIdentity.current.id, ordering: .sequentiallyConsistent)
      loop.run()
    }
    let done = Condition(0)
    let onLoop = Atomic(0)
    let threads = try (0..<4).map { _ in
      try HostThread(name: "other") {
        for _ in 0..<500 {
          loop.execute {
            if ThreadIdentity.current.id == loopThread.load(ordering: .sequentiallyConsistent) {
              onLoop.add(1, ordering: .relaxed)
            }
            done.withLock { $0 += 1 }
          }
        }
      }
    }
    for thread in threads { thread.join() }
    done.wait { $0 == 2000 ? () : nil }
    // Queued before the stop, so done before it.
    loop.execute { done.withLock { $0 += 1 } }
    loop.stop()
    runner.join()
    #expect(done.withLock { $0 } == 2001)
    #expect(onLoop.load(ordering: .relaxed) == 2000)
  }

  @Test func addAndRemoveFromOtherThreads() throws {
    let loop = try EventLoop()
    let runner = try HostThread(name: "loop") { loop.run() }
    let calls = Condition(0)
    let failures = Atomic(0)
    let threads = try (0..<4).map { _ in
      try HostThread(name: "other") {
        for _ in 0..<100 {
          guard let event = try? Event() else {
            failures.add(1, ordering: .relaxed)
            continue
          }
          let isCalled = Condition(false)
          do {
            try loop.add(event.descriptor, .readable) { _ in
              event.drain()
              isCalled.withLock { $0 = true }
              calls.withLock { $0 += 1 }
            }
          } catch {
            failures.add(1, ordering: .relaxed)
            continue
          }
          event.signal()
          isCalled.wait { $0 ? () : nil }
          loop.remove(event.descriptor)
        }
      }
    }
    for thread in threads { thread.join() }
    loop.stop()
    runner.join()
    #expect(failures.load(ordering: .relaxed) == 0)
    #expect(calls.withLock { $0 } == 400)
  }

  @Test func endAtOnceWhereStoppedBefore() throws {
    let loop = try EventLoop()
    let done = Journal<Int>()
    loop.execute { done.add(1) }
    loop.stop()
    loop.run()
    #expect(done.all == [1])
  }
}

/// A notifier that handlers can share.
private final class Event: Sendable {
  private let notifier: EventNotifier
  init() throws(HostError) { notifier = try EventNotifier() }
  var descriptor: Int32 { notifier.descriptor.rawValue }
  func signal() { notifier.signal() }
  func drain() { notifier.drain() }
}
