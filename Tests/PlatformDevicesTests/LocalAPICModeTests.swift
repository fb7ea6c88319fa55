import Accelerator
import DeviceModel
import DeviceTesting
import PlatformDevices
import StateTree
import Testing

@Suite struct X2APICTests {
  private let fixture = LocalAPICFixture(count: 20)
  private var local: LocalAPIC { fixture[0] }

  @Test func onlySomeChangesOfModeAreAllowed() {
    let page: UInt64 = 0xfee0_0000
    // Reserved bits; x2APIC without the APIC.
    #expect(!local.writeMSR(0x1b, value: page | 0x901) && !local.writeMSR(0x1b, value: page | 0x500))
    #expect(!local.writeMSR(0x1b, value: 1 << 52 | page | 0x900))
    #expect(local.readMSR(0x802) == nil && !local.writeMSR(0x808, value: 0))
    #expect(local.writeMSR(0x1b, value: page | 0xd00))
    #expect(local.registerPage == nil)
    // Not back to xAPIC, but off; and not from off to x2APIC.
    #expect(!local.writeMSR(0x1b, value: page | 0x900))
    #expect(local.writeMSR(0x1b, value: page | 0x100))
    #expect(!local.writeMSR(0x1b, value: page | 0xd00))
    #expect(local.writeMSR(0x1b, value: 0xd000_0900) && local.registerPage == 0xd000_0000)
    #expect(local.read(register: 0xf0) == 0xff)
    let plain = LocalAPICFixture(count: 1, features: [])
    #expect(!plain[0].writeMSR(0x1b, value: page | 0xd00))
    #expect(plain[0].readMSR(0x6e0) == nil && !plain[0].writeMSR(0x6e0, value: 1))
  }

  @Test func registersAreMSRs() {
    fixture.enableX2APIC()
    #expect(fixture[17].readMSR(0x802) == 17 && fixture[17].readMSR(0x80d) == 0x1_0002)
    #expect(local.readMSR(0x803) == 0x0105_0014 && local.readMSR(0x80f) == 0x1ff)
    #expect(local.writeMSR(0x808, value: 0x30) && local.taskPriority == 3 && local.readMSR(0x80a) == 0x30)
    // Reserved bits, read-only registers, registers that are not there, write-only ones.
    #expect(!local.writeMSR(0x808, value: 0x100) && !local.writeMSR(0x80f, value: 0x2000))
    #expect(!local.writeMSR(0x808, value: 1 << 32 | 0x30) && !local.writeMSR(0x80b, value: 1))
    #expect(!local.writeMSR(0x828, value: 1) && !local.writeMSR(0x832, value: 0x8_0000))
    #expect(!local.writeMSR(0x835, value: 0x1_0800) && local.writeMSR(0x835, value: 0x1_0700))
    #expect(!local.writeMSR(0x83e, value: 4) && !local.writeMSR(0x830, value: 0x2000))
    for index: UInt32 in [0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x820, 0x831, 0x839, 0x8ff] {
      #expect(!local.writeMSR(index, value: 0), "\(String(index, radix: 16))")
    }
    for index: UInt32 in [0x800, 0x809, 0x80b, 0x80c, 0x80e, 0x82f, 0x831, 0x83f, 0x840, 0x8ff] {
      #expect(local.readMSR(index) == nil, "\(String(index, radix: 16))")
    }
    #expect(local.writeMSR(0x838, value: 0xffff_ffff) && local.readMSR(0x839) != nil)
  }

