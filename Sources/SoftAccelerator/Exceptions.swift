import Accelerator
import CSoftCPU
import X86

/// An exception or interrupt on its way to its handler.
struct Event {
  var vector: UInt8
  /// What the handler finds on top of its stack.
  var errorCode: UInt32?
  /// INT n, INT3 or INTO: the gate's DPL counts.
  var isSoftware = false
  /// The instruction is executed again when the handler returns: RF is set in the flags that are pushed.
  var isFault = false
  /// Where the handler returns to.
  var returnIP: UInt64

  /// EXT, bit 0 of error codes: not an instruction of the program's own brought the event about.
  var external: UInt32 { isSoftware ? 0 : 1 }
}

/// Delivery of exceptions and interrupts (SDM vol. 3, chapter 6).
extension Processor {
  /// Delivers what stopped an instruction, and what delivering it raises in turn; nil when a handler is about to run.
  func deliver(_ interruption: Interruption) -> PendingExit? {
    switch interruption {
    case .exit: return nil
    case .exception(let vector): return raise(vector, nil)
    case .fault(let vector, let code): return raise(vector, code)
    }
  }

  /// Makes a non-maskable interrupt pending: one waits while another is being handled, two otherwise.
  func postNMI() { pendingNMIs = min(pendingNMIs + 1, cpu.pointee.nmi_masked ? 1 : 2) }

  /// Delivers a non-maskable interrupt.
  func deliverNMI() -> PendingExit? {
    traceInterrupt(2, at: cpu.pointee.rip, .nonMaskable)
    if let exit = deliver(Event(vector: 2, returnIP: cpu.pointee.rip), as: nil) {
      pendingNMIs += 1
      return exit
    }
    cpu.pointee.nmi_masked = true
    return nil
  }

  /// Delivers an external interrupt; one that cannot be delivered yet waits.
  func deliverInterrupt(_ vector: UInt8) -> PendingExit? {
    traceInterrupt(vector, at: cpu.pointee.rip, .external)
    guard let exit = deliver(Event(vector: vector, returnIP: cpu.pointee.rip), as: nil) else { return nil }
    pendingInterrupt = vector
    return exit
  }

  /// Delivers an exception at the current instruction.
  private func raise(_ vector: ExceptionVector, _ errorCode: UInt32?) -> PendingExit? {
    var event = Event(vector: vector.rawValue, errorCode: errorCode, returnIP: cpu.pointee.rip)
    let due = pendingDebug
    switch vector {
    case .debug:
      recordDebugException()
    case .pageFault:
      cpu.pointee.cr2 = faultAddress
      event.isFault = true
    default: event.isFault = true
    }
    let exit = deliver(event, as: vector)
    // A trap that cannot be delivered yet would not be raised again.
    if exit != nil, vector == .debug { pendingDebug = due }
    return exit
  }

  /// Delivers an event; `exception` is its class for double faults, nil for interrupts.
  private func deliver(_ event: Event, as exception: ExceptionVector?) -> PendingExit? {
    var event = event
    var exception = exception
    // Tables and stacks may lie in the local APIC's page: what delivery accessed there is no instruction's to repeat.
    defer { finishDeviceAccesses() }
    // Exceptions that are no double faults follow one another without end where each handler's frame raises the next, as
    // #AC can: then the run loop looks around, and the instruction raises the first of them again.
    for _ in 0..<8 {
      if let exception { traceException(exception, event) }
      let second: ExceptionVector
      do throws(Interruption) {
        try vector(event)
        return nil
      } catch {
        switch error {
        case .exit: return noMemory()
        case .exception(let vector):
          second = vector
          event.errorCode = nil
        case .fault(let vector, let code):
          second = vector
          event.errorCode = code
        }
      }
      if second == .pageFault { cpu.pointee.cr2 = faultAddress }
      if exception == .doubleFault { return .tripleFault }
      let isDouble =
        switch exception {
        case .pageFault: second.isContributory || second == .pageFault
        case .some(let first): first.isContributory && second.isContributory
        case nil: false
        }
      exception = isDouble ? .doubleFault : second
      if isDouble { event.errorCode = 0 }
      event = Event(
        vector: (exception ?? second).rawValue, errorCode: event.errorCode, isFault: true, returnIP: cpu.pointee.rip)
    }
    return nil
  }

