import CSoftCPU
import X86

/// MMX, SSE and AVX instructions that only move data.
extension Processor {
  /// Executes a move; false where the instruction is none.
  func executeVectorMove(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .movups, .movupd, .movdqu, .lddqu, .vmovups, .vmovupd, .vmovdqu, .vlddqu:
      try checkVectorState(i)
      try moveWhole(i, isAligned: false)
    case .movaps, .movapd, .movdqa, .movntps, .movntpd, .movntdq, .movntdqa,
      .vmovaps, .vmovapd, .vmovdqa, .vmovntps, .vmovntpd, .vmovntdq:
      try checkVectorState(i)
      try moveWhole(i, isAligned: true)
    case .vmovntdqa:
      try checkVectorState(i)
      if i.vectorLength == 32, !features.has(.avx2) { throw .invalidOpcode }
      try moveWhole(i, isAligned: true)
    case .movd, .movq, .movq2dq, .movdq2q, .movntq, .vmovd, .vmovq:
      try checkVectorState(i)
      try writeLow(i, readLow(i, 1))
      if i.operands[0].register.class == .mmx || i.operands[1].register.class == .mmx { enterMMX() }
    case .movss, .movsd, .vmovss, .vmovsd:
      try checkVectorState(i)
      try moveScalar(i)
    case .movlps, .movlpd, .movhps, .movhpd, .movhlps, .movlhps,
      .vmovlps, .vmovlpd, .vmovhps, .vmovhpd, .vmovhlps, .vmovlhps:
      try checkVectorState(i)
      try moveHalf(i)
    case .maskmovq, .maskmovdqu, .vmaskmovdqu:
      try checkVectorState(i)
      try storeMaskedBytes(i)
    case .vmaskmovps, .vpmaskmovd:
      try checkVectorState(i)
      try moveMasked(i, size: 4)
    case .vmaskmovpd, .vpmaskmovq:
      try checkVectorState(i)
      try moveMasked(i, size: 8)
    case .vgatherdps, .vpgatherdd:
      try checkVectorState(i)
      try gather(i, indexSize: 4, size: 4)
    case .vgatherdpd, .vpgatherdq:
      try checkVectorState(i)
      try gather(i, indexSize: 4, size: 8)
    case .vgatherqps, .vpgatherqd:
      try checkVectorState(i)
      try gather(i, indexSize: 8, size: 4)
    case .vgatherqpd, .vpgatherqq:
      try checkVectorState(i)
      try gather(i, indexSize: 8, size: 8)
    case .emms:
      let cr0 = CR0(rawValue: cpu.pointee.cr0)
      if cr0.contains(.em) { throw .invalidOpcode }
      if cr0.contains(.ts) { throw .exception(.deviceNotAvailable) }
      try checkPendingX87()
      enterMMX()
      cpu.pointee.fpu_valid = 0
    case .vzeroupper, .vzeroall:
      try checkVectorState(i)
      let isAll = i.operation.mnemonic == .vzeroall
      for index in 0..<(is64Bit ? 16 : 8) {
        let vector = soft_vector(cpu, index)
        (isAll ? vector : vector + 16).initializeMemory(as: UInt8.self, repeating: 0, count: isAll ? 32 : 16)
      }
    default:
      return false
    }
    return true
  }

  /// All of a vector between a register and a register or memory.
  private func moveWhole(_ i: Instruction, isAligned: Bool) throws(Interruption) {
    let isVEX = i.prefixes.contains(.vex)
    let size = Int(i.operands[0].size)
    if i.operands[0].kind == .memory {
      let linear = try address(i, size: size, isWrite: true)
      if isAligned { try checkVectorAlignment(linear, UInt64(size)) }
      try storeVector(from: soft_vector(cpu, Int(i.operands[1].register.index)), linear, count: size)
    } else if i.operands[1].kind == .memory {
      let linear = try address(i, size: size, isWrite: false)
      if isAligned { try checkVectorAlignment(linear, UInt64(size)) }
      let buffer = soft_operand(cpu)
      try loadVector(linear, into: buffer, count: size)
      writeVector(i.operands[0].register, from: buffer, isVEX: isVEX)
    } else {
      writeVector(i.operands[0].register, from: soft_vector(cpu, Int(i.operands[1].register.index)), isVEX: isVEX)
    }
  }

  /// The low bytes of an operand of any kind, zero-extended.
  private func readLow(_ i: Instruction, _ number: Int) throws(Interruption) -> UInt64 {
    let operand = i.operands[number]
    if operand.kind == .register, let vector = vectorPointer(operand.register) {
      return vector.load(as: UInt64.self) & Self.mask(operand.size)
    }
    return try read(i, number)
  }

  /// Writes operand 0; a vector register is cleared above the value.
  private func writeLow(_ i: Instruction, _ value: UInt64) throws(Interruption) {
    let operand = i.operands[0]
    switch operand.register.class {
    case .xmm:
      writeVector(operand.register, value, 0, isVEX: i.prefixes.contains(.vex))
    case .mmx:
      writeMMX(soft_st(cpu, Int(operand.register.index)), value)
    default:
      // A memory operand narrower than the register that is stored.
      try write(i, 0, value & Self.mask(operand.size))
    }
  }

  /// Writes both halves of an XMM register.
  private func writeVector(_ register: Register, _ low: UInt64, _ high: UInt64, isVEX: Bool) {
    let vector = soft_vector(cpu, Int(register.index))
    vector.storeBytes(of: low, as: UInt64.self)
    vector.storeBytes(of: high, toByteOffset: 8, as: UInt64.self)
    if isVEX { clearUpper(vector) }
  }

  /// The halves of an XMM register.
  private func halves(_ register: Register) -> (low: UInt64, high: UInt64) {
    let vector = soft_vector(cpu, Int(register.index))
    return (vector.load(as: UInt64.self), vector.load(fromByteOffset: 8, as: UInt64.self))
  }

  /// MOVSS and MOVSD: from memory the rest of the register is cleared, between registers it comes from the first source.
  private func moveScalar(_ i: Instruction) throws(Interruption) {
    let isVEX = i.prefixes.contains(.vex)
    let size = i.operands[0].size
    guard i.operands[0].kind == .register, i.operands[1].kind == .register else {
      return try writeLow(i, readLow(i, 1))
    }
    let base = halves(i.operands[isVEX ? 1 : 0].register)
    let value = halves(i.operands[isVEX ? 2 : 1].register).low
    let mask = Self.mask(size)
    writeVector(i.operands[0].register, base.low & ~mask | value & mask, base.high, isVEX: isVEX)
  }

  /// MOVLPS, MOVHPS, MOVHLPS, MOVLHPS and their like: a half of an XMM register.
  private func moveHalf(_ i: Instruction) throws(Interruption) {
    let isVEX = i.prefixes.contains(.vex)
    let isHigh: Bool =
      switch i.operation.mnemonic {
      case .movhps, .movhpd, .movlhps, .vmovhps, .vmovhpd, .vmovlhps: true
      default: false
      }
    if i.operands[0].kind == .memory {
      let source = halves(i.operands[1].register)
      return try write(i, 0, isHigh ? source.high : source.low)
    }
    let source = i.operands[isVEX ? 2 : 1]
    var value: UInt64
    if source.kind == .memory {
      value = try read(i, isVEX ? 2 : 1)
    } else {
      let other = halves(source.register)
      value = isHigh ? other.low : other.high
    }
    let base = halves(i.operands[isVEX ? 1 : 0].register)
    writeVector(i.operands[0].register, isHigh ? base.low : value, isHigh ? value : base.high, isVEX: isVEX)
  }

  /// MASKMOVQ and MASKMOVDQU: the bytes of operand 0 whose mask byte is negative go to DS:rDI.
  private func storeMaskedBytes(_ i: Instruction) throws(Interruption) {
    guard let data = vectorPointer(i.operands[0].register), let mask = vectorPointer(i.operands[1].register) else {
      return
    }
    let isMMX = i.operands[0].register.class == .mmx
    let count = isMMX ? 8 : 16
    let start = general[7] & Self.mask(i.addressSize)
    // All bytes are checked before one is stored.
    for isStore in [false, true] {
      for index in 0..<count where mask.load(fromByteOffset: index, as: UInt8.self) & 0x80 != 0 {
        let linear = try linear(Int(i.segment.index), start &+ UInt64(index), size: 1, isWrite: true)
        if isStore {
          try store(data.load(fromByteOffset: index, as: UInt8.self), linear)
        } else {
          try checkWrite(linear, count: 1)
        }
      }
    }
    if isMMX { enterMMX() }
  }

  /// VMASKMOVPx and VPMASKMOVx: only elements with a negative mask are touched; loads clear the others.
  private func moveMasked(_ i: Instruction, size: Int) throws(Interruption) {
    let isStore = i.operands[0].kind == .memory
    let mask = soft_vector(cpu, Int(i.operands[1].register.index))
    let count = Int(i.vectorLength) / size
    let start = offset(i)
    let buffer = soft_operand(cpu)
    buffer.initializeMemory(as: UInt8.self, repeating: 0, count: 32)
    let data = isStore ? soft_vector(cpu, Int(i.operands[2].register.index)) : buffer
    for isTransfer in isStore ? [false, true] : [true] {
      for index in 0..<count where mask.load(fromByteOffset: index * size + size - 1, as: UInt8.self) & 0x80 != 0 {
        // An operand that begins at the end of what its addresses reach goes on beyond.
        let linear = try linear(Int(i.segment.index), start &+ UInt64(index * size), size: size, isWrite: isStore)
        if !isTransfer {
          try checkWrite(linear, count: size)
        } else if isStore {
          try store(Self.read(data + index * size, size: UInt8(size)), linear, size: UInt8(size))
        } else {
          Self.write(try load(linear, size: UInt8(size)), data + index * size, size: UInt8(size))
        }
      }
    }
    if !isStore { writeVector(i.operands[0].register, from: buffer, isVEX: true) }
  }

  /// Gathers: elements with a negative mask are loaded in order; after a fault the elements before it are done and
  /// their masks clear (SDM vol. 2, VPGATHERDD).
  private func gather(_ i: Instruction, indexSize: Int, size: Int) throws(Interruption) {
    let destination = soft_vector(cpu, Int(i.operands[0].register.index))
    let mask = soft_vector(cpu, Int(i.operands[2].register.index))
    let indices = soft_vector(cpu, Int(i.index.index))
    let count = Int(i.vectorLength) / max(indexSize, size)
    // The base and displacement alone: a vector index does not count there.
    let base = offset(i)
    let buffer = soft_operand(cpu)
    buffer.initializeMemory(as: UInt8.self, repeating: 0, count: 32)
    buffer.copyMemory(from: destination, byteCount: count * size)
    var done = 0
    do throws(Interruption) {
      while done < count {
        if mask.load(fromByteOffset: done * size + size - 1, as: UInt8.self) & 0x80 != 0 {
          let index = Self.signExtend(Self.read(indices + done * indexSize, size: UInt8(indexSize)), UInt8(indexSize))
          let offset = (base &+ index &* UInt64(i.scale)) & Self.mask(i.addressSize)
          let linear = try linear(Int(i.segment.index), offset, size: size, isWrite: false)
          Self.write(try load(linear, size: UInt8(size)), buffer + done * size, size: UInt8(size))
        }
        done += 1
      }
    } catch {
      // A device access starts the whole instruction again, a fault goes on from here.
      if case .exit = error { throw error }
      destination.copyMemory(from: buffer, byteCount: done * size)
      mask.initializeMemory(as: UInt8.self, repeating: 0, count: done * size)
      throw error
    }
    destination.copyMemory(from: buffer, byteCount: 32)
    mask.initializeMemory(as: UInt8.self, repeating: 0, count: 32)
  }
}