  @Test func theCommandRegisterIsOne() {
    fixture.enableX2APIC()
    #expect(local.writeMSR(0x830, value: 17 << 32 | 0x31))
    #expect(local.readMSR(0x830) == 17 << 32 | 0x31)
    #expect(fixture.take() == (0..<20).map { $0 == 17 ? [0x31] : [] })
    // Logical: cluster 1, members 1 and 3.
    #expect(local.writeMSR(0x830, value: 0x1_000a << 32 | 0x832))
    #expect(fixture.take() == (0..<20).map { [17, 19].contains($0) ? [0x32] : [] })
    // 255 is an id like any other; all ones is everybody.
    #expect(local.writeMSR(0x830, value: 0xff << 32 | 0x33))
    #expect(fixture.take().allSatisfy { $0.isEmpty })
    #expect(local.writeMSR(0x830, value: 0xffff_ffff << 32 | 0x33))
    #expect(fixture.take().allSatisfy { $0 == [0x33] })
    #expect(local.writeMSR(0x83f, value: 0x44))
    #expect(fixture.take()[0] == [0x44])
    // Devices' messages have 8-bit destinations, 255 for everybody.
    fixture.bus.deliver(InterruptMessage(address: 0xfee1_2000, data: 0x45))
    fixture.bus.deliver(InterruptMessage(address: 0xfeef_f000, data: 0x55))
    #expect(fixture.take() == (0..<20).map { $0 == 18 ? [0x55, 0x45] : [0x55] })
    #expect(fixture[18].writeMSR(0x80b, value: 0))
  }
}

@Suite struct LocalAPICTimerTests {
  private let fixture = LocalAPICFixture(count: 1)
  private var local: LocalAPIC { fixture[0] }

  init() { fixture.enable() }

  @Test func oneShot() {
    local.write(register: 0x3e0, value: 0b1011)
    local.write(register: 0x320, value: 0x41)
    local.write(register: 0x380, value: 1_000)
    #expect(local.read(register: 0x390) == 1_000)
    fixture.clock.advance(by: 400)
    #expect(local.read(register: 0x390) == 600 && !local.hasInterrupt)
    fixture.clock.advance(by: 600)
    #expect(local.read(register: 0x390) == 0 && fixture.take()[0] == [0x41])
    fixture.clock.advance(by: 5_000)
    #expect(!local.hasInterrupt)
    local.write(register: 0x380, value: 1_000)
    local.write(register: 0x380, value: 0)
    fixture.clock.advance(by: 5_000)
    #expect(!local.hasInterrupt && local.read(register: 0x390) == 0)
  }

  @Test(arguments: [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] as [(UInt32, UInt64)])
  func dividers(_ value: UInt32, _ divisor: UInt64) {
    local.write(register: 0x3e0, value: value)
    #expect(local.read(register: 0x3e0) == value)
    local.write(register: 0x380, value: 100)
    fixture.clock.advance(by: 30 * divisor)
    #expect(local.read(register: 0x390) == 70)
    // The count stays where it is when the divider changes.
    local.write(register: 0x3e0, value: 0)
    #expect(local.read(register: 0x390) == 70)
    fixture.clock.advance(by: 10)
    #expect(local.read(register: 0x390) == 65)
  }

  @Test func periodic() {
    local.write(register: 0x3e0, value: 0b1011)
    local.write(register: 0x320, value: 0x2_0042)
    local.write(register: 0x380, value: 100_000)
    for _ in 0..<3 {
      fixture.clock.advance(by: 100_000)
      #expect(fixture.take()[0] == [0x42])
    }
    fixture.clock.advance(by: 30_000)
    #expect(local.read(register: 0x390) == 70_000)
    // Masked, it counts on, and what passes is lost.
    local.write(register: 0x320, value: 0x3_0042)
    fixture.clock.advance(by: 200_000)
    #expect(local.read(register: 0x390) == 70_000 && !local.hasInterrupt)
    local.write(register: 0x320, value: 0x2_0042)
    fixture.clock.advance(by: 69_999)
    #expect(!local.hasInterrupt)
    fixture.clock.advance(by: 1)
    #expect(fixture.take()[0] == [0x42])
    // As one-shot it ends with the present period.
    local.write(register: 0x320, value: 0x42)
    fixture.clock.advance(by: 300_000)
    #expect(fixture.take()[0] == [0x42] && local.read(register: 0x390) == 0)
  }