  /// The exit for an event whose handler cannot be reached: the tables or the stack are in no memory, or the view
  /// forbids an access to them.
  private func noMemory() -> PendingExit {
    defer { pendingExit = .none }
    if case .memory(let physical, _, _, _) = pendingExit { return .memoryFault(physical: physical) }
    return pendingExit
  }

  /// A software interrupt: INT n, INT3, INTO. It is part of its instruction, and what it raises is that one's fault.
  func softwareInterrupt(_ number: UInt8) throws(Interruption) {
    let ip = cpu.pointee.rip
    try vector(Event(vector: number, isSoftware: true, returnIP: nextIP))
    traceInterrupt(number, at: ip, .software)
    nextIP = cpu.pointee.rip
  }

  /// INT1, which stands for a #DB of an in-circuit emulator.
  func emulatorBreakpoint() throws(Interruption) {
    let event = Event(vector: 1, returnIP: nextIP)
    try vector(event)
    traceException(.debug, event)
    recordDebugException()
    nextIP = cpu.pointee.rip
  }

  // MARK: To the handler

  /// Enters the handler of an event. Nothing is changed where that fails.
  private func vector(_ event: Event) throws(Interruption) {
    if cpu.pointee.cr0 & CR0.pe.rawValue == 0 {
      try vectorReal(event)
    } else if isLongMode {
      try vectorLong(event)
    } else {
      try vectorProtected(event)
    }
    // An event ends the shadow of the instruction before it.
    cpu.pointee.interrupt_shadow = 0
    isHalted = false
  }

  /// The flags as a handler finds them on its stack.
  private func pushedFlags(_ event: Event) -> UInt64 {
    event.isFault ? rflags | RFLAGS.rf.rawValue : rflags
  }

  /// The error code of a fault in an IDT entry.
  private func tableFault(_ event: Event) -> UInt32 { UInt32(event.vector) << 3 | 2 | event.external }

  /// Real mode: the table has far pointers (SDM vol. 3, 20.1.4).
  private func vectorReal(_ event: Event) throws(Interruption) {
    let offset = UInt64(event.vector) << 2
    guard offset &+ 3 <= UInt64(cpu.pointee.idt_limit) else { throw .fault(.generalProtection, tableFault(event)) }
    let pointer = try loadSystem(systemAddress(cpu.pointee.idt_base &+ offset), size: 4)
    var frame = StackFrame()
    frame.push(rflags & 0xffff)
    frame.push(UInt64(segments[SegmentIndex.cs].selector))
    frame.push(event.returnIP)
    let stack = segments[SegmentIndex.ss]
    let top = try push(frame, size: 2, stack: stack, pointer: general[4], isNew: false, fault: 0)
    write(4, top, size: stackSize)
    cpu.pointee.other_flags &= ~(RFLAGS([.if, .tf, .ac, .rf]).rawValue)
    loadRealSegment(SegmentIndex.cs, UInt16(truncatingIfNeeded: pointer >> 16))
    updateMode(privilege: 0)
    cpu.pointee.rip = pointer & 0xffff
  }

