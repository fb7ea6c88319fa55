import DeviceTesting
import PlatformDevices
import Synchronization
import Testing

private let second: UInt64 = 1_000_000_000

@Suite struct RealTimeClockTests {
  private let fixture: Fixture
  private let alarms = Counter()

  private final class Counter: Sendable {
    let value = Atomic(0)
  }

  init() throws {
    fixture = try Fixture()
    let alarms = alarms
    // 2023-11-14, a Tuesday, 22:13:20.
    try fixture.attach(
      RealTimeClock(
        line: fixture.line(8), clock: fixture.clock,
        contents: .init(lowMemory: 3 << 30, highMemory: 5 << 30, cpus: 4), epoch: 1_700_000_000,
        onAlarm: { alarms.value.add(1, ordering: .relaxed) }))
  }

  private func read(_ index: UInt64) -> UInt64 {
    fixture.output(0x70, index)
    return fixture.input(0x71)
  }

  private func write(_ index: UInt64, _ value: UInt64) {
    fixture.output(0x70, index)
    fixture.output(0x71, value)
  }

  private var time: [UInt64] { [0x32, 9, 8, 7, 6, 4, 2, 0].map { read($0) } }

  @Test func timeInEveryEncoding() {
    #expect(time == [0x20, 0x23, 0x11, 0x14, 0x03, 0x22, 0x13, 0x20])
    write(0x0b, 0x00)
    #expect(read(4) == 0x90)
    write(0x0b, 0x04)
    #expect(read(4) == 0x8a)
    write(0x0b, 0x06)
    #expect(time == [20, 23, 11, 14, 3, 22, 13, 20])
    fixture.clock.advance(by: 2 * 3600 * second)
    #expect(time == [20, 23, 11, 15, 4, 0, 13, 20])
    write(0x0b, 0x04)
    #expect(read(4) == 12)
  }

  @Test func settingTheTime() {
    write(0x0b, 0x82)
    fixture.clock.advance(by: 10 * second)
    #expect(read(0) == 0x20)
    for (index, value) in [(0x32, 0x20), (9, 0x24), (8, 0x02), (7, 0x28), (4, 0x23), (2, 0x59), (0, 0x59)] {
      write(UInt64(index), UInt64(value))
    }
    write(0x0b, 0x02)
    fixture.clock.advance(by: second)
    // 2024 has a 29th of February, a Thursday.
    #expect(time == [0x20, 0x24, 0x02, 0x29, 0x05, 0, 0, 0])
    write(2, 0x30)
    #expect(time == [0x20, 0x24, 0x02, 0x29, 0x05, 0, 0x30, 0])
  }

  @Test func updateInProgressComesOnceASecond() {
    #expect(read(0x0a) == 0x26)
    fixture.clock.advance(by: second - 1_000_000)
    #expect(read(0x0a) == 0xa6)
    fixture.clock.advance(by: 1_000_000)
    #expect(read(0x0a) == 0x26)
    #expect(read(0) == 0x21)
  }

  @Test func periodicInterrupt() {
    write(0x0b, 0x42)
    var count = 0
    for _ in 0..<4096 {
      fixture.clock.advance(by: second / 4096)
      guard fixture.sink.isHigh(8) else { continue }
      #expect(read(0x0c) & 0xc0 == 0xc0)
      count += 1
    }
    #expect(count == 1024 || count == 1023)
    #expect(fixture.sink.rises(8) == count)
  }

  @Test func alarmAtASecondAndWildcards() {
    for index in [1, 3, 5] as [UInt64] { write(index, 0xc0) }
    write(1, 0x23)
    write(0x0b, 0x22)
    fixture.clock.advance(by: 3 * second - 1)
    #expect(!fixture.sink.isHigh(8))
    fixture.clock.advance(by: 1)
    #expect(fixture.sink.isHigh(8))
    #expect(alarms.value.load(ordering: .relaxed) == 1)
    #expect(read(0x0c) & 0xa0 == 0xa0)
    #expect(read(0x0c) == 0)
    #expect(!fixture.sink.isHigh(8))
    fixture.clock.advance(by: 60 * second)
    #expect(fixture.sink.rises(8) == 2)
  }

  @Test func theAlarmIsSeenAfterALongSleepWithoutInterrupts() {
    write(5, 0x04)
    write(3, 0x05)
    write(1, 0x06)
    fixture.clock.advance(by: 5 * 3600 * second)
    #expect(read(0x0c) & 0x20 == 0)
    fixture.clock.advance(by: 20 * 3600 * second)
    #expect(read(0x0c) & 0x20 == 0x20)
    #expect(fixture.sink.rises(8) == 0)
  }

  @Test func memorySizeAndProcessors() {
    #expect(read(0x15) | read(0x16) << 8 == 640)
    #expect(read(0x17) | read(0x18) << 8 == 0xffff)
    #expect(read(0x34) | read(0x35) << 8 == ((3 << 30) - (16 << 20)) >> 16)
    #expect(read(0x5b) | read(0x5c) << 8 | read(0x5d) << 16 == 5 << 14)
    #expect(read(0x5f) == 3)
  }

  @Test func resetKeepsTheShutdownByteAndStopsInterrupts() throws {
    let clock = RealTimeClock(
      line: fixture.line(8), clock: fixture.clock, contents: .init(lowMemory: 0, highMemory: 0, cpus: 1), epoch: 0,
      onAlarm: {})
    clock.write(offset: 0, size: 2, value: 0x0a0f)
    clock.write(offset: 0, size: 2, value: 0x520b)
    clock.reset()
    fixture.clock.advance(by: 5 * second)
    #expect(!fixture.sink.isHigh(8))
    clock.write(offset: 0, size: 1, value: 0x8f)
    #expect(clock.read(offset: 1, size: 1) == 0x0a)
  }

  @Test func nonsenseTimesDoNotTrap() {
    for encoding in [0x80, 0x82, 0x84, 0x86] as [UInt64] {
      for value in [0, 0xff, 0x99, 0x1f] as [UInt64] {
        write(0x0b, encoding)
        for index in [0, 2, 4, 6, 7, 8, 9, 0x32] as [UInt64] { write(index, value) }
        write(0x0b, encoding & 0x7f)
        fixture.clock.advance(by: second)
        #expect(time.count == 8)
      }
    }
  }
}
