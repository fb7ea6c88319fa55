import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import MemoryViews
import Synchronization
import X86

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
      _ = try carried(withXCR0: true)
      former.left?.system = nil
      face = made
      isSynced = false
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

  /// Moves the state to another face: of what seldom changes only what has. Each call costs the better part of an exit where
  /// KVM runs on a hypervisor, so there are as few as can be: registers and events come and go in the shared pages.
  private func carry(to next: KVMFace) throws(AcceleratorError) {
    let source = face
    let wasSynced = isSynced
    var registers = source.registers.pointee
    if !wasSynced {
      try kvmCall("KVM_GET_REGS", descriptor, CLINUX_KVM_GET_REGS, with: &registers.regs)
      try kvmCall("KVM_GET_SREGS", descriptor, CLINUX_KVM_GET_SREGS, with: &registers.sregs)
      try kvmCall("KVM_GET_VCPU_EVENTS", descriptor, CLINUX_KVM_GET_VCPU_EVENTS, with: &registers.events)
    }
    // Without VMX or SVM the call is dear, and with OSXSAVE clear XCR0 has no effect.
    let seesXCR0 = machine.accelerator.capabilities.contains(.nativeRing0) || registers.sregs.cr4 & 1 << 18 != 0
    let now = try carried(withXCR0: seesXCR0)
    // What waits in the page for the next run never gets there.
    let hasOldSystem = source.shared.pointee.kvm_dirty_regs & CLINUX_KVM_SYNC_X86_SREGS != 0
    source.shared.pointee.kvm_dirty_regs = 0
    now.system = hasOldSystem ? nil : registers.sregs
    let events = (source.shared.pointee.if_flag, source.shared.pointee.ready_for_interrupt_injection)
    face = next
    isSynced = false
    (shared.pointee.if_flag, shared.pointee.ready_for_interrupt_injection) = events
    let then = next.left
    try bring(now, over: then)
    if debug.control != 0 {
      try kvmCall("KVM_SET_GUEST_DEBUG", descriptor, CLINUX_KVM_SET_GUEST_DEBUG, with: &debug)
    }
    let isFlushed = try flushTranslations(registers.sregs)
    let systemChanged = isFlushed || !same(then?.system, registers.sregs)
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
    if !wasSynced { forbidInjection() }
  }

  /// Makes the face forget the translations that it had when it was left: what the guest has invalidated since, it has in
  /// another face. Of KVM's calls a change of CR3 does that; the caller writes the right one. Where KVM emulates ring 0, it
  /// keeps none for it.
  private func flushTranslations(_ system: kvm_sregs) throws(AcceleratorError) -> Bool {
    guard machine.accelerator.capabilities.contains(.nativeRing0), system.cr0 & 1 << 31 != 0 else { return false }
    var system = system
    // PWT, which is valid in every mode.
    system.cr3 ^= 1 << 3
    try kvmCall("KVM_SET_SREGS", descriptor, CLINUX_KVM_SET_SREGS, with: &system)
    return true
  }

  /// Reads everything that moves besides registers and events, into what the face is left with.
  private func carried(withXCR0 wanted: Bool) throws(AcceleratorError) -> KVMCarried {
    let isFirst = face.left == nil
    let now: KVMCarried
    if let left = face.left {
      now = left
    } else {
      // The host lists some that the vCPU does not have.
      let present = try readModelSpecificRegisters(machine.accelerator.carriedIndices)
      now = KVMCarried(extendedStateSize: machine.accelerator.extendedStateSize, modelSpecific: MSRTable(present))
      face.left = now
    }
    try kvmCall("KVM_GET_DEBUGREGS", descriptor, CLINUX_KVM_GET_DEBUGREGS, with: &now.debug)
    if wanted || isFirst { try kvmCall("KVM_GET_XCRS", descriptor, CLINUX_KVM_GET_XCRS, with: &now.control) }
    try readExtendedState(into: now.extended)
    let (done, refused) = try now.modelSpecific.call("KVM_GET_MSRS", descriptor, CLINUX_KVM_GET_MSRS, from: 0)
    if refused { throw .modelSpecificRegister(index: now.modelSpecific[done].index, write: false) }
    return now
  }

  /// Writes to the face what differs from what it was left with.
  private func bring(_ now: KVMCarried, over then: KVMCarried?) throws(AcceleratorError) {
    if !same(then?.control, now.control) {
      try kvmCall("KVM_SET_XCRS", descriptor, CLINUX_KVM_SET_XCRS, with: &now.control)
      then?.control = now.control
    }
    if then?.hasSameExtended(now) != true {
      _ = try kvmCall("KVM_SET_XSAVE", descriptor, CLINUX_KVM_SET_XSAVE, now.extended.baseAddress)
    }
    if !same(then?.debug, now.debug) {
      try kvmCall("KVM_SET_DEBUGREGS", descriptor, CLINUX_KVM_SET_DEBUGREGS, with: &now.debug)
    }
    if then?.modelSpecific.hasSameValues(now.modelSpecific) != true {
      try writeModelSpecificRegisters(now.modelSpecific.registers)
    }
  }

  /// Hands what was written to the shared page to KVM, for calls that go to KVM itself; the page stays true.
  func settle() throws(AcceleratorError) {
    guard isSynced else { return }
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

  /// The same for calls that change what is in the page, which is not looked at again before the next run.
  func unsync() throws(AcceleratorError) {
    try settle()
    isSynced = false
  }

  /// The guest's paging by the registers in the shared page, for walks at a hundredth of the price of KVM's; nil: KVM has to be
  /// asked. PAE's first four entries are what they were when CR3 was loaded.
  var knownPaging: Paging? {
    guard isSynced else { return nil }
    let system = face.registers.pointee.sregs
    let paging = Paging(
      cr0: CR0(rawValue: system.cr0), cr3: system.cr3, cr4: CR4(rawValue: system.cr4).subtracting([.smap, .pke]),
      efer: EFER(rawValue: system.efer))
    return paging.mode == .pae ? nil : paging
  }

  /// Where a linear address leads, whatever it may be used for there.
  func walk(_ linear: UInt64, _ paging: Paging) -> GuestPhysicalAddress? {
    let found = try? paging.translate(linear) { [activeView] address, size in
      let address = GuestPhysicalAddress(address)
      guard let slot = machine.slot(containing: address) else { return nil }
      let page = activeView?.entry(address).flatMap { UnsafeMutableRawPointer(bitPattern: $0.hostPage) }
      let place =
        page.map { $0 + Int(address.rawValue & 0xfff) }
        ?? slot.hostBase + Int(address.rawValue - slot.range.start.rawValue)
      return size == 8 ? place.load(as: UInt64.self) : UInt64(place.load(as: UInt32.self))
    }
    return found.map { GuestPhysicalAddress($0.physicalAddress) }
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
