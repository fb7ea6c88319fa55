import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import MemoryViews
import Synchronization

/// A vCPU's way between views: each view has a virtual machine of KVM's with its own slots, and the state moves.
extension KVMVirtualCPU {
  /// What a look at an exit under a view found.
  enum ViewExit {
    /// The access was made; the vCPU goes on.
    case served
    /// The view forbids it.
    case violation(ViewViolation)
  }

  /// Moves the vCPU to the virtual machine of a view.
  public func selectView(_ view: MemoryView?) throws(AcceleratorError) {
    try endForbidden()
    guard view !== activeView else { return }
    guard machine.interrupts == .userSpace else {
      throw .unsupported(engine: "kvm", what: "memory views beside interrupt controllers in the kernel")
    }
    let number = view?.number ?? 0
    if let known = faces[number] {
      try carry(to: known)
    } else {
      guard let view else { return }
      let made = try KVMFace(machine.shell(of: view), index: index, cpuid: cpuid)
      // The whole state once: most of it the guest never changes.
      let state = try readState()
      let events = (shared.pointee.if_flag, shared.pointee.ready_for_interrupt_injection)
      let former = face
      former.left = try carried()
      face = made
      faces[number] = made
      try writeState(state)
      (shared.pointee.if_flag, shared.pointee.ready_for_interrupt_injection) = events
      copyTimestampOffset(from: former, to: made)
      if debug.control != 0 {
        try kvmCall("KVM_SET_GUEST_DEBUG", descriptor, CLINUX_KVM_SET_GUEST_DEBUG, with: &debug)
      }
    }
    activeView = view
    if machine.accelerator.hasSyncedRegisters {
      shared.pointee.kvm_valid_regs =
        CLINUX_KVM_SYNC_X86_REGS | CLINUX_KVM_SYNC_X86_SREGS | CLINUX_KVM_SYNC_X86_EVENTS
    }
  }

  /// Makes two faces' time-stamp counters the same one, where KVM tells their offset from the host's; elsewhere a written
  /// counter has to do.
  private func copyTimestampOffset(from one: KVMFace, to other: KVMFace) {
    var offset: UInt64 = 0
    withUnsafeMutablePointer(to: &offset) { offset in
      var attribute = kvm_device_attr()
      attribute.group = UInt32(KVM_VCPU_TSC_CTRL)
      attribute.attr = UInt64(KVM_VCPU_TSC_OFFSET)
      attribute.addr = UInt64(UInt(bitPattern: offset))
      withUnsafeMutablePointer(to: &attribute) { attribute in
        let pointer = UnsafeMutableRawPointer(attribute)
        guard ioctl(one.descriptor.rawValue, CLINUX_KVM_GET_DEVICE_ATTR, pointer) == 0 else { return }
        _ = ioctl(other.descriptor.rawValue, CLINUX_KVM_SET_DEVICE_ATTR, pointer)
      }
    }
  }

