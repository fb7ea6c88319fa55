import DeviceModel
import DeviceTesting
import PlatformDevices
import Testing

@Suite struct SmallDeviceTests {
  private let fixture: Fixture

  init() throws {
    fixture = try Fixture()
  }

  @Test(arguments: [(1, 0x12), (2, 0x1234), (4, 0x1234_5678)] as [(Int, UInt64)])
  func debugExitTakesAnySize(size: Int, value: UInt64) throws {
    try fixture.attach(DebugExit(machine: fixture.machine))
    fixture.output(0xf4, value, size: size)
    #expect(fixture.machine.take() == [.debugExit(UInt32(value))])
  }

  @Test func debugConsole() throws {
    try fixture.attach(DebugConsole(output: fixture.output))
    #expect(fixture.input(0xe9) == 0xe9)
    fixture.output(0xe9, 0x41)
    #expect(fixture.output.text == "A")
  }

  @Test func resetPorts() throws {
    try fixture.attach(ResetControl(machine: fixture.machine))
    #expect(fixture.input(0x92) == 2)
    fixture.output(0x92, 0x00)
    fixture.output(0xcf9, 0x02)
    #expect(fixture.machine.take().isEmpty)
    #expect(fixture.input(0x92) == 0 && fixture.input(0xcf9) == 2)
    fixture.output(0xcf9, 0x06)
    #expect(fixture.machine.take() == [.reset])
    fixture.output(0x92, 0x01)
    #expect(fixture.machine.take() == [.reset])
  }

  @Test func keyboardControllerResets() throws {
    try fixture.attach(I8042(line: fixture.line(1), machine: fixture.machine))
    fixture.output(0x64, 0xff)
    #expect(fixture.machine.take().isEmpty)
    fixture.output(0x64, 0xfe)
    #expect(fixture.machine.take() == [.reset])
    fixture.output(0x64, 0xd1)
    fixture.output(0x60, 0x02)
    #expect(fixture.machine.take() == [.reset])
  }

  @Test func keyboardControllerAnswersItsProbes() throws {
    try fixture.attach(I8042(line: fixture.line(1), machine: fixture.machine))
    func command(_ command: UInt64, _ data: UInt64? = nil) -> UInt64? {
      fixture.output(0x64, command)
      if let data { fixture.output(0x60, data) }
      return fixture.input(0x64) & 1 == 1 ? fixture.input(0x60) : nil
    }
    #expect(command(0xaa) == 0x55)
    #expect(command(0xab) == 0)
    #expect(command(0x60, 0x45) == nil)
    #expect(command(0x20) == 0x45)
    // A20 shut and opened again through the output port.
    #expect(command(0xdd) == nil)
    #expect(command(0xd0) == 0x01)
    #expect(command(0xdf) == nil)
    #expect(command(0xd0) == 0x03)
    // No second port: the loop-back does not come from it, and its test fails.
    fixture.output(0x64, 0xd3)
    fixture.output(0x60, 0x5a)
    #expect(fixture.input(0x64) & 0x21 == 0x01)
    #expect(fixture.input(0x60) == 0x5a)
    #expect(command(0xa9) == 1)
    // No keyboard: an identify is answered at once, with an interrupt.
    fixture.output(0x60, 0xf2)
    #expect(fixture.sink.isHigh(1))
    #expect(fixture.input(0x64) & 0x41 == 0x41)
    #expect(fixture.input(0x60) == 0xfe)
    #expect(!fixture.sink.isHigh(1))
    #expect(fixture.input(0x64) & 0x41 == 0)
  }

  @Test func testDevice() throws {
    try fixture.attach(TestDevice(lines: TestDevice.interrupts.map { fixture.line($0) }))
    fixture.output(0xe0, 0x1234_5678, size: 4)
    #expect(fixture.input(0xe0, size: 4) == 0x1234_5678 && fixture.input(0xe1) == 0x56)
    fixture.output(0x200e, 1)
    #expect(fixture.sink.isHigh(14))
    fixture.output(0x200e, 0)
    #expect(!fixture.sink.isHigh(14))
    fixture.bus.write(0xff00_fffc, size: 4, value: 0x99aa_bbcc)
    #expect(fixture.bus.read(0xff00_fffe, size: 2) & 0xffff == 0x99aa)
  }
}
