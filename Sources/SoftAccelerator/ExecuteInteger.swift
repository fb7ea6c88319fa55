import CSoftCPU
import X86

/// Integer instructions but those on bits, strings and ports.
extension Processor {
  /// Executes an integer instruction or a near branch; false where the instruction is none, or has an operand (segment,
  /// control or debug register, far pointer) that makes it the system's.
  func executeInteger(_ i: Instruction) throws(Interruption) -> Bool {
    let size = i.operands[0].size
    switch i.operation.mnemonic {
    case .mov:
      guard i.operands[0].isPlain, i.operands[1].isPlain else { return false }
      try write(i, 0, read(i, 1))
    case .movzx:
      try write(i, 0, read(i, 1))
    case .movsx, .movsxd:
      try write(i, 0, Self.signExtend(read(i, 1), i.operands[1].size))
    case .movbe:
      let operandSize = i.operands[0].size
      try write(i, 0, read(i, 1).byteSwapped >> (64 &- UInt64(operandSize) &* 8))
    case .movnti:
      try write(i, 0, read(i, 1))
    case .lea:
      write(i.operands[0].register, offset(i))
    case .xchg:
      let register = i.operands[1].register
      if i.operands[0].kind == .register {
        let old = read(i.operands[0].register)
        write(i.operands[0].register, read(register))
        write(register, old)
      } else {
        let value = read(register)
        write(
          register,
          try modify(address(i, size: Int(size), isWrite: true), size: size, isLocked: true) { _ in value })
      }

    case .add:
      let b = try source(i)
      let a = try modify(i) { $0 &+ b }
      setAdditionFlags(a, b, a &+ b, size)
    case .adc:
      let b = try source(i)
      let c: UInt64 = carry ? 1 : 0
      let a = try modify(i) { $0 &+ b &+ c }
      setAdditionFlags(a, b, a &+ b &+ c, size)
    case .sub:
      let b = try source(i)
      let a = try modify(i) { $0 &- b }
      setSubtractionFlags(a, b, a &- b, size)
    case .sbb:
      let b = try source(i)
      let c: UInt64 = carry ? 1 : 0
      let a = try modify(i) { $0 &- b &- c }
      setSubtractionFlags(a, b, a &- b &- c, size)
    case .cmp:
      let b = try source(i)
      let a = try read(i, 0)
      setSubtractionFlags(a, b, a &- b, size)
    case .and:
      let b = try source(i)
      setFlags(result: try modify(i) { $0 & b } & b, carries: 0, size: size)
    case .or:
      let b = try source(i)
      setFlags(result: try modify(i) { $0 | b } | b, carries: 0, size: size)
    case .xor:
      let b = try source(i)
      setFlags(result: try modify(i) { $0 ^ b } ^ b, carries: 0, size: size)
    case .test:
      let b = try source(i)
      setFlags(result: try read(i, 0) & b, carries: 0, size: size)
    case .not:
      _ = try modify(i) { ~$0 }
    case .neg:
      let a = try modify(i) { 0 &- $0 }
      setSubtractionFlags(0, a, 0 &- a, size)
    case .inc:
      let c = carry
      let a = try modify(i) { $0 &+ 1 }
      setAdditionFlags(a, 1, a &+ 1, size)
      set(carry: c)
    case .dec:
      let c = carry
      let a = try modify(i) { $0 &- 1 }
      setSubtractionFlags(a, 1, a &- 1, size)
      set(carry: c)
    case .cmpxchg: try compareExchange(i)
    case .cmpxchg8b: try compareExchange8(i)
    case .cmpxchg16b: try compareExchange16(i)
    case .xadd:
      let register = i.operands[1].register
      let b = read(register)
      let a = try modify(i) { $0 &+ b }
      // Where both are one register, the sum stays.
      if i.operands[0].kind == .register {
        write(register, a)
        write(i.operands[0].register, a &+ b)
      } else {
        write(register, a)
      }
      setAdditionFlags(a, b, a &+ b, size)

    case .mul, .imul: try multiply(i)
    case .div, .idiv: try divide(i)
    case .cbw, .cwde, .cdqe:
      write(0, Self.signExtend(general[0], i.operandSize >> 1), size: i.operandSize)
    case .cwd, .cdq, .cqo:
      write(2, Int64(bitPattern: Self.signExtend(general[0], i.operandSize)) < 0 ? ~0 : 0, size: i.operandSize)
    case .daa, .das: adjustDecimal(isSubtraction: i.operation.mnemonic == .das)
    case .aaa, .aas: adjustASCII(isSubtraction: i.operation.mnemonic == .aas)
    case .aam:
      let base = UInt64(i.immediate & 0xff)
      guard base != 0 else { throw .exception(.divideError) }
      let al = general[0] & 0xff
      write(0, (al / base) << 8 | al % base, size: 2)
      setFlags(result: al % base, carries: 0, size: 1)
    case .aad:
      let al = (general[0] &+ (general[0] >> 8 & 0xff) &* UInt64(i.immediate & 0xff)) & 0xff
      write(0, al, size: 2)
      setFlags(result: al, carries: 0, size: 1)

    case .sahf: statusFlags = statusFlags & RFLAGS.of.rawValue | general[0] >> 8 & ~RFLAGS.of.rawValue
    case .lahf:
      general[0] = general[0] & ~0xff00 | (statusFlags & 0xff | 2) << 8
    case .cmc: set(carry: !carry)
    case .clc: set(carry: false)
    case .stc: set(carry: true)
    case .cld: cpu.pointee.other_flags &= ~RFLAGS.df.rawValue
    case .std: cpu.pointee.other_flags |= RFLAGS.df.rawValue
    case .salc: write(0, carry ? 0xff : 0, size: 1)
    case .cmovo, .cmovno, .cmovb, .cmovae, .cmove, .cmovne, .cmovbe, .cmova, .cmovs, .cmovns, .cmovp, .cmovnp, .cmovl,
      .cmovge, .cmovle, .cmovg:
      // The source is read, and a 32-bit destination's upper half cleared, whatever the condition.
      let value = try read(i, 1)
      let register = i.operands[0].register
      write(register, holds(i.opcode & 15) ? value : read(register))
    case .seto, .setno, .setb, .setae, .sete, .setne, .setbe, .seta, .sets, .setns, .setp, .setnp, .setl, .setge,
      .setle,
      .setg:
      try write(i, 0, holds(i.opcode & 15) ? 1 : 0)
    case .bswap:
      let register = i.operands[0].register
      // With 16 bits undefined; processors clear the register (SDM vol. 2, BSWAP).
      write(register, size == 2 ? 0 : read(register).byteSwapped >> (64 &- UInt64(size) &* 8))
    case .xlat:
      let place = (general[3] &+ (general[0] & 0xff)) & Self.mask(i.addressSize)
      write(0, try load(linear(Int(i.segment.index), place, size: 1, isWrite: false), size: 1), size: 1)
    case .bound:
      let width = i.operands[0].size
      let index = Int64(bitPattern: Self.signExtend(read(i.operands[0].register), width))
      let place = try address(i, size: Int(width) &* 2, isWrite: false)
      let low = Int64(bitPattern: Self.signExtend(try load(place, size: width), width))
      let high = Int64(bitPattern: Self.signExtend(try load(place &+ UInt64(width), size: width), width))
      if index < low || index > high { throw .exception(.boundRangeExceeded) }

    case .push:
      guard i.operands[0].isPlain else { return false }
      try push(read(i, 0), size: i.operandSize)
    case .pop:
      guard i.operands[0].isPlain else { return false }
      try popOperand(i)
    case .pusha, .popa: try pushOrPopAll(i)
    case .enter: try enter(i)
    case .leave:
      let width = stackSize
      let frame = general[5] & Self.mask(width)
      let saved = try load(linear(2, frame, size: Int(i.operandSize), isWrite: false), size: i.operandSize)
      write(4, frame &+ UInt64(i.operandSize), size: width)
      write(5, saved, size: i.operandSize)

    case .jo, .jno, .jb, .jae, .je, .jne, .jbe, .ja, .js, .jns, .jp, .jnp, .jl, .jge, .jle, .jg:
      if holds(i.opcode & 15) { try branch(i) }
    case .loop, .loope, .loopne:
      let count = (general[1] &- 1) & Self.mask(i.addressSize)
      let goes =
        count != 0
        && (i.operation.mnemonic == .loop || zero == (i.operation.mnemonic == .loope))
      if goes { try branch(i) }
      write(1, count, size: i.addressSize)
    case .jcxz, .jecxz, .jrcxz:
      if general[1] & Self.mask(i.addressSize) == 0 { try branch(i) }
    case .jmp:
      guard let target = try nearTarget(i) else { return false }
      nextIP = try checked(target)
    case .call:
      guard let target = try nearTarget(i) else { return false }
      let destination = try checked(target)
      try push(nextIP, size: i.operandSize)
      nextIP = destination
    case .ret:
      let target = try checked(peek(size: i.operandSize))
      drop(UInt64(i.operandSize) &+ (i.operands[0].kind == .immediate ? UInt64(i.immediate & 0xffff) : 0))
      nextIP = target

    case .nop, .pause, .endbr32, .endbr64, .prefetch, .prefetchw, .prefetchwt1, .prefetchnta, .prefetcht0, .prefetcht1,
      .prefetcht2, .lfence, .mfence, .sfence, .cldemote:
      break
    case .ud0, .ud1, .ud2: throw .invalidOpcode
    case .rdrand, .rdseed:
      write(i.operands[0].register, randomNumber())
      statusFlags = RFLAGS.cf.rawValue
    default:
      if try executeBits(i) { return true }
      if try executeString(i) { return true }
      return try executePort(i)
    }
    return true
  }