  /// Moves the state to another face: of what seldom changes only what has.
  private func carry(to next: KVMFace) throws(AcceleratorError) {
    let source = face
    // Where the last run left them in the shared page, registers cost no call.
    let wasSynced = isSynced
    var registers = source.registers.pointee
    if !wasSynced {
      try kvmCall("KVM_GET_REGS", descriptor, CLINUX_KVM_GET_REGS, with: &registers.regs)
      try kvmCall("KVM_GET_SREGS", descriptor, CLINUX_KVM_GET_SREGS, with: &registers.sregs)
      try kvmCall("KVM_GET_VCPU_EVENTS", descriptor, CLINUX_KVM_GET_VCPU_EVENTS, with: &registers.events)
    }
    source.shared.pointee.kvm_dirty_regs = 0
    isSynced = false
    // Without OSXSAVE the guest cannot have changed XCR0 since the face was entered.
    let mayChangeXCR0 = registers.sregs.cr4 & 1 << 18 != 0
    var now = try carried(control: mayChangeXCR0 ? nil : source.left?.control)
    now.system = registers.sregs
    let events = (source.shared.pointee.if_flag, source.shared.pointee.ready_for_interrupt_injection)
    source.left = now
    face = next
    (shared.pointee.if_flag, shared.pointee.ready_for_interrupt_injection) = events
    let then = next.left
    if !same(then?.control, now.control) {
      try kvmCall("KVM_SET_XCRS", descriptor, CLINUX_KVM_SET_XCRS, with: &now.control)
    }
    if then?.extended != now.extended { try writeExtendedState(now.extended) }
    if !same(then?.debug, now.debug) {
      try kvmCall("KVM_SET_DEBUGREGS", descriptor, CLINUX_KVM_SET_DEBUGREGS, with: &now.debug)
    }
    if then?.modelSpecific != now.modelSpecific { try writeModelSpecificRegisters(now.modelSpecific) }
    if debug.control != 0 {
      try kvmCall("KVM_SET_GUEST_DEBUG", descriptor, CLINUX_KVM_SET_GUEST_DEBUG, with: &debug)
    }
    let systemChanged = !same(then?.system, now.system)
    if machine.accelerator.hasSyncedRegisters {
      next.registers.pointee = registers
      var dirty = CLINUX_KVM_SYNC_X86_REGS | CLINUX_KVM_SYNC_X86_EVENTS
      if systemChanged { dirty |= CLINUX_KVM_SYNC_X86_SREGS }
      shared.pointee.kvm_dirty_regs = dirty
      isSynced = true
    } else {
      try kvmCall("KVM_SET_REGS", descriptor, CLINUX_KVM_SET_REGS, with: &registers.regs)
      if systemChanged { try kvmCall("KVM_SET_SREGS", descriptor, CLINUX_KVM_SET_SREGS, with: &registers.sregs) }
      try kvmCall("KVM_SET_VCPU_EVENTS", descriptor, CLINUX_KVM_SET_VCPU_EVENTS, with: &registers.events)
    }
    next.left = now
    if !wasSynced { forbidInjection() }
  }

  /// Everything that moves besides registers and events; `system` is the caller's.
  private func carried(control known: kvm_xcrs? = nil) throws(AcceleratorError) -> KVMCarried {
    try settle()
    var debug = kvm_debugregs()
    try kvmCall("KVM_GET_DEBUGREGS", descriptor, CLINUX_KVM_GET_DEBUGREGS, with: &debug)
    var control = known ?? kvm_xcrs()
    if known == nil { try kvmCall("KVM_GET_XCRS", descriptor, CLINUX_KVM_GET_XCRS, with: &control) }
    return KVMCarried(
      system: kvm_sregs(), debug: debug, control: control, extended: try readExtendedState(),
      modelSpecific: try readModelSpecificRegisters(machine.accelerator.carriedIndices))
  }

  /// Hands what was written to the shared page to KVM, for calls that go to KVM itself.
  func settle() throws(AcceleratorError) {
    guard isSynced else { return }
    isSynced = false
    let dirty = shared.pointee.kvm_dirty_regs
    guard dirty != 0 else { return }
    shared.pointee.kvm_dirty_regs = 0
    let registers = face.registers
    if dirty & CLINUX_KVM_SYNC_X86_REGS != 0 {
      try kvmCall("KVM_SET_REGS", descriptor, CLINUX_KVM_SET_REGS, with: &registers.pointee.regs)
    }
    if dirty & CLINUX_KVM_SYNC_X86_SREGS != 0 {
      try kvmCall("KVM_SET_SREGS", descriptor, CLINUX_KVM_SET_SREGS, with: &registers.pointee.sregs)
    }
    if dirty & CLINUX_KVM_SYNC_X86_EVENTS != 0 {
      try kvmCall("KVM_SET_VCPU_EVENTS", descriptor, CLINUX_KVM_SET_VCPU_EVENTS, with: &registers.pointee.events)
    }
  }

  // MARK: Accesses that leave the slots of a view

