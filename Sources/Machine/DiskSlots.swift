import BlockLayer
import DeviceModel
import GuestMemory
import Host
import NetLayer
import PlatformDevices
import Synchronization
import Virtio

/// The machine's virtio devices by their places on PCI bus 0: those it was built with, and disks that came since.
final class DiskSlots: Sendable {
  private let pci: PCIHost
  private let hotplug: PCIHotplug
  private let memory: GuestMemory
  private let interrupts: any InterruptSink
  private let machine: any MachineControl
  private let queues: Int
  private let isDeterministic: Bool
  private let onFault: @Sendable (String) -> Void
  private let disks = Mutex<[UInt8: VirtioPCI]>([:])

  init(
    _ configuration: MachineConfiguration, pci: PCIHost, hotplug: PCIHotplug, memory: GuestMemory,
    interrupts: any InterruptSink, machine: any MachineControl, isDeterministic: Bool
  ) {
    self.pci = pci
    self.hotplug = hotplug
    self.memory = memory
    self.interrupts = interrupts
    self.machine = machine
    queues = min(configuration.cpus, VirtioBlock.maximumQueues)
    self.isDeterministic = isDeterministic
    onFault = configuration.onDeviceFault
  }

  private struct Made: @unchecked Sendable {
    let device: any VirtioDevice
  }

  /// In the order of their places.
  var devices: [VirtioPCI] { disks.withLock { disks in disks.sorted { $0.key < $1.key }.map(\.value) } }

  /// Names and places, in the order of their places.
  var places: [(name: String, slot: UInt8)] {
    disks.withLock { disks in disks.sorted { $0.key < $1.key }.map { ($0.value.name, $0.key) } }
  }

  /// The network cards, in the order of their places.
  var networkCards: [PlacedNetworkCard] {
    disks.withLock { disks in disks.sorted { $0.key < $1.key }.map { ($0.key, $0.value.device) } }
      .compactMap { slot, device in
        (device as? VirtioNetwork).map { PlacedNetworkCard(name: $0.name, slot: slot, device: $0) }
      }
  }

  subscript(_ name: String) -> VirtioPCI? { disks.withLock { disks in disks.values.first { $0.name == name } } }

  /// Puts a disk at the first free place; with `announcing`, the guest is told.
  func add(_ disk: MachineDisk, on thread: IOThread, announcing: Bool) throws(MachineError) {
    let block = VirtioBlock(
      name: disk.name, disk: disk.node, serial: disk.serial, memory: memory, thread: thread, queues: queues,
      readErrors: disk.readErrors, writeErrors: disk.writeErrors)
    block.onError = { [machine] in machine.request(.ioError($0)) }
    try add(block, on: thread.loop, among: Array(PCIHotplug.slots), announcing: announcing)
  }

  /// Puts another virtio device at the last free place, which leaves disks where they would be without it.
  func add(_ device: any VirtioDevice, on loop: EventLoop) throws(MachineError) {
    try add(device, on: loop, among: PCIHotplug.slots.reversed(), announcing: false)
  }

  /// Puts a network card there, too, and attaches it to its network.
  func add(_ card: MachineNetworkCard, on loop: EventLoop) throws(MachineError) {
    let device = VirtioNetwork(
      name: card.name, address: card.address, mtu: card.mtu, backend: card.backend, usesOffloads: card.usesOffloads,
      memory: memory, loop: loop)
    try add(device, on: loop)
    let made = PlacedNetworkCard(name: card.name, slot: 0, device: device)
    let outcome = Condition<Result<Void, NetworkError>?>(nil)
    loop.execute {
      let result = Result { () throws(NetworkError) in try made.device.connect() }
      outcome.withLock { $0 = result }
    }
    do { try outcome.wait { $0 }.get() } catch { throw .network(card: card.name, error) }
  }

  private func add(
    _ virtio: any VirtioDevice, on loop: EventLoop, among places: [UInt8], announcing: Bool
  ) throws(MachineError) {
    let name = virtio.name
    let made = Made(device: virtio)
    let slot = try disks.withLock { disks throws(MachineError) in
      guard !disks.values.contains(where: { $0.name == name }) else { throw .diskName(name) }
      guard let slot = places.first(where: { disks[$0] == nil }) else {
        throw .disks(asked: disks.count + 1, limit: MachineConfiguration.maximumDisks)
      }
      let address = PCIAddress(device: slot)
      let device: VirtioPCI
      do throws(HostError) {
        device = try VirtioPCI(
          made.device, host: pci, line: pci.line(device: slot), interrupts: interrupts, memory: memory,
          loop: loop, isSynchronous: isDeterministic, onFault: onFault)
      } catch {
        throw .host(error)
      }
      guard pci.add(device, at: address) else {
        throw .device(.slotTaken(device: name, address: "\(address)"))
      }
      disks[slot] = device
      return slot
    }
    hotplug.insert(slot, announcing: announcing)
  }

  /// Asks the guest to give a disk up.
  func requestRemoval(of name: String) throws(MachineError) {
    let slot = disks.withLock { disks in disks.first { $0.value.name == name }?.key }
    guard let slot else { throw .noDisk(name) }
    hotplug.requestEject(slot)
  }

  /// Lets go of a disk that has left the bus, when nothing of it is under way any more, and returns its name.
  func remove(slot: UInt8) -> String? {
    guard let device = disks.withLock({ $0[slot] }) else { return nil }
    device.disconnect()
    disks.withLock { $0[slot] = nil }
    return device.name
  }
}
