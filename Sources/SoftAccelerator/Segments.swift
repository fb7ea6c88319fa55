import CSoftCPU
import X86

/// Numbers of segment registers as encodings and `soft_cpu.segment` have them.
enum SegmentIndex {
  static let es = 0
  static let cs = 1
  static let ss = 2
  static let ds = 3
  static let fs = 4
  static let gs = 5
  static let ldtr = 7
  static let tr = 8
}

extension soft_segment {
  /// Attribute bits (`soft_cpu` has the whole list).
  static let long: UInt16 = 1 << 9
  static let big: UInt16 = 1 << 10
  static let unusable: UInt16 = 1 << 12

  /// What a descriptor loads; a 16-byte descriptor's upper half of the base is the caller's.
  init(_ descriptor: SegmentDescriptor, selector: UInt16) {
    let raw = descriptor.rawValue
    self.init(
      base: UInt64(descriptor.base), limit: descriptor.limit, selector: selector,
      attributes: UInt16(raw >> 40 & 0xff) | UInt16(raw >> 52 & 15) << 8)
  }

  /// A null selector's register. The DPL stays readable: a null SS has the privilege level there.
  init(null selector: UInt16, dpl: UInt8 = 0) {
    self.init(base: 0, limit: 0, selector: selector, attributes: Self.unusable | UInt16(dpl) << 5)
  }

  /// A segment register in virtual-8086 mode (SDM vol. 3, 20.2.1).
  init(virtual8086 selector: UInt16) {
    self.init(base: UInt64(selector) << 4, limit: 0xffff, selector: selector, attributes: 0xf3)
  }

  /// A flat segment, as SYSCALL and its like load them.
  init(flat selector: UInt16, attributes: UInt16) {
    self.init(base: 0, limit: 0xffff_ffff, selector: selector, attributes: attributes)
  }

  var type: UInt8 { UInt8(attributes & 15) }
  var dpl: UInt8 { UInt8(attributes >> 5 & 3) }
  var isUsable: Bool { attributes & Self.unusable == 0 }
  var isBig: Bool { attributes & Self.big != 0 }
}

extension SegmentDescriptor {
  /// A data segment that can be written.
  var isWritableData: Bool { isCodeOrData && type & 10 == 2 }
  /// A data segment, or a code segment that can be read.
  var isReadable: Bool { isCodeOrData && type & 10 != 8 }
  /// A code segment whose callers keep their privilege level.
  var isConforming: Bool { isCode && type & 4 != 0 }
}

/// A descriptor and where it is.
struct FoundDescriptor {
  var descriptor: SegmentDescriptor
  /// Its linear address.
  var address: UInt64
}

/// Descriptors and segment registers (SDM vol. 3, chapters 3 and 5).
extension Processor {
  // MARK: Mode

  /// Derives the mode that instructions are decoded for from CS and EFER, and the contexts of accesses from the
  /// privilege level; after any change of CS, CR0, EFER.LMA, RFLAGS.VM or the level.
  func updateMode(privilege: UInt8) {
    let code = segments[SegmentIndex.cs].attributes
    cpu.pointee.code_mode =
      isLongMode && code & soft_segment.long != 0
      ? CodeMode.code64.rawValue : code & soft_segment.big != 0 ? CodeMode.code32.rawValue : CodeMode.code16.rawValue
    cpu.pointee.cpl = privilege
    updateContext()
  }

  /// The same, with the privilege level that the registers themselves tell: for state that comes from outside.
  func updateMode() {
    let isReal = cpu.pointee.cr0 & CR0.pe.rawValue == 0
    updateMode(privilege: isReal ? 0 : isVirtual8086 ? 3 : segments[SegmentIndex.ss].dpl)
  }

  /// A linear address of a system structure: outside long mode they wrap at 4 GiB.
  @inline(__always)
  func systemAddress(_ linear: UInt64) -> UInt64 { isLongMode ? linear : linear & 0xffff_ffff }

  // MARK: Descriptors

