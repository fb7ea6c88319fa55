import CSoftCPU
import X86

/// MMX, SSE, AVX, AES and their like: the operands are gathered here, the host's own unit computes, the result is
/// committed here. What only moves data is in ExecuteVectorMove.swift.
extension Processor {
  /// Executes an MMX, SSE or AVX instruction, or one that saves or restores their state; false where it is none.
  func executeVector(_ i: Instruction) throws(Interruption) -> Bool {
    let unit = soft_unit_of(Int(i.operation.rawValue))
    guard unit.pointee.code.0 | unit.pointee.code.1 != 0 else {
      if try executeVectorMove(i) { return true }
      return try executeStateTransfer(i)
    }
    try checkVectorState(i)
    // VPINSRQ and VPEXTRQ, which only 64-bit mode has.
    if i.rex & 8 != 0, i.mode != .code64, i.operation.mnemonic == .vpinsrd || i.operation.mnemonic == .vpextrd {
      throw .invalidOpcode
    }
    try executeUnit(i, unit)
    return true
  }

  /// #UD, #NM or #MF where the state of the operating system or of the x87 unit forbids MMX, SSE or AVX
  /// (SDM vol. 3, 2.5, 13.1 and 14.1; vol. 2, 2.4).
  func checkVectorState(_ i: Instruction) throws(Interruption) {
    let cr0 = CR0(rawValue: cpu.pointee.cr0)
    if i.prefixes.contains(.vex) {
      guard cpu.pointee.cr4 & CR4.osxsave.rawValue != 0, cpu.pointee.xcr0 & 6 == 6, features.has(.avx) else {
        throw .invalidOpcode
      }
      if cr0.contains(.ts) { throw .exception(.deviceNotAvailable) }
      return
    }
    if cr0.contains(.em) || (usesXMM(i) && cpu.pointee.cr4 & CR4.osfxsr.rawValue == 0) { throw .invalidOpcode }
    if cr0.contains(.ts) { throw .exception(.deviceNotAvailable) }
    if usesMMX(i) { try checkPendingX87() }
  }

  private func usesXMM(_ i: Instruction) -> Bool {
    i.operands[0].register.class == .xmm || i.operands[1].register.class == .xmm
  }

  private func usesMMX(_ i: Instruction) -> Bool {
    i.operands[0].register.class == .mmx || i.operands[1].register.class == .mmx
  }

