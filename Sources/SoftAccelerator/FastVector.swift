import CSoftCPU
import X86

/// Vector instructions as fast operations: whole moves, and units of the host that know nothing of MXCSR and flags.
extension Processor {
  /// The fast operation of a vector instruction of 64-bit mode that the CPU has; nil where it has none.
  func fastVectorOperation(_ i: Instruction, next: UInt64) -> FastOperation? {
    let isVEX = i.prefixes.contains(.vex)
    if isVEX, !features.has(.avx) { return nil }
    switch i.operation.mnemonic {
    case .movups, .movupd, .movdqu, .lddqu, .vmovups, .vmovupd, .vmovdqu, .vlddqu:
      return fastMove(i, isAligned: false, next: next)
    case .movaps, .movapd, .movdqa, .vmovaps, .vmovapd, .vmovdqa:
      return fastMove(i, isAligned: true, next: next)
    default:
      return fastUnit(i, next: next)
    }
  }

  private func fastMove(_ i: Instruction, isAligned: Bool, next: UInt64) -> FastOperation? {
    let size = i.operands[0].size
    let (copy, load, store): (OperationCode, OperationCode, OperationCode) =
      if !i.prefixes.contains(.vex) {
        (.sseCopy, .sseLoad, .sseStore)
      } else if size == 16 {
        (.vexCopy, .vexLoad, .vexStore)
      } else {
        (.ymmCopy, .ymmLoad, .ymmStore)
      }
    let isStore = i.operands[0].kind == .memory
    var operation = FastOperation(code: isStore ? store : load)
    operation.a = i.operands[isStore ? 1 : 0].register.index
    if i.isRegisterForm {
      operation.code = copy
      operation.b = i.operands[1].register.index
      return operation
    }
    operation.immediate = isAligned ? UInt64(size) &- 1 : 0
    return operation.setMemory(i, next: next) ? operation : nil
  }

  private func fastUnit(_ i: Instruction, next: UInt64) -> FastOperation? {
    let unit = soft_unit_of(Int(i.operation.rawValue))
    let flags = Int(unit.pointee.flags)
    let slow = SOFT_UNIT_MXCSR | SOFT_UNIT_STATUS | SOFT_UNIT_STRING | SOFT_UNIT_GENERAL | SOFT_UNIT_WIDE
    let isVEX = i.prefixes.contains(.vex)
    let is256 = isVEX && i.vectorLength == 32
    guard i.opcodeMap != 0, (is256 ? unit.pointee.code.1 : unit.pointee.code.0) != 0, flags & Int(slow) == 0,
      !is256 || flags & Int(SOFT_UNIT_AVX2) == 0 || features.has(.avx2)
    else { return nil }
    var operation = FastOperation(code: .vector)
    operation.immediate = soft_unit_address(unit, is256 ? 1 : 0, Int(i.immediate))
    let destination = i.operands[0].register

    if flags & Int(SOFT_UNIT_RAX) != 0 {
      guard i.operands[0].kind == .register, i.operands[1].register.class.isVector else { return nil }
      operation.code = isVEX ? .ymmUnitG : .sseUnitG
      operation.a = destination.index &* 8
      operation.b = i.operands[1].register.index
      return operation
    }

    guard destination.class.isVector else { return nil }
    operation.a = destination.index
    // One or two sources, of which the last may be memory of the vector's size.
    var sources: (UInt8, UInt8) = (destination.index, destination.index)
    var count = 0
    var readsMemory = false
    for number in (isVEX ? 1 : 0)..<4 {
      let operand = i.operands[number]
      switch operand.kind {
      case .register:
        guard operand.register.class.isVector, !readsMemory, count < 2 else { return nil }
        sources = count == 0 ? (operand.register.index, operand.register.index) : (sources.0, operand.register.index)
        count += 1
      case .memory:
        guard operand.size == (is256 ? 32 : 16), count < 2 else { return nil }
        readsMemory = true
      default: continue
      }
    }
    if readsMemory {
      guard operation.setMemory(i, next: next) else { return nil }
    } else if isVEX {
      operation.base = sources.1
    }
    operation.b = isVEX ? sources.0 : sources.1
    if !isVEX {
      operation.code = readsMemory ? .sseUnitM : .sseUnit
    } else if destination.class == .ymm {
      operation.code = readsMemory ? .ymmUnitM : .ymmUnit
    } else {
      // A result narrower than its sources, as of VEXTRACTI128, takes the longer way from memory.
      guard !is256 || !readsMemory else { return nil }
      operation.code = readsMemory ? .vexUnitM : .vexUnit
    }
    return operation
  }

  /// Executes an instruction of which `isX87OrVector` holds, and which the CPU has.
  @inline(__always)
  func executeX87OrVector(_ i: Instruction) throws(Interruption) {
    if i.opcodeMap == 0 {
      try executeX87(i)
    } else {
      guard try executeVector(i) else { throw .invalidOpcode }
    }
  }
}

extension Instruction {
  /// Whether the instruction is x87's, or MMX's to AVX's with a native unit or a move of its own, and unprivileged.
  var isX87OrVector: Bool {
    if opcodeMap == 0 { return opcode & 0xf8 == 0xd8 || opcode == 0x9b }
    switch operation.feature {
    case .mmx, .sse, .sse2, .sse3, .ssse3, .sse41, .sse42, .aes, .pclmulqdq, .sha, .avx, .avx2, .f16c, .fma: break
    default: return false
    }
    // Their vectors are in the first two operands; what has none is the integer unit's, or rare.
    return operands[0].register.class.isVector || operands[1].register.class.isVector
  }
}

extension Register.Class {
  /// XMM and YMM registers.
  var isVector: Bool { self == .xmm || self == .ymm }
}

/// What fast operations on vectors touch.
extension FastState {
  /// No #UD or #NM for SSE: CR0.EM and TS are clear, CR4.OSFXSR is set.
  @inline(__always)
  var allowsSSE: Bool {
    // Numbers: constants of another module are not constants here.
    cpu.pointee.cr0 & 0xc | ~cpu.pointee.cr4 & 1 << 9 == 0
  }

  /// The same for AVX: CR0.TS is clear, CR4.OSXSAVE is set, and so are SSE and AVX in XCR0.
  @inline(__always)
  var allowsAVX: Bool {
    cpu.pointee.cr0 & 8 | ~cpu.pointee.cr4 & 1 << 18 | ~cpu.pointee.xcr0 & 6 == 0
  }

  @inline(__always)
  func vector(_ number: UInt8) -> UnsafeMutableRawPointer { soft_vector(cpu, Int(number)) }

  /// What VEX does to the upper half of a register.
  @inline(__always)
  func clearUpper(_ number: UInt8) {
    (vector(number) + 16).initializeMemory(as: UInt8.self, repeating: 0, count: 16)
  }
}
