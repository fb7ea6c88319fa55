import CSoftCPU
import X86

/// The status flags, kept as the last result and its carries; `soft_cpu` describes the form.
extension Processor {
  @inline(__always)
  var carry: Bool { Int64(bitPattern: cpu.pointee.flag_carries) < 0 }
  @inline(__always)
  var overflow: Bool { Int64(bitPattern: cpu.pointee.flag_carries ^ (cpu.pointee.flag_carries << 1)) < 0 }
  @inline(__always)
  var zero: Bool { cpu.pointee.flag_result == 0 }
  @inline(__always)
  var sign: Bool { cpu.pointee.flag_result ^ Int64(bitPattern: cpu.pointee.flag_delta) < 0 }
  @inline(__always)
  var parity: Bool {
    (UInt8(truncatingIfNeeded: cpu.pointee.flag_result) ^ UInt8(truncatingIfNeeded: cpu.pointee.flag_delta))
      .nonzeroBitCount & 1 == 0
  }
  @inline(__always)
  var auxiliaryCarry: Bool { cpu.pointee.flag_carries & 8 != 0 }

  /// Whether a condition holds, as the low four bits of Jcc's opcode number it (SDM vol. 1, appendix B).
  @inline(__always)
  func holds(_ condition: UInt8) -> Bool {
    let positive: Bool =
      switch condition >> 1 {
      case 0: overflow
      case 1: carry
      case 2: zero
      case 3: carry || zero
      case 4: sign
      case 5: parity
      case 6: sign != overflow
      default: zero || sign != overflow
      }
    return positive != (condition & 1 != 0)
  }

  /// Sets the result's flags: ZF, SF and PF from a result of `size` bytes, and what `carries` (of the same width) says.
  @inline(__always)
  func setFlags(result: UInt64, carries: UInt64, size: UInt8) {
    let shift = UInt64(64 &- Int(size) &* 8)
    cpu.pointee.flag_result = Int64(bitPattern: result << shift) >> Int64(shift)
    cpu.pointee.flag_carries = carries << shift | carries & 8
    cpu.pointee.flag_delta = 0
  }

  /// ZF, SF and PF from a result; CF and OF as given, AF clear.
  @inline(__always)
  func setFlags(result: UInt64, size: UInt8, carry: Bool, overflow: Bool) {
    setFlags(result: result, carries: 0, size: size)
    cpu.pointee.flag_carries = Self.carries(carry: carry, overflow: overflow, auxiliary: false)
  }

  /// Changes CF and OF alone.
  @inline(__always)
  func set(carry: Bool, overflow: Bool) {
    cpu.pointee.flag_carries = Self.carries(carry: carry, overflow: overflow, auxiliary: auxiliaryCarry)
  }

  /// Changes CF alone.
  @inline(__always)
  func set(carry: Bool) { set(carry: carry, overflow: overflow) }

  /// Changes ZF alone.
  func set(zero: Bool) {
    statusFlags = zero ? statusFlags | RFLAGS.zf.rawValue : statusFlags & ~RFLAGS.zf.rawValue
  }

  @inline(__always)
  static func carries(carry: Bool, overflow: Bool, auxiliary: Bool) -> UInt64 {
    (carry ? 1 << 63 : 0) | (carry != overflow ? 1 << 62 : 0) | (auxiliary ? 8 : 0)
  }

  /// CF, PF, AF, ZF, SF and OF as RFLAGS holds them.
  var statusFlags: UInt64 {
    get {
      (carry ? RFLAGS.cf.rawValue : 0) | (parity ? RFLAGS.pf.rawValue : 0)
        | (auxiliaryCarry ? RFLAGS.af.rawValue : 0) | (zero ? RFLAGS.zf.rawValue : 0)
        | (sign ? RFLAGS.sf.rawValue : 0) | (overflow ? RFLAGS.of.rawValue : 0)
    }
    set {
      let flags = RFLAGS(rawValue: newValue)
      // A result of 1 has neither PF nor SF, one of 0 has PF: the delta corrects both.
      let isZero = flags.contains(.zf)
      cpu.pointee.flag_result = isZero ? 0 : 1
      cpu.pointee.flag_delta = (flags.contains(.sf) ? 1 << 63 : 0) | (flags.contains(.pf) == isZero ? 0 : 1)
      cpu.pointee.flag_carries = Self.carries(
        carry: flags.contains(.cf), overflow: flags.contains(.of), auxiliary: flags.contains(.af))
    }
  }

  /// The whole register.
  var rflags: UInt64 {
    get { cpu.pointee.other_flags | statusFlags }
    set {
      statusFlags = newValue
      cpu.pointee.other_flags = newValue & Self.otherFlags | RFLAGS.alwaysSet.rawValue
    }
  }

  /// The flags besides the status flags that exist.
  private static let otherFlags: UInt64 = 0x3f_7700
}