  private func executeUnit(_ i: Instruction, _ unit: UnsafePointer<soft_unit>) throws(Interruption) {
    let flags = Int(unit.pointee.flags)
    let isVEX = i.prefixes.contains(.vex)
    let is256 = isVEX && i.vectorLength == 32
    if is256, flags & Int(SOFT_UNIT_AVX2) != 0, !features.has(.avx2) { throw .invalidOpcode }

    // The sources, in the order that the unit takes them.
    let destination = i.operands[0]
    let isDestinationOnly =
      destination.kind == .memory || destination.register.class.rawValue <= Register.Class.general64.rawValue
      || (isVEX && flags & Int(SOFT_UNIT_STATUS | SOFT_UNIT_STRING) == 0)
    var sources = (soft_operand(cpu), soft_operand(cpu), soft_operand(cpu))
    var count = 0
    var value: UInt64 = 0
    var readsMemory = false
    for number in (isDestinationOnly ? 1 : 0)..<4 {
      let operand = i.operands[number]
      var source = soft_operand(cpu)
      switch operand.kind {
      case .register:
        guard let vector = vectorPointer(operand.register) else {
          value = read(operand.register)
          continue
        }
        source = vector
      case .memory where flags & Int(SOFT_UNIT_GENERAL) != 0:
        value = try read(i, number)
        continue
      case .memory:
        let linear = try address(i, size: Int(operand.size), isWrite: false)
        if operand.size == 16, !isVEX, flags & Int(SOFT_UNIT_UNALIGNED) == 0 { try checkVectorAlignment(linear, 16) }
        try loadVector(linear, into: source, count: Int(operand.size))
        readsMemory = true
      default: continue
      }
      switch count {
      case 0: sources = (source, source, sources.2)
      case 1: sources.1 = source
      default: sources.2 = source
      }
      count &+= 1
    }
    let register = vectorPointer(destination.register)
    // FMA's third source is its destination.
    if count < 3, let register { sources.2 = register }

    var variant = Int(i.immediate)
    if flags & Int(SOFT_UNIT_WIDE) != 0 {
      let general = flags & Int(SOFT_UNIT_GENERAL) == 0 ? 0 : isVEX ? 2 : 1
      variant = i.operands[general].size == 8 ? 1 : 0
    }
    // INSERTPS from memory has nothing to choose from.
    if readsMemory, i.operation.mnemonic == .insertps || i.operation.mnemonic == .vinsertps { variant &= 0x3f }

    let code = soft_unit_entry(unit, is256 ? 1 : 0, variant)
    if flags & Int(SOFT_UNIT_STRING) != 0 { return executeStringUnit(i, code, sources.0, sources.1) }
    let result = soft_result(cpu)
    var rax: UInt64 = 0
    var raised: UInt32 = 0
    if flags & Int(SOFT_UNIT_MXCSR) != 0 {
      do throws(Interruption) {
        raised = try runFloating(code, sources, value, &rax)
      } catch {
        // Of an instruction that faults with #XM this is done all the same.
        if usesMMX(i) { enterMMX() }
        throw error
      }
    } else {
      rax = soft_run(code, result, sources.0, sources.1, sources.2, value, 0)
    }

    if flags & Int(SOFT_UNIT_STATUS) != 0 {
      statusFlags = rax
    } else if destination.kind == .memory {
      if flags & Int(SOFT_UNIT_RAX) != 0 { Self.write(rax, result, size: 8) }
      try storeVector(
        from: result, address(i, size: Int(destination.size), isWrite: true), count: Int(destination.size))
    } else if flags & Int(SOFT_UNIT_RAX) != 0 {
      write(destination.register, rax)
    } else if let register {
      if destination.register.class == .mmx {
        writeMMX(register, result.load(as: UInt64.self))
      } else {
        writeVector(destination.register, from: result, isVEX: isVEX)
      }
    }
    cpu.pointee.mxcsr |= raised
    if usesMMX(i) { enterMMX() }
  }

  /// Runs a floating-point unit under the guest's MXCSR; the result is in `soft_result`.
  ///
  /// - Returns: the exception flags to set in MXCSR.
  /// - Throws: #XM (SDM vol. 1, 11.5) for an exception that the guest does not mask; its flags are set.
  private func runFloating(
    _ code: soft_unit_code, _ sources: (UnsafeMutableRawPointer, UnsafeMutableRawPointer, UnsafeMutableRawPointer),
    _ value: UInt64, _ rax: inout UInt64
  ) throws(Interruption) -> UInt32 {
    var mxcsr = cpu.pointee.mxcsr & ~MXCSR.flags
    var hasTrapped: UInt32 = 0
    let result = soft_result(cpu)
    if mxcsr & MXCSR.masks == MXCSR.masks {
      rax = soft_run_mxcsr(code, result, sources.0, sources.1, sources.2, value, &mxcsr)
    } else {
      rax = soft_run_unmasked(code, result, sources.0, sources.1, sources.2, value, &mxcsr, &hasTrapped)
    }
    let raised = mxcsr & MXCSR.flags
    if hasTrapped == 0 { return raised }
    cpu.pointee.mxcsr |= raised
    throw cpu.pointee.cr4 & CR4.osxmmexcpt.rawValue != 0 ? .exception(.simdFloatingPoint) : .invalidOpcode
  }

  /// PCMPESTRx and PCMPISTRx: flags, and an index in ECX or a mask in XMM0.
  private func executeStringUnit(
    _ i: Instruction, _ code: soft_unit_code, _ a: UnsafeMutableRawPointer, _ b: UnsafeMutableRawPointer
  ) {
    // Lengths are 64-bit only with REX.W; the unit's always are.
    let is64 = i.rex & 8 != 0 && i.mode == .code64
    let lengths = (
      is64 ? general[0] : Self.signExtend(general[0], 4), is64 ? general[2] : Self.signExtend(general[2], 4)
    )
    let result = soft_result(cpu)
    let packed = soft_run(code, result, a, b, a, lengths.0, lengths.1)
    statusFlags = packed & 0xffff_ffff
    switch i.operation.mnemonic {
    case .pcmpestri, .pcmpistri, .vpcmpestri, .vpcmpistri: general[1] = packed >> 32
    default: writeVector(Register(.xmm, 0), from: result, isVEX: i.prefixes.contains(.vex))
    }
  }

