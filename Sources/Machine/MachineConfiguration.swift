import Accelerator
import BlockLayer
import Boot
import GuestMemory
import PlatformDevices
import Virtio

/// The machine's disks, which its maker opens before and closes after.
public struct MachineDisks: @unchecked Sendable {
  /// What the disks belong to; running.
  public let thread: IOThread
  /// The disks, in the order of their places on the PCI bus.
  public var disks: [MachineDisk]

  /// Disks of one thread.
  public init(thread: IOThread, disks: [MachineDisk]) {
    self.thread = thread
    self.disks = disks
  }
}

/// A disk of a machine, as a virtio block device on PCI.
public struct MachineDisk {
  /// Unique in the machine.
  public var name: String
  /// The disk.
  public var node: any BlockNode
  /// What the guest's driver calls it.
  public var serial: String
  /// What happens when the host fails a read or a write.
  public var readErrors = DiskErrorPolicy.report
  /// See `readErrors`.
  public var writeErrors = DiskErrorPolicy.enospc

  /// A disk that the guest knows by its name.
  public init(name: String, node: any BlockNode) {
    self.name = name
    self.node = node
    serial = name
  }
}

/// What a machine is made of; the same for every accelerator.
public struct MachineConfiguration: Sendable {
  /// More than an 8-bit APIC id can name, less the broadcast id.
  public static let maximumCPUs = 254
  /// The least that a boot ROM's areas, tables and a small kernel fit in.
  public static let minimumMemory: UInt64 = 1 << 20

  /// Bytes of RAM, whole pages.
  public var memory: UInt64 = 256 << 20
  /// vCPUs.
  public var cpus = 1
  /// Which processor the guest is shown.
  public var cpu = CPUModel.host
  /// The guest; nil runs the firmware alone.
  public var image: BootImage?
  /// The kernel's command line.
  public var commandLine = ""
  /// The initial RAM disk.
  public var initialRAMDisk: BootImage?
  /// Boot modules.
  public var modules: [BootModule] = []
  /// Where a flat binary goes.
  public var loadAddress: UInt64?
  /// The boot ROM; nil for a build without one.
  public var firmware: BootROM?
  /// The disks, if any.
  public var disks: MachineDisks?
  /// The network cards, if any.
  public var networks: MachineNetworks?
  /// Byte streams between the guest and the host, if any.
  public var ports: MachinePorts?
  /// Told in one line of what goes wrong in a device while the machine runs, on any thread.
  public var onDeviceFault: @Sendable (String) -> Void = { _ in }
  /// Where COM1 sends its bytes.
  public var serial: any SerialOutput
  /// Where the interrupt controllers live; nil for the accelerator's local APICs and the VMM's rest, or
  /// all of them the VMM's where the accelerator has none.
  public var interrupts: InterruptControllerModel?
  /// Whether vCPUs take turns on one thread, a fixed number of instructions each; needs `.instructionLimit`. They do so
  /// anyway where the accelerator's machines have virtual time.
  public var takesTurns = false
  /// Where exits and what vCPUs do are written down, if anywhere: a trace a subject.
  public var traces: [Trace] = []
  /// What decides which memory the vCPUs may touch, if anything; needs `.memoryViews`.
  public var supervisor: (any ViewSupervisor)?
  /// What executes single instructions that the accelerator cannot, if anything.
  public var assist: (any InstructionAssist)?

  /// A machine of the default size whose COM1 sends to `serial`.
  public init(serial: any SerialOutput) {
    self.serial = serial
  }

  /// Places for PCI devices beside the host bridge.
  public static let maximumDisks = PCIHotplug.slots.count

  func validate() throws(MachineError) {
    guard (1...Self.maximumCPUs).contains(cpus) else { throw .cpus(asked: cpus, limit: Self.maximumCPUs) }
    guard memory >= Self.minimumMemory, memory & 0xfff == 0 else {
      throw .memorySize(asked: memory, minimum: Self.minimumMemory)
    }
    let disks = disks?.disks ?? []
    guard disks.count <= Self.maximumDisks else { throw .disks(asked: disks.count, limit: Self.maximumDisks) }
    var names: Set<String> = []
    for disk in disks where !names.insert(disk.name).inserted { throw .diskName(disk.name) }
    let cards = networks?.cards ?? []
    let most = Self.maximumDisks - disks.count - (ports == nil ? 0 : 1)
    guard cards.count <= most else { throw .networkCards(asked: cards.count, limit: most) }
    if let ports { names.insert(ports.deviceName) }
    for card in cards where !names.insert(card.name).inserted { throw .networkName(card.name) }
  }
}
