import CSoftCPU
import X86

/// Shifts, rotates, and instructions on single bits and bit fields.
extension Processor {
  /// Executes one of them; false for any other instruction.
  func executeBits(_ i: Instruction) throws(Interruption) -> Bool {
    let size = i.operands[0].size
    switch i.operation.mnemonic {
    case .shl, .shr, .sar, .rol, .ror, .rcl, .rcr: try shift(i)
    case .shld, .shrd: try doubleShift(i)
    case .bt, .bts, .btr, .btc: try bitTest(i)
    case .bsf, .bsr:
      let value = try read(i, 1)
      // The whole destination stays where the source is 0.
      if value != 0 {
        let index = i.operation.mnemonic == .bsf ? value.trailingZeroBitCount : 63 - value.leadingZeroBitCount
        write(i.operands[0].register, UInt64(index))
      }
      setFlags(result: value, carries: 0, size: size)
    case .tzcnt:
      let value = try read(i, 1)
      let bits = UInt64(size) &* 8
      let count = value == 0 ? bits : UInt64(value.trailingZeroBitCount)
      write(i.operands[0].register, count)
      setFlags(result: count, size: size, carry: value == 0, overflow: false)
    case .lzcnt:
      let value = try read(i, 1)
      let bits = UInt64(size) &* 8
      let count = value == 0 ? bits : UInt64(value.leadingZeroBitCount) &- (64 &- bits)
      write(i.operands[0].register, count)
      setFlags(result: count, size: size, carry: value == 0, overflow: false)
    case .popcnt:
      let value = try read(i, 1)
      write(i.operands[0].register, UInt64(value.nonzeroBitCount))
      statusFlags = value == 0 ? RFLAGS.zf.rawValue : 0
    case .crc32:
      var sum = UInt32(truncatingIfNeeded: read(i.operands[0].register))
      var data = try read(i, 1)
      for _ in 0..<i.operands[1].size {
        sum = Self.crc32c(sum ^ UInt32(data & 0xff))
        data >>= 8
      }
      write(i.operands[0].register, UInt64(sum))
    case .adcx:
      let b = try read(i, 1)
      let a = read(i.operands[0].register)
      let sum = a &+ b &+ (carry ? 1 : 0)
      write(i.operands[0].register, sum)
      set(carry: (a & b | (a | b) & ~sum) & Self.signBit(size) != 0)
    case .adox:
      let b = try read(i, 1)
      let a = read(i.operands[0].register)
      let sum = a &+ b &+ (overflow ? 1 : 0)
      write(i.operands[0].register, sum)
      set(carry: carry, overflow: (a & b | (a | b) & ~sum) & Self.signBit(size) != 0)

    case .andn:
      let result = ~(try read(i, 1)) & (try read(i, 2))
      write(i.operands[0].register, result)
      setFlags(result: result, carries: 0, size: size)
    case .blsr, .blsmsk, .blsi:
      let value = try read(i, 1)
      let isIsolate = i.operation.mnemonic == .blsi
      let result =
        i.operation.mnemonic == .blsr
        ? value & (value &- 1) : isIsolate ? value & (0 &- value) : value ^ (value &- 1)
      write(i.operands[0].register, result)
      setFlags(result: result, size: size, carry: (value == 0) != isIsolate, overflow: false)
    case .bextr:
      let value = try read(i, 1)
      let control = try read(i, 2)
      let start = control & 0xff
      let length = control >> 8 & 0xff
      let field = start > 63 ? 0 : value >> start
      let result = length > 63 ? field : field & ((1 << length) &- 1)
      write(i.operands[0].register, result)
      setFlags(result: result, carries: 0, size: size)
    case .bzhi:
      let value = try read(i, 1)
      let index = try read(i, 2) & 0xff
      let bits = UInt64(size) &* 8
      let result = index >= bits ? value : value & ((1 << index) &- 1)
      write(i.operands[0].register, result)
      setFlags(result: result, size: size, carry: index >= bits, overflow: false)
    case .pdep:
      var source = try read(i, 1)
      var mask = try read(i, 2)
      var result: UInt64 = 0
      while mask != 0 {
        if source & 1 != 0 { result |= mask & (0 &- mask) }
        source >>= 1
        mask &= mask &- 1
      }
      write(i.operands[0].register, result)
    case .pext:
      let source = try read(i, 1)
      var mask = try read(i, 2)
      var result: UInt64 = 0
      var bit: UInt64 = 1
      while mask != 0 {
        if source & mask & (0 &- mask) != 0 { result |= bit }
        bit <<= 1
        mask &= mask &- 1
      }
      write(i.operands[0].register, result)
    case .mulx:
      let product = (general[2] & Self.mask(size)).multipliedFullWidth(by: try read(i, 2))
      let high = size == 8 ? product.high : product.low >> 32
      // The high half is written last: it counts where both go to one register.
      write(i.operands[1].register, product.low)
      write(i.operands[0].register, high)
    case .shlx:
      let value = try read(i, 1)
      write(i.operands[0].register, value << (try read(i, 2) & (size == 8 ? 63 : 31)))
    case .shrx:
      let value = try read(i, 1)
      write(i.operands[0].register, value >> (try read(i, 2) & (size == 8 ? 63 : 31)))
    case .sarx:
      let value = Int64(bitPattern: Self.signExtend(try read(i, 1), size))
      write(i.operands[0].register, UInt64(bitPattern: value >> Int64(try read(i, 2) & (size == 8 ? 63 : 31))))
    case .rorx:
      let value = try read(i, 1)
      let bits = UInt64(size) &* 8
      let count = UInt64(i.immediate) & (bits &- 1)
      write(i.operands[0].register, value >> count | value << ((bits &- count) & (bits &- 1)))
    default:
      return false
    }
    return true
  }

