import DeviceModel
import DeviceTesting
import GuestMemory
import PlatformDevices
import Testing

/// The id in memory and the event, as QEMU's docs/specs/vmgenid has them.
@Suite struct GenerationIDTests {
  private let fixture: Fixture
  private let power: ACPIPowerManagement
  private let address = GuestPhysicalAddress(0x1000)

  init() throws {
    fixture = try Fixture()
    power = ACPIPowerManagement(line: fixture.line(9), clock: fixture.clock, machine: fixture.machine)
    try fixture.attach(power)
    // The event is the guest's to enable.
    fixture.output(0x622, 1 << 5, size: 2)
  }

  private func device(isDeterministic: Bool = true) -> GenerationID {
    GenerationID(memory: fixture.memory, address: address, power: power, isDeterministic: isDeterministic)
  }

  private func low() throws -> UInt64 { try fixture.memory.read(address, as: UInt64.self) }

  @Test func aBootPlacesItAndSaysNothing() throws {
    let device = device()
    try device.place()
    #expect(try low() == 1)
    #expect(device.text == "00000001-0000-0000-0000-000000000000")
    #expect(!fixture.sink.isHigh(9))
  }

  @Test func aCopyHasAnotherAndIsTold() throws {
    let device = device(isDeterministic: false)
    try device.place()
    let (text, first) = (device.text, try low())
    try device.renew()
    #expect(device.text != text)
    #expect(try low() != first)
    #expect(fixture.sink.isHigh(9))
    #expect(fixture.input(0x620, size: 2) == 1 << 5)
  }

  @Test func aRestoredOneIsTheSame() throws {
    let device = device(isDeterministic: false)
    let other = self.device(isDeterministic: false)
    #expect(other.text != device.text)
    try other.restore(device.save())
    #expect(other.text == device.text)
    #expect(!fixture.sink.isHigh(9))
  }

  /// A guest whose tables name no such device: its memory is its own until it boots again.
  @Test func aMachineOfEarlierIsLeftAlone() throws {
    try fixture.memory.write([UInt8](repeating: 0xa5, count: 16), to: address)
    let device = device()
    device.restoreAbsent()
    try device.renew()
    #expect(try low() == 0xa5a5_a5a5_a5a5_a5a5)
    #expect(fixture.input(0x620, size: 2) == 0)
    let next = self.device()
    try next.restore(device.save())
    try next.renew()
    #expect(try low() == 0xa5a5_a5a5_a5a5_a5a5)
    try next.place()
    #expect(try low() == 3)
  }
}
