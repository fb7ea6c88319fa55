import CSoftCPU
import X86

/// Operands of a decoded instruction, of any size, in any mode.
extension Processor {
  // MARK: Registers

  /// A general register as an operand names it, zero-extended.
  @inline(__always)
  func read(_ register: Register) -> UInt64 {
    let value = general[Int(register.index)]
    return switch register.class {
    case .general64: value
    case .general32: value & 0xffff_ffff
    case .general16: value & 0xffff
    case .general8High: general[Int(register.index & 3)] >> 8 & 0xff
    case .general8: value & 0xff
    case .segment: UInt64(segments[Int(register.index)].selector)
    default: value
    }
  }

  /// Writes a general register: 32 bits clear the upper half, 8 and 16 leave the rest (SDM vol. 1, 3.4.1.1).
  @inline(__always)
  func write(_ register: Register, _ value: UInt64) {
    let index = Int(register.index)
    switch register.class {
    case .general64: general[index] = value
    case .general32: general[index] = value & 0xffff_ffff
    case .general16: general[index] = general[index] & ~0xffff | value & 0xffff
    case .general8High: general[index & 3] = general[index & 3] & ~0xff00 | (value & 0xff) << 8
    default: general[index] = general[index] & ~0xff | value & 0xff
    }
  }

  /// Register `index` cut to `size` bytes.
  @inline(__always)
  func read(_ index: Int, size: UInt8) -> UInt64 { general[index] & Self.mask(size) }

  /// Writes `size` bytes of register `index` with the same rule for the rest.
  @inline(__always)
  func write(_ index: Int, _ value: UInt64, size: UInt8) {
    general[index] =
      switch size {
      case 8: value
      case 4: value & 0xffff_ffff
      case 2: general[index] & ~0xffff | value & 0xffff
      default: general[index] & ~0xff | value & 0xff
      }
  }

  /// All ones in `size` bytes.
  @inline(__always)
  static func mask(_ size: UInt8) -> UInt64 { ~0 >> (64 &- UInt64(size) &* 8) }

  /// The sign bit of `size` bytes.
  @inline(__always)
  static func signBit(_ size: UInt8) -> UInt64 { 1 << (UInt64(size) &* 8 &- 1) }

  /// Sign-extends `size` bytes to 64 bits.
  @inline(__always)
  static func signExtend(_ value: UInt64, _ size: UInt8) -> UInt64 {
    let shift = 64 &- Int64(size) &* 8
    return UInt64(bitPattern: Int64(bitPattern: value << UInt64(shift)) >> shift)
  }

  // MARK: Addresses

  /// The offset of the memory operand within its segment.
  @inline(__always)
  func offset(_ i: Instruction) -> UInt64 {
    var offset = UInt64(bitPattern: i.displacement)
    switch i.base.class {
    case .none: break
    case .instructionPointer: offset &+= nextIP
    default: offset &+= general[Int(i.base.index)]
    }
    // A vector index (VSIB) is its instruction's own business.
    if i.index != .none, i.index.class.rawValue <= Register.Class.general64.rawValue {
      offset &+= general[Int(i.index.index)] &* UInt64(i.scale)
    }
    return offset & Self.mask(i.addressSize)
  }

  /// The linear address of the memory operand, whose `size` bytes are checked against the segment.
  func address(_ i: Instruction, size: Int, isWrite: Bool) throws(Interruption) -> UInt64 {
    try linear(Int(i.segment.index), offset(i), size: size, isWrite: isWrite)
  }

  /// The linear address of `size` bytes at an offset of a segment (index as encodings number it).
  ///
  /// - Throws: #GP(0), or #SS(0) for the stack segment: not canonical, beyond the limit, null, or of the wrong type.
  func linear(_ index: Int, _ offset: UInt64, size: Int, isWrite: Bool) throws(Interruption) -> UInt64 {
    let segment = segments + index
    if cpu.pointee.code_mode == CodeMode.code64.rawValue {
      let address = index >= 4 ? segment.pointee.base &+ offset : offset
      guard isCanonical(address), isCanonical(address &+ UInt64(size &- 1)) else { throw segmentFault(index) }
      return address
    }
    let attributes = segment.pointee.attributes
    // Bit 12: unusable. Writes need a writable data segment, reads any but execute-only code.
    let isCode = attributes & 8 != 0
    let isAllowed = isWrite ? !isCode && attributes & 2 != 0 : !isCode || attributes & 2 != 0
    guard attributes & 1 << 12 == 0, isAllowed || !isProtected else { throw segmentFault(index) }
    let offset = offset & 0xffff_ffff
    let last = offset &+ UInt64(size &- 1)
    let limit = UInt64(segment.pointee.limit)
    if !isCode, attributes & 4 != 0 {
      let top: UInt64 = attributes & 1 << 10 != 0 ? 0xffff_ffff : 0xffff
      guard offset > limit, last <= top else { throw segmentFault(index) }
    } else {
      guard last <= limit else { throw segmentFault(index) }
    }
    return (segment.pointee.base &+ offset) & 0xffff_ffff
  }

