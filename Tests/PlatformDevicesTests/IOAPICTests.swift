import DeviceModel
import DeviceTesting
import PlatformDevices
import Testing

@Suite struct IOAPICTests {
  private let fixture: Fixture
  private let apics = RecordingLocalAPICs()
  private let ioapic: IOAPIC

  init() throws {
    fixture = try Fixture()
    ioapic = IOAPIC(output: apics)
    try fixture.attach(ioapic)
  }

  private func read(_ register: UInt64) -> UInt64 {
    fixture.bus.write(0xfec0_0000, size: 4, value: register)
    return fixture.bus.read(0xfec0_0010, size: 4) & 0xffff_ffff
  }

  private func write(_ register: UInt64, _ value: UInt64) {
    fixture.bus.write(0xfec0_0000, size: 4, value: register)
    fixture.bus.write(0xfec0_0010, size: 4, value: value)
  }

  private func redirect(_ pin: UInt64, _ low: UInt64, destination: UInt64 = 0) {
    write(0x11 + pin * 2, destination << 24)
    write(0x10 + pin * 2, low)
  }

  @Test func identity() {
    #expect(read(1) == 0x17_0020)
    write(1, 0xffff_ffff)
    #expect(read(1) == 0x17_0020)
    write(0, 0xffff_ffff)
    #expect(read(0) == 0x0f00_0000 && read(2) == 0x0f00_0000)
    #expect(read(0x10) == 0x1_0000)
    write(0x10, 0xffff_ffff)
    #expect(read(0x10) == 0x1_afff)
    #expect(read(0x40) == 0)
  }

  @Test func anEdgeIsOneMessage() {
    redirect(4, 0x0831, destination: 3)
    ioapic.setInput(4, level: true)
    ioapic.setInput(4, level: true)
    #expect(apics.take() == [InterruptMessage(address: 0xfee0_3004, data: 0x31)])
    ioapic.setInput(4, level: false)
    ioapic.setInput(4, level: true)
    #expect(apics.take().count == 1)
    redirect(5, 0x1_0041)
    ioapic.setInput(5, level: true)
    redirect(5, 0x41)
    #expect(apics.take().isEmpty)
  }

  @Test func aLevelWaitsForItsEnd() {
    redirect(9, 0x8051)
    ioapic.setInput(9, level: true)
    #expect(apics.take() == [InterruptMessage(address: 0xfee0_0000, data: 0xc051)])
    #expect(read(0x22) & 0x4000 != 0)
    ioapic.setInput(9, level: false)
    ioapic.setInput(9, level: true)
    #expect(apics.take().isEmpty)
    ioapic.endOfInterrupt(vector: 0x52)
    #expect(apics.take().isEmpty)
    ioapic.endOfInterrupt(vector: 0x51)
    #expect(apics.take().count == 1)
    ioapic.setInput(9, level: false)
    fixture.bus.write(0xfec0_0040, size: 4, value: 0x51)
    #expect(apics.take().isEmpty)
    #expect(read(0x22) & 0x4000 == 0)
  }

  @Test func aMaskedLevelComesWhenItIsOpened() {
    redirect(10, 0x1_8061)
    ioapic.setInput(10, level: true)
    #expect(apics.take().isEmpty)
    redirect(10, 0x8061)
    #expect(apics.take().count == 1)
    // A moment as an edge clears the remote IRR, as Linux does it.
    redirect(10, 0x1_0061)
    #expect(read(0x24) & 0x4000 == 0)
    redirect(10, 0x8061)
    #expect(apics.take().count == 1)
  }

  @Test func routesAreAnnounced() {
    redirect(11, 0x8071)
    #expect(apics.route(11) == InterruptMessage(address: 0xfee0_0000, data: 0xc071))
    redirect(11, 0x1_8071)
    #expect(apics.route(11) == nil)
  }

  @Test func wiringOfAPC() {
    let pin = RecordingPin()
    let pic = PIC(pin: pin)
    let controllers = InterruptControllers(pic: pic, ioapic: ioapic, messages: apics)
    redirect(2, 0x20)
    redirect(17, 0x30)
    controllers.setInterruptLine(0, level: true)
    #expect(apics.take().map(\.data) == [0x20])
    #expect(pin.isHigh && pic.acknowledge() == 0)
    controllers.setInterruptLine(17, level: true)
    controllers.signalMSI(address: 0xfee0_1000, data: 0x99)
    #expect(apics.take().map(\.data) == [0x30, 0x99])
    #expect(!pin.isHigh)
  }
}