  /// The code segment that a gate leads to, and the privilege level it runs at.
  private func gateTarget(
    _ selector: UInt16, external: UInt32
  ) throws(Interruption) -> (found: FoundDescriptor, privilege: UInt8) {
    guard !SegmentSelector(rawValue: selector).isNull else { throw .fault(.generalProtection, external) }
    let found = try descriptor(selector, else: .generalProtection, external: external)
    let code = UInt32(selector & ~3) | external
    guard found.descriptor.isCode, found.descriptor.dpl <= cpu.pointee.cpl else {
      throw .fault(.generalProtection, code)
    }
    if isLongMode {
      guard found.descriptor.isLong, !found.descriptor.isBig else { throw .fault(.generalProtection, code) }
    }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, code) }
    return (found, found.descriptor.isConforming ? cpu.pointee.cpl : found.descriptor.dpl)
  }

  /// What a handler's flags lose, by the type of its gate: bit 0 tells a trap gate.
  private func enterHandler(gateType: UInt64, privilege: UInt8) {
    let cleared: RFLAGS = gateType & 1 != 0 ? [.tf, .nt, .rf, .vm] : [.tf, .nt, .rf, .vm, .if]
    cpu.pointee.other_flags &= ~cleared.rawValue
    updateMode(privilege: privilege)
  }

  /// Long mode: 16-byte gates, stacks by number (SDM vol. 3, 6.14).
  private func vectorLong(_ event: Event) throws(Interruption) {
    let tableCode = tableFault(event)
    let offset = UInt64(event.vector) << 4
    guard offset &+ 15 <= UInt64(cpu.pointee.idt_limit) else { throw .fault(.generalProtection, tableCode) }
    let low = try loadSystem(cpu.pointee.idt_base &+ offset, size: 8)
    let high = try loadSystem(cpu.pointee.idt_base &+ offset &+ 8, size: 8)
    guard low >> 40 & 0x1e == 14, high >> 40 & 0x1f == 0 else { throw .fault(.generalProtection, tableCode) }
    if event.isSoftware, UInt8(low >> 45 & 3) < cpu.pointee.cpl { throw .fault(.generalProtection, tableCode) }
    guard low >> 47 & 1 != 0 else { throw .fault(.segmentNotPresent, tableCode) }
    let selector = UInt16(truncatingIfNeeded: low >> 16)
    let (found, privilege) = try gateTarget(selector, external: event.external)
    let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32

    let changesPrivilege = privilege < cpu.pointee.cpl
    let stackNumber = low >> 32 & 7
    var pointer = general[4]
    if stackNumber != 0 {
      pointer = try taskStack64(at: 28 &+ 8 &* stackNumber, external: event.external)
    } else if changesPrivilege {
      pointer = try taskStack64(at: 4 &+ 8 &* UInt64(privilege), external: event.external)
    }
    guard isCanonical(target) else { throw .fault(.generalProtection, event.external) }
    var frame = StackFrame()
    frame.push(UInt64(segments[SegmentIndex.ss].selector))
    frame.push(general[4])
    frame.push(pushedFlags(event))
    frame.push(UInt64(segments[SegmentIndex.cs].selector))
    frame.push(event.returnIP)
    if let code = event.errorCode { frame.push(UInt64(code)) }
    try markAccessed(found)
    let top = try push(
      frame, size: 8, stack: segments[SegmentIndex.ss], pointer: pointer & ~15, isNew: changesPrivilege,
      fault: event.external)
    general[4] = top
    segments[SegmentIndex.cs] = segment(found, selector & ~3 | UInt16(privilege))
    if changesPrivilege { segments[SegmentIndex.ss] = soft_segment(null: UInt16(privilege), dpl: privilege) }
    enterHandler(gateType: low >> 40 & 15, privilege: privilege)
    cpu.pointee.rip = target
  }

  /// A stack pointer of the 64-bit TSS.
  func taskStack64(at offset: UInt64, external: UInt32) throws(Interruption) -> UInt64 {
    let task = segments[SegmentIndex.tr]
    guard task.isUsable, offset &+ 7 <= UInt64(task.limit) else {
      throw .fault(.invalidTSS, UInt32(task.selector & ~3) | external)
    }
    let pointer = try loadSystem(task.base &+ offset, size: 8)
    guard isCanonical(pointer) else { throw .fault(.stackFault, external) }
    return pointer
  }

  /// SS and ESP of a privilege level in a 32-bit or 16-bit TSS.
  func taskStack(_ privilege: UInt8, external: UInt32) throws(Interruption) -> (selector: UInt16, pointer: UInt64) {
    let task = segments[SegmentIndex.tr]
    let is32 = task.attributes & 8 != 0
    let offset = is32 ? 4 &+ 8 &* UInt64(privilege) : 2 &+ 4 &* UInt64(privilege)
    let size: UInt64 = is32 ? 4 : 2
    guard task.isUsable, offset &+ size &+ 1 <= UInt64(task.limit) else {
      throw .fault(.invalidTSS, UInt32(task.selector & ~3) | external)
    }
    let pointer = try loadSystem(systemAddress(task.base &+ offset), size: UInt8(size))
    let selector = try loadSystem(systemAddress(task.base &+ offset &+ size), size: 2)
    return (UInt16(truncatingIfNeeded: selector), pointer)
  }

  /// Protected and virtual-8086 mode: 8-byte gates (SDM vol. 3, 6.12).
  private func vectorProtected(_ event: Event) throws(Interruption) {
    let tableCode = tableFault(event)
    let offset = UInt64(event.vector) << 3
    guard offset &+ 7 <= UInt64(cpu.pointee.idt_limit) else { throw .fault(.generalProtection, tableCode) }
    let gate = try loadSystem(systemAddress(cpu.pointee.idt_base &+ offset), size: 8)
    let type = gate >> 40 & 0x1f
    guard type == 5 || type & 0x16 == 6 else { throw .fault(.generalProtection, tableCode) }
    if event.isSoftware, UInt8(gate >> 45 & 3) < cpu.pointee.cpl { throw .fault(.generalProtection, tableCode) }
    guard gate >> 47 & 1 != 0 else { throw .fault(.segmentNotPresent, tableCode) }
    let selector = UInt16(truncatingIfNeeded: gate >> 16)
    if type == 5 { return try enterTask(selector, event) }

    let external = event.external
    let (found, privilege) = try gateTarget(selector, external: external)
    let wasVirtual = isVirtual8086
    if wasVirtual, privilege != 0 { throw .fault(.generalProtection, UInt32(selector & ~3) | external) }
    let size: UInt8 = type & 8 != 0 ? 4 : 2
    let target = size == 4 ? gate & 0xffff | gate >> 32 & 0xffff_0000 : gate & 0xffff

    let changesPrivilege = privilege < cpu.pointee.cpl
    var stack = segments[SegmentIndex.ss]
    var pointer = general[4]
    var frame = StackFrame()
    if changesPrivilege {
      let (stackSelector, stackPointer) = try taskStack(privilege, external: external)
      guard !SegmentSelector(rawValue: stackSelector).isNull else { throw .fault(.invalidTSS, external) }
      stack = try stackSegment(stackSelector, privilege: privilege, else: .invalidTSS, external: external)
      pointer = stackPointer
      if wasVirtual {
        for index in [SegmentIndex.gs, SegmentIndex.fs, SegmentIndex.ds, SegmentIndex.es] {
          frame.push(UInt64(segments[index].selector))
        }
      }
      frame.push(UInt64(segments[SegmentIndex.ss].selector))
      frame.push(general[4])
    }
    guard target <= UInt64(found.descriptor.limit) else { throw .fault(.generalProtection, external) }
    frame.push(pushedFlags(event))
    frame.push(UInt64(segments[SegmentIndex.cs].selector))
    frame.push(event.returnIP)
    if let code = event.errorCode { frame.push(UInt64(code)) }
    try markAccessed(found)
    let noRoom = changesPrivilege ? UInt32(stack.selector & ~3) | external : external
    let top = try push(
      frame, size: size, stack: stack, pointer: pointer, isNew: changesPrivilege, fault: noRoom)
    if wasVirtual {
      for index in [SegmentIndex.gs, SegmentIndex.fs, SegmentIndex.ds, SegmentIndex.es] {
        segments[index] = soft_segment(null: 0)
      }
    }
    segments[SegmentIndex.cs] = segment(found, selector & ~3 | UInt16(privilege))
    segments[SegmentIndex.ss] = stack
    enterHandler(gateType: type, privilege: privilege)
    write(4, top, size: stackSize)
    cpu.pointee.rip = target
  }

  /// A task gate: the handler is another task, which returns by IRET with NT set.
  private func enterTask(_ selector: UInt16, _ event: Event) throws(Interruption) {
    let code = UInt32(selector & ~3) | event.external
    guard selector & 4 == 0 else { throw .fault(.generalProtection, code) }
    let found = try descriptor(selector, else: .generalProtection, external: event.external)
    switch found.descriptor.systemType {
    case .tss16Available, .tss32Available: break
    default: throw .fault(.generalProtection, code)
    }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, code) }
    try switchTask(
      to: found, selector, reason: .gate, returnIP: event.returnIP, flags: pushedFlags(event),
      external: event.external)
    if let code = event.errorCode {
      let size: UInt8 = segments[SegmentIndex.tr].attributes & 8 != 0 ? 4 : 2
      var frame = StackFrame()
      frame.push(UInt64(code))
      let top = try push(
        frame, size: size, stack: segments[SegmentIndex.ss], pointer: general[4], isNew: false, fault: event.external)
      write(4, top, size: stackSize)
    }
  }
}
