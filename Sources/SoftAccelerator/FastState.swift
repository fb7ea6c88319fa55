import CSoftCPU
import X86

/// What fast operations touch: a pointer that the loop keeps in a register, and what is done through it.
///
/// Register operands are byte offsets into the general registers, so that AH is 1 and R15 is 120.
struct FastState {
  let cpu: UnsafeMutablePointer<soft_cpu>
  /// The general registers come first in the state: one pointer to keep, not two.
  @inline(__always)
  var general: UnsafeMutableRawPointer { UnsafeMutableRawPointer(cpu) }

  /// Counts the instructions of a block that is done; true where the run loop must look around.
  @inline(__always)
  func retire(_ count: Int64) -> Bool {
    let retired = Int64(bitPattern: cpu.pointee.instructions) &+ count
    cpu.pointee.instructions = UInt64(bitPattern: retired)
    return (cpu.pointee.budget &- retired) | soft_attention(cpu) < 0
  }

  // MARK: Registers

  @inline(__always)
  func get<T: FixedWidthInteger>(_ offset: UInt8, as type: T.Type) -> T { Self.load(general + Int(offset)) }

  /// 32 bits clear the upper half; 8 and 16 leave the rest.
  @inline(__always)
  func put<T: FixedWidthInteger>(_ offset: UInt8, _ value: T) {
    if MemoryLayout<T>.size == 4 {
      soft_put64(general + Int(offset), UInt64(truncatingIfNeeded: UInt32(truncatingIfNeeded: value)))
    } else {
      Self.store(value, general + Int(offset))
    }
  }

  @inline(__always)
  static func load<T: FixedWidthInteger>(_ pointer: UnsafeRawPointer, as type: T.Type = T.self) -> T {
    switch MemoryLayout<T>.size {
    case 1: T(truncatingIfNeeded: soft_get8(pointer))
    case 2: T(truncatingIfNeeded: soft_get16(pointer))
    case 4: T(truncatingIfNeeded: soft_get32(pointer))
    default: T(truncatingIfNeeded: soft_get64(pointer))
    }
  }

  @inline(__always)
  static func store<T: FixedWidthInteger>(_ value: T, _ pointer: UnsafeMutableRawPointer) {
    switch MemoryLayout<T>.size {
    case 1: soft_put8(pointer, UInt8(truncatingIfNeeded: value))
    case 2: soft_put16(pointer, UInt16(truncatingIfNeeded: value))
    case 4: soft_put32(pointer, UInt32(truncatingIfNeeded: value))
    default: soft_put64(pointer, UInt64(truncatingIfNeeded: value))
    }
  }

  // MARK: Memory

  /// The host's address for a load; nil where the TLB does not have it.
  @inline(__always)
  func readable(_ linear: UInt64, size: Int) -> UnsafeMutableRawPointer? {
    let entry = cpu.pointee.tlb + Processor.tlbIndex(linear)
    let last = linear &+ UInt64(truncatingIfNeeded: size &- 1)
    guard entry.pointee.read_tag == last & ~0xfff | cpu.pointee.data_context else { return nil }
    return Processor.host(linear, entry)
  }

  /// The host's address for a store; nil where the TLB does not have it.
  @inline(__always)
  func writable(_ linear: UInt64, size: Int) -> UnsafeMutableRawPointer? {
    let entry = cpu.pointee.tlb + Processor.tlbIndex(linear)
    let last = linear &+ UInt64(truncatingIfNeeded: size &- 1)
    guard entry.pointee.write_tag == last & ~0xfff | cpu.pointee.data_context else { return nil }
    return Processor.host(linear, entry)
  }

  /// Four-level paging's canonical addresses; with five levels those beyond take the slow way, which knows better.
  @inline(__always)
  func isCanonical(_ linear: UInt64) -> Bool {
    Int64(bitPattern: linear << 16) >> 16 == Int64(bitPattern: linear)
  }

  // MARK: Flags

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
  var below: Bool { carry || zero }
  @inline(__always)
  var less: Bool { sign != overflow }
  @inline(__always)
  var lessOrEqual: Bool { zero || sign != overflow }

  @inline(__always)
  func set<T: FixedWidthInteger & UnsignedInteger>(_ result: T, carries: T) {
    let shift = UInt64(64 &- T.bitWidth)
    cpu.pointee.flag_result = Int64(bitPattern: UInt64(truncatingIfNeeded: result) << shift) >> Int64(shift)
    cpu.pointee.flag_carries = UInt64(truncatingIfNeeded: carries) << shift | UInt64(truncatingIfNeeded: carries & 8)
    cpu.pointee.flag_delta = 0
  }