  @Test func aTinyPeriodDoesNotOverrunTheHost() {
    local.write(register: 0x3e0, value: 0b1011)
    local.write(register: 0x320, value: 0x2_0042)
    local.write(register: 0x380, value: 1)
    var count = 0
    for _ in 0..<1_000 {
      fixture.clock.advance(by: 1_000)
      count += fixture.take()[0].count
    }
    #expect((15...20).contains(count))
  }

  @Test func timestampDeadline() {
    local.write(register: 0x320, value: 0x43)
    #expect(local.writeMSR(0x6e0, value: 10_000) && local.readMSR(0x6e0) == 0)
    local.write(register: 0x320, value: 0x4_0043)
    local.write(register: 0x380, value: 500)
    #expect(local.read(register: 0x380) == 0)
    // 10,000 ticks at 2 GHz.
    #expect(local.writeMSR(0x6e0, value: 10_000) && local.readMSR(0x6e0) == 10_000)
    fixture.clock.advance(by: 4_999)
    #expect(!local.hasInterrupt && local.read(register: 0x390) == 0)
    fixture.clock.advance(by: 1)
    #expect(fixture.take()[0] == [0x43] && local.readMSR(0x6e0) == 0)
    // One that has passed comes at once.
    #expect(local.writeMSR(0x6e0, value: 1))
    #expect(fixture.take()[0] == [0x43])
    #expect(local.writeMSR(0x6e0, value: 50_000) && local.writeMSR(0x6e0, value: 0))
    fixture.clock.advance(by: 50_000)
    #expect(!local.hasInterrupt)
    // Leaving the mode disarms it.
    #expect(local.writeMSR(0x6e0, value: 1_000_000))
    local.write(register: 0x320, value: 0x43)
    #expect(local.readMSR(0x6e0) == 0)
    fixture.clock.advance(by: 1_000_000)
    #expect(!local.hasInterrupt)
  }

  /// The loop that fires timers is late, and the guest sees a count of 0 first: its next write must not undo the expiry.
  @Test(
    arguments: [(0x320, 0x2_0042, 0), (0x320, 0x1_0042, 0), (0x380, 2_000, 2_000), (0x380, 0, 0), (0x3e0, 8, 0)]
      as [(UInt16, UInt32, UInt32)])
  func anExpiryComesBeforeAChange(_ register: UInt16, _ value: UInt32, _ count: UInt32) {
    local.write(register: 0x3e0, value: 0b1011)
    local.write(register: 0x320, value: 0x41)
    local.write(register: 0x380, value: 1_000)
    fixture.clock.pass(1_500)
    #expect(local.read(register: 0x390) == 0 && !local.hasInterrupt)
    local.write(register: register, value: value)
    #expect(fixture.take()[0] == [0x41])
    #expect(local.read(register: 0x390) == count)
    fixture.clock.advance(by: 10_000)
    #expect(fixture.take()[0] == (count == 0 ? [] : [0x41]))
  }

  @Test func whatPassedWhileMaskedIsLost() {
    local.write(register: 0x320, value: 0x1_0041)
    local.write(register: 0x380, value: 100)
    fixture.clock.advance(by: 10_000)
    local.write(register: 0x320, value: 0x41)
    fixture.clock.advance(by: 10_000)
    #expect(!local.hasInterrupt)
  }
}

@Suite struct LocalAPICStateTests {
  private func busy(_ fixture: LocalAPICFixture) {
    fixture.enable()
    let local = fixture[0]
    local.taskPriority = 4
    local.write(register: 0x3e0, value: 0b1011)
    local.write(register: 0x320, value: 0x81)
    local.write(register: 0x380, value: 1_000_000)
    local.write(register: 0x370, value: 0xfe)
    local.write(register: 0x300, value: 0x4_0051)
    _ = local.acknowledgeInterrupt()
    local.write(register: 0x300, value: 0x4_0031)
    local.write(register: 0x300, value: 0x4_0003)
    fixture[1].write(register: 0x300, value: 0x0400)
    fixture.clock.advance(by: 250_000)
  }

