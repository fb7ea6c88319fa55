import Accelerator
import Boot
import DeviceModel
import Glibc
import GuestMemory
import Host
import PlatformDevices
import Synchronization

/// Turns a configuration into a machine: RAM and slots, devices on their buses, vCPUs, and the plan to boot it.
public struct MachineBuilder {
  private let configuration: MachineConfiguration
  private let accelerator: any Accelerator

  /// A builder of one machine on one accelerator.
  public init(_ configuration: MachineConfiguration, on accelerator: any Accelerator) {
    self.configuration = configuration
    self.accelerator = accelerator
  }

  /// Builds the machine. Nothing runs yet.
  public func build() throws(MachineError) -> Machine {
    try configuration.validate()
    let map = try boot { () throws(BootError) in
      let disk = try configuration.image.map { image throws(BootError) in
        try BootCatalogue.bootDiskSize(of: image, loadAddress: configuration.loadAddress)
      }
      return try MemoryMap(size: configuration.memory, bootDisk: disk ?? 0)
    }
    let model = try interruptModel()
    var description = ACPIConfiguration(cpus: configuration.cpus, pciWindow64: Self.pciWindow64(map))
    description.hasHPET = model != .inKernel
    description.systemBus = [
      PCIHotplugObjects.systemBus(port: UInt16(PCIHotplug.port), slots: PCIHotplug.slots),
      GenerationObjects.systemBus(address: Platform.generationID.start),
    ]
    description.generalEvents = [
      PCIHotplugObjects.generalEvent(PCIHotplug.event), GenerationObjects.generalEvent(GenerationID.event),
    ]
    let tables = try boot { () throws(BootError) in
      try ACPITables(description, firmware: configuration.firmware)
    }
    var request = BootRequest(image: configuration.image, memoryMap: map)
    request.commandLine = configuration.commandLine
    request.initialRAMDisk = configuration.initialRAMDisk
    request.modules = configuration.modules
    request.loadAddress = configuration.loadAddress
    request.firmware = configuration.firmware
    request.acpiRSDP = tables?.rsdp
    // What can be refused is refused before anything is allocated.
    try boot { () throws(BootError) in try BootCatalogue.check(request) }

    let kind = try boot { () throws(BootError) in
      try configuration.image.map { image throws(BootError) in
        try BootCatalogue.kind(of: image, loadAddress: configuration.loadAddress)
      }
    }
    let memory: GuestMemory
    do { memory = try GuestMemory(map.ram) } catch { throw .memory(error) }
    let loop: EventLoop
    do { loop = try EventLoop() } catch { throw .host(error) }
    let clock: any GuestClock
    let takesTurns: Bool
    let link = MachineLink()
    let virtualMachine: any VirtualMachine
    let interrupts: MachineInterrupts
    var vcpus: [any VirtualCPU] = []
    let cpuid = try processor()
    let shown: [CPUIDLeaf]
    do {
      virtualMachine = try accelerator.makeVirtualMachine(memory: memory, interrupts: model)
      clock = virtualMachine.virtualTime.map { VirtualClock($0) } ?? MachineClock(loop: loop)
      takesTurns = configuration.takesTurns || virtualMachine.virtualTime != nil
      try setSlots(virtualMachine)
      let policy = CPUIDPolicy(
        cpus: configuration.cpus, emulatesRing0: !accelerator.capabilities.contains(.nativeRing0),
        controllers: model, hasControllerRegisters: accelerator.capabilities.contains(.controllerRegisters))
      shown = policy.leaves(supported: cpuid, apicID: 0)
      for index in 0..<configuration.cpus {
        let leaves = policy.leaves(supported: cpuid, apicID: UInt32(index))
        vcpus.append(try virtualMachine.makeVCPU(index: index, cpuid: leaves))
      }
      interrupts = try MachineInterrupts(
        virtualMachine, vcpus: vcpus, features: policy.localAPICFeatures(supported: cpuid), clock: clock,
        oneThread: takesTurns)
    } catch {
      throw .accelerator(error)
    }
    let platform = try MachinePlatform(
      configuration, kind: kind, memory: memory, map: map, hasTables: tables != nil, clock: clock, machine: link,
      interrupts: interrupts, isDeterministic: virtualMachine.virtualTime != nil)
    let exitTrace = try connectTraces(vcpus)
    let parts = MachineParts(
      memory: memory, virtualMachine: virtualMachine, vcpus: vcpus, cpuid: shown, loop: loop, clock: clock,
      takesTurns: takesTurns, platform: platform, interrupts: interrupts, boot: BootPlan(request, tables),
      assist: configuration.assist, exitTrace: exitTrace, supervisor: configuration.supervisor)
    do {
      try configuration.supervisor?.attach(virtualMachine, vcpus)
      let machine = try Machine(parts)
      link.connect(machine)
      return machine
    } catch {
      throw .accelerator(error)
    }
  }

