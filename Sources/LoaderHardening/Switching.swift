import Accelerator
import GuestMemory
import MemoryViews
import Synchronization

/// What a violation means: a change of view at an entry point or behind an exit, or something forbidden.
extension LoaderHardening {
  /// Changes the vCPU's view, or does what the policy says.
  public func violation(
    _ violation: ViewViolation, _ vcpu: any VirtualCPU
  ) throws(AcceleratorError) -> String? {
    guard let attached = machine.withLock({ $0 }), vcpu.index < attached.visitors.count else { return nil }
    let visitor = attached.visitors[vcpu.index]
    let shared = shared.withLock { $0 }
    let address = violation.address.rawValue
    let isInLoader = shared.loader?.contains(violation.address) ?? false
    guard violation.missing.contains(.execute) else {
      let reason: DenialReason =
        isInLoader && !visitor.isInside
        ? .loaderData
        : protection(violation.address, shared)
          ?? (violation.missing.contains(.write) ? .notWritable : .notReadable)
      return try deny(violation, reason, visitor, attached)
    }
    if visitor.isInside {
      guard !isInLoader, attached.kernel[violation.address].rights.contains(.execute) else {
        return try deny(violation, .notExecutable, visitor, attached)
      }
      let registers = try vcpu.readRegisters()
      if let interrupted = try interruptedLoader(registers, vcpu, shared, attached.memory) {
        visitor.suspended.append(interrupted)
        audit(event(.suspend, visitor, rip: interrupted.rip))
        return try leave(visitor, attached, registers, releases: false)
      }
      guard shared.exits.isEmpty || shared.exits.contains(address) else {
        return try deny(violation, .exitNotRegistered, visitor, attached)
      }
      audit(event(.leave, visitor, rip: violation.rip))
      visitor.verified = 0
      return try leave(visitor, attached, registers, releases: true)
    }
    guard isInLoader, let loader = shared.loader else {
      return try deny(violation, protection(violation.address, shared) ?? .notExecutable, visitor, attached)
    }
    if let interrupted = visitor.suspended.last, interrupted.rip == violation.rip {
      let registers = try vcpu.readRegisters()
      if registers.rsp == interrupted.rsp {
        visitor.suspended.removeLast()
        // As the interrupt found it, whatever the handler made of it.
        try vcpu.writeRegisters(interrupted)
        try vcpu.selectView(attached.loader)
        visitor.isInside = true
        audit(event(.resume, visitor, rip: interrupted.rip))
        return nil
      }
    }
    guard shared.entries.contains(address), violation.linear == violation.rip else {
      return try deny(violation, .loaderMiddle, visitor, attached)
    }
    guard try isMapped(loader, shared.linear, vcpu) else {
      return try deny(violation, .loaderMoved, visitor, attached)
    }
    // A new visit: what was put off on this vCPU never comes back.
    visitor.suspended = []
    visitor.verified = 0
    try enter(visitor, attached, vcpu)
    return nil
  }

  /// The policy's name for a place, where it protects it.
  private func protection(_ address: GuestPhysicalAddress, _ shared: Shared) -> DenialReason? {
    shared.protections.first { $0.range.contains(address) }.map { .protected($0.name) }
  }

  /// Whether the loader's linear addresses still lead to it: else somebody else's data would be taken for the loader's.
  private func isMapped(
    _ loader: GuestRange, _ linear: UInt64, _ vcpu: any VirtualCPU
  ) throws(AcceleratorError) -> Bool {
    for offset in stride(from: 0, to: loader.size, by: 0x1000) {
      guard try vcpu.translate(linear &+ offset) == loader.start + offset else { return false }
    }
    return true
  }

  // MARK: In and out

  private static let interruptFlag: UInt64 = 1 << 9

  private func enter(
    _ visitor: LoaderVisitor, _ attached: Attached, _ vcpu: any VirtualCPU
  ) throws(AcceleratorError) {
    var registers = try vcpu.readRegisters()
    audit(event(.enter, visitor, rip: registers.rip))
    visitor.entryCount.wrappingAdd(1, ordering: .relaxed)
    visitor.isInside = true
    if policy.interrupts == .hold, registers.rflags & Self.interruptFlag != 0 {
      registers.rflags &= ~Self.interruptFlag
      try vcpu.writeRegisters(registers)
      visitor.heldSince.store(clock(), ordering: .relaxed)
    }
    try vcpu.selectView(attached.loader)
  }

  private func clock() -> UInt64 { max(1, monotonic()) }

  /// Changes to the kernel's view; `releases`: interrupts that waited for the loader's end are let through.
  private func leave(
    _ visitor: LoaderVisitor, _ attached: Attached, _ registers: GeneralRegisters, releases: Bool
  ) throws(AcceleratorError) -> String? {
    visitor.isInside = false
    if visitor.heldSince.exchange(0, ordering: .relaxed) != 0, releases {
      var registers = registers
      registers.rflags |= Self.interruptFlag
      try visitor.vcpu.writeRegisters(registers)
    }
    try visitor.vcpu.selectView(attached.kernel)
    return nil
  }

  /// A kick of `checkBounds`: interrupts have waited long enough.
  public func interrupted(_ vcpu: any VirtualCPU) throws(AcceleratorError) {
    guard let visitor = machine.withLock({ $0 })?.visitors[vcpu.index] else { return }
    try visitor.takePins(policy.pins)
    let since = visitor.heldSince.load(ordering: .relaxed)
    guard since != 0, monotonic() > since, monotonic() - since > UInt64(policy.interruptBound) * 1_000_000 else {
      return
    }
    visitor.heldSince.store(0, ordering: .relaxed)
    var registers = try vcpu.readRegisters()
    registers.rflags |= Self.interruptFlag
    try vcpu.writeRegisters(registers)
    audit(event(.bound, visitor, rip: registers.rip))
  }

