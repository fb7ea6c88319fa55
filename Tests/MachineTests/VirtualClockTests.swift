import Accelerator
import DeviceModel
import Synchronization
import Testing

@testable import Machine

/// Time that only the test moves.
private final class TestTime: VirtualTime {
  private let nanoseconds = Atomic<UInt64>(0)
  var now: UInt64 { nanoseconds.load(ordering: .relaxed) }
  func set(_ nanoseconds: UInt64) { self.nanoseconds.store(nanoseconds, ordering: .relaxed) }
}

private final class Log<Element: Sendable>: Sendable {
  private let list = Mutex<[Element]>([])
  func add(_ element: Element) { list.withLock { $0.append(element) } }
  var elements: [Element] { list.withLock { $0 } }
}

struct VirtualClockTests {
  private let time = TestTime()
  private let clock: VirtualClock
  private let log = Log<String>()

  init() { clock = VirtualClock(time) }

  private func timer(_ name: String) -> any DeviceTimer { clock.makeTimer { [log] in log.add(name) } }

  @Test func timersFireAtTheirTimeAndNotBefore() {
    let timer = timer("a")
    timer.arm(at: 100)
    #expect(clock.nextDeadline == 100)
    time.set(99)
    clock.fireDue()
    #expect(log.elements.isEmpty)
    time.set(100)
    clock.fireDue()
    clock.fireDue()
    #expect(log.elements == ["a"])
    #expect(clock.nextDeadline == nil)
  }

  @Test func theOrderIsThatOfDeadlinesAndThenOfArming() {
    let timers = ["a", "b", "c", "d"].map(timer)
    timers[0].arm(at: 50)
    timers[1].arm(at: 20)
    timers[2].arm(at: 20)
    timers[3].arm(at: 10)
    time.set(60)
    clock.fireDue()
    #expect(log.elements == ["d", "b", "c", "a"])
  }

  @Test func armingAgainReplacesAndCancellingEnds() {
    let first = timer("first")
    let second = timer("second")
    first.arm(at: 10)
    first.arm(at: 30)
    second.arm(at: 20)
    second.cancel()
    time.set(25)
    clock.fireDue()
    #expect(log.elements.isEmpty)
    #expect(clock.nextDeadline == 30)
  }

  @Test func aTimerThatArmsItselfForNowFiresOnceACall() throws {
    let count = Atomic(0)
    let holder = Mutex<(any DeviceTimer)?>(nil)
    let timer = clock.makeTimer { [time] in
      count.add(1, ordering: .relaxed)
      holder.withLock { $0?.arm(at: time.now) }
    }
    holder.withLock { $0 = timer }
    timer.arm(at: 0)
    clock.fireDue()
    #expect(count.load(ordering: .relaxed) == 1)
    clock.fireDue()
    #expect(count.load(ordering: .relaxed) == 2)
    holder.withLock { $0 = nil }
  }

  @Test func idleTimeIsSkipped() {
    #expect(!clock.skip())
    let timer = timer("a")
    timer.arm(at: 1_000_000_000)
    #expect(clock.skip())
    #expect(clock.now() == 1_000_000_000)
    clock.fireDue()
    #expect(log.elements == ["a"])
    // A deadline that has passed takes no time back.
    timer.arm(at: 5)
    #expect(clock.skip())
    #expect(clock.now() == 1_000_000_000)
  }

  @Test func onlyANewFirstDeadlineIsTold() {
    let told = Log<UInt64>()
    clock.observe { deadline, _ in told.add(deadline) }
    let timers = ["a", "b"].map(timer)
    timers[0].arm(at: 100)
    timers[1].arm(at: 200)
    timers[1].arm(at: 50)
    #expect(told.elements == [100, 50])
  }

  @Test func theEndOfTimeNeverComes() {
    let timer = timer("a")
    timer.arm(at: .max)
    time.set(1 << 62)
    clock.fireDue()
    #expect(log.elements.isEmpty)
    #expect(clock.nextDeadline == UInt64.max - 1)
  }
}
