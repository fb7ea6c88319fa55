import Accelerator
import GuestMemory
import MemoryViews
import Synchronization

/// The hypercalls.
extension LoaderHardening {
  /// More would make entries slow: every page's mapping is looked up.
  private static let loaderLimit: UInt64 = 1 << 20
  /// Entry points and exits.
  static let addressLimit = 64
  /// Bytes of a signed module.
  private static let moduleLimit: UInt64 = 16 << 20

  /// The result for a module that nobody signed, where that is allowed.
  private static let noKey: UInt32 = 0xffff

  /// Answers a call.
  public func call(_ vcpu: any VirtualCPU) throws(AcceleratorError) -> UInt32 {
    guard let attached = machine.withLock({ $0 }), vcpu.index < attached.visitors.count else {
      return Hypercall.Failure.unknown.result
    }
    let visitor = attached.visitors[vcpu.index]
    let registers = try vcpu.readRegisters()
    do throws(CallError) {
      return try answer(registers, visitor, attached)
    } catch {
      switch error {
      case .failed(let failure): return failure.result
      case .accelerator(let error): throw error
      case .denied(let reason, let failure):
        var event = event(.denied, visitor, rip: registers.rip)
        event.address = registers.rsi
        event.size = registers.rbx
        event.reason = "\(reason)"
        // The caller is told; what it asked for has not been done, whatever the policy's reaction to accesses.
        event.reaction = "refused"
        audit(event)
        visitor.denialCount.wrappingAdd(1, ordering: .relaxed)
        return failure.result
      }
    }
  }

  private enum CallError: Error {
    case failed(Hypercall.Failure)
    case denied(DenialReason, Hypercall.Failure)
    case accelerator(AcceleratorError)
  }

  private func answer(
    _ registers: GeneralRegisters, _ visitor: LoaderVisitor, _ attached: Attached
  ) throws(CallError) -> UInt32 {
    guard let function = Hypercall(rawValue: UInt32(truncatingIfNeeded: registers.rdi)) else {
      throw .failed(.unknown)
    }
    switch function {
    case .version: return Hypercall.versionNumber
    case .registerLoader:
      let range = try range(registers, attached.memory)
      guard range.size <= Self.loaderLimit, registers.rcx & 0xfff == 0 else { throw .failed(.invalid) }
      try whileUnlocked { shared throws(CallError) in
        shared.loader = range
        shared.linear = registers.rcx
        (shared.entries, shared.exits) = ([], [])
      }
      try change([ViewChange(attached.kernel, range, [])], attached)
      audit(registers, .register, range, visitor)
    case .addEntry:
      try whileUnlocked { shared throws(CallError) in
        guard shared.loader?.contains(GuestPhysicalAddress(registers.rsi)) == true else { throw .failed(.invalid) }
        guard shared.entries.count < Self.addressLimit else { throw .failed(.full) }
        shared.entries.append(registers.rsi)
      }
    case .addExit:
      try whileUnlocked { shared throws(CallError) in
        guard shared.loader?.contains(GuestPhysicalAddress(registers.rsi)) == false else { throw .failed(.invalid) }
        guard shared.exits.count < Self.addressLimit else { throw .failed(.full) }
        shared.exits.append(registers.rsi)
      }
    case .lock: try lock(visitor, attached, registers)
    case .setPermission: try setPermission(registers, visitor, attached)
    case .query:
      let address = GuestPhysicalAddress(registers.rsi)
      let kernel = UInt32(attached.kernel[address].rights.rawValue)
      let loader = UInt32(attached.loader[address].rights.rawValue)
      return kernel | loader << 4 | (visitor.isInside ? 1 << 8 : 0) | (shared.withLock { $0.isLocked } ? 1 << 9 : 0)
    case .verify: return try verify(registers, visitor, attached)
    case .note:
      var event = event(.note, visitor, rip: registers.rip)
      event.address = registers.rsi
      event.size = registers.rbx
      audit(event)
    }
    return 0
  }

  /// RSI and RBX as whole pages of RAM.
  private func range(_ registers: GeneralRegisters, _ memory: GuestMemory) throws(CallError) -> GuestRange {
    guard (registers.rsi | registers.rbx) & 0xfff == 0, registers.rbx > 0, let size = Int(exactly: registers.rbx),
      memory.hostPointer(GuestPhysicalAddress(registers.rsi), count: size) != nil,
      let range = GuestRange(start: GuestPhysicalAddress(registers.rsi), size: registers.rbx)
    else { throw .failed(.invalid) }
    return range
  }

  private func whileUnlocked(_ body: (inout Shared) throws(CallError) -> Void) throws(CallError) {
    try shared.withLock { shared throws(CallError) in
      guard !shared.isLocked else { throw .denied(.registeredAfterLock, .denied) }
      try body(&shared)
    }
  }

  private func change(_ changes: [ViewChange], _ attached: Attached) throws(CallError) {
    do { try attached.machine.change(changes) } catch { throw .accelerator(error) }
  }

