import Accelerator
import DeviceModel
import Host
import PlatformDevices
import Synchronization

/// The machine's interrupt controllers, wherever they live: what devices drive, what vCPUs listen to.
struct MachineInterrupts {
  /// Where they live.
  let model: InterruptControllerModel
  /// Where devices send their interrupts.
  let sink: any InterruptSink
  /// The controllers in the VMM, in the order in which they are put on the buses.
  let devices: [any PlatformDevice]
  /// The IOAPIC in the VMM.
  let ioapic: IOAPIC?
  /// The local APICs in the VMM, by vCPU; empty where they are the accelerator's.
  let locals: [LocalAPIC]
  /// The vCPU threads, by vCPU.
  let presences: [VCPUPresence]
  /// What nobody else keeps.
  private let bus: LocalAPICBus?

  /// Makes the controllers that the accelerator does not have and attaches the vCPUs, which one thread may run, to them.
  init(
    _ virtualMachine: any VirtualMachine, vcpus: [any VirtualCPU], features: LocalAPIC.Features,
    clock: any DeviceClock, oneThread: Bool = false
  ) throws(AcceleratorError) {
    model = virtualMachine.interrupts
    let shared = Condition(())
    presences = vcpus.map { VCPUPresence($0, change: oneThread ? shared : Condition(())) }
    switch model {
    case .inKernel:
      sink = VirtualMachineInterrupts(virtualMachine)
      (devices, ioapic, locals, bus) = ([], nil, [], nil)
    case .split:
      let split = SplitControllers(virtualMachine, bootProcessor: presences[0])
      let pic = PIC(pin: split)
      let ioapic = IOAPIC(output: split)
      split.connect(pic)
      try vcpus[0].attach(external: split)
      sink = InterruptControllers(pic: pic, ioapic: ioapic, messages: split)
      devices = [pic, ioapic]
      self.ioapic = ioapic
      (locals, bus) = ([], nil)
    case .userSpace:
      let bus = LocalAPICBus(
        count: vcpus.count, features: features, clock: clock,
        untilTimestamp: { [presences] in presences[$0].nanoseconds(untilTimestamp: $1) },
        wake: { [presences] in presences[$0].wake() })
      let pic = PIC(pin: bus)
      let ioapic = IOAPIC(output: bus)
      bus.connect(pic: pic, ioapic: ioapic)
      for (vcpu, local) in zip(vcpus, bus.locals) { try vcpu.attach(local) }
      sink = InterruptControllers(pic: pic, ioapic: ioapic, messages: bus)
      devices = [pic, ioapic]
      self.ioapic = ioapic
      locals = bus.locals
      self.bus = bus
    }
  }

  /// What the vCPUs wait for after reset: application processors for SIPI.
  func resetActivities() {
    for (index, presence) in presences.enumerated() {
      presence.activity = index == 0 || locals.isEmpty ? .runnable : .waitForStartup
    }
  }
}

/// Hands the devices' interrupts to the accelerator's controllers.
final class VirtualMachineInterrupts: InterruptSink {
  private let machine: any VirtualMachine

  init(_ machine: any VirtualMachine) {
    self.machine = machine
  }

  // The calls fail for interrupts that no controller has an input for, which a guest may ask for: those are lost.
  func setInterruptLine(_ gsi: UInt32, level: Bool) {
    try? machine.setInterruptLine(gsi, level: level)
  }

  func signalMSI(address: UInt64, data: UInt32) {
    try? machine.signalMSI(address: address, data: data)
  }
}

/// What a PIC and an IOAPIC in the VMM drive where the local APICs are the accelerator's.
final class SplitControllers: IOAPICOutput, InterruptRequestPin, InterruptSource, @unchecked Sendable {
  private let machine: any VirtualMachine
  private let bootProcessor: VCPUPresence
  /// Set once, before anything runs; the machine owns it.
  private unowned var pic: PIC?
  private let isRequested = Atomic(false)
  private let routes = Mutex<[Int: InterruptMessage]>([:])

  init(_ machine: any VirtualMachine, bootProcessor: VCPUPresence) {
    self.machine = machine
    self.bootProcessor = bootProcessor
  }

  func connect(_ pic: PIC) {
    self.pic = pic
  }

  // As with VirtualMachineInterrupts, what names no local APIC is lost.
  func deliver(_ message: InterruptMessage) {
    try? machine.signalMSI(address: message.address, data: message.data)
  }

  /// From the routes the accelerator knows which vectors are level-triggered, whose ends the IOAPIC waits for. A masked
  /// pin keeps its route: the end of what was delivered before is still to come.
  func routeDidChange(pin: Int, to message: InterruptMessage?) {
    guard let message else { return }
    let level = message.isLevel ? message : nil
    routes.withLock { routes in
      guard routes[pin] != level else { return }
      routes[pin] = level
      try? machine.setInterruptRoutes(
        routes.sorted { $0.key < $1.key }.map {
          InterruptRoute(gsi: UInt32($0.key), target: .message(address: $0.value.address, data: $0.value.data))
        })
    }
  }

  func setInterruptRequest(_ level: Bool) {
    isRequested.store(level, ordering: .sequentiallyConsistent)
    if level { bootProcessor.wake() }
  }

  var hasInterrupt: Bool { isRequested.load(ordering: .sequentiallyConsistent) }

  func acknowledgeInterrupt() -> UInt8? { pic?.acknowledge() }
}
