import Accelerator
import DeviceModel
import GuestMemory
import Host
import PlatformDevices
import Synchronization

/// What a vCPU's thread does.
extension Machine {
  func runVCPU(_ index: Int) {
    threadIDs.withLock { $0[index] = ThreadIdentity.current.id }
    let vcpu = vcpus[index]
    let counters = counters[index]
    let presence = interrupts.presences[index]
    let local = interrupts.locals.isEmpty ? nil : interrupts.locals[index]
    let isWoken = interrupts.model != .inKernel
    do throws(AcceleratorError) {
      while true {
        if gate.isClosed {
          while let exit = try vcpu.completeExit() { try handle(exit, vcpu) }
          if !gate.park(index) { return }
          continue
        }
        if let local, local.hasEvents || presence.activity != .runnable {
          try wait(vcpu, local, presence)
          continue
        }
        if isWoken { presence.enterGuest() }
        // NMI, INIT and SIPI that came before that were no kick; an interrupt, which `run` looks for itself, needs none.
        if let local, local.hasEvents {
          presence.leaveGuest()
          continue
        }
        let exit = try vcpu.run()
        if isWoken { presence.leaveGuest() }
        counters.count(ExitCounters.Reason(exit))
        exitTrace?.record(exit, vcpu: index, at: nil)
        try handle(exit, vcpu)
      }
    } catch {
      finish(.failed(error))
      // Stay reachable for a pause that waits for every vCPU.
      while gate.park(index) {}
    }
  }

  // MARK: Local APICs in the VMM

  /// Takes what is for the processor and not for its INTR pin, or sleeps until there is something.
  private func wait(
    _ vcpu: any VirtualCPU, _ local: LocalAPIC, _ presence: VCPUPresence
  ) throws(AcceleratorError) {
    guard local.hasEvents else {
      let isOpen = presence.activity == .halted ? try takesInterrupts(vcpu) : false
      presence.sleep { local.hasEvents || gate.isClosed || isOpen && local.hasInterrupt }
      if isOpen, local.hasInterrupt { presence.activity = .runnable }
      return
    }
    try takeEvents(vcpu, local, presence)
  }

  /// Whether a vCPU in `hlt` would take an interrupt.
  func takesInterrupts(_ vcpu: any VirtualCPU) throws(AcceleratorError) -> Bool {
    try vcpu.readRegisters().rflags & Self.interruptFlag != 0
  }

  /// Takes NMI, INIT and SIPI.
  func takeEvents(
    _ vcpu: any VirtualCPU, _ local: LocalAPIC, _ presence: VCPUPresence
  ) throws(AcceleratorError) {
    while let exit = try vcpu.completeExit() { try handle(exit, vcpu) }
    let events = local.takeEvents()
    if events.initialize {
      local.initialize()
      try initialize(vcpu)
      presence.activity = vcpu.index == 0 ? .runnable : .waitForStartup
    }
    if let vector = events.startUp, presence.activity == .waitForStartup {
      var system = try vcpu.readSystemRegisters()
      system.cs = .real(selector: UInt16(vector) << 8, code: true)
      try vcpu.writeSystemRegisters(system)
      var general = try vcpu.readRegisters()
      general.rip = 0
      try vcpu.writeRegisters(general)
      presence.activity = .runnable
    }
    if events.nonMaskable {
      try vcpu.injectNMI()
      if events.secondNonMaskable { try vcpu.injectNMI() }
      if presence.activity == .halted { presence.activity = .runnable }
    }
  }

  private static let interruptFlag: UInt64 = 1 << 9

  /// What INIT leaves (SDM vol. 3, table 10-1): the state after reset, but for the APIC base, the cache bits of CR0, the
  /// extended state and the model-specific registers, of which the state that is written has none.
  private func initialize(_ vcpu: any VirtualCPU) throws(AcceleratorError) {
    let present = try vcpu.readSystemRegisters()
    var state = pristine.vcpus[vcpu.index]
    let caches: UInt64 = 3 << 29
    state.system.cr0 = state.system.cr0 & ~caches | present.cr0 & caches
    state.system.apicBase = present.apicBase
    state.extended = []
    state.xcr0 = 0
    state.modelSpecific = []
    state.tscKilohertz = 0
    try vcpu.writeState(state)
  }

  /// Notes what the rings have, for whoever tracks dirty pages, and so makes room in them.
  private func collectDirtyPages() throws(AcceleratorError) {
    let pages = try virtualMachine.collectDirtyRings()
    guard memory.dirty.isTracking else { return }
    for (slot, page) in pages where slot < memory.regions.count {
      // RAM's slots have the numbers of its regions.
      let number = Int(memory.regions[Int(slot)].fileOffset >> 12 + page)
      memory.dirty.mark(firstPage: number, lastPage: number)
    }
  }

