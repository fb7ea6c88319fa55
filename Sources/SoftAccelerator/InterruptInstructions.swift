import CSoftCPU
import X86

/// INT n and its like, IRET, and the instructions on flags that interrupts depend on.
extension Processor {
  /// Executes one; false for any other instruction.
  func executeInterrupt(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .int:
      // Virtual-8086 tasks without IOPL 3 leave INT n to their monitor; INT3 is not among it.
      try checkVirtual8086Privilege()
      try softwareInterrupt(UInt8(truncatingIfNeeded: i.immediate))
    case .int3: try softwareInterrupt(ExceptionVector.breakpoint.rawValue)
    case .into: if overflow { try softwareInterrupt(ExceptionVector.overflow.rawValue) }
    case .int1: try emulatorBreakpoint()
    case .iret: try interruptReturn(i.operandSize)
    case .cli:
      try checkInterruptPrivilege()
      cpu.pointee.other_flags &= ~RFLAGS.if.rawValue
    case .sti:
      try checkInterruptPrivilege()
      if cpu.pointee.other_flags & RFLAGS.if.rawValue == 0 {
        cpu.pointee.other_flags |= RFLAGS.if.rawValue
        // The next instruction is executed before any interrupt.
        if cpu.pointee.interrupt_shadow == 0 { cpu.pointee.interrupt_shadow = 1 }
      }
    case .pushf:
      try checkVirtual8086Privilege()
      try push(rflags & ~(RFLAGS([.vm, .rf]).rawValue), size: i.operandSize)
    case .popf:
      try checkVirtual8086Privilege()
      let flags = try pop(size: i.operandSize)
      setFlags(popped: flags, size: i.operandSize, isReturn: false)
    default: return false
    }
    return true
  }

  /// #GP in virtual-8086 mode with IOPL below 3.
  private func checkVirtual8086Privilege() throws(Interruption) {
    if isVirtual8086, privilegeForIO < 3 { throw .generalProtection }
  }

  /// IOPL.
  private var privilegeForIO: UInt8 { UInt8(cpu.pointee.other_flags >> 12 & 3) }

  private func checkInterruptPrivilege() throws(Interruption) {
    if cpu.pointee.cr0 & CR0.pe.rawValue != 0, cpu.pointee.cpl > privilegeForIO { throw .generalProtection }
  }

  /// What POPF and IRET of `size` bytes change of the flags: by privilege, IOPL and IF stay as they are without a fault.
  /// RF is set by IRET alone, and cleared by POPF. VM never changes here.
  func setFlags(popped: UInt64, size: UInt8, isReturn: Bool) {
    var mask: RFLAGS = [.cf, .pf, .af, .zf, .sf, .tf, .df, .of, .nt]
    if size > 2 {
      mask.formUnion([.ac, .id])
      if isReturn { mask.insert(.rf) }
    }
    let isReal = cpu.pointee.cr0 & CR0.pe.rawValue == 0
    let privilege = cpu.pointee.cpl
    if isReal || privilege == 0 { mask.insert(.iopl) }
    if isReal || privilege <= privilegeForIO { mask.insert(.if) }
    // VIF and VIP: only IRET at level 0 loads them.
    if isReturn, size > 2, privilege == 0, !isReal { mask.formUnion([.vif, .vip]) }
    let old = rflags
    var new = popped & mask.rawValue | old & ~mask.rawValue
    if !isReturn { new &= ~RFLAGS.rf.rawValue }
    rflags = new
    if (old ^ new) & RFLAGS.ac.rawValue != 0 { updateContext() }
  }

  // MARK: IRET

  private func interruptReturn(_ size: UInt8) throws(Interruption) {
    if !isProtected {
      try checkVirtual8086Privilege()
      cpu.pointee.nmi_masked = false
      return try interruptReturnReal(size)
    }
    // A fault of IRET leaves NMIs unblocked (SDM vol. 3, 6.7.1).
    cpu.pointee.nmi_masked = false
    if cpu.pointee.other_flags & RFLAGS.nt.rawValue != 0 {
      if isLongMode { throw .generalProtection }
      return try taskReturn()
    }
    let ip = try peek(size: size)
    let selector = UInt16(truncatingIfNeeded: try peek(UInt64(size), size: size))
    let flags = try peek(2 &* UInt64(size), size: size)
    if size == 4, flags & RFLAGS.vm.rawValue != 0, cpu.pointee.cpl == 0, !isLongMode {
      return try returnToVirtual8086(ip, selector, flags)
    }
    let found = try returnTarget(selector)
    let privilege = UInt8(selector & 3)
    if privilege == cpu.pointee.cpl, !is64Bit {
      let target = try checkedReturn(ip, found)
      try markAccessed(found)
      drop(3 &* UInt64(size))
      setFlags(popped: flags, size: size, isReturn: true)
      segments[SegmentIndex.cs] = segment(found, selector)
      updateMode(privilege: privilege)
      nextIP = target
      return
    }
    let pointer = try peek(3 &* UInt64(size), size: size)
    let stackSelector = UInt16(truncatingIfNeeded: try peek(4 &* UInt64(size), size: size))
    let stack = try returnStack(stackSelector, code: found, privilege: privilege)
    let target = try checkedReturn(ip, found)
    try markAccessed(found)
    setFlags(popped: flags, size: size, isReturn: true)
    enterOuter(found, selector, stack, pointer, size)
    nextIP = target
  }

  private func checkedReturn(_ ip: UInt64, _ found: FoundDescriptor) throws(Interruption) -> UInt64 {
    if isLongMode, found.descriptor.isLong {
      guard isCanonical(ip) else { throw .generalProtection }
      return ip
    }
    guard ip & 0xffff_ffff <= UInt64(found.descriptor.limit) else { throw .generalProtection }
    return ip & 0xffff_ffff
  }

  private func interruptReturnReal(_ size: UInt8) throws(Interruption) {
    let ip = try peek(size: size)
    let selector = try peek(UInt64(size), size: 2)
    let flags = try peek(2 &* UInt64(size), size: size)
    try enterReal(UInt16(truncatingIfNeeded: selector), ip)
    drop(3 &* UInt64(size))
    setFlags(popped: flags, size: size, isReturn: true)
  }

  private func returnToVirtual8086(_ ip: UInt64, _ selector: UInt16, _ flags: UInt64) throws(Interruption) {
    let pointer = try peek(12, size: 4)
    var selectors = InlineArray<6, UInt16>(repeating: selector)
    let order = (SegmentIndex.ss, SegmentIndex.es, SegmentIndex.ds, SegmentIndex.fs, SegmentIndex.gs)
    selectors[order.0] = UInt16(truncatingIfNeeded: try peek(16, size: 4))
    selectors[order.1] = UInt16(truncatingIfNeeded: try peek(20, size: 4))
    selectors[order.2] = UInt16(truncatingIfNeeded: try peek(24, size: 4))
    selectors[order.3] = UInt16(truncatingIfNeeded: try peek(28, size: 4))
    selectors[order.4] = UInt16(truncatingIfNeeded: try peek(32, size: 4))
    guard ip & 0xffff_ffff <= 0xffff else { throw .generalProtection }
    setFlags(popped: flags, size: 4, isReturn: true)
    cpu.pointee.other_flags |= RFLAGS.vm.rawValue
    for index in 0..<6 { segments[index] = soft_segment(virtual8086: selectors[index]) }
    updateMode(privilege: 3)
    general[4] = pointer & 0xffff_ffff
    nextIP = ip & 0xffff_ffff
  }

  /// IRET with NT set: back to the task that the current one is nested in.
  private func taskReturn() throws(Interruption) {
    let link = UInt16(truncatingIfNeeded: try loadSystem(systemAddress(segments[SegmentIndex.tr].base), size: 2))
    guard link & 4 == 0 else { throw .fault(.invalidTSS, UInt32(link & ~3)) }
    let found = try descriptor(link, else: .invalidTSS)
    switch found.descriptor.systemType {
    case .tss16Busy, .tss32Busy: break
    default: throw .fault(.invalidTSS, UInt32(link & ~3))
    }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(link & ~3)) }
    try switchTask(to: found, link, reason: .return, returnIP: nextIP, flags: rflags)
  }
}