  /// The descriptor that a selector names; nil where it is null or beyond its table.
  func findDescriptor(_ selector: UInt16) throws(Interruption) -> FoundDescriptor? {
    let selector = SegmentSelector(rawValue: selector)
    guard !selector.isNull else { return nil }
    let base: UInt64
    if selector.isLocal {
      let table = segments[SegmentIndex.ldtr]
      guard table.isUsable, UInt32(selector.offset) &+ 7 <= table.limit else { return nil }
      base = table.base
    } else {
      guard UInt32(selector.offset) &+ 7 <= UInt32(cpu.pointee.gdt_limit) else { return nil }
      base = cpu.pointee.gdt_base
    }
    let address = systemAddress(base &+ UInt64(selector.offset))
    return FoundDescriptor(
      descriptor: SegmentDescriptor(rawValue: try loadSystem(address, size: 8)), address: address)
  }

  /// The descriptor that a selector names, or `vector` with the selector and `external` (EXT, bit 0) as error code.
  func descriptor(
    _ selector: UInt16, else vector: ExceptionVector, external: UInt32 = 0
  ) throws(Interruption) -> FoundDescriptor {
    guard let found = try findDescriptor(selector) else {
      throw .fault(vector, UInt32(selector & ~3) | external)
    }
    return found
  }

  /// Bits 63:32 of the base, or of the offset, in a 16-byte descriptor.
  func upperHalf(
    _ found: FoundDescriptor, _ selector: UInt16, else vector: ExceptionVector
  ) throws(Interruption) -> UInt64 {
    let limit =
      selector & 4 != 0 ? segments[SegmentIndex.ldtr].limit : UInt32(cpu.pointee.gdt_limit)
    guard UInt32(selector & ~7) &+ 15 <= limit else { throw .fault(vector, UInt32(selector & ~3)) }
    let upper = try loadSystem(found.address &+ 8, size: 8)
    // The type field of the upper half must be 0: else it is a descriptor of its own.
    guard upper >> 40 & 0x1f == 0 else { throw .fault(vector, UInt32(selector & ~3)) }
    return upper << 32
  }

  /// Sets the accessed bit of a code or data segment.
  func markAccessed(_ found: FoundDescriptor) throws(Interruption) {
    guard found.descriptor.type & 1 == 0 else { return }
    try storeSystem(found.descriptor.rawValue >> 40 & 0xff | 1, systemAddress(found.address &+ 5), size: 1)
  }

  /// The segment register that a code or data descriptor makes; the accessed bit is set already.
  func segment(_ found: FoundDescriptor, _ selector: UInt16) -> soft_segment {
    soft_segment(SegmentDescriptor(rawValue: found.descriptor.rawValue | 1 << 40), selector: selector)
  }

  // MARK: Loading segment registers

  /// MOV or POP to a segment register, and their like (SDM vol. 3, 5.6 and 5.7).
  func loadSegment(_ index: Int, _ selector: UInt16) throws(Interruption) {
    guard isProtected else { return loadRealSegment(index, selector) }
    if index == SegmentIndex.ss {
      segments[index] = try stackSegment(selector)
    } else {
      segments[index] = try dataSegment(selector)
    }
  }

  /// A segment register in real and virtual-8086 mode. The limit, and whether the segment is a big one, stay as
  /// protected mode left them.
  func loadRealSegment(_ index: Int, _ selector: UInt16) {
    let segment = segments + index
    if isVirtual8086 {
      segment.pointee = soft_segment(virtual8086: selector)
      return
    }
    if !segment.pointee.isUsable {
      segment.pointee = soft_segment(base: 0, limit: 0xffff, selector: 0, attributes: 0x93)
    }
    segment.pointee.selector = selector
    segment.pointee.base = UInt64(selector) << 4
    segment.pointee.attributes = segment.pointee.attributes & ~0xff | 0x93
  }

  /// What DS, ES, FS or GS become of a selector.
  func dataSegment(_ selector: UInt16) throws(Interruption) -> soft_segment {
    if SegmentSelector(rawValue: selector).isNull { return soft_segment(null: selector) }
    let found = try descriptor(selector, else: .generalProtection)
    let descriptor = found.descriptor
    guard descriptor.isReadable,
      descriptor.isConforming || descriptor.dpl >= max(UInt8(selector & 3), cpu.pointee.cpl)
    else { throw .generalProtection(selector) }
    guard descriptor.isPresent else { throw .fault(.segmentNotPresent, UInt32(selector & ~3)) }
    try markAccessed(found)
    return segment(found, selector)
  }