  /// Operand 1 cut to the size of operand 0.
  @inline(__always)
  private func source(_ i: Instruction) throws(Interruption) -> UInt64 {
    try read(i, 1) & Self.mask(i.operands[0].size)
  }

  /// Flags of a + b (+ carry) = `result`, of `size` bytes (AMD APM vol. 1, 3.1.4).
  @inline(__always)
  func setAdditionFlags(_ a: UInt64, _ b: UInt64, _ result: UInt64, _ size: UInt8) {
    setFlags(result: result, carries: a & b | (a | b) & ~result, size: size)
  }

  /// Flags of a - b (- borrow) = `result`, of `size` bytes.
  @inline(__always)
  func setSubtractionFlags(_ a: UInt64, _ b: UInt64, _ result: UInt64, _ size: UInt8) {
    setFlags(result: result, carries: ~a & b | ~(a ^ b) & result, size: size)
  }

  // MARK: Compare and exchange

  private func compareExchange(_ i: Instruction) throws(Interruption) {
    let size = i.operands[0].size
    let accumulator = general[0] & Self.mask(size)
    let replacement = read(i.operands[1].register)
    // Memory is written either way, as the processor's locked cycle does; a register is not, not even its upper half.
    if i.operands[0].kind == .register {
      let old = read(i.operands[0].register)
      if old == accumulator { write(i.operands[0].register, replacement) } else { write(0, old, size: size) }
      return setSubtractionFlags(accumulator, old, accumulator &- old, size)
    }
    let old = try modify(i) { $0 & Self.mask(size) == accumulator ? replacement : $0 }
    if old != accumulator { write(0, old, size: size) }
    setSubtractionFlags(accumulator, old, accumulator &- old, size)
  }