  func handle(_ exit: VCPUExit, _ vcpu: any VirtualCPU) throws(AcceleratorError) {
    switch exit {
    case .portIO(let access):
      if let supervisor, access.port == supervisor.port, access.size == 4, access.count == 1, !access.isWrite {
        access.data.storeBytes(of: try supervisor.call(vcpu), as: UInt32.self)
      } else {
        portAccess(access)
      }
    case .memoryIO(let access):
      let address = access.address.rawValue
      let size = Int(access.size)
      if !interrupts.locals.isEmpty, let page = interrupts.locals[vcpu.index].registerPage, address &- page < 0x1000 {
        let local = interrupts.locals[vcpu.index]
        if access.isWrite {
          local.write(offset: address - page, size: size, value: loadInteger(access.data, size: size))
        } else {
          storeInteger(local.read(offset: address - page, size: size), to: access.data, size: size)
        }
      } else if access.isWrite {
        memoryBus.write(address, size: size, value: loadInteger(access.data, size: size))
      } else {
        storeInteger(memoryBus.read(address, size: size), to: access.data, size: size)
      }
    case .interrupted: try supervisor?.interrupted(vcpu)
    case .interruptWindow, .instructionLimit: break
    case .emulationFailure(let bytes):
      let isDone = try assist?.execute(vcpu) { exit throws(AcceleratorError) in try handle(exit, vcpu) }
      if isDone != true { crash(vcpu, .emulationFailure(bytes)) }
    case .debug(let event): stop(.debug(vcpu: vcpu.index, event))
    case .systemEvent(.shutdown): request(.powerOff)
    case .systemEvent(.reset): request(.reset)
    case .systemEvent(.crash): crash(vcpu, .reportedByGuest)
    case .tripleFault: crash(vcpu, .tripleFault)
    case .memoryFault(let address, _, _): crash(vcpu, .memoryFault(address))
    case .viewViolation(let violation):
      guard let supervisor else { return crash(vcpu, .unexpectedExit("view violation")) }
      if let reason = try supervisor.violation(violation, vcpu) { crash(vcpu, .denied(reason)) }
    case .pinnedRegister(let register, let value):
      guard let supervisor else { return crash(vcpu, .unexpectedExit("pinned register")) }
      if let reason = try supervisor.pinned(register, value: value, vcpu) { crash(vcpu, .denied(reason)) }
    case .entryFailure(let reason): crash(vcpu, .entryFailure(reason))
    case .internalError(let subcode, let data): crash(vcpu, .internalError(subcode: subcode, data: data.0))
    // KVM's ABI for a hypercall that nobody knows: -KVM_ENOSYS.
    case .hypercall(_, _, let result): result.pointee = UInt64(bitPattern: -1000)
    case .halt where interrupts.model == .userSpace: interrupts.presences[vcpu.index].activity = .halted
    case .halt: crash(vcpu, .unexpectedExit("halt"))
    case .endOfInterrupt(let vector): interrupts.ioapic?.endOfInterrupt(vector: vector)
    case .dirtyRingFull: try collectDirtyPages()
    case .unknown(let reason): crash(vcpu, .unexpectedExit("number \(reason)"))
    }
  }

  @inline(__always)
  private func portAccess(_ access: PortAccess) {
    let port = UInt64(access.port)
    let size = Int(access.size)
    var data = access.data
    for _ in 0..<access.count {
      if access.isWrite {
        ports.write(port, size: size, value: loadInteger(data, size: size))
      } else {
        storeInteger(ports.read(port, size: size), to: data, size: size)
      }
      data += size
    }
  }
}

@inline(__always)
private func loadInteger(_ data: UnsafeMutableRawPointer, size: Int) -> UInt64 {
  switch size {
  case 1: UInt64(data.load(as: UInt8.self))
  case 2: UInt64(data.loadUnaligned(as: UInt16.self))
  case 4: UInt64(data.loadUnaligned(as: UInt32.self))
  default: data.loadUnaligned(as: UInt64.self)
  }
}

@inline(__always)
private func storeInteger(_ value: UInt64, to data: UnsafeMutableRawPointer, size: Int) {
  switch size {
  case 1: data.storeBytes(of: UInt8(truncatingIfNeeded: value), as: UInt8.self)
  case 2: data.storeBytes(of: UInt16(truncatingIfNeeded: value), as: UInt16.self)
  case 4: data.storeBytes(of: UInt32(truncatingIfNeeded: value), as: UInt32.self)
  default: data.storeBytes(of: value, as: UInt64.self)
  }
}
