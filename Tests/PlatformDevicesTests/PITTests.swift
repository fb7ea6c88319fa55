import DeviceTesting
import PlatformDevices
import Testing

private let second: UInt64 = 1_000_000_000

@Suite struct PITTests {
  private let fixture: Fixture
  private let pit: PIT

  init() throws {
    fixture = try Fixture()
    pit = PIT(line: fixture.line(0), clock: fixture.clock)
    try fixture.attach(pit)
  }

  /// Nanoseconds that let at least `ticks` pass, and less than one more.
  private func advance(ticks: UInt64) {
    fixture.clock.advance(by: (ticks * second + PIT.frequency - 1) / PIT.frequency)
  }

  private func program(_ counter: UInt64, mode: UInt64, count: UInt64) {
    fixture.output(0x43, counter << 6 | 0x30 | mode << 1)
    fixture.output(0x40 + counter, count & 0xff)
    fixture.output(0x40 + counter, count >> 8)
  }

  private func count(_ counter: UInt64) -> UInt64 {
    fixture.output(0x43, counter << 6)
    return fixture.input(0x40 + counter) | fixture.input(0x40 + counter) << 8
  }

  private func rises(_ ticks: UInt64) -> Int {
    let before = fixture.sink.rises(0)
    advance(ticks: ticks)
    return fixture.sink.rises(0) - before
  }

  @Test func rateGeneratorInterruptsOncePerPeriod() {
    program(0, mode: 2, count: 11932)
    // 100 Hz to a hair.
    let before = fixture.sink.rises(0)
    fixture.clock.advance(by: 10 * second)
    #expect(fixture.sink.rises(0) - before == 999)
    program(0, mode: 2, count: 1000)
    #expect(rises(999) == 0)
    #expect(rises(1) == 1)
    #expect(rises(5000) == 5)
  }

  @Test func squareWaveHasTheSamePeriodAndCountsByTwo() {
    program(0, mode: 3, count: 1000)
    #expect(rises(3500) == 3)
    program(2, mode: 3, count: 1000)
    fixture.output(0x61, 1)
    #expect(fixture.input(0x61) & 0x21 == 0x21)
    advance(ticks: 100)
    #expect((798...800).contains(count(2)))
    advance(ticks: 450)
    #expect(fixture.input(0x61) & 0x20 == 0)
    advance(ticks: 500)
    #expect(fixture.input(0x61) & 0x20 == 0x20)
  }

  @Test func interruptOnTerminalCountComesOnce() {
    program(0, mode: 0, count: 500)
    #expect(!fixture.sink.isHigh(0))
    #expect(rises(499) == 0)
    #expect(rises(2) == 1)
    #expect(fixture.sink.isHigh(0))
    #expect(rises(200_000) == 0)
    // The count goes on below zero.
    program(0, mode: 0, count: 10)
    advance(ticks: 15)
    #expect((0xfffa...0xfffb).contains(count(0)))
  }

  @Test func softwareStrobe() {
    program(0, mode: 4, count: 100)
    #expect(rises(99) == 0)
    #expect(rises(3) == 1)
    #expect(rises(200_000) == 0)
  }

  @Test func aNewCountOfARateTakesEffectAtThePeriodsEnd() {
    program(0, mode: 2, count: 1000)
    advance(ticks: 400)
    fixture.output(0x40, 200 & 0xff)
    fixture.output(0x40, 200 >> 8)
    #expect(rises(595) == 0)
    #expect(rises(10) == 1)
    #expect(rises(200) == 1)
  }

  /// The calibration that kernels do: gate on, mode 0, wait for the output in port 0x61.
  @Test func counterTwoAndItsGate() {
    fixture.output(0x61, 0)
    program(2, mode: 0, count: 1000)
    advance(ticks: 5000)
    #expect(fixture.input(0x61) & 0x20 == 0)
    #expect(count(2) == 1000)
    fixture.output(0x61, 1)
    advance(ticks: 600)
    fixture.output(0x61, 0)
    advance(ticks: 5000)
    #expect((398...400).contains(count(2)))
    fixture.output(0x61, 3)
    advance(ticks: 402)
    #expect(fixture.input(0x61) & 0x23 == 0x23)
  }

  @Test(arguments: [1, 5] as [UInt64])
  func triggeredModesStartAtTheGatesRise(mode: UInt64) {
    fixture.output(0x61, 0)
    program(2, mode: mode, count: 100)
    advance(ticks: 1000)
    #expect(fixture.input(0x61) & 0x20 == 0x20)
    fixture.output(0x61, 1)
    #expect(fixture.input(0x61) & 0x20 == (mode == 1 ? 0 : 0x20))
    advance(ticks: 60)
    // Triggered again.
    fixture.output(0x61, 0)
    fixture.output(0x61, 1)
    advance(ticks: 60)
    #expect((39...40).contains(count(2)))
    advance(ticks: 50)
    #expect(fixture.input(0x61) & 0x20 == 0x20)
  }

  @Test func latchesHoldUntilTheyAreRead() {
    program(0, mode: 2, count: 0)
    advance(ticks: 256)
    fixture.output(0x43, 0)
    advance(ticks: 5000)
    fixture.output(0x43, 0)
    let latched = fixture.input(0x40) | fixture.input(0x40) << 8
    #expect((65535 - 257...65536 - 256).contains(latched))
    #expect(count(0) < latched)
    // Read-back of status and count of counter 0: status first.
    fixture.output(0x43, 0xc2)
    #expect(fixture.input(0x40) == 0xb4)
    let readBack = fixture.input(0x40) | fixture.input(0x40) << 8
    #expect(readBack < latched)
    fixture.output(0x43, 0x34)
    fixture.output(0x43, 0xe2)
    // No count yet.
    #expect(fixture.input(0x40) == 0xf4)
  }

  @Test func binaryCodedDecimal() {
    fixture.output(0x43, 0xb1)
    fixture.output(0x42, 0x50)
    fixture.output(0x42, 0x12)
    fixture.output(0x61, 1)
    #expect(count(2) == 0x1250)
    advance(ticks: 51)
    #expect((0x1198...0x1199).contains(count(2)))
  }

  @Test func oneByteAccess() {
    fixture.output(0x43, 0x14)
    fixture.output(0x40, 100)
    #expect(rises(101) == 1)
    fixture.output(0x43, 0x24)
    fixture.output(0x40, 4)
    #expect(fixture.input(0x40) == 4 || fixture.input(0x40) == 3)
  }

  @Test func aTinyPeriodDoesNotFloodTheHost() {
    program(0, mode: 2, count: 2)
    let before = fixture.sink.rises(0)
    fixture.clock.advance(by: second / 10)
    #expect((1900...2001).contains(fixture.sink.rises(0) - before))
  }

  @Test func pollingTheCountLosesNoInterrupt() {
    program(0, mode: 2, count: 1193)
    let before = fixture.sink.rises(0)
    for _ in 0..<1193 * 10 {
      _ = count(0)
      advance(ticks: 1)
    }
    #expect((10...11).contains(fixture.sink.rises(0) - before))
  }

  @Test func anHPETTakesItOffItsLine() {
    program(0, mode: 2, count: 1000)
    pit.setConnected(false)
    #expect(!fixture.sink.isHigh(0))
    #expect(rises(5000) == 0)
    pit.setConnected(true)
    #expect(rises(5000) >= 5)
  }
}