  private func compareExchange8(_ i: Instruction) throws(Interruption) {
    let expected = general[2] << 32 | general[0] & 0xffff_ffff
    let replacement = general[1] << 32 | general[3] & 0xffff_ffff
    let place = try address(i, size: 8, isWrite: true)
    let old = try modify(place, size: 8, isLocked: i.prefixes.contains(.lock)) { $0 == expected ? replacement : $0 }
    if old != expected {
      general[0] = old & 0xffff_ffff
      general[2] = old >> 32
    }
    set(zero: old == expected)
  }

  private func compareExchange16(_ i: Instruction) throws(Interruption) {
    let place = try address(i, size: 16, isWrite: true)
    guard place & 15 == 0 else { throw .generalProtection }
    try checkWrite(place, count: 16)
    let location = try locate(place, dataAccess.union(.write))
    var expected: (UInt64, UInt64) = (general[0], general[2])
    var isEqual: Bool
    if let host = location.host {
      isEqual = withUnsafeMutableBytes(of: &expected) { bytes in
        soft_cas128(
          host, bytes.baseAddress.unsafelyUnwrapped.assumingMemoryBound(to: UInt64.self), general[3], general[1])
      }
      memoryWritten(host, count: 16)
    } else {
      let low = try deviceRead(location.physical, size: 8)
      let high = try deviceRead(location.physical &+ 8, size: 8)
      isEqual = low == general[0] && high == general[2]
      try deviceWrite(location.physical, size: 8, value: isEqual ? general[3] : low)
      try deviceWrite(location.physical &+ 8, size: 8, value: isEqual ? general[1] : high)
      expected = (low, high)
    }
    if !isEqual { (general[0], general[2]) = expected }
    set(zero: isEqual)
  }

