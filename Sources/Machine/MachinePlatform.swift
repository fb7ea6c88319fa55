import Accelerator
import BlockLayer
import Boot
import DeviceModel
import Glibc
import GuestMemory
import Host
import PlatformDevices
import Virtio

/// The machine's devices and where they are: the one list to add a device to.
struct MachinePlatform {
  let ports = AddressBus(name: "ports")
  let memoryBus = AddressBus(name: "memory")
  private(set) var devices: [any Device] = []
  let power: ACPIPowerManagement
  let generation: GenerationID
  let serial: Serial16550
  /// Where PCI functions are added.
  let pci: PCIHost
  /// The disks, which come and go.
  let disks: DiskSlots

  init(
    _ configuration: MachineConfiguration, kind: BootKind?, memory: GuestMemory, map: MemoryMap,
    hasTables: Bool, clock: any DeviceClock, machine: any MachineControl, interrupts: MachineInterrupts,
    isDeterministic: Bool
  ) throws(MachineError) {
    do throws(DeviceModelError) {
      try self.init(
        platform: configuration, kind: kind, memory: memory, map: map, hasTables: hasTables, clock: clock,
        machine: machine, interrupts: interrupts, isDeterministic: isDeterministic)
    } catch {
      throw .device(error)
    }
    if let ports = configuration.ports {
      let console = VirtioConsole(name: ports.deviceName, ports: ports.names, memory: memory)
      try disks.add(console, on: ports.thread.loop)
      ports.device = console
    }
    if let networks = configuration.networks {
      for card in networks.cards { try disks.add(card, on: networks.loop) }
    }
    guard let configured = configuration.disks else { return }
    for disk in configured.disks { try disks.add(disk, on: configured.thread, announcing: false) }
  }

  private init(
    platform configuration: MachineConfiguration, kind: BootKind?, memory: GuestMemory, map: MemoryMap,
    hasTables: Bool, clock: any DeviceClock, machine: any MachineControl, interrupts: MachineInterrupts,
    isDeterministic: Bool
  ) throws(DeviceModelError) {
    let sink = interrupts.sink
    // Devices on one interrupt share its line.
    var lines: [UInt32: InterruptLine] = [:]
    func line(_ gsi: UInt32) -> InterruptLine.Source {
      let line = lines[gsi] ?? InterruptLine(gsi: gsi, sink: sink)
      lines[gsi] = line
      return line.makeSource()
    }
    let power = ACPIPowerManagement(line: line(ACPIPowerManagement.interrupt), clock: clock, machine: machine)
    self.power = power
    generation = GenerationID(
      memory: memory, address: hasTables ? Platform.generationID.start : nil, power: power,
      isDeterministic: isDeterministic)
    pci = PCIHost(ports: ports, memory: memoryBus, interrupts: sink)
    let hotplug = PCIHotplug(host: pci, power: power, machine: machine)
    disks = DiskSlots(
      configuration, pci: pci, hotplug: hotplug, memory: memory, interrupts: sink, machine: machine,
      isDeterministic: isDeterministic)
    serial = Serial16550(name: "serial0", line: line(4), output: configuration.serial)
    let contents = RealTimeClock.Contents(
      lowMemory: map.lowRAM.size, highMemory: map.highRAM?.size ?? 0, cpus: configuration.cpus)
    try add(serial)
    try add(power)
    try add(generation)
    for controller in interrupts.devices { try add(controller) }
    let rtc = RealTimeClock(
      line: line(RealTimeClock.interrupt), clock: clock, contents: contents,
      epoch: isDeterministic ? VirtualClock.epoch : Int64(time(nil))
    ) { power.signalAlarm() }
    try add(rtc)
    if interrupts.model != .inKernel {
      let pit = PIT(line: line(PIT.interrupt), clock: clock)
      try add(pit)
      // KVM's own controllers come with a PIT that no HPET here could take off its line.
      try add(
        HPET(
          lines: HPET.routes.map { line($0) }, timerLine: line(PIT.interrupt), clockLine: line(RealTimeClock.interrupt),
          clock: clock, interrupts: sink
        ) { isLegacy in
          pit.setConnected(!isLegacy)
          rtc.setConnected(!isLegacy)
        })
    }
    try add(I8042(line: line(1), machine: machine))
    try add(ResetControl(machine: machine))
    try add(DebugExit(machine: machine))
    // QEMU's test device: kvm-unit-tests, which are Multiboot images, raise interrupts through it. Others must not meet
    // its ports by chance.
    if kind == .multiboot { try add(TestDevice(lines: TestDevice.interrupts.map { line($0) })) }
    try add(DebugConsole(output: configuration.serial))
    try add(pci)
    try add(hotplug)
    try add(PCIHostBridge(host: pci, interrupts: sink), at: PCIHostBridge.address)
    try add(
      FirmwareConfiguration(
        memory: memory, items: Self.firmwareItems(configuration), files: [("etc/e820", map.e820)]))
  }

  private mutating func add(_ device: any PlatformDevice) throws(DeviceModelError) {
    try device.attach(ports: ports, memory: memoryBus)
    devices.append(device)
  }

  private mutating func add(_ device: any PCIDevice, at address: PCIAddress) throws(DeviceModelError) {
    guard pci.add(device, at: address) else { throw .slotTaken(device: device.name, address: "\(address)") }
    devices.append(device)
  }

  /// Adds a device at a port that no platform device names, for tests.
  mutating func add(_ device: any BusDevice, port: UInt64, size: UInt64) throws(DeviceModelError) {
    try ports.attach(device, at: port, size: size)
    devices.append(device)
  }

  private static func firmwareItems(_ configuration: MachineConfiguration) -> [UInt16: [UInt8]] {
    func littleEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
      withUnsafeBytes(of: value.littleEndian) { Array($0) }
    }
    typealias Key = FirmwareConfiguration.Key
    return [
      Key.memorySize: littleEndian(configuration.memory), Key.cpus: littleEndian(UInt16(configuration.cpus)),
      Key.maximumCPUs: littleEndian(UInt16(configuration.cpus)),
    ]
  }
}