  // MARK: Registers

  /// The bytes of a vector or MMX register, nil for any other.
  @inline(__always)
  func vectorPointer(_ register: Register) -> UnsafeMutableRawPointer? {
    switch register.class {
    case .xmm, .ymm: soft_vector(cpu, Int(register.index))
    case .mmx: soft_st(cpu, Int(register.index))
    default: nil
    }
  }

  /// Writes a vector register: all of a YMM register, or an XMM register and with VEX zeros above it.
  func writeVector(_ register: Register, from source: UnsafeRawPointer, isVEX: Bool) {
    let vector = soft_vector(cpu, Int(register.index))
    vector.copyMemory(from: source, byteCount: register.class == .ymm ? 32 : 16)
    if isVEX, register.class == .xmm { clearUpper(vector) }
  }

  /// Clears the upper half of a YMM register.
  func clearUpper(_ vector: UnsafeMutableRawPointer) {
    (vector + 16).initializeMemory(as: UInt8.self, repeating: 0, count: 16)
  }

  /// Writes an MMX register, which is an x87 register whose sign and exponent are all ones (SDM vol. 1, 9.6.2).
  func writeMMX(_ register: UnsafeMutableRawPointer, _ value: UInt64) {
    register.storeBytes(of: value, as: UInt64.self)
    register.storeBytes(of: 0xffff, toByteOffset: 8, as: UInt16.self)
  }

  /// What an MMX instruction does to the x87 unit: no register is empty, the top is 0 (SDM vol. 1, 9.5.1).
  func enterMMX() {
    cpu.pointee.fpu_valid = 0xff
    cpu.pointee.fpu_status &= ~X87Status.top.rawValue
  }

  // MARK: Memory

  /// #GP(0) for an operand that must be aligned to `size` bytes and is not.
  @inline(__always)
  func checkVectorAlignment(_ linear: UInt64, _ size: UInt64) throws(Interruption) {
    if linear & (size &- 1) != 0 { throw .generalProtection }
  }

  /// What an operand of more than 8 bytes is aligned to where alignment is checked (#AC).
  private static func alignment(_ count: Int) -> UInt8 { count == 10 ? 8 : 16 }

  /// Loads up to 32 bytes.
  func loadVector(
    _ linear: UInt64, into buffer: UnsafeMutableRawPointer, count: Int
  ) throws(Interruption) {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let last = linear &+ UInt64(count &- 1)
    if entry.pointee.read_tag == last & ~0xfff | cpu.pointee.data_context {
      buffer.copyMemory(from: Self.host(linear, entry), byteCount: count)
      return
    }
    if count <= 8 {
      Self.write(try load(linear, size: UInt8(count)), buffer, size: UInt8(count))
      return
    }
    try checkAlignment(linear, size: Self.alignment(count))
    try load(linear, into: buffer, count: count)
    if watchesData { noteDataAccess(linear, count: count, isWrite: false) }
  }

  /// Stores up to 32 bytes.
  func storeVector(
    from buffer: UnsafeRawPointer, _ linear: UInt64, count: Int
  ) throws(Interruption) {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let last = linear &+ UInt64(count &- 1)
    if entry.pointee.write_tag == last & ~0xfff | cpu.pointee.data_context {
      Self.host(linear, entry).copyMemory(from: buffer, byteCount: count)
      return
    }
    if count <= 8 {
      try store(Self.read(buffer, size: UInt8(count)), linear, size: UInt8(count))
      return
    }
    try checkAlignment(linear, size: Self.alignment(count))
    try store(from: buffer, linear, count: count)
    if watchesData { noteDataAccess(linear, count: count, isWrite: true) }
  }
}

/// Bits of MXCSR (SDM vol. 1, figure 10-3).
enum MXCSR {
  static let flags: UInt32 = 0x3f
  static let masks: UInt32 = 0x1f80
  /// The bits that exist: MXCSR_MASK in an FXSAVE area.
  static let all: UInt32 = 0xffff
}
