import Accelerator
import BlockLayer
import GuestMemory
import LoaderHardening
import Machine
import NetLayer
import StateTree
import Virtio

/// What a saved machine was made of: it can go on only in one that is made so too.
struct MachineDescription: Equatable {
  struct Disk: Equatable {
    var name: String
    var slot: UInt8
    var path: String
    var isReadOnly: Bool
  }

  struct NetworkCard: Equatable {
    var name: String
    var slot: UInt8
    var address: MACAddress
    /// 0 for none.
    var mtu: UInt16
    /// What its driver has accepted of the backend's.
    var offloads: NetworkOffloads
    /// What the backend here has, and whether the address is the command line's; in no file.
    var offered: NetworkOffloads = []
    var isAddressed = false
  }

  static let nodeName = "configuration"
  private static let version: UInt32 = 5
  private static let maximumText = 4096

  var engine: String
  var cpus: UInt32
  var memory: UInt64
  var controllers: String
  var disks: [Disk]
  /// Since version 2; before, a machine with an agent's port could not be saved.
  var hasAgent = false
  /// The policy's identity, empty where there is none; since version 3, in the same way.
  var hardening = ""
  /// What the guest has seen of its processor; since version 4, before which it goes on only in the engine it was in.
  var processor: Processor?
  /// Since version 5, before which there were none.
  var networks: [NetworkCard] = []

  /// A processor that a guest has seen.
  struct Processor: Equatable {
    /// `--cpu`.
    var model: String
    /// Ticks of the time-stamp counter a millisecond.
    var counterKilohertz: UInt32
    var cpuid: [CPUIDLeaf]
    /// Whether a counter of another rate can be had here; in no file.
    var isCounterScaled = false
  }

  init(
    _ machine: Machine, engine: any Accelerator, cpu: CPUModel, hasAgent: Bool, disks: RunDisks?,
    networks: RunNetworks?, hardening: HardeningPolicy?
  ) {
    self.hardening = hardening?.identity ?? ""
    self.engine = engine.name
    self.hasAgent = hasAgent
    processor = Processor(
      model: cpu.rawValue, counterKilohertz: machine.counterKilohertz, cpuid: machine.cpuid,
      isCounterScaled: engine.capabilities.contains(.tscScaling))
    cpus = UInt32(machine.vcpus.count)
    memory = machine.memory.size
    controllers = "\(machine.virtualMachine.interrupts)"
    let places = machine.diskPlaces
    self.disks =
      disks.map { disks in
        disks.thread.perform {
          places.compactMap { name, slot in
            guard let disk = disks.graph.disks[name] else { return nil }
            return Disk(
              name: name, slot: slot, path: BlockGraph.absolute(disk.top.path), isReadOnly: disk.isReadOnly)
          }
        }
      } ?? []
    let addressed = networks?.addressed ?? []
    self.networks = machine.networkCards.map { card in
      NetworkCard(
        name: card.name, slot: card.slot, address: card.device.permanentAddress, mtu: card.device.mtu ?? 0,
        offloads: card.device.neededOffloads, offered: card.device.offloads, isAddressed: addressed.contains(card.name))
    }
  }

  init(_ node: StateNode) throws(StateError) {
    self = try node.read(Self.nodeName, versions: 1...Self.version) { reader, version throws(StateError) in
      try Self(&reader, version)
    }
  }

  private init(_ reader: inout StateReader, _ version: UInt32) throws(StateError) {
    engine = try reader.readString(limit: Self.maximumText)
    cpus = try reader.read()
    memory = try reader.read()
    controllers = try reader.readString(limit: Self.maximumText)
    disks = []
    for _ in 0..<(try reader.read(UInt8.self)) {
      let name = try reader.readString(limit: Self.maximumText)
      let slot = try reader.read(UInt8.self)
      let path = try reader.readString(limit: Self.maximumText)
      disks.append(Disk(name: name, slot: slot, path: path, isReadOnly: try reader.read()))
    }
    if version >= 2 { hasAgent = try reader.read() }
    if version >= 3 { hardening = try reader.readString(limit: Self.maximumText) }
    if version >= 4 { processor = try Processor(&reader) }
    guard version >= 5 else { return }
    for _ in 0..<(try reader.read(UInt8.self)) {
      let name = try reader.readString(limit: Self.maximumText)
      let slot = try reader.read(UInt8.self)
      let address = MACAddress(rawValue: try reader.read())
      let mtu = try reader.read(UInt16.self)
      networks.append(
        NetworkCard(
          name: name, slot: slot, address: address, mtu: mtu, offloads: NetworkOffloads(rawValue: try reader.read())))
    }
  }

  var node: StateNode {
    StateNode(Self.nodeName, version: Self.version) { writer in
      writer.write(engine)
      writer.write(cpus)
      writer.write(memory)
      writer.write(controllers)
      writer.write(UInt8(clamping: disks.count))
      for disk in disks {
        writer.write(disk.name)
        writer.write(disk.slot)
        writer.write(disk.path)
        writer.write(disk.isReadOnly)
      }
      writer.write(hasAgent)
      writer.write(hardening)
      processor?.write(to: &writer)
      writer.write(UInt8(clamping: networks.count))
      for card in networks {
        writer.write(card.name)
        writer.write(card.slot)
        writer.write(card.address.rawValue)
        writer.write(card.mtu)
        writer.write(card.offloads.rawValue)
      }
    }
  }

  /// The first thing in which two machines differ. Where they are in two processes, the disks' files may have other names.
  func difference(
    from here: MachineDescription, comparesPaths: Bool = true
  ) -> (what: String, saved: String, here: String)? {
    guard comparesPaths else {
      var other = here
      for (index, disk) in disks.enumerated() where index < other.disks.count { other.disks[index].path = disk.path }
      return difference(from: other)
    }
    if processor == nil {
      if engine != here.engine { return ("--engine", engine, here.engine) }
      if controllers != here.controllers { return ("interrupt controllers", controllers, here.controllers) }
    }
    if cpus != here.cpus { return ("--cpus", "\(cpus)", "\(here.cpus)") }
    if memory != here.memory { return ("--memory", "\(memory >> 10)K", "\(here.memory >> 10)K") }
    if hasAgent != here.hasAgent { return ("--agent", hasAgent ? "yes" : "no", here.hasAgent ? "yes" : "no") }
    if hardening != here.hardening {
      let text = { (identity: String) in identity.isEmpty ? "none" : "of policy \(identity)" }
      return ("--harden", text(hardening), text(here.hardening))
    }
    if disks != here.disks { return ("the disks", Self.text(disks), Self.text(here.disks)) }
    return networkDifference(from: here)
  }

  private static func text(_ disks: [Disk]) -> String {
    if disks.isEmpty { return "none" }
    return disks.map { "\($0.name) (\($0.path)\($0.isReadOnly ? ", read-only" : "")) in place \($0.slot)" }
      .joined(separator: ", ")
  }
}