  private func audit(
    _ registers: GeneralRegisters, _ kind: AuditEvent.Kind, _ range: GuestRange, _ visitor: LoaderVisitor,
    _ rights: PageRights? = nil
  ) {
    var event = event(kind, visitor, rip: registers.rip)
    event.address = range.start.rawValue
    event.size = range.size
    event.rights = rights.map { "\($0)" }
    audit(event)
  }

  // MARK: Lock and permissions

  private func lock(
    _ visitor: LoaderVisitor, _ attached: Attached, _ registers: GeneralRegisters
  ) throws(CallError) {
    let loader = try shared.withLock { shared throws(CallError) -> GuestRange in
      guard !shared.isLocked else { throw .denied(.registeredAfterLock, .denied) }
      guard let loader = shared.loader, !shared.entries.isEmpty else { throw .failed(.invalid) }
      return loader
    }
    if policy.exclusive {
      for view in [attached.kernel, attached.loader] {
        for run in view.runs where run.entry.rights.isSuperset(of: [.write, .execute]) {
          throw .denied(.writableAndExecutable, .denied)
        }
      }
      let plain: PageRights = [.read, .write]
      try change([ViewChange(attached.kernel, nil, plain), ViewChange(attached.loader, nil, plain)], attached)
    }
    shared.withLock { $0.isLocked = true }
    if !policy.pins.isEmpty {
      for other in attached.visitors { other.pins.store(true, ordering: .releasing) }
      for other in attached.visitors where other !== visitor { other.vcpu.kick() }
      do throws(AcceleratorError) { try visitor.takePins(policy.pins) } catch { throw .accelerator(error) }
    }
    audit(registers, .lock, loader, visitor)
  }

  private func setPermission(
    _ registers: GeneralRegisters, _ visitor: LoaderVisitor, _ attached: Attached
  ) throws(CallError) {
    let range = try range(registers, attached.memory)
    guard registers.rcx & ~3 == 0, registers.rcx != 0, registers.r8 & ~7 == 0 else { throw .failed(.invalid) }
    let rights = PageRights(rawValue: UInt8(registers.r8))
    let shared = shared.withLock { $0 }
    let changesKernel = registers.rcx & 1 != 0
    let changesLoader = registers.rcx & 2 != 0
    if shared.isLocked {
      guard visitor.isInside else { throw .denied(.permissionFromKernel, .denied) }
      if let loader = shared.loader, loader.overlaps(range) { throw .denied(.loaderRange, .denied) }
    }
    if let loader = shared.loader, loader.overlaps(range), changesKernel { throw .denied(.loaderRange, .denied) }
    for protection in shared.protections
    where protection.range.overlaps(range) && !rights.isSubset(of: protection.rights) {
      throw .denied(.protected(protection.name), .denied)
    }
    if policy.exclusive {
      guard !rights.isSuperset(of: [.write, .execute]) else { throw .denied(.writableAndExecutable, .denied) }
      // What one view may write, the other must not execute.
      if shared.isLocked, changesKernel != changesLoader, rights.contains(.write) || rights.contains(.execute) {
        let other = changesKernel ? attached.loader : attached.kernel
        let conflict: PageRights = rights.contains(.write) ? .execute : .write
        for offset in stride(from: 0, to: range.size, by: 0x1000)
        where other[range.start + offset].rights.contains(conflict) {
          throw .denied(.writableAndExecutable, .denied)
        }
      }
    }
    if shared.isLocked, rights.contains(.execute), policy.requiresSignature {
      guard visitor.verified >= range.size else { throw .denied(.signatureMissing, .denied) }
      visitor.verified -= range.size
    }
    var changes: [ViewChange] = []
    if changesKernel { changes.append(ViewChange(attached.kernel, range, rights)) }
    if changesLoader { changes.append(ViewChange(attached.loader, range, rights)) }
    try change(changes, attached)
    audit(registers, .permission, range, visitor, rights)
  }

  // MARK: Signatures

  private func verify(
    _ registers: GeneralRegisters, _ visitor: LoaderVisitor, _ attached: Attached
  ) throws(CallError) -> UInt32 {
    guard visitor.isInside else { throw .denied(.permissionFromKernel, .denied) }
    guard registers.rbx <= Self.moduleLimit, registers.rbx > UInt64(Hypercall.trailerSize),
      let size = Int(exactly: registers.rbx),
      let range = GuestRange(start: GuestPhysicalAddress(registers.rsi), size: registers.rbx)
    else { throw .failed(.invalid) }
    // Nobody may change it between the check and its use: neither the kernel on another vCPU nor the loader itself.
    for page in stride(from: range.start.rawValue & ~0xfff, to: range.end.rawValue, by: 0x1000) {
      for view in [attached.kernel, attached.loader]
      where view[GuestPhysicalAddress(page)].rights.contains(.write) {
        throw .denied(.moduleWritable, .denied)
      }
    }
    let module: [UInt8]
    do { module = try attached.memory.bytes(range.start, count: size) } catch { throw .failed(.invalid) }
    let key = Hypercall.signer(of: module, keys: policy.keys)
    guard key != nil || !policy.requiresSignature else { throw .denied(.signatureWrong, .badSignature) }
    visitor.verified = (range.size + 0xfff) & ~0xfff
    audit(registers, .verify, range, visitor)
    return key.map { UInt32($0) } ?? Self.noKey
  }
}