  /// One byte's step of the CRC with polynomial 0x1EDC6F41, reflected (SDM vol. 2, CRC32).
  private static func crc32c(_ value: UInt32) -> UInt32 {
    var sum = value
    for _ in 0..<8 { sum = sum >> 1 ^ (sum & 1 != 0 ? 0x82f6_3b78 : 0) }
    return sum
  }

  // MARK: Shifts and rotates

  private func shift(_ i: Instruction) throws(Interruption) {
    let size = i.operands[0].size
    let bits = UInt64(size) &* 8
    let count = try read(i, 1) & (size == 8 ? 63 : 31)
    if count == 0 {
      // No flag changes, but memory is written and a 32-bit register's upper half cleared.
      _ = try modify(i) { $0 }
      return
    }
    let carryIn: UInt64 = carry ? 1 : 0
    let sign = Self.signBit(size)
    let mask = Self.mask(size)
    switch i.operation.mnemonic {
    case .shl:
      let a = try modify(i) { count >= bits ? 0 : $0 << count }
      let result = count >= bits ? 0 : a << count & mask
      let out = count <= bits && a >> (bits &- count) & 1 != 0
      setFlags(result: result, size: size, carry: out, overflow: (result & sign != 0) != out)
    case .shr:
      let a = try modify(i) { count >= bits ? 0 : $0 >> count }
      let result = count >= bits ? 0 : a >> count
      let out = count <= bits && a >> (count &- 1) & 1 != 0
      setFlags(result: result, size: size, carry: out, overflow: ((result ^ result << 1) & sign) != 0)
    case .sar:
      func shifted(_ value: UInt64, _ count: UInt64) -> UInt64 {
        UInt64(bitPattern: Int64(bitPattern: Self.signExtend(value, size)) >> Int64(min(count, 63)))
      }
      let a = try modify(i) { shifted($0, count) }
      setFlags(result: shifted(a, count), size: size, carry: shifted(a, count &- 1) & 1 != 0, overflow: false)
    case .rol:
      let turn = count & (bits &- 1)
      func rotated(_ value: UInt64) -> UInt64 { (value << turn | value >> ((bits &- turn) & (bits &- 1))) & mask }
      let result = rotated(try modify(i) { turn == 0 ? $0 : rotated($0) })
      let out = result & 1 != 0
      set(carry: out, overflow: (result & sign != 0) != out)
    case .ror:
      let turn = count & (bits &- 1)
      func rotated(_ value: UInt64) -> UInt64 { (value >> turn | value << ((bits &- turn) & (bits &- 1))) & mask }
      let result = rotated(try modify(i) { turn == 0 ? $0 : rotated($0) })
      set(carry: result & sign != 0, overflow: (result ^ result << 1) & sign != 0)
    case .rcl:
      let turn = count % (bits &+ 1)
      func rotated(_ value: UInt64) -> UInt64 {
        guard turn != 0 else { return value }
        return (value << turn | carryIn << (turn &- 1) | (turn == 1 ? 0 : value >> (bits &+ 1 &- turn))) & mask
      }
      let a = try modify(i) { rotated($0) }
      let result = rotated(a)
      let out = turn == 0 ? carryIn != 0 : a >> (bits &- turn) & 1 != 0
      set(carry: out, overflow: (result & sign != 0) != out)
    default:
      let turn = count % (bits &+ 1)
      func rotated(_ value: UInt64) -> UInt64 {
        guard turn != 0 else { return value }
        let high = turn == 1 ? 0 : value << (bits &+ 1 &- turn)
        return ((turn == 64 ? 0 : value >> turn) | carryIn << (bits &- turn) | high) & mask
      }
      let a = try modify(i) { rotated($0) }
      let result = rotated(a)
      let out = turn == 0 ? carryIn != 0 : a >> (turn &- 1) & 1 != 0
      set(carry: out, overflow: (result ^ result << 1) & sign != 0)
    }
  }

