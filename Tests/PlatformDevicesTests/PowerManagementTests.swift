import DeviceModel
import DeviceTesting
import PlatformDevices
import Testing

@Suite struct PowerManagementTests {
  private let fixture: Fixture
  private let power: ACPIPowerManagement

  init() throws {
    fixture = try Fixture()
    power = ACPIPowerManagement(line: fixture.line(9), clock: fixture.clock, machine: fixture.machine)
    try fixture.attach(power)
  }

  @Test func timerRunsAtItsFrequency() {
    #expect(fixture.input(0x608, size: 4) == 0)
    fixture.clock.advance(by: 1_000_000_000)
    #expect(fixture.input(0x608, size: 4) == 3_579_545)
    fixture.clock.advance(by: 1_199_000_000_000)
    // 2^32 ticks take 1199.9 s.
    #expect(fixture.input(0x608, size: 4) == 3_579_545 * 1200 - 1 << 32)
  }

  @Test func timerOverflowInterrupts() {
    fixture.output(0x602, 1, size: 2)
    fixture.clock.advance(by: 599_000_000_000)
    #expect(!fixture.sink.isHigh(9))
    fixture.clock.advance(by: 2_000_000_000)
    #expect(fixture.sink.isHigh(9))
    #expect(fixture.input(0x600, size: 2) == 1)
    fixture.output(0x600, 1, size: 2)
    #expect(!fixture.sink.isHigh(9))
  }

  @Test func powerOff() {
    #expect(fixture.input(0x604, size: 2) == 1)
    fixture.output(0x604, 0x1400, size: 2)
    #expect(fixture.machine.take().isEmpty)
    fixture.output(0x604, 0x3400, size: 2)
    #expect(fixture.machine.take() == [.powerOff])
    #expect(fixture.input(0x604, size: 2) == 0x1401)
  }

  @Test func powerButtonIsASharedLevel() {
    power.pressPowerButton()
    #expect(fixture.input(0x600, size: 2) == 0x100)
    #expect(!fixture.sink.isHigh(9))
    fixture.output(0x602, 0x100, size: 2)
    #expect(fixture.sink.isHigh(9))
    power.raise(generalEvent: 3)
    fixture.output(0x622, 8, size: 2)
    fixture.output(0x600, 0x100, size: 2)
    #expect(fixture.sink.isHigh(9))
    #expect(fixture.input(0x620, size: 2) == 8)
    fixture.output(0x620, 8, size: 2)
    #expect(!fixture.sink.isHigh(9))
    #expect(fixture.machine.take().isEmpty)
  }

  /// As kvm-unit-tests' s3 does it.
  @Test func alarmWakesFromS3() throws {
    let clock = RealTimeClock(
      line: fixture.line(8), clock: fixture.clock, contents: .init(lowMemory: 0, highMemory: 0, cpus: 1), epoch: 0,
      onAlarm: { [power] in power.signalAlarm() })
    try fixture.attach(clock)
    for (index, value) in [(1, 0xc0), (3, 0xc0), (5, 0xc0), (0x0b, 0x22)] {
      fixture.output(0x70, UInt64(index))
      fixture.output(0x71, UInt64(value))
    }
    fixture.output(0x602, 0x400, size: 2)
    fixture.output(0x604, 0x2400, size: 2)
    #expect(fixture.machine.take() == [.suspend])
    fixture.clock.advance(by: 1_000_000_000)
    #expect(fixture.machine.take() == [.wake])
    power.reset()
    #expect(fixture.input(0x600, size: 2) == 0x8400)
    #expect(fixture.input(0x602, size: 2) == 0)
    power.reset()
    fixture.output(0x600, 0xffff, size: 2)
    power.reset()
    #expect(fixture.input(0x600, size: 2) == 0)
  }

  @Test func aDisabledEventDoesNotWake() {
    fixture.output(0x604, 0x2400, size: 2)
    #expect(fixture.machine.take() == [.suspend])
    power.signalAlarm()
    #expect(fixture.machine.take().isEmpty)
    power.pressPowerButton()
    #expect(fixture.machine.take() == [.wake])
  }
}
