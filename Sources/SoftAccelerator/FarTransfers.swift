import CSoftCPU
import X86

/// Far JMP, CALL and RET (SDM vol. 3, 5.8).
extension Processor {
  /// Executes one; false for any other instruction.
  func executeFarTransfer(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .jmp:
      let (selector, offset) = try farTarget(i)
      if isProtected { try jumpFar(selector, offset, i.operandSize) } else { try enterReal(selector, offset) }
    case .call:
      let (selector, offset) = try farTarget(i)
      if isProtected {
        try callFar(selector, offset, i.operandSize)
      } else {
        try callReal(selector, offset, i.operandSize)
      }
    case .retf:
      let extra = i.operands[0].kind == .immediate ? UInt64(i.immediate & 0xffff) : 0
      if isProtected { try returnFar(i.operandSize, extra) } else { try returnReal(i.operandSize, extra) }
    default: return false
    }
    return true
  }

  private func farTarget(_ i: Instruction) throws(Interruption) -> (selector: UInt16, offset: UInt64) {
    if i.operands[0].kind == .farPointer {
      return (i.secondImmediate, UInt64(bitPattern: i.immediate) & Self.mask(i.operandSize))
    }
    return try farPointer(i, i.operandSize)
  }

  // MARK: Real and virtual-8086 mode

  /// Goes on at a far pointer of real mode, within the limit that CS has.
  func enterReal(_ selector: UInt16, _ offset: UInt64) throws(Interruption) {
    guard offset <= UInt64(segments[SegmentIndex.cs].limit) else { throw .generalProtection }
    loadRealSegment(SegmentIndex.cs, selector)
    updateMode(privilege: cpu.pointee.cpl)
    nextIP = offset
  }

  private func callReal(_ selector: UInt16, _ offset: UInt64, _ size: UInt8) throws(Interruption) {
    guard offset <= UInt64(segments[SegmentIndex.cs].limit) else { throw .generalProtection }
    try pushReturn(size)
    try enterReal(selector, offset)
  }

  private func returnReal(_ size: UInt8, _ extra: UInt64) throws(Interruption) {
    let offset = try peek(size: size)
    let selector = try peek(UInt64(size), size: 2)
    try enterReal(UInt16(truncatingIfNeeded: selector), offset)
    drop(2 &* UInt64(size) &+ extra)
  }

  /// Pushes CS and the next instruction's address.
  private func pushReturn(_ size: UInt8) throws(Interruption) {
    var frame = StackFrame()
    frame.push(UInt64(segments[SegmentIndex.cs].selector))
    frame.push(nextIP)
    let width = stackSize
    let top = try pushCurrent(frame, size: size)
    write(4, top, size: width)
  }

  /// Pushes onto the current stack; the stack pointer stays for the caller to set.
  private func pushCurrent(_ frame: StackFrame, size: UInt8) throws(Interruption) -> UInt64 {
    // In 64-bit mode every push is at a 64-bit pointer of a flat stack, whatever its size.
    var place = general[4] & Self.mask(stackSize)
    for _ in 0..<frame.count {
      place = (place &- UInt64(size)) & Self.mask(stackSize)
      try checkWrite(linear(SegmentIndex.ss, place, size: Int(size), isWrite: true), count: Int(size))
    }
    place = general[4] & Self.mask(stackSize)
    for index in 0..<frame.count {
      place = (place &- UInt64(size)) & Self.mask(stackSize)
      try store(frame[index], linear(SegmentIndex.ss, place, size: Int(size), isWrite: true), size: size)
    }
    return place
  }

  // MARK: Protected mode

  /// Checks the code segment of a direct far transfer.
  private func checkTarget(_ found: FoundDescriptor, _ selector: UInt16) throws(Interruption) {
    let descriptor = found.descriptor
    let privilege = cpu.pointee.cpl
    if isLongMode, descriptor.isLong, descriptor.isBig { throw .generalProtection(selector) }
    let isAllowed =
      descriptor.isConforming
      ? descriptor.dpl <= privilege : descriptor.dpl == privilege && UInt8(selector & 3) <= privilege
    guard isAllowed else { throw .generalProtection(selector) }
    guard descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(selector & ~3)) }
  }

  /// An offset that a code segment allows.
  private func checked(_ offset: UInt64, in descriptor: SegmentDescriptor) throws(Interruption) -> UInt64 {
    if isLongMode, descriptor.isLong {
      guard isCanonical(offset) else { throw .generalProtection }
      return offset
    }
    guard offset <= UInt64(descriptor.limit) else { throw .generalProtection }
    return offset
  }

  /// Goes on in a code segment at the same privilege level.
  private func enter(_ found: FoundDescriptor, _ selector: UInt16, _ offset: UInt64) {
    segments[SegmentIndex.cs] = segment(found, selector & ~3 | UInt16(cpu.pointee.cpl))
    updateMode(privilege: cpu.pointee.cpl)
    nextIP = offset
  }

  private func farDescriptor(_ selector: UInt16) throws(Interruption) -> FoundDescriptor {
    guard !SegmentSelector(rawValue: selector).isNull else { throw .generalProtection }
    return try descriptor(selector, else: .generalProtection)
  }

  /// Checks the privilege and presence of a gate or TSS that a program names itself.
  private func checkGate(_ found: FoundDescriptor, _ selector: UInt16) throws(Interruption) {
    guard found.descriptor.dpl >= max(cpu.pointee.cpl, UInt8(selector & 3)) else { throw .generalProtection(selector) }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(selector & ~3)) }
  }

  private func jumpFar(_ selector: UInt16, _ offset: UInt64, _ size: UInt8) throws(Interruption) {
    let found = try farDescriptor(selector)
    if found.descriptor.isCode {
      try checkTarget(found, selector)
      let offset = try checked(offset, in: found.descriptor)
      try markAccessed(found)
      enter(found, selector, offset)
      return
    }
    if try isTask(found, selector) { return try enterTask(found, selector, reason: .jump) }
    let gate = try callGate(found, selector)
    let code = gate.code.descriptor
    let isAllowed = code.isConforming ? code.dpl <= cpu.pointee.cpl : code.dpl == cpu.pointee.cpl
    guard isAllowed else { throw .generalProtection(gate.selector) }
    guard code.isPresent else { throw .fault(.segmentNotPresent, UInt32(gate.selector & ~3)) }
    let target = try checked(gate.offset, in: code)
    try markAccessed(gate.code)
    enter(gate.code, gate.selector, target)
  }

  private func callFar(_ selector: UInt16, _ offset: UInt64, _ size: UInt8) throws(Interruption) {
    let found = try farDescriptor(selector)
    if found.descriptor.isCode {
      try checkTarget(found, selector)
      let offset = try checked(offset, in: found.descriptor)
      try markAccessed(found)
      try pushReturn(size)
      enter(found, selector, offset)
      return
    }
    if try isTask(found, selector) { return try enterTask(found, selector, reason: .call) }
    let gate = try callGate(found, selector)
    let code = gate.code.descriptor
    guard code.dpl <= cpu.pointee.cpl else { throw .generalProtection(gate.selector) }
    guard code.isPresent else { throw .fault(.segmentNotPresent, UInt32(gate.selector & ~3)) }
    let target = try checked(gate.offset, in: code)
    if !code.isConforming, code.dpl < cpu.pointee.cpl {
      try callInner(gate, target)
    } else {
      try markAccessed(gate.code)
      try pushReturn(gate.size)
      enter(gate.code, gate.selector, target)
    }
  }

  // MARK: Call gates

  private struct CallGate {
    var selector: UInt16
    var offset: UInt64
    /// The size of what is pushed, in bytes.
    var size: UInt8
    /// Parameters to copy.
    var count: Int
    var code: FoundDescriptor
  }

  /// A call gate and the code segment it leads to.
  private func callGate(_ found: FoundDescriptor, _ selector: UInt16) throws(Interruption) -> CallGate {
    let raw = found.descriptor.rawValue
    let type = found.descriptor.systemType
    guard type == .callGate32 || type == .callGate16 && !isLongMode else { throw .generalProtection(selector) }
    try checkGate(found, selector)
    var offset = raw & 0xffff
    if type == .callGate32 { offset |= raw >> 32 & 0xffff_0000 }
    if isLongMode { offset |= try upperHalf(found, selector, else: .generalProtection) }
    let target = UInt16(truncatingIfNeeded: raw >> 16)
    let code = try farDescriptor(target)
    guard code.descriptor.isCode else { throw .generalProtection(target) }
    if isLongMode {
      guard code.descriptor.isLong, !code.descriptor.isBig else { throw .generalProtection(target) }
    }
    return CallGate(
      selector: target, offset: offset, size: isLongMode ? 8 : type == .callGate32 ? 4 : 2,
      count: isLongMode ? 0 : Int(raw >> 32 & 31), code: code)
  }

  /// A call to an inner privilege level: with that level's stack, and the parameters copied to it.
  private func callInner(_ gate: CallGate, _ target: UInt64) throws(Interruption) {
    let privilege = gate.code.descriptor.dpl
    var frame = StackFrame()
    frame.push(UInt64(segments[SegmentIndex.ss].selector))
    frame.push(general[4])
    var stack: soft_segment
    var pointer: UInt64
    if isLongMode {
      pointer = try taskStack64(at: 4 &+ 8 &* UInt64(privilege), external: 0)
      stack = soft_segment(null: UInt16(privilege), dpl: privilege)
    } else {
      let (selector, top) = try taskStack(privilege, external: 0)
      guard !SegmentSelector(rawValue: selector).isNull else { throw .fault(.invalidTSS, 0) }
      stack = try stackSegment(selector, privilege: privilege, else: .invalidTSS, external: 0)
      pointer = top
      // The last parameter pushed is at the top of the old stack.
      for index in (0..<gate.count).reversed() {
        frame.push(try peek(UInt64(index) &* UInt64(gate.size), size: gate.size))
      }
    }
    frame.push(UInt64(segments[SegmentIndex.cs].selector))
    frame.push(nextIP)
    try markAccessed(gate.code)
    pointer = try push(
      frame, size: gate.size, stack: stack, pointer: pointer, isNew: true, fault: UInt32(stack.selector & ~3))
    segments[SegmentIndex.ss] = stack
    segments[SegmentIndex.cs] = segment(gate.code, gate.selector & ~3 | UInt16(privilege))
    updateMode(privilege: privilege)
    write(4, pointer, size: stackSize)
    nextIP = target
  }

  // MARK: Tasks

  private func isTask(_ found: FoundDescriptor, _ selector: UInt16) throws(Interruption) -> Bool {
    switch found.descriptor.systemType {
    case .taskGate, .tss16Available, .tss32Available, .tss16Busy, .tss32Busy:
      if isLongMode { throw .generalProtection(selector) }
      return true
    default: return false
    }
  }

  private func enterTask(_ found: FoundDescriptor, _ selector: UInt16, reason: TaskSwitchReason) throws(Interruption) {
    try checkGate(found, selector)
    var task = found
    var taskSelector = selector
    if found.descriptor.systemType == .taskGate {
      taskSelector = UInt16(truncatingIfNeeded: found.descriptor.rawValue >> 16)
      guard taskSelector & 4 == 0 else { throw .generalProtection(taskSelector) }
      task = try descriptor(taskSelector, else: .generalProtection)
    }
    switch task.descriptor.systemType {
    case .tss16Available, .tss32Available: break
    default: throw .generalProtection(taskSelector)
    }
    guard taskSelector & 4 == 0 else { throw .generalProtection(taskSelector) }
    guard task.descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(taskSelector & ~3)) }
    try switchTask(to: task, taskSelector, reason: reason, returnIP: nextIP, flags: rflags)
  }

  // MARK: Returns

  /// The code segment that a far return or IRET goes back to.
  func returnTarget(_ selector: UInt16) throws(Interruption) -> FoundDescriptor {
    guard !SegmentSelector(rawValue: selector).isNull else { throw .generalProtection }
    let found = try descriptor(selector, else: .generalProtection)
    let descriptor = found.descriptor
    let privilege = UInt8(selector & 3)
    guard descriptor.isCode, privilege >= cpu.pointee.cpl,
      descriptor.isConforming ? descriptor.dpl <= privilege : descriptor.dpl == privilege,
      !(isLongMode && descriptor.isLong && descriptor.isBig)
    else { throw .generalProtection(selector) }
    guard descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(selector & ~3)) }
    return found
  }

  /// The stack segment of the outer level that is returned to.
  func returnStack(_ selector: UInt16, code: FoundDescriptor, privilege: UInt8) throws(Interruption) -> soft_segment {
    if SegmentSelector(rawValue: selector).isNull {
      guard isLongMode, code.descriptor.isLong, privilege < 3, selector & 3 == UInt16(privilege) else {
        throw .generalProtection
      }
      return soft_segment(null: selector, dpl: privilege)
    }
    return try stackSegment(selector, privilege: privilege, else: .generalProtection, external: 0)
  }

  private func returnFar(_ size: UInt8, _ extra: UInt64) throws(Interruption) {
    let offset = try peek(size: size)
    let selector = UInt16(truncatingIfNeeded: try peek(UInt64(size), size: size))
    let found = try returnTarget(selector)
    let privilege = UInt8(selector & 3)
    if privilege == cpu.pointee.cpl {
      let target = try checked(offset, in: found.descriptor)
      try markAccessed(found)
      drop(2 &* UInt64(size) &+ extra)
      enter(found, selector, target)
      return
    }
    let pointer = try peek(2 &* UInt64(size) &+ extra, size: size)
    let stackSelector = UInt16(truncatingIfNeeded: try peek(3 &* UInt64(size) &+ extra, size: size))
    let stack = try returnStack(stackSelector, code: found, privilege: privilege)
    let target = try checked(offset, in: found.descriptor)
    try markAccessed(found)
    enterOuter(found, selector, stack, pointer, size)
    write(4, general[4] &+ extra, size: stackSize)
    nextIP = target
  }

  /// Goes back to an outer privilege level, or in 64-bit mode to the same one.
  func enterOuter(_ found: FoundDescriptor, _ selector: UInt16, _ stack: soft_segment, _ pointer: UInt64, _ size: UInt8)
  {
    let changesPrivilege = UInt8(selector & 3) != cpu.pointee.cpl
    segments[SegmentIndex.cs] = segment(found, selector)
    segments[SegmentIndex.ss] = stack
    updateMode(privilege: UInt8(selector & 3))
    write(4, pointer, size: stackSize)
    if changesPrivilege { dropInnerSegments() }
  }
}
