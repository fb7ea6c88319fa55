import DeviceModel
import DeviceTesting
import GuestMemory
import Host
import NetLayer
import PlatformDevices
import Testing
import Virtio

/// A device, and the windows through which a guest reaches it.
struct Subject {
  /// A run of offsets that somebody answers: the device, or the host that passes accesses on to it.
  struct Door {
    var target: any BusDevice
    var offset: UInt64
    var size: UInt64
  }
  var device: any Device
  /// What the device does not keep alive itself.
  var owner: AnyObject?
  var doors: [Door]

  /// A device at fixed addresses.
  init(_ device: any PlatformDevice) {
    self.device = device
    doors = device.windows.map { Door(target: device, offset: $0.offset, size: $0.size) }
  }

  /// A local APIC with another one beside it; both live as long as their bus.
  init(_ bus: LocalAPICBus) {
    device = bus.locals[0]
    owner = bus
    doors = [Door(target: bus.locals[0], offset: 0, size: 0x400)]
  }

  /// A PCI function at 0000:00:03.0 with its configuration space and BARs of these sizes.
  init(_ device: any PCIDevice, host: PCIHost, bars: [Int: UInt64]) {
    self.device = device
    _ = host.add(device, at: PCIAddress(device: 3))
    doors = [256, 4096].map { Door(target: host, offset: 1 << 32 | 3 << 15, size: $0) }
    for (bar, size) in bars.sorted(by: { $0.key < $1.key }) {
      doors.append(Door(target: device, offset: UInt64(bar) << 60, size: size))
    }
  }
}

/// A device under the conformance tests.
struct CatalogueEntry: Sendable, CustomTestStringConvertible {
  var name: String
  /// A battery or the like keeps part of the state over a reset.
  var survivesReset: Bool = false
  var subject: @Sendable (Fixture) throws -> Subject

  init(name: String, survivesReset: Bool = false, _ make: @escaping @Sendable (Fixture) throws -> any PlatformDevice) {
    self.name = name
    self.survivesReset = survivesReset
    subject = { Subject(try make($0)) }
  }

  init(pci name: String, bars: [Int: UInt64], _ make: @escaping @Sendable (Fixture, PCIHost) -> any PCIDevice) {
    self.name = name
    subject = { fixture in
      let host = fixture.pciHost()
      return Subject(make(fixture, host), host: host, bars: bars)
    }
  }

  init(virtio name: String, _ make: @escaping @Sendable (Fixture, SilentNetwork) -> any VirtioDevice) {
    self.name = name
    subject = { fixture in
      let host = fixture.pciHost()
      // The device keeps its thread.
      let network = try SilentNetwork()
      let device = try VirtioPCI(
        make(fixture, network), host: host, line: fixture.line(17), interrupts: fixture.sink, memory: fixture.memory,
        loop: network.thread.loop, isSynchronous: true)
      return Subject(device, host: host, bars: [0: 0x10000])
    }
  }

  init(localAPIC name: String) {
    self.name = name
    subject = { fixture in
      Subject(
        LocalAPICBus(
          count: 2, features: [.x2APIC, .timestampDeadline], clock: fixture.clock,
          untilTimestamp: { [clock = fixture.clock] in max($1, clock.now()) - clock.now() }, wake: { _ in }))
    }
  }

  var testDescription: String { name }
}

/// Every device; a new one is one line.
let catalogue: [CatalogueEntry] = [
  CatalogueEntry(name: "serial") { Serial16550(name: "serial0", line: $0.line(4), output: $0.output) },
  CatalogueEntry(name: "debug exit") { DebugExit(machine: $0.machine) },
  CatalogueEntry(name: "debug console") { DebugConsole(output: $0.output) },
  CatalogueEntry(name: "i8042") { I8042(line: $0.line(1), machine: $0.machine) },
  CatalogueEntry(name: "reset control") { ResetControl(machine: $0.machine) },
  CatalogueEntry(name: "RTC", survivesReset: true) { fixture in
    RealTimeClock(
      line: fixture.line(8), clock: fixture.clock,
      contents: .init(lowMemory: 1 << 30, highMemory: 1 << 30, cpus: 4), epoch: 1_700_000_000, onAlarm: {})
  },
  CatalogueEntry(name: "ACPI PM") {
    ACPIPowerManagement(line: $0.line(9), clock: $0.clock, machine: $0.machine)
  },
  CatalogueEntry(name: "fw_cfg") {
    FirmwareConfiguration(
      memory: $0.memory, items: [FirmwareConfiguration.Key.cpus: [4, 0]],
      files: [("etc/e820", [UInt8](repeating: 7, count: 300)), ("empty", [])])
  },
  CatalogueEntry(name: "PIC") { _ in PIC(pin: RecordingPin()) },
  CatalogueEntry(name: "IOAPIC") { _ in IOAPIC(output: RecordingLocalAPICs()) },
  CatalogueEntry(localAPIC: "local APIC"),
  CatalogueEntry(name: "PIT") { PIT(line: $0.line(0), clock: $0.clock) },
  CatalogueEntry(name: "HPET") { $0.hpet() },
  CatalogueEntry(name: "test device") { fixture in
    TestDevice(lines: TestDevice.interrupts.map { fixture.line($0) })
  },
  CatalogueEntry(name: "PCI hot-plug") { fixture in
    let power = ACPIPowerManagement(line: fixture.line(9), clock: fixture.clock, machine: fixture.machine)
    return PCIHotplug(host: fixture.pciHost(), power: power, machine: fixture.machine)
  },
  CatalogueEntry(name: "generation id") { fixture in
    GenerationID(
      memory: fixture.memory, address: GuestPhysicalAddress(0x1000),
      power: ACPIPowerManagement(line: fixture.line(9), clock: fixture.clock, machine: fixture.machine),
      isDeterministic: true)
  },
  CatalogueEntry(name: "PCI host") { $0.pciHost() },
  CatalogueEntry(pci: "PCI host bridge", bars: [:]) { PCIHostBridge(host: $1, interrupts: $0.sink) },
  CatalogueEntry(virtio: "virtio network card") { fixture, network in
    VirtioNetwork(
      name: "net0", address: MACAddress(rawValue: 0x5254_0012_3456), mtu: 9000, backend: network,
      memory: fixture.memory, loop: network.thread.loop)
  },
  CatalogueEntry(pci: "PCI sample", bars: SamplePCIDevice.bars) { SamplePCIDevice(host: $1, interrupts: $0.sink) },
]