  /// The leaves of the processor that was asked for, which the accelerator must be able to show.
  private func processor() throws(MachineError) -> [CPUIDLeaf] {
    let supported: [CPUIDLeaf]
    do { supported = try accelerator.supportedCPUID() } catch { throw .accelerator(error) }
    guard let leaves = configuration.cpu.leaves else { return supported }
    let missing = CPUFeatures(leaves).missing(in: CPUFeatures(supported), anyVendor: true)
    guard missing.isEmpty else {
      throw .cpuModel(configuration.cpu, engine: accelerator.name, missing: missing)
    }
    return leaves
  }

  /// Gives the vCPUs those who trace them; returns the trace that is the machine's own.
  private func connectTraces(_ vcpus: [any VirtualCPU]) throws(MachineError) -> Trace? {
    var exits: Trace?
    for trace in configuration.traces {
      switch trace.subject {
      case .exits: exits = trace
      case .vcpu(let kind):
        do throws(AcceleratorError) {
          for vcpu in vcpus { try vcpu.trace(kind, to: trace) }
        } catch {
          throw .accelerator(error)
        }
      }
    }
    return exits
  }

  /// What was asked for, else the accelerator's local APICs with the rest in the VMM.
  ///
  /// KVM could hold all of them. But it waits for its readers (SRCU) with each register block of its PIC, IOAPIC and PIT
  /// that it puts on its buses or takes off, which is two thirds of a small machine's time from start to end, and a
  /// device's interrupt costs the same one call either way.
  private func interruptModel() throws(MachineError) -> InterruptControllerModel {
    let capabilities = accelerator.capabilities
    let offered: InterruptControllerModel = capabilities.contains(.splitInterrupts) ? .split : .userSpace
    // Views may move a vCPU between virtual machines, and its interrupts must be the same in all of them.
    let model = configuration.interrupts ?? (configuration.supervisor == nil ? offered : .userSpace)
    let isOffered =
      switch model {
      case .inKernel: capabilities.contains(.inKernelInterrupts)
      case .split: capabilities.contains(.splitInterrupts)
      case .userSpace: true
      }
    guard isOffered else { throw .interruptControllers(asked: model, engine: accelerator.name) }
    return model
  }

  /// 32 GiB for 64-bit BARs, above all RAM.
  private static func pciWindow64(_ map: MemoryMap) -> GuestRange? {
    let size: UInt64 = 32 << 30
    return GuestRange(start: GuestPhysicalAddress((map.end.rawValue + size - 1) & ~(size - 1)), size: size)
  }

  /// One slot a RAM region, then the ROM, which the guest may read and execute but not write.
  private func setSlots(_ machine: any VirtualMachine) throws(AcceleratorError) {
    var slots = machine.memory.regions.enumerated().map { number, region in
      MemorySlot(number: UInt32(number), range: region.range, hostBase: region.hostBase)
    }
    if let firmware = configuration.firmware {
      let readOnly = accelerator.capabilities.contains(.readOnlyMemory)
      slots.append(
        MemorySlot(
          number: UInt32(slots.count), range: firmware.range, hostBase: firmware.hostBase,
          access: readOnly ? .readExecute : .readWriteExecute))
    }
    for slot in slots { try machine.setMemorySlot(slot) }
    try configuration.assist?.attach(machine.memory, slots: slots)
  }

  private func boot<Value>(_ body: () throws(BootError) -> Value) throws(MachineError) -> Value {
    do { return try body() } catch { throw .boot(error) }
  }
}

/// The devices' way to the machine, which is made after them.
final class MachineLink: MachineControl {
  private struct Reference {
    weak var machine: Machine?
  }

  private let machine = Mutex(Reference())

  func connect(_ machine: Machine) {
    self.machine.withLock { $0.machine = machine }
  }

  func request(_ request: MachineRequest) {
    machine.withLock { $0.machine }?.request(request)
  }
}
