import DeviceModel
import DeviceTesting
import PlatformDevices
import Testing

/// The registers as QEMU's docs/specs/acpi_pci_hotplug has them.
@Suite struct PCIHotplugTests {
  private let fixture: Fixture
  private let host: PCIHost
  private let hotplug: PCIHotplug
  private let device: SamplePCIDevice

  init() throws {
    fixture = try Fixture()
    host = fixture.pciHost()
    let power = ACPIPowerManagement(line: fixture.line(9), clock: fixture.clock, machine: fixture.machine)
    hotplug = PCIHotplug(host: host, power: power, machine: fixture.machine)
    try fixture.attach(power)
    try fixture.attach(host)
    try fixture.attach(hotplug)
    device = SamplePCIDevice(host: host, interrupts: fixture.sink)
    #expect(host.add(device, at: PCIAddress(device: 3)))
    // The event is the guest's to enable.
    fixture.output(0x622, 1 << 1, size: 2)
  }

  private var identity: UInt64 {
    fixture.output(0xcf8, 0x8000_1800, size: 4)
    return fixture.input(0xcfc, size: 4)
  }

  @Test func whatComesIsAnnouncedOnce() {
    hotplug.insert(3, announcing: true)
    #expect(fixture.sink.isHigh(9))
    #expect(fixture.input(0x620, size: 2) == 1 << 1)
    #expect(fixture.input(0xae0c, size: 4) == 1 << 3)
    #expect(fixture.input(0xae00, size: 4) == 1 << 3)
    #expect(fixture.input(0xae00, size: 4) == 0)
    fixture.output(0x620, 1 << 1, size: 2)
    #expect(!fixture.sink.isHigh(9))
  }

  @Test func whatWasThereFromTheStartIsNot() {
    hotplug.insert(3, announcing: false)
    #expect(!fixture.sink.isHigh(9))
    #expect(fixture.input(0xae00, size: 4) == 0)
    #expect(fixture.input(0xae0c, size: 4) == 1 << 3)
  }

  @Test func theGuestEjects() {
    hotplug.insert(3, announcing: false)
    hotplug.requestEject(3)
    #expect(fixture.sink.isHigh(9))
    // Asked for, not taken away.
    #expect(fixture.input(0xae04, size: 4) == 1 << 3)
    #expect(fixture.input(0xae04, size: 4) == 1 << 3)
    #expect(identity == 0x5678_1234)
    fixture.output(0xae08, 1 << 3, size: 4)
    #expect(identity == 0xffff_ffff)
    #expect(fixture.machine.take() == [.ejected(slot: 3)])
    #expect(fixture.input(0xae04, size: 4) == 0)
    #expect(fixture.input(0xae0c, size: 4) == 0)
    // Once.
    fixture.output(0xae08, 1 << 3, size: 4)
    #expect(fixture.machine.take().isEmpty)
  }

  @Test func onlyWhatMayGoGoes() {
    hotplug.requestEject(3)
    #expect(!fixture.sink.isHigh(9))
    for slots: UInt64 in [0, 1, 1 << 3, 0xffff_ffff] { fixture.output(0xae08, slots, size: 4) }
    hotplug.insert(0, announcing: true)
    hotplug.insert(32, announcing: true)
    #expect(fixture.input(0xae00, size: 4) == 0)
    #expect(fixture.machine.take().isEmpty)
    #expect(identity == 0x5678_1234)
  }

  @Test func aResetTakesAwayWhatWasToGo() {
    hotplug.insert(3, announcing: true)
    hotplug.requestEject(3)
    hotplug.reset()
    #expect(identity == 0xffff_ffff)
    #expect(fixture.machine.take() == [.ejected(slot: 3)])
    #expect(fixture.input(0xae00, size: 4) == 0)
  }

  @Test func aResetLeavesTheRest() {
    hotplug.insert(3, announcing: true)
    hotplug.reset()
    #expect(identity == 0x5678_1234)
    #expect(fixture.machine.take().isEmpty)
    #expect(fixture.input(0xae0c, size: 4) == 1 << 3)
  }
}