  /// What SS becomes of a selector at the current privilege level.
  func stackSegment(_ selector: UInt16) throws(Interruption) -> soft_segment {
    let privilege = cpu.pointee.cpl
    if SegmentSelector(rawValue: selector).isNull {
      guard is64Bit, privilege < 3, selector & 3 == UInt16(privilege) else { throw .generalProtection }
      return soft_segment(null: selector, dpl: privilege)
    }
    return try stackSegment(
      selector, privilege: privilege, else: .generalProtection, external: 0)
  }

  /// What SS becomes of a selector that is not null, at a privilege level that is being entered: `vector` is what a
  /// wrong one raises.
  func stackSegment(
    _ selector: UInt16, privilege: UInt8, else vector: ExceptionVector, external: UInt32
  ) throws(Interruption) -> soft_segment {
    let found = try descriptor(selector, else: vector, external: external)
    let code = UInt32(selector & ~3) | external
    guard selector & 3 == UInt16(privilege), found.descriptor.isWritableData, found.descriptor.dpl == privilege else {
      throw .fault(vector, code)
    }
    guard found.descriptor.isPresent else { throw .fault(.stackFault, code) }
    try markAccessed(found)
    return segment(found, selector)
  }

  /// A return to an outer level takes away the data segments that it may not use (SDM vol. 3, 5.8.6).
  func dropInnerSegments() {
    for index in [SegmentIndex.es, SegmentIndex.ds, SegmentIndex.fs, SegmentIndex.gs] {
      let segment = segments[index]
      let isConforming = segment.attributes & 0x1c == 0x1c
      guard segment.isUsable, !isConforming, segment.dpl < cpu.pointee.cpl else { continue }
      // The base stays: in 64-bit mode FS and GS have theirs from elsewhere.
      segments[index].selector = 0
      segments[index].attributes = soft_segment.unusable
    }
  }

  // MARK: Stacks that are not the current one

  /// The linear address of `size` bytes on a stack; nil beyond its limit.
  func stackAddress(_ stack: soft_segment, _ pointer: UInt64, size: UInt64) -> UInt64? {
    let last = pointer &+ size &- 1
    if stack.attributes & 0xc == 4 {
      guard pointer > UInt64(stack.limit), last <= (stack.isBig ? 0xffff_ffff : 0xffff) else { return nil }
    } else {
      guard last <= UInt64(stack.limit) else { return nil }
    }
    return (stack.base &+ pointer) & 0xffff_ffff
  }
}

/// Values that are pushed together: all of them, or none.
struct StackFrame {
  private(set) var count = 0
  private var values = InlineArray<36, UInt64>(repeating: 0)

  mutating func push(_ value: UInt64) {
    guard count < 36 else { return }
    values[count] = value
    count += 1
  }

  subscript(index: Int) -> UInt64 { values[index] }
}

extension Processor {
  /// Pushes a frame of values of `size` bytes each onto a stack, and answers the new stack pointer. A stack that
  /// `isNew` is an inner level's, which the processor itself writes to. `fault` is #SS's error code where there is no
  /// room.
  func push(
    _ frame: StackFrame, size: UInt8, stack: soft_segment, pointer: UInt64, isNew: Bool, fault: UInt32
  ) throws(Interruption) -> UInt64 {
    let is64 = size == 8 && isLongMode
    let mask: UInt64 = is64 ? ~0 : stack.isBig ? 0xffff_ffff : 0xffff
    let access: PageAccess = isNew ? [.implicit, .write] : dataAccess.union(.write)
    var place = pointer & mask
    for _ in 0..<frame.count {
      place = (place &- UInt64(size)) & mask
      guard let linear = frameAddress(stack, place, size: size, is64: is64) else { throw .fault(.stackFault, fault) }
      try checkAccess(linear, count: Int(size), access)
    }
    place = pointer & mask
    for index in 0..<frame.count {
      place = (place &- UInt64(size)) & mask
      guard let linear = frameAddress(stack, place, size: size, is64: is64) else { throw .fault(.stackFault, fault) }
      if isNew {
        try storeSystem(frame[index], linear, size: size)
      } else {
        try store(frame[index], linear, size: size)
      }
    }
    return place
  }

  private func frameAddress(_ stack: soft_segment, _ place: UInt64, size: UInt8, is64: Bool) -> UInt64? {
    if is64 { return isCanonical(place) && isCanonical(place &+ UInt64(size &- 1)) ? place : nil }
    return stackAddress(stack, place, size: UInt64(size))
  }
}