  @Test func aSavedStateGoesOn() throws {
    let first = LocalAPICFixture(count: 2)
    busy(first)
    let saved = first[0].save()
    let second = LocalAPICFixture(count: 2)
    second.clock.advance(by: 250_000)
    try second[0].restore(StateNode(decoding: saved.encoded()))
    #expect(second[0].save() == saved && second[0].hasEvents)
    #expect(second[0].hasInterrupt && second.vectors(0x100) == [0x51] && second.vectors(0x200) == [0x31, 0xfe])
    second.clock.advance(by: 749_999)
    #expect(second.vectors(0x200) == [0x31, 0xfe])
    second.clock.advance(by: 1)
    #expect(second.vectors(0x200) == [0x31, 0x81, 0xfe])
    second[0].write(register: 0x280, value: 0)
    #expect(second[0].read(register: 0x280) == 0x20)
  }

  @Test func aPageGoesFromEngineToEngine() throws {
    let first = LocalAPICFixture(count: 2)
    busy(first)
    let page = first[0].page
    // KVM's layout: version, task priority, the request for 0x31, the remaining count.
    #expect(page.count == 1024 && Array(page[0x30..<0x34]) == [0x14, 0, 5, 1] && page[0x80] == 0x40)
    #expect(page[0x212] == 2 && page[0x390..<0x394].elementsEqual([0xb0, 0x71, 0x0b, 0]))
    let second = LocalAPICFixture(count: 2)
    try second[0].load(page: page, base: 0xfee0_0900, deadline: 0)
    #expect(second[0].page == page && second[0].modelSpecific.base == 0xfee0_0900)
    second.clock.advance(by: 750_000)
    #expect(second.vectors(0x200) == [0x31, 0x81, 0xfe])
    #expect(throws: StateError.self) { try second[0].load(page: [1], base: 0xfee0_0900, deadline: 0) }
    #expect(throws: StateError.self) { try second[0].load(page: page, base: 0xfee0_0500, deadline: 0) }
  }

  @Test func aPageInX2APICModeHasTheIDInItsHighBits() throws {
    let first = LocalAPICFixture(count: 6)
    first.enableX2APIC()
    #expect(first[5].writeMSR(0x832, value: 0x4_0077) && first[5].writeMSR(0x6e0, value: 8_000))
    #expect(first[5].page[0x23] == 5)
    let second = LocalAPICFixture(count: 6)
    let (base, deadline) = first[5].modelSpecific
    try second[5].load(page: first[5].page, base: base, deadline: deadline)
    #expect(second[5].readMSR(0x802) == 5 && second[5].readMSR(0x80d) == 0x20 && second[5].readMSR(0x6e0) == 8_000)
    second.clock.advance(by: 4_000)
    #expect(second[5].acknowledgeInterrupt() == 0x77)
  }

  @Test func initializeKeepsBaseAndID() {
    let fixture = LocalAPICFixture(count: 2)
    busy(fixture)
    fixture[0].write(register: 0x20, value: 9 << 24)
    #expect(fixture[0].writeMSR(0x1b, value: 0xd000_0900))
    fixture[0].initialize()
    #expect(fixture[0].read(register: 0x20) == 9 << 24 && fixture[0].registerPage == 0xd000_0000)
    #expect(fixture[0].read(register: 0xf0) == 0xff && fixture.vectors(0x200).isEmpty)
    fixture.clock.advance(by: 2_000_000)
    #expect(!fixture[0].hasInterrupt && fixture[0].taskPriority == 0)
    fixture[0].reset()
    #expect(fixture[0].read(register: 0x20) == 0 && fixture[0].registerPage == 0xfee0_0000)
  }
}
