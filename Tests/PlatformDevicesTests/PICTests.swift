import DeviceTesting
import PlatformDevices
import Testing

@Suite struct PICTests {
  private let fixture: Fixture
  private let pin = RecordingPin()
  private let pic: PIC

  init() throws {
    fixture = try Fixture()
    pic = PIC(pin: pin)
    try fixture.attach(pic)
  }

  /// As Linux initialises it: vectors 0x30 and 0x38, everything open.
  private func initialize(fourthWord: UInt64 = 1) {
    for (base, vector, cascade) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] as [(UInt64, UInt64, UInt64)] {
      fixture.output(base, 0x11)
      fixture.output(base + 1, vector)
      fixture.output(base + 1, cascade)
      fixture.output(base + 1, fourthWord)
      fixture.output(base + 1, 0)
    }
  }

  private func pulse(_ input: Int) {
    pic.setInput(input, level: true)
    pic.setInput(input, level: false)
  }

  private func endOfInterrupt(second: Bool = false) {
    if second { fixture.output(0xa0, 0x20) }
    fixture.output(0x20, 0x20)
  }

  @Test func vectorsFromBothControllers() {
    initialize()
    pulse(4)
    #expect(pin.isHigh)
    #expect(pic.acknowledge() == 0x34)
    #expect(!pin.isHigh)
    endOfInterrupt()
    pulse(8)
    #expect(pin.isHigh)
    #expect(pic.acknowledge() == 0x38)
    endOfInterrupt(second: true)
    #expect(!pin.isHigh)
  }

  @Test func masksHoldRequestsBack() {
    initialize()
    fixture.output(0x21, 0x10)
    #expect(fixture.input(0x21) == 0x10)
    pulse(4)
    #expect(!pin.isHigh)
    fixture.output(0x20, 0x0a)
    #expect(fixture.input(0x20) == 0x10)
    fixture.output(0x21, 0)
    #expect(pin.isHigh && pic.acknowledge() == 0x34)
    fixture.output(0x20, 0x0b)
    #expect(fixture.input(0x20) == 0x10)
    fixture.output(0x20, 0x0a)
    #expect(fixture.input(0x20) == 0)
  }

  @Test func theMoreUrgentInterruptsTheLessUrgent() {
    initialize()
    pulse(5)
    #expect(pic.acknowledge() == 0x35)
    pulse(6)
    #expect(!pin.isHigh)
    pulse(1)
    #expect(pin.isHigh && pic.acknowledge() == 0x31)
    endOfInterrupt()
    #expect(!pin.isHigh)
    endOfInterrupt()
    #expect(pin.isHigh && pic.acknowledge() == 0x36)
  }

  @Test func anInterruptOfTheSecondControllerWaitsForTheFirstOnes() {
    initialize()
    pulse(14)
    #expect(pic.acknowledge() == 0x3e)
    pulse(15)
    pulse(9)
    // The first controller has input 2 in service until its own end of interrupt.
    #expect(!pin.isHigh)
    endOfInterrupt(second: true)
    #expect(pin.isHigh && pic.acknowledge() == 0x39)
    endOfInterrupt(second: true)
    #expect(pin.isHigh && pic.acknowledge() == 0x3f)
  }

  @Test func spuriousInterrupts() {
    initialize()
    #expect(pic.acknowledge() == 0x37)
    fixture.output(0x20, 0x0b)
    #expect(fixture.input(0x20) == 0)
    // Level-triggered, and gone before the acknowledge.
    fixture.output(0x4d1, 0x02)
    #expect(fixture.input(0x4d1) == 0x02)
    pic.setInput(9, level: true)
    #expect(pin.isHigh)
    pic.setInput(9, level: false)
    #expect(!pin.isHigh || pic.acknowledge() == 0x3f)
  }

  @Test func levelTriggeredInputsComeBackAfterTheEnd() {
    initialize()
    fixture.output(0x4d0, 0xff)
    #expect(fixture.input(0x4d0) == 0xf8)
    pic.setInput(5, level: true)
    #expect(pic.acknowledge() == 0x35)
    #expect(!pin.isHigh)
    endOfInterrupt()
    #expect(pin.isHigh)
    pic.setInput(5, level: false)
    #expect(!pin.isHigh)
  }

  @Test func specificEndsAndRotation() {
    initialize()
    pulse(3)
    #expect(pic.acknowledge() == 0x33)
    fixture.output(0x20, 0x60 | 4)
    fixture.output(0x20, 0x0b)
    #expect(fixture.input(0x20) == 0x08)
    // Rotate on a specific end: 3 is the least urgent now, 4 the most.
    fixture.output(0x20, 0xe0 | 3)
    #expect(fixture.input(0x20) == 0)
    pulse(3)
    pulse(7)
    #expect(pic.acknowledge() == 0x37)
    #expect(!pin.isHigh)
    fixture.output(0x20, 0x20)
    #expect(pic.acknowledge() == 0x33)
  }

  @Test func automaticEnds() {
    initialize(fourthWord: 3)
    pulse(3)
    #expect(pic.acknowledge() == 0x33)
    fixture.output(0x20, 0x0b)
    #expect(fixture.input(0x20) == 0)
    pulse(3)
    #expect(pin.isHigh)
  }

  @Test func specialMaskLetsTheLessUrgentIn() {
    initialize()
    pulse(1)
    #expect(pic.acknowledge() == 0x31)
    fixture.output(0x21, 0x02)
    pulse(6)
    #expect(!pin.isHigh)
    fixture.output(0x20, 0x68)
    #expect(pin.isHigh && pic.acknowledge() == 0x36)
  }

  @Test func pollingAcknowledges() {
    initialize()
    pulse(6)
    fixture.output(0x20, 0x0c)
    #expect(fixture.input(0x20) == 0x86)
    #expect(!pin.isHigh)
    fixture.output(0x20, 0x0c)
    #expect(fixture.input(0x20) == 0)
  }

  @Test func initialisationForgetsEdges() {
    initialize()
    pic.setInput(4, level: true)
    initialize()
    #expect(!pin.isHigh)
    pic.setInput(4, level: false)
    pic.setInput(4, level: true)
    #expect(pin.isHigh)
  }
}
