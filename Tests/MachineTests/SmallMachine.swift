import Accelerator
import Boot
import DeviceModel
import GuestMemory
import Host
import KVMAccelerator
import PlatformDevices
import StateTree
import Synchronization
import Testing

@testable import Machine

/// Remembers what the guest wrote to a port, and gives it bytes to read.
final class Recorder: BusDevice {
  let name = "recorder"
  let written = Condition<[UInt64]>([])
  /// What the guest reads.
  let answer = Atomic<UInt64>(0)

  func read(offset: UInt64, size: Int) -> UInt64 { answer.load(ordering: .relaxed) }

  func write(offset: UInt64, size: Int, value: UInt64) {
    written.withLock { $0.append(value) }
  }

  func reset() { written.withLock { $0 = [] } }

  func save() -> StateNode {
    let values = written.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(UInt32(values.count))
      for value in values { writer.write(value) }
    }
  }

  func restore(_ node: StateNode) throws(StateError) {
    let values = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var values: [UInt64] = []
      for _ in 0..<(try reader.read(UInt32.self)) { values.append(try reader.read()) }
      return values
    }
    written.withLock { $0 = values }
  }
}

/// Keeps nothing of what the guest prints.
final class Silence: SerialOutput {
  func write(_ byte: UInt8) {}
}

/// A machine of 1 MiB with the platform's devices and a recorder at port 0x80; its boot processor starts at 0x1000 in 32-bit mode.
struct SmallMachine {
  let machine: Machine
  let recorder = Recorder()

  init(
    _ code: [UInt8], cpus: Int = 1, controllers: InterruptControllerModel = .split, cpu: CPUModel = .host,
    on other: (any Accelerator)? = nil
  ) throws {
    let range = try #require(GuestRange(start: GuestPhysicalAddress(0), size: 1 << 20))
    let memory = try GuestMemory([range])
    let accelerator = try other ?? KVMAccelerator()
    let virtualMachine = try accelerator.makeVirtualMachine(memory: memory, interrupts: controllers)
    try virtualMachine.setMemorySlot(MemorySlot(number: 0, range: range, hostBase: memory.regions[0].hostBase))
    let supported = try cpu.leaves ?? accelerator.supportedCPUID()
    let policy = CPUIDPolicy(
      cpus: cpus, controllers: controllers,
      hasControllerRegisters: accelerator.capabilities.contains(.controllerRegisters))
    let vcpus = try (0..<cpus).map { index in
      try virtualMachine.makeVCPU(index: index, cpuid: policy.leaves(supported: supported, apicID: UInt32(index)))
    }
    let loop = try EventLoop()
    let clock = MachineClock(loop: loop)
    let link = MachineLink()
    let interrupts = try MachineInterrupts(
      virtualMachine, vcpus: vcpus, features: policy.localAPICFeatures(supported: supported), clock: clock)
    var configuration = MachineConfiguration(serial: Silence())
    configuration.cpus = cpus
    var platform = try MachinePlatform(
      configuration, kind: nil, memory: memory, map: MemoryMap(size: range.size), hasTables: false, clock: clock,
      machine: link, interrupts: interrupts, isDeterministic: false)
    try platform.add(recorder, port: 0x80, size: 1)
    let load: @Sendable (GuestMemory) throws(MachineError) -> BootEntry = { memory throws(MachineError) in
      do throws(GuestMemoryError) {
        try memory.write(code, to: GuestPhysicalAddress(0x1000))
      } catch {
        throw .memory(error)
      }
      var system = SystemRegisters()
      system.cs = .code32(selector: 8)
      for path in [\SystemRegisters.ds, \.es, \.fs, \.gs, \.ss] { system[keyPath: path] = .data(selector: 16) }
      system.cr0 |= 1
      var general = GeneralRegisters()
      general.rip = 0x1000
      general.rsp = 0x8000
      return BootEntry(general: general, system: system)
    }
    machine = try Machine(
      MachineParts(
        memory: memory, virtualMachine: virtualMachine, vcpus: vcpus,
        cpuid: policy.leaves(supported: supported, apicID: 0), loop: loop,
        clock: clock, platform: platform,
        interrupts: interrupts, boot: BootPlan(load: load, wake: load)))
    link.connect(machine)
  }
}