  private func doubleShift(_ i: Instruction) throws(Interruption) {
    let size = i.operands[0].size
    let bits = UInt64(size) &* 8
    let count = try read(i, 2) & (size == 8 ? 63 : 31)
    let b = read(i.operands[1].register)
    if count == 0 {
      _ = try modify(i) { $0 }
      return
    }
    let isLeft = i.operation.mnemonic == .shld
    // Beyond the size (16 bits only) the result is undefined: the bits that follow are the destination's again.
    func shifted(_ a: UInt64) -> UInt64 {
      if count > bits {
        let rest = count &- bits
        return (isLeft ? b << rest | a >> (bits &- rest) : b >> rest | a << (bits &- rest)) & Self.mask(size)
      }
      if count == bits { return b }
      return (isLeft ? a << count | b >> (bits &- count) : a >> count | b << (bits &- count)) & Self.mask(size)
    }
    let a = try modify(i) { shifted($0) }
    let result = shifted(a)
    let out: Bool =
      if count > bits {
        (isLeft ? b >> (bits &+ bits &- count) : b >> (count &- bits &- 1)) & 1 != 0
      } else {
        (isLeft ? a >> (bits &- count) : a >> (count &- 1)) & 1 != 0
      }
    setFlags(result: result, size: size, carry: out, overflow: (result ^ a) & Self.signBit(size) != 0)
  }

  private func bitTest(_ i: Instruction) throws(Interruption) {
    let size = i.operands[0].size
    let bits = UInt64(size) &* 8
    let operand = try read(i, 1)
    let bit: UInt64 = 1 << (operand & (bits &- 1))
    let change: (UInt64) -> UInt64 =
      switch i.operation.mnemonic {
      case .bts: { $0 | bit }
      case .btr: { $0 & ~bit }
      default: { $0 ^ bit }
      }
    let old: UInt64
    if i.operands[0].kind == .register {
      old = read(i.operands[0].register)
      if i.operation.mnemonic != .bt { write(i.operands[0].register, change(old)) }
    } else {
      // A register's number reaches beyond the operand: a signed bit offset from it.
      var place = offset(i)
      if i.operands[1].kind == .register {
        let index = Int64(bitPattern: Self.signExtend(operand, size))
        place =
          (place &+ UInt64(bitPattern: (index >> Int64(bits.trailingZeroBitCount)) &* Int64(size)))
          & Self.mask(i.addressSize)
      }
      let isWrite = i.operation.mnemonic != .bt
      let address = try linear(Int(i.segment.index), place, size: Int(size), isWrite: isWrite)
      old =
        isWrite
        ? try modify(address, size: size, isLocked: i.prefixes.contains(.lock), change)
        : try load(address, size: size)
    }
    set(carry: old & bit != 0)
  }
}