  // MARK: Multiplication and division

  private func multiply(_ i: Instruction) throws(Interruption) {
    let isSigned = i.operation.mnemonic == .imul
    if i.operands[1].kind != .none {
      // Two or three operands: the low half alone.
      let size = i.operands[0].size
      let isThree = i.operands[2].kind != .none
      let a = Int64(bitPattern: Self.signExtend(isThree ? try read(i, 1) : read(i.operands[0].register), size))
      let b = Int64(bitPattern: Self.signExtend(isThree ? UInt64(bitPattern: i.immediate) : try read(i, 1), size))
      let (low, overflows) = a.multipliedReportingOverflow(by: b)
      let result = UInt64(bitPattern: low)
      write(i.operands[0].register, result)
      let fits = !overflows && Self.signExtend(result, size) == result
      setFlags(result: result, size: size, carry: !fits, overflow: !fits)
      return
    }
    let size = i.operands[0].size
    let b = try read(i, 0)
    var low: UInt64
    var high: UInt64
    if isSigned {
      let a = Int64(bitPattern: Self.signExtend(general[0], size))
      let product = a.multipliedFullWidth(by: Int64(bitPattern: Self.signExtend(b, size)))
      (low, high) = (product.low, UInt64(bitPattern: product.high))
    } else {
      let product = (general[0] & Self.mask(size)).multipliedFullWidth(by: b)
      (low, high) = (product.low, product.high)
    }
    if size == 8 {
      general[0] = low
      general[2] = high
    } else if size == 1 {
      write(0, low, size: 2)
      high = low >> 8
    } else {
      high = low >> (UInt64(size) &* 8)
      write(0, low, size: size)
      write(2, high, size: size)
    }
    let signs = isSigned && Int64(bitPattern: Self.signExtend(low, size)) < 0 ? Self.mask(size) : 0
    let fits = high & Self.mask(size) == signs
    setFlags(result: low, size: size, carry: !fits, overflow: !fits)
  }