  @inline(__always)
  func setAddition<T: FixedWidthInteger & UnsignedInteger>(_ a: T, _ b: T, _ result: T) {
    set(result, carries: a & b | (a | b) & ~result)
  }

  @inline(__always)
  func setSubtraction<T: FixedWidthInteger & UnsignedInteger>(_ a: T, _ b: T, _ result: T) {
    set(result, carries: ~a & b | ~(a ^ b) & result)
  }

  @inline(__always)
  func setLogic<T: FixedWidthInteger & UnsignedInteger>(_ result: T) {
    set(result, carries: 0)
  }

  /// Changes CF alone.
  @inline(__always)
  func replaceCarry(_ carry: Bool) {
    let isOverflow = overflow
    let auxiliary = cpu.pointee.flag_carries & 8
    cpu.pointee.flag_carries = (carry ? 1 << 63 : 0) | (carry != isOverflow ? 1 << 62 : 0) | auxiliary
  }

  @inline(__always)
  private func set<T: FixedWidthInteger & UnsignedInteger>(_ result: T, carry: Bool, overflow: Bool) {
    set(result, carries: 0)
    cpu.pointee.flag_carries = (carry ? 1 << 63 : 0) | (carry != overflow ? 1 << 62 : 0)
  }

  // MARK: Arithmetic that needs more than a line. Counts are neither 0 nor as large as the operand.

  @inline(__always)
  func shl<T: FixedWidthInteger & UnsignedInteger>(_ x: T, _ count: T) -> T {
    let result = x &<< count
    let out = x &>> (T(truncatingIfNeeded: T.bitWidth) &- count) & 1 != 0
    set(result, carry: out, overflow: (result &>> T(truncatingIfNeeded: T.bitWidth &- 1) != 0) != out)
    return result
  }

  @inline(__always)
  func shr<T: FixedWidthInteger & UnsignedInteger>(_ x: T, _ count: T) -> T {
    let result = x &>> count
    let top = (result ^ result &<< 1) &>> T(truncatingIfNeeded: T.bitWidth &- 1)
    set(result, carry: x &>> (count &- 1) & 1 != 0, overflow: top != 0)
    return result
  }

  @inline(__always)
  func sar(_ x: UInt32, _ count: UInt32) -> UInt32 {
    let result = UInt32(bitPattern: Int32(bitPattern: x) &>> Int32(bitPattern: count))
    set(result, carry: Int32(bitPattern: x) &>> Int32(bitPattern: count &- 1) & 1 != 0, overflow: false)
    return result
  }

  @inline(__always)
  func sar(_ x: UInt64, _ count: UInt64) -> UInt64 {
    let result = UInt64(bitPattern: Int64(bitPattern: x) &>> Int64(bitPattern: count))
    set(result, carry: Int64(bitPattern: x) &>> Int64(bitPattern: count &- 1) & 1 != 0, overflow: false)
    return result
  }

  @inline(__always)
  func rol<T: FixedWidthInteger & UnsignedInteger>(_ x: T, _ count: T) -> T {
    let result = x &<< count | x &>> (0 &- count)
    let out = result & 1 != 0
    replaceCarry(out, overflow: (result &>> T(truncatingIfNeeded: T.bitWidth &- 1) != 0) != out)
    return result
  }

  @inline(__always)
  func ror<T: FixedWidthInteger & UnsignedInteger>(_ x: T, _ count: T) -> T {
    let result = x &>> count | x &<< (0 &- count)
    let top = T(truncatingIfNeeded: T.bitWidth &- 1)
    replaceCarry(result &>> top != 0, overflow: (result ^ result &<< 1) &>> top != 0)
    return result
  }

  @inline(__always)
  private func replaceCarry(_ carry: Bool, overflow: Bool) {
    let auxiliary = cpu.pointee.flag_carries & 8
    cpu.pointee.flag_carries = (carry ? 1 << 63 : 0) | (carry != overflow ? 1 << 62 : 0) | auxiliary
  }

  @inline(__always)
  func multiply(_ x: UInt32, _ y: UInt32) -> UInt32 {
    let product = Int64(Int32(bitPattern: x)) &* Int64(Int32(bitPattern: y))
    let result = UInt32(truncatingIfNeeded: product)
    let overflows = product != Int64(Int32(bitPattern: result))
    set(result, carry: overflows, overflow: overflows)
    return result
  }

  @inline(__always)
  func multiply(_ x: UInt64, _ y: UInt64) -> UInt64 {
    let (product, overflows) = Int64(bitPattern: x).multipliedReportingOverflow(by: Int64(bitPattern: y))
    set(UInt64(bitPattern: product), carry: overflows, overflow: overflows)
    return UInt64(bitPattern: product)
  }
}