  /// Whether a linear address is canonical (SDM vol. 1, 3.3.7.1).
  @inline(__always)
  func isCanonical(_ linear: UInt64) -> Bool {
    let shift: Int64 = cpu.pointee.cr4 & CR4.la57.rawValue != 0 ? 7 : 16
    return Int64(bitPattern: linear << UInt64(shift)) >> shift == Int64(bitPattern: linear)
  }

  private func segmentFault(_ index: Int) -> Interruption {
    .fault(index == Int(Register.ss.index) ? .stackFault : .generalProtection, 0)
  }

  /// Protected mode, and not virtual-8086 mode: segments have descriptors.
  @inline(__always)
  var isProtected: Bool { cpu.pointee.cr0 & CR0.pe.rawValue != 0 && !isVirtual8086 }

  /// Virtual-8086 mode.
  @inline(__always)
  var isVirtual8086: Bool { cpu.pointee.other_flags & RFLAGS.vm.rawValue != 0 }

  /// Long mode: 64-bit or compatibility.
  @inline(__always)
  var isLongMode: Bool { cpu.pointee.efer & EFER.lma.rawValue != 0 }

  /// 64-bit mode.
  @inline(__always)
  var is64Bit: Bool { cpu.pointee.code_mode == CodeMode.code64.rawValue }

  // MARK: Operands

  /// An operand that is a general register, memory or an immediate, zero-extended; at most 8 bytes.
  func read(_ i: Instruction, _ number: Int) throws(Interruption) -> UInt64 {
    let operand = i.operands[number]
    switch operand.kind {
    case .register: return read(operand.register)
    case .memory:
      return try load(address(i, size: Int(operand.size), isWrite: false), size: operand.size)
    case .immediate, .one: return UInt64(bitPattern: i.immediate) & Self.mask(operand.size)
    default: return UInt64(i.secondImmediate)
    }
  }

  /// Writes an operand that is a general register or memory; at most 8 bytes.
  func write(_ i: Instruction, _ number: Int, _ value: UInt64) throws(Interruption) {
    let operand = i.operands[number]
    if operand.kind == .register {
      write(operand.register, value)
    } else {
      try store(value, address(i, size: Int(operand.size), isWrite: true), size: operand.size)
    }
  }

  /// Replaces operand 0 by what `change` makes of it, atomically with LOCK; returns the old value.
  @inline(__always)
  func modify(_ i: Instruction, _ change: (UInt64) -> UInt64) throws(Interruption) -> UInt64 {
    let operand = i.operands[0]
    if operand.kind == .register {
      let old = read(operand.register)
      write(operand.register, change(old))
      return old
    }
    return try modify(
      address(i, size: Int(operand.size), isWrite: true), size: operand.size, isLocked: i.prefixes.contains(.lock),
      change)
  }

  // MARK: The stack

  /// The size of the stack pointer in bytes.
  @inline(__always)
  var stackSize: UInt8 {
    is64Bit ? 8 : segments[Int(Register.ss.index)].attributes & 1 << 10 != 0 ? 4 : 2
  }

  /// Pushes `size` bytes.
  func push(_ value: UInt64, size: UInt8) throws(Interruption) {
    let width = stackSize
    let pointer = (general[4] &- UInt64(size)) & Self.mask(width)
    try store(value, linear(2, pointer, size: Int(size), isWrite: true), size: size)
    write(4, pointer, size: width)
  }

  /// The `size` bytes at an offset above the stack pointer, which stays.
  func peek(_ offset: UInt64 = 0, size: UInt8) throws(Interruption) -> UInt64 {
    try load(linear(2, (general[4] &+ offset) & Self.mask(stackSize), size: Int(size), isWrite: false), size: size)
  }

  /// Moves the stack pointer up.
  func drop(_ count: UInt64) {
    let width = stackSize
    write(4, general[4] &+ count, size: width)
  }

  /// Pops `size` bytes.
  func pop(size: UInt8) throws(Interruption) -> UInt64 {
    let value = try peek(size: size)
    drop(UInt64(size))
    return value
  }
}