  // MARK: Interrupts and exceptions in the loader

  /// Vectors whose frames have an error code (SDM vol. 3, table 6-1).
  private static let errorCodes: Set<Int> = [8, 10, 11, 12, 13, 14, 17, 21]

  /// The loader's registers where the vCPU is at the first instruction of a handler that has put it off; nil elsewhere.
  private func interruptedLoader(
    _ registers: GeneralRegisters, _ vcpu: any VirtualCPU, _ shared: Shared, _ memory: GuestMemory
  ) throws(AcceleratorError) -> GeneralRegisters? {
    guard let loader = shared.loader else { return nil }
    func isLoader(_ linear: UInt64) -> Bool { linear &- shared.linear < loader.size }
    for shift: UInt64 in [0, 8] {
      guard let rip = try word(registers.rsp &+ shift, vcpu, memory), isLoader(rip) else { continue }
      let table = try vcpu.readSystemRegisters().idt
      for vector in 0...255 where Self.errorCodes.contains(vector) == (shift == 8) {
        guard UInt64(vector) * 16 + 15 <= UInt64(table.limit) else { break }
        guard let low = try word(table.base &+ UInt64(vector) * 16, vcpu, memory),
          let high = try word(table.base &+ UInt64(vector) * 16 &+ 8, vcpu, memory)
        else { continue }
        let handler = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32
        guard handler == registers.rip, let flags = try word(registers.rsp &+ shift &+ 16, vcpu, memory),
          let stack = try word(registers.rsp &+ shift &+ 24, vcpu, memory)
        else { continue }
        var interrupted = registers
        interrupted.rip = rip
        interrupted.rflags = flags
        interrupted.rsp = stack
        return interrupted
      }
    }
    return nil
  }

  /// Eight bytes of the guest at a linear address; nil where they are not all in one page of RAM.
  private func word(
    _ linear: UInt64, _ vcpu: any VirtualCPU, _ memory: GuestMemory
  ) throws(AcceleratorError) -> UInt64? {
    guard linear & 0xfff <= 0xff8, let address = try vcpu.translate(linear) else { return nil }
    return try? memory.read(address)
  }

  // MARK: What is forbidden

  /// How often one violation may follow itself: the exception for it cannot be delivered either.
  private static let patience = 1000

  /// Writes a violation down and does what the policy says about it.
  private func deny(
    _ violation: ViewViolation, _ reason: DenialReason, _ visitor: LoaderVisitor, _ attached: Attached
  ) throws(AcceleratorError) -> String? {
    var event = event(.denied, visitor, rip: violation.rip)
    event.address = violation.address.rawValue
    event.rights = "\(violation.missing)"
    event.reason = "\(reason)"
    event.reaction = policy.reaction.rawValue
    visitor.denialCount.wrappingAdd(1, ordering: .relaxed)
    if policy.reaction == .log {
      audit(event)
      let view = visitor.isInside ? attached.loader : attached.kernel
      let page = GuestRange(start: violation.address.page, size: 0x1000)
      try attached.machine.change([
        ViewChange(view, page, view[violation.address].rights.union(violation.missing))
      ])
      return nil
    }
    let isRepeated = visitor.last.rip == violation.rip && visitor.last.address == violation.address.rawValue
    visitor.last = (violation.rip, violation.address.rawValue, isRepeated ? visitor.last.count + 1 : 1)
    let isStuck = visitor.last.count > Self.patience
    if isStuck { event.reason = "\(DenialReason.repeated)" }
    if isStuck || policy.reaction == .stop {
      event.reaction = HardeningPolicy.Reaction.stop.rawValue
      audit(event)
      return "\(isStuck ? DenialReason.repeated : reason), at guest-physical \(violation.address)"
    }
    audit(event)
    try raiseGeneralProtection(visitor, attached)
    return nil
  }

  /// #GP(0), in the kernel's view: the loader does not go on from there.
  func raiseGeneralProtection(_ visitor: LoaderVisitor, _ attached: Attached) throws(AcceleratorError) {
    if visitor.isInside {
      visitor.verified = 0
      _ = try leave(visitor, attached, visitor.vcpu.readRegisters(), releases: true)
    }
    var state = try visitor.vcpu.readState()
    state.events.exceptionInjected = true
    state.events.exceptionVector = 13
    state.events.exceptionHasErrorCode = true
    state.events.exceptionErrorCode = 0
    try visitor.vcpu.writeState(state)
  }

  /// A change of a pinned register: as other violations, but that it cannot be let through by opening a page.
  public func pinned(
    _ register: PinnedRegister, value: UInt64, _ vcpu: any VirtualCPU
  ) throws(AcceleratorError) -> String? {
    guard let attached = machine.withLock({ $0 }), vcpu.index < attached.visitors.count else { return nil }
    let visitor = attached.visitors[vcpu.index]
    let reason = DenialReason.pinned(register.rawValue)
    var event = try event(.denied, visitor, rip: vcpu.readRegisters().rip)
    event.address = value
    event.reason = "\(reason)"
    event.reaction = policy.reaction.rawValue
    audit(event)
    visitor.denialCount.wrappingAdd(1, ordering: .relaxed)
    switch policy.reaction {
    case .generalProtection: try raiseGeneralProtection(visitor, attached)
    case .stop: return "\(reason)"
    case .log: try vcpu.pin(policy.pins.subtracting([register]))
    }
    return nil
  }
}
