import DeviceModel
import DeviceTesting
import PlatformDevices
import Synchronization
import Testing

@Suite struct HPETTests {
  private let fixture: Fixture
  private let hpet: HPET

  init() throws {
    fixture = try Fixture()
    hpet = fixture.hpet()
    try fixture.attach(hpet)
  }

  private func read(_ register: UInt64, size: Int = 8) -> UInt64 {
    fixture.bus.read(0xfed0_0000 + register, size: size)
  }
  private func write(_ register: UInt64, _ value: UInt64, size: Int = 8) {
    fixture.bus.write(0xfed0_0000 + register, size: size, value: value)
  }

  @Test func counterRunsWhileItIsEnabled() {
    #expect(read(0) == 0x0098_9680_8086_a201)
    #expect(read(4, size: 4) & 0xffff_ffff == 10_000_000)
    fixture.clock.advance(by: 1000)
    #expect(read(0xf0) == 0)
    write(0x10, 1)
    fixture.clock.advance(by: 1000)
    #expect(read(0xf0) == 100)
    write(0x10, 0)
    fixture.clock.advance(by: 1000)
    #expect(read(0xf0) == 100)
    write(0xf0, 0xffff_ffff_0000_0000)
    write(0x10, 1)
    fixture.clock.advance(by: 50)
    #expect(read(0xf0) == 0xffff_ffff_0000_0005)
  }

  @Test func oneShotOnALine() {
    #expect(read(0x100) == 0x00f0_0000_0000_8030)
    write(0x100, 21 << 9 | 4)
    write(0x108, 500)
    write(0x10, 1)
    fixture.clock.advance(by: 4990)
    #expect(fixture.sink.rises(21) == 0)
    fixture.clock.advance(by: 20)
    #expect(fixture.sink.rises(21) == 1)
    fixture.clock.advance(by: 100_000_000)
    #expect(fixture.sink.rises(21) == 1)
  }

  @Test func levelStandsUntilItIsCleared() {
    write(0x120, 20 << 9 | 6)
    write(0x128, 10)
    write(0x10, 1)
    fixture.clock.advance(by: 200)
    #expect(fixture.sink.isHigh(20))
    #expect(read(0x20) == 2)
    write(0x20, 1)
    #expect(fixture.sink.isHigh(20))
    write(0x20, 2)
    #expect(!fixture.sink.isHigh(20) && read(0x20) == 0)
  }

  @Test func periodicWithLegacyReplacement() {
    // As Linux sets its tick up: 32 bits, VAL_SET, the first match, then the period.
    write(0x10, 3)
    write(0x100, 0x14c)
    write(0x108, 100_000, size: 4)
    write(0x108, 100_000, size: 4)
    fixture.clock.advance(by: 10_000_000)
    #expect((9...10).contains(fixture.sink.rises(0)))
    #expect(read(0x108) % 100_000 == 0)
    write(0x100, 0)
    let before = fixture.sink.rises(0)
    fixture.clock.advance(by: 10_000_000)
    #expect(fixture.sink.rises(0) == before)
  }

  @Test func messages() {
    write(0x150, 0xfee0_1000_0000_0041)
    write(0x140, 0x4004)
    write(0x148, 100)
    write(0x10, 1)
    fixture.clock.advance(by: 2000)
    #expect(fixture.sink.takeMessages() == [.init(address: 0xfee0_1000, data: 0x41)])
  }

  @Test func thirtyTwoBitComparatorsWrap() {
    write(0xf0, 0xffff_ff00)
    write(0x100, 20 << 9 | 0x104)
    write(0x108, 0x100)
    write(0x10, 1)
    fixture.clock.advance(by: 0x1ff * 10)
    #expect(fixture.sink.rises(20) == 0)
    fixture.clock.advance(by: 30)
    #expect(fixture.sink.rises(20) == 1)
  }

  @Test func aTinyPeriodDoesNotFloodTheHost() {
    write(0x100, 20 << 9 | 0x4c)
    write(0x108, 10)
    write(0x108, 1)
    write(0x10, 1)
    fixture.clock.advance(by: 100_000_000)
    #expect((1900...2001).contains(fixture.sink.rises(20)))
  }

  private final class Told: Sendable {
    let values = Mutex<[Bool]>([])
  }

  @Test func legacyReplacementIsToldToTheOthers() throws {
    let told = Told()
    let other = HPET(
      lines: HPET.routes.map { fixture.line($0) }, timerLine: fixture.line(0), clockLine: fixture.line(8),
      clock: fixture.clock, interrupts: fixture.sink,
      onLegacyReplacement: { on in told.values.withLock { $0.append(on) } })
    other.write(offset: 0x10, size: 4, value: 2)
    other.write(offset: 0x10, size: 4, value: 3)
    other.write(offset: 0x10, size: 4, value: 0)
    #expect(told.values.withLock { $0 } == [true, false])
  }
}
