import Accelerator
import CSoftCPU
import X86

/// Instructions on segment registers, descriptors and descriptor tables.
extension Processor {
  /// Executes one; false for any other instruction.
  func executeSegment(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .mov:
      guard i.operands[0].register.class == .segment || i.operands[1].register.class == .segment else { return false }
      if i.operands[0].kind == .register, i.operands[0].register.class == .segment {
        try moveToSegment(Int(i.operands[0].register.index), UInt16(truncatingIfNeeded: read(i, 1)))
      } else {
        try write(i, 0, UInt64(segments[Int(i.operands[1].register.index)].selector))
      }
    case .push: try pushSegment(i)
    case .pop: try popSegment(i)
    case .les: try loadFarPointer(i, SegmentIndex.es)
    case .lds: try loadFarPointer(i, SegmentIndex.ds)
    case .lss: try loadFarPointer(i, SegmentIndex.ss)
    case .lfs: try loadFarPointer(i, SegmentIndex.fs)
    case .lgs: try loadFarPointer(i, SegmentIndex.gs)

    case .lar: try loadAccessRights(i)
    case .lsl: try loadSegmentLimit(i)
    case .verr: set(zero: try isVerified(UInt16(truncatingIfNeeded: read(i, 0)), forWriting: false))
    case .verw: set(zero: try isVerified(UInt16(truncatingIfNeeded: read(i, 0)), forWriting: true))
    case .arpl:
      let privilege = read(i.operands[1].register) & 3
      let old = try read(i, 0)
      if old & 3 < privilege { try write(i, 0, old & ~3 | privilege) }
      set(zero: old & 3 < privilege)

    case .lldt: try loadLocalTable(UInt16(truncatingIfNeeded: read(i, 0)))
    case .ltr: try loadTaskRegister(UInt16(truncatingIfNeeded: read(i, 0)))
    case .sldt: try storeGuarded(i, UInt64(segments[SegmentIndex.ldtr].selector))
    case .str: try storeGuarded(i, UInt64(segments[SegmentIndex.tr].selector))
    case .smsw: try storeGuarded(i, cpu.pointee.cr0)
    case .sgdt: try storeTable(i, base: cpu.pointee.gdt_base, limit: cpu.pointee.gdt_limit)
    case .sidt: try storeTable(i, base: cpu.pointee.idt_base, limit: cpu.pointee.idt_limit)
    case .lgdt:
      let (base, limit) = try loadTable(i)
      if base != cpu.pointee.gdt_base || limit != cpu.pointee.gdt_limit { try refuse(.gdtr, value: base) }
      cpu.pointee.gdt_base = base
      cpu.pointee.gdt_limit = limit
    case .lidt:
      let (base, limit) = try loadTable(i)
      if base != cpu.pointee.idt_base || limit != cpu.pointee.idt_limit { try refuse(.idtr, value: base) }
      cpu.pointee.idt_base = base
      cpu.pointee.idt_limit = limit
    default: return false
    }
    return true
  }

  // MARK: Segment registers

  private func moveToSegment(_ index: Int, _ selector: UInt16) throws(Interruption) {
    guard index < 6, index != SegmentIndex.cs else { throw .invalidOpcode }
    try loadSegment(index, selector)
    if index == SegmentIndex.ss { castStackShadow() }
  }

  /// The instruction after a load of SS is executed before any interrupt or debug trap (SDM vol. 3, 6.8.3).
  private func castStackShadow() {
    if cpu.pointee.interrupt_shadow == 0 { cpu.pointee.interrupt_shadow = 2 }
  }

  private func pushSegment(_ i: Instruction) throws(Interruption) {
    // With 32 bits only the selector is written, as processors do it.
    let size = i.operandSize
    let width = stackSize
    let pointer = (general[4] &- UInt64(size)) & Self.mask(width)
    let place = try linear(SegmentIndex.ss, pointer, size: Int(size), isWrite: true)
    let selector = UInt64(segments[Int(i.operands[0].register.index)].selector)
    try store(selector, place, size: size == 4 ? 2 : size)
    write(4, pointer, size: width)
  }

  private func popSegment(_ i: Instruction) throws(Interruption) {
    let index = Int(i.operands[0].register.index)
    let selector = UInt16(truncatingIfNeeded: try peek(size: i.operandSize))
    // Counted with the old stack's width, before SS changes.
    let width = stackSize
    try loadSegment(index, selector)
    write(4, general[4] &+ UInt64(i.operandSize), size: width)
    if index == SegmentIndex.ss { castStackShadow() }
  }

  private func loadFarPointer(_ i: Instruction, _ index: Int) throws(Interruption) {
    let (selector, offset) = try farPointer(i, i.operandSize)
    try loadSegment(index, selector)
    write(i.operands[0].register, offset)
  }

  /// The far pointer in the memory operand: a selector behind an offset of `size` bytes.
  func farPointer(_ i: Instruction, _ size: UInt8) throws(Interruption) -> (selector: UInt16, offset: UInt64) {
    let place = try address(i, size: Int(size) &+ 2, isWrite: false)
    let offset = try load(place, size: size)
    let selector = try load(wrapped(place &+ UInt64(size)), size: 2)
    return (UInt16(truncatingIfNeeded: selector), offset)
  }

  /// A linear address of the program, which wraps at 4 GiB outside 64-bit mode.
  @inline(__always)
  func wrapped(_ linear: UInt64) -> UInt64 { is64Bit ? linear : linear & 0xffff_ffff }

  // MARK: Looking at descriptors

  /// System descriptor types that LAR and LSL know (SDM vol. 2: gates have rights but no limit).
  private func isKnown(_ type: UInt8, hasLimit: Bool) -> Bool {
    switch type {
    case 2, 9, 11: true
    case 1, 3: !isLongMode
    case 12: !hasLimit
    case 4, 5: !hasLimit && !isLongMode
    default: false
    }
  }

  /// The descriptor that LAR and LSL may look at, nil where ZF becomes 0.
  private func visibleDescriptor(_ selector: UInt16, hasLimit: Bool) throws(Interruption) -> SegmentDescriptor? {
    guard let descriptor = try findDescriptor(selector)?.descriptor else { return nil }
    guard descriptor.isCodeOrData || isKnown(descriptor.type, hasLimit: hasLimit) else { return nil }
    guard descriptor.isConforming || descriptor.dpl >= max(UInt8(selector & 3), cpu.pointee.cpl) else { return nil }
    return descriptor
  }

  private func loadAccessRights(_ i: Instruction) throws(Interruption) {
    let selector = UInt16(truncatingIfNeeded: try read(i, 1))
    let found = try visibleDescriptor(selector, hasLimit: false)
    if let found { write(i.operands[0].register, found.rawValue >> 32 & 0x00f0_ff00) }
    set(zero: found != nil)
  }

  private func loadSegmentLimit(_ i: Instruction) throws(Interruption) {
    let selector = UInt16(truncatingIfNeeded: try read(i, 1))
    let found = try visibleDescriptor(selector, hasLimit: true)
    if let found { write(i.operands[0].register, UInt64(found.limit)) }
    set(zero: found != nil)
  }

  private func isVerified(_ selector: UInt16, forWriting: Bool) throws(Interruption) -> Bool {
    guard let descriptor = try findDescriptor(selector)?.descriptor else { return false }
    guard forWriting ? descriptor.isWritableData : descriptor.isReadable else { return false }
    return descriptor.isConforming || descriptor.dpl >= max(UInt8(selector & 3), cpu.pointee.cpl)
  }

  // MARK: Tables

  private func loadLocalTable(_ selector: UInt16) throws(Interruption) {
    if SegmentSelector(rawValue: selector).isNull {
      segments[SegmentIndex.ldtr] = soft_segment(null: selector)
      return
    }
    guard selector & 4 == 0 else { throw .generalProtection(selector) }
    let found = try descriptor(selector, else: .generalProtection)
    guard found.descriptor.systemType == .ldt else { throw .generalProtection(selector) }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(selector & ~3)) }
    var segment = soft_segment(found.descriptor, selector: selector)
    if isLongMode { segment.base |= try systemBase(found, selector) }
    segments[SegmentIndex.ldtr] = segment
  }

  private func loadTaskRegister(_ selector: UInt16) throws(Interruption) {
    guard !SegmentSelector(rawValue: selector).isNull else { throw .generalProtection }
    guard selector & 4 == 0 else { throw .generalProtection(selector) }
    let found = try descriptor(selector, else: .generalProtection)
    switch found.descriptor.systemType {
    case .tss32Available: break
    case .tss16Available where !isLongMode: break
    default: throw .generalProtection(selector)
    }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(selector & ~3)) }
    var segment = soft_segment(found.descriptor, selector: selector)
    if isLongMode { segment.base |= try systemBase(found, selector) }
    try setBusy(found, true)
    segment.attributes |= 2
    segments[SegmentIndex.tr] = segment
  }

  /// The upper half of the base of a 16-byte system descriptor: the whole must be canonical.
  private func systemBase(_ found: FoundDescriptor, _ selector: UInt16) throws(Interruption) -> UInt64 {
    let upper = try upperHalf(found, selector, else: .generalProtection)
    guard isCanonical(upper | UInt64(found.descriptor.base)) else { throw .generalProtection(selector) }
    return upper
  }

  /// Sets or clears the busy bit of a TSS descriptor.
  func setBusy(_ found: FoundDescriptor, _ isBusy: Bool) throws(Interruption) {
    let byte = found.descriptor.rawValue >> 40 & 0xff
    try storeSystem(isBusy ? byte | 2 : byte & ~2, systemAddress(found.address &+ 5), size: 1)
  }

  /// UMIP hides what the tables and CR0 hold from users (SDM vol. 3, 2.5).
  private func checkUserModePrevention() throws(Interruption) {
    if cpu.pointee.cpl != 0, cpu.pointee.cr4 & CR4.umip.rawValue != 0 { throw .generalProtection }
  }

  private func storeGuarded(_ i: Instruction, _ value: UInt64) throws(Interruption) {
    try checkUserModePrevention()
    try write(i, 0, value)
  }

  private func storeTable(_ i: Instruction, base: UInt64, limit: UInt16) throws(Interruption) {
    try checkUserModePrevention()
    let size: UInt8 = is64Bit ? 8 : 4
    let place = try address(i, size: Int(size) &+ 2, isWrite: true)
    let baseAddress = wrapped(place &+ 2)
    try checkWrite(baseAddress, count: Int(size))
    try store(UInt64(limit), place, size: 2)
    try store(base, baseAddress, size: size)
  }

  private func loadTable(_ i: Instruction) throws(Interruption) -> (base: UInt64, limit: UInt16) {
    let size: UInt8 = is64Bit ? 8 : 4
    let place = try address(i, size: Int(size) &+ 2, isWrite: false)
    let limit = try load(place, size: 2)
    var base = try load(wrapped(place &+ 2), size: size)
    if size == 8 {
      guard isCanonical(base) else { throw .generalProtection }
    } else if i.operandSize == 2 {
      base &= 0xff_ffff
    }
    return (base, UInt16(truncatingIfNeeded: limit))
  }
}