  /// Serves or refuses an access of the active view's; nil for an exit that is not about RAM. The caller holds the gate.
  func serveView() -> ViewExit? {
    guard let view = activeView else { return nil }
    switch Int32(bitPattern: shared.pointee.exit_reason) {
    case KVM_EXIT_MMIO:
      let address = GuestPhysicalAddress(shared.pointee.mmio.phys_addr)
      let count = Int(min(shared.pointee.mmio.len, 8))
      let isWrite = shared.pointee.mmio.is_write != 0
      guard let slot = machine.slot(containing: address), count > 0 else { return nil }
      // The ROM's writes are the bus's.
      if isWrite, slot.access == .readExecute { return nil }
      let data: UnsafeMutableRawPointer = clinux_kvm_mmio_data(shared)
      var done = 0
      while done < count {
        let place = address + UInt64(done)
        let run = min(count - done, Int(0x1000 - place.rawValue & 0xfff))
        let entry = view[place]
        let needed: PageRights = isWrite ? .write : .read
        guard entry.rights.contains(needed), let slot = machine.slot(containing: place) else {
          if !isWrite { memset(data, 0, count) }
          hasForbidden = true
          return .violation(
            ViewViolation(
              view: view.number, address: place, linear: place.rawValue, missing: needed,
              rip: (try? readRegisters().rip) ?? 0))
        }
        let host =
          UnsafeMutableRawPointer(bitPattern: entry.hostPage).map { $0 + Int(place.rawValue & 0xfff) }
          ?? slot.hostBase + Int(place.rawValue - slot.range.start.rawValue)
        if isWrite {
          memcpy(host, data + done, run)
          if entry.hostPage == 0 { machine.noteWrite(place, in: slot, host, count: run) }
        } else {
          memcpy(data + done, host, run)
        }
        done += run
      }
      return .served
    case KVM_EXIT_INTERNAL_ERROR:
      guard Int32(shared.pointee.`internal`.suberror) == KVM_INTERNAL_ERROR_EMULATION,
        let linear = try? codeAddress(), let address = (try? translate(linear)) ?? nil,
        machine.slot(containing: address) != nil, !view[address].rights.contains(.execute)
      else { return nil }
      return .violation(
        ViewViolation(
          view: view.number, address: address, linear: linear, missing: .execute,
          rip: (try? readRegisters().rip) ?? linear))
    default: return nil
    }
  }

  /// The linear address of the next instruction.
  private func codeAddress() throws(AcceleratorError) -> UInt64 {
    let rip = try readRegisters().rip
    let system = try readSystemRegisters()
    let isLong = system.efer & 1 << 10 != 0 && system.cs.attributes & 1 << 9 != 0
    return isLong ? rip : (system.cs.base &+ rip) & 0xffff_ffff
  }

  /// Runs `body` where a change of rights waits for it.
  public func holdingViews<Result>(
    _ body: () throws(AcceleratorError) -> Result
  ) throws(AcceleratorError) -> Result {
    guard machine.hasViews else { return try body() }
    machine.gate.enter(self)
    defer { machine.gate.leave(self) }
    return try body()
  }

  /// Ends the instruction whose access was forbidden, by the rights that the page has now: KVM has begun it and takes nothing
  /// back. Where it stays forbidden a write is lost and a read gives 0, and RIP is behind the instruction.
  func endForbidden() throws(AcceleratorError) {
    guard hasForbidden else { return }
    hasForbidden = false
    machine.gate.enter(self)
    _ = serveView()
    machine.gate.leave(self)
    hasForbidden = false
    while let exit = try completeExit() {
      // Further parts of it.
      hasForbidden = false
      guard case .viewViolation = exit else { break }
    }
  }

  /// Forgets the faces of views that are no more.
  func forget(_ numbers: [UInt32]) {
    for number in numbers where faces[number] !== face {
      let old = faces.removeValue(forKey: number)
      // Nobody still sets its flag when it goes.
      kicks.withLock { _ in }
      withExtendedLifetime(old) {}
    }
  }
}

/// Whether two of KVM's structures have the same bytes; they have no padding that KVM does not set.
private func same<Value>(_ one: Value?, _ other: Value) -> Bool {
  guard let one else { return false }
  return withUnsafeBytes(of: one) { one in
    withUnsafeBytes(of: other) { other in
      memcmp(one.baseAddress.unsafelyUnwrapped, other.baseAddress.unsafelyUnwrapped, one.count) == 0
    }
  }
}