  private func divide(_ i: Instruction) throws(Interruption) {
    let size = i.operands[0].size
    let divisor = try read(i, 0)
    guard divisor != 0 else { throw .exception(.divideError) }
    let bits = UInt64(size) &* 8
    let quotient: UInt64
    let remainder: UInt64
    if size == 8 {
      let high = general[2]
      let low = general[0]
      if i.operation.mnemonic == .div {
        guard high < divisor else { throw .exception(.divideError) }
        (quotient, remainder) = divisor.dividingFullWidth((high, low))
      } else {
        // On magnitudes: the quotient's may be up to 2^63.
        let isNegative = Int64(bitPattern: high) < 0
        let divisorIsNegative = Int64(bitPattern: divisor) < 0
        let magnitudeLow = isNegative ? 0 &- low : low
        let magnitudeHigh = isNegative ? ~high &+ (low == 0 ? 1 : 0) : high
        let by = divisorIsNegative ? 0 &- divisor : divisor
        guard magnitudeHigh < by else { throw .exception(.divideError) }
        let (q, r) = by.dividingFullWidth((magnitudeHigh, magnitudeLow))
        let quotientIsNegative = isNegative != divisorIsNegative
        guard q <= (quotientIsNegative ? 1 << 63 : 1 << 63 - 1) else { throw .exception(.divideError) }
        quotient = quotientIsNegative ? 0 &- q : q
        remainder = isNegative ? 0 &- r : r
      }
    } else {
      let dividend =
        size == 1 ? general[0] & 0xffff : (general[2] & Self.mask(size)) << bits | general[0] & Self.mask(size)
      if i.operation.mnemonic == .div {
        (quotient, remainder) = dividend.quotientAndRemainder(dividingBy: divisor)
        guard quotient <= Self.mask(size) else { throw .exception(.divideError) }
      } else {
        let a = Int64(bitPattern: Self.signExtend(dividend, size &* 2))
        let b = Int64(bitPattern: Self.signExtend(divisor, size))
        let (q, overflows) = a.dividedReportingOverflow(by: b)
        guard !overflows, Int64(bitPattern: Self.signExtend(UInt64(bitPattern: q), size)) == q else {
          throw .exception(.divideError)
        }
        quotient = UInt64(bitPattern: q)
        remainder = UInt64(bitPattern: a &- q &* b)
      }
    }
    if size == 1 {
      write(0, (remainder & 0xff) << 8 | quotient & 0xff, size: 2)
    } else {
      write(0, quotient & Self.mask(size), size: size)
      write(2, remainder & Self.mask(size), size: size)
    }
  }

  // MARK: Decimal adjustments (SDM vol. 2, DAA, DAS, AAA, AAS)

  private func adjustDecimal(isSubtraction: Bool) {
    let old = general[0] & 0xff
    let oldCarry = carry
    var al = old
    var newCarry = false
    let adjustsLow = al & 15 > 9 || auxiliaryCarry
    if adjustsLow {
      newCarry = isSubtraction ? oldCarry || al < 6 : oldCarry || al > 0xf9
      al = (isSubtraction ? al &- 6 : al &+ 6) & 0xff
    }
    if old > 0x99 || oldCarry {
      al = (isSubtraction ? al &- 0x60 : al &+ 0x60) & 0xff
      newCarry = true
    } else if !isSubtraction {
      newCarry = false
    }
    write(0, al, size: 1)
    setFlags(result: al, carries: 0, size: 1)
    cpu.pointee.flag_carries = Self.carries(carry: newCarry, overflow: false, auxiliary: adjustsLow)
  }

  private func adjustASCII(isSubtraction: Bool) {
    let adjusts = general[0] & 15 > 9 || auxiliaryCarry
    let ax = general[0] & 0xffff
    let result = !adjusts ? ax : isSubtraction ? (ax &- 0x106) & 0xffff : (ax &+ 0x106) & 0xffff
    write(0, result & 0xff0f, size: 2)
    setFlags(result: result & 15, carries: 0, size: 1)
    cpu.pointee.flag_carries = Self.carries(carry: adjusts, overflow: false, auxiliary: adjusts)
  }

  // MARK: The stack

  private func popOperand(_ i: Instruction) throws(Interruption) {
    let size = i.operandSize
    let value = try peek(size: size)
    if i.operands[0].kind == .register {
      // POP rSP: what was popped stays.
      drop(UInt64(size))
      write(i.operands[0].register, value)
      return
    }
    // An address based on rSP uses the value after the pop; it is put back if the store does not succeed.
    let pointer = general[4]
    drop(UInt64(size))
    do throws(Interruption) {
      try write(i, 0, value)
    } catch {
      general[4] = pointer
      throw error
    }
  }

  private func pushOrPopAll(_ i: Instruction) throws(Interruption) {
    let size = i.operandSize
    let width = stackSize
    let isPush = i.operation.mnemonic == .pusha
    let start = isPush ? (general[4] &- 8 &* UInt64(size)) & Self.mask(width) : general[4] & Self.mask(width)
    // The lowest is rDI; rSP's own slot is written with its old value and skipped by POPA.
    if isPush {
      for number in 0..<8 {
        let place = try linear(
          2, (start &+ UInt64(number) &* UInt64(size)) & Self.mask(width), size: Int(size), isWrite: true)
        try checkWrite(place, count: Int(size))
      }
    }
    var values: (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0, 0, 0, 0, 0)
    try withEach(&values) { (number, value) throws(Interruption) in
      let place = try linear(
        2, (start &+ UInt64(number) &* UInt64(size)) & Self.mask(width), size: Int(size), isWrite: isPush)
      if isPush {
        try store(general[7 - number], place, size: size)
      } else {
        value = try load(place, size: size)
      }
    }
    if isPush {
      write(4, start, size: width)
    } else {
      try withEach(&values) { (number, value) throws(Interruption) in
        if number != 3 { write(7 - number, value, size: size) }
      }
      write(4, start &+ 8 &* UInt64(size), size: width)
    }
  }

  private func withEach(
    _ values: inout (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64),
    _ body: (Int, inout UInt64) throws(Interruption) -> Void
  ) throws(Interruption) {
    try body(0, &values.0)
    try body(1, &values.1)
    try body(2, &values.2)
    try body(3, &values.3)
    try body(4, &values.4)
    try body(5, &values.5)
    try body(6, &values.6)
    try body(7, &values.7)
  }

  /// ENTER (SDM vol. 2): all it writes is checked first.
  private func enter(_ i: Instruction) throws(Interruption) {
    let size = i.operandSize
    let width = stackSize
    let level = UInt64(i.secondImmediate & 31)
    let mask = Self.mask(width)
    let frame = (general[4] &- UInt64(size)) & mask
    let pushed = UInt64(size) &* (1 &+ level)
    let end = (general[4] &- pushed &- UInt64(i.immediate & 0xffff)) & mask
    var position = frame
    try store(general[5], linear(2, position, size: Int(size), isWrite: true), size: size)
    if level > 0 {
      var display = general[5] & mask
      for _ in 1..<max(level, 1) {
        display = (display &- UInt64(size)) & mask
        let value = try load(linear(2, display, size: Int(size), isWrite: false), size: size)
        position = (position &- UInt64(size)) & mask
        try store(value, linear(2, position, size: Int(size), isWrite: true), size: size)
      }
      position = (position &- UInt64(size)) & mask
      try store(frame, linear(2, position, size: Int(size), isWrite: true), size: size)
    }
    // The final stack pointer must be usable too; that is found last.
    try checkWrite(linear(2, end, size: Int(size), isWrite: true), count: Int(size))
    write(5, frame, size: size)
    write(4, end, size: width)
  }

  // MARK: Near branches

  /// The target of a near JMP or CALL, cut to the operand size; nil for a far one.
  private func nearTarget(_ i: Instruction) throws(Interruption) -> UInt64? {
    switch i.operands[0].kind {
    case .relative: return relativeTarget(i)
    case .register: return read(i.operands[0].register)
    case .memory where i.modRM >> 3 & 7 == 2 || i.modRM >> 3 & 7 == 4: return try read(i, 0)
    default: return nil
    }
  }

  @inline(__always)
  private func relativeTarget(_ i: Instruction) -> UInt64 {
    (nextIP &+ UInt64(bitPattern: i.immediate)) & Self.mask(i.operandSize)
  }

  private func branch(_ i: Instruction) throws(Interruption) {
    nextIP = try checked(relativeTarget(i))
  }

  /// A branch target that the mode allows: canonical, or within CS's limit; else #GP(0).
  @inline(__always)
  func checked(_ target: UInt64) throws(Interruption) -> UInt64 {
    guard is64Bit ? isCanonical(target) : target <= UInt64(segments[Int(Register.cs.index)].limit) else {
      throw .generalProtection
    }
    return target
  }
}

extension Operand {
  /// Whether it is what integer instructions work on: a general register, memory or an immediate.
  fileprivate var isPlain: Bool {
    kind != .register || register.class.rawValue <= Register.Class.general64.rawValue
  }
}
