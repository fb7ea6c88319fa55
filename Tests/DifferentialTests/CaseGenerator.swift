import NativeProcess
import X86

/// A reproducible source of random numbers (SplitMix64).
struct Random {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
    return z ^ z >> 31
  }

  /// 0 to `count` - 1.
  mutating func below(_ count: Int) -> Int { Int(next() >> 33) % count }
  /// True once in `count` times.
  mutating func oneIn(_ count: Int) -> Bool { below(count) == 0 }
  mutating func pick<T>(_ values: [T]) -> T { values[below(values.count)] }

  /// Integers near all edges.
  mutating func integer() -> UInt64 {
    let bits = UInt64(below(64))
    return switch below(9) {
    case 0: 0
    case 1: ~0
    case 2: 1 << bits
    case 3: (1 << bits) &- 1
    case 4: ~(1 << bits)
    case 5: next() & 0xff
    case 6: UInt64(bitPattern: Int64(Int8(truncatingIfNeeded: next())))
    case 7: next() & 0xffff_ffff
    default: next()
    }
  }

  /// Numbers of IEEE 754 near all edges: 32-bit ones in both halves, or a 64-bit one.
  mutating func real() -> UInt64 {
    oneIn(2) ? real64() : UInt64(real32()) | UInt64(real32()) << 32
  }

  private mutating func real32() -> UInt32 {
    let random = UInt32(truncatingIfNeeded: next())
    let sign = random & 0x8000_0000
    return switch below(8) {
    case 0: sign | pick([0, 0x7f80_0000, 0x7fc0_0000, 0x7f80_0001, 0x7fff_ffff, 0x7f7f_ffff])
    case 1: sign | random & 0x007f_ffff >> UInt32(below(23))
    case 2: sign | pick([0x3f80_0000, 0x4f00_0000, 0x5f00_0000, 0x4b00_0000, 0x3f00_0000, 0x3fc0_0000, 0x477f_e000])
    case 3: sign | (UInt32(127 - 8 + below(48)) << 23) | random & 0x007f_ffff
    case 4: sign | (UInt32(127 + below(33)) << 23) | random & 0x007f_0000
    case 5: sign | UInt32(1 + below(30)) << 23 | random & 0x007f_ffff
    case 6: sign | UInt32(254 - below(30)) << 23 | random & 0x007f_ffff
    default: random
    }
  }

  private mutating func real64() -> UInt64 {
    let random = next()
    let sign = random & 1 << 63
    let fraction: UInt64 = 0xf_ffff_ffff_ffff
    return switch below(8) {
    case 0:
      sign
        | pick([
          0, 0x7ff0_0000_0000_0000, 0x7ff8_0000_0000_0000, 0x7ff0_0000_0000_0001, 0x7fff_ffff_ffff_ffff,
          0x7fef_ffff_ffff_ffff,
        ])
    case 1: sign | random & fraction >> UInt64(below(52))
    case 2: sign | pick([0x3ff0_0000_0000_0000, 0x41e0_0000_0000_0000, 0x43e0_0000_0000_0000, 0x3fe0_0000_0000_0000])
    case 3: sign | UInt64(1023 - 16 + below(80)) << 52 | random & fraction
    case 4: sign | UInt64(1023 + below(66)) << 52 | random & 0xf_f000_0000_0000
    // About the edges of 32-bit numbers.
    case 5: sign | UInt64(1023 - 155 + below(34)) << 52 | random & fraction
    case 6: sign | UInt64(1023 + 120 + below(12)) << 52 | random & fraction
    default: random
    }
  }

  /// The sign and exponent, and the significand, of an 80-bit number.
  mutating func extended() -> (UInt16, UInt64) {
    let random = next()
    let sign = UInt16(truncatingIfNeeded: random) & 0x8000
    let one: UInt64 = 1 << 63
    switch below(10) {
    case 0: return (sign, 0)
    case 1:
      return (
        sign | 0x7fff, pick([one, one | 1 << 62, one | 1, one | next() >> 2, one | 1 << 62 | next() >> 2, 0, next()])
      )
    case 2: return (sign, next() >> UInt64(below(64)))
    case 3: return (sign | 0x3fff, pick([one, one | 1 << 62, one | next() >> 1]))
    case 4: return (sign | UInt16(0x3fff + below(70)), one | (next() << UInt64(below(64))) >> 1)
    case 5: return (sign | UInt16(0x3fff - 70 + below(140)), one | next() >> 1)
    case 6: return (sign | UInt16(below(40)), one | next() >> 1)
    case 7: return (sign | UInt16(0x7ffe - below(40)), one | next() >> 1)
    case 8: return (sign | UInt16(0x3fff - 1080 + below(2200)), one | next() >> 1 & ~0x7ff)
    default: return (UInt16(truncatingIfNeeded: next()), next())
    }
  }
}

/// Makes instructions of every row of the opcode table, and states that make them do something.
struct CaseGenerator {
  /// How an instruction of one row can begin.
  private struct Skeleton {
    var prefix: UInt8
    var isVEX = false
    var wide: Bool
    var long = false
    var map: UInt8
    var opcode: UInt8
    var modRM: UInt8
  }

  let mode: CodeMode
  var random: Random
  /// The rows that can be generated.
  let operations: [Operation]
  private let skeletons: [[Skeleton]]
  private let data: UnsafePointer<UInt8>

  /// A generator of the rows that are `wanted`.
  init(mode: CodeMode, seed: UInt64, data: UnsafePointer<UInt8>, wanted: (X86.Operation) -> Bool) {
    self.mode = mode
    self.data = data
    random = Random(state: seed)
    var found = [[Skeleton]](repeating: [], count: X86.Operation.count)
    var forms: [UInt8] = []
    for reg in UInt8(0)..<8 {
      for form in [0x00, 0x41, 0x86, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7] as [UInt8] {
        forms.append(form | reg << 3)
      }
    }
    var bytes = [UInt8](repeating: 0, count: 15)
    func add(_ skeleton: Skeleton) {
      for index in 0..<15 { bytes[index] = 0 }
      let length = Self.begin(&bytes, skeleton, rex: 0, vex: 0xf)
      bytes[length] = skeleton.modRM
      guard let instruction = Self.decode(bytes, mode), wanted(instruction.operation) else { return }
      found[Int(instruction.operation.rawValue)].append(skeleton)
    }
    for opcode in UInt8.min ... .max {
      for modRM in forms {
        for prefix in [0, 0x66, 0xf3, 0xf2] as [UInt8] {
          for wide in mode == .code64 ? [false, true] : [false] {
            for map in UInt8(0)..<4 {
              add(Skeleton(prefix: prefix, wide: wide, map: map, opcode: opcode, modRM: modRM))
            }
          }
          for map in UInt8(1)..<4 {
            for flags in 0..<4 {
              add(
                Skeleton(
                  prefix: prefix, isVEX: true, wide: flags & 1 != 0, long: flags & 2 != 0, map: map, opcode: opcode,
                  modRM: modRM))
            }
          }
        }
      }
    }
    skeletons = found
    operations = found.indices.compactMap {
      found[$0].isEmpty ? nil : X86.Operation(rawValue: UInt16($0))
    }
  }

  static func decode(_ bytes: [UInt8], _ mode: CodeMode) -> Instruction? {
    bytes.withUnsafeBytes { buffer in try? Instruction(decoding: buffer, mode: mode) }
  }

  /// Writes all up to ModRM; the number of bytes.
  private static func begin(_ bytes: inout [UInt8], _ s: Skeleton, rex: UInt8, vex: UInt8, at start: Int = 0) -> Int {
    var count = start
    func put(_ byte: UInt8, _ bytes: inout [UInt8]) {
      bytes[count] = byte
      count += 1
    }
    if s.isVEX {
      put(0xc4, &bytes)
      put(~rex << 5 | s.map, &bytes)
      let pp: UInt8 = s.prefix == 0x66 ? 1 : s.prefix == 0xf3 ? 2 : s.prefix == 0xf2 ? 3 : 0
      put((s.wide ? 0x80 : 0) | vex << 3 | (s.long ? 4 : 0) | pp, &bytes)
    } else {
      if s.prefix != 0 { put(s.prefix, &bytes) }
      if s.wide || rex != 0 { put(0x40 | (s.wide ? 8 : 0) | rex & 7, &bytes) }
      if s.map > 0 { put(0x0f, &bytes) }
      if s.map == 2 { put(0x38, &bytes) }
      if s.map == 3 { put(0x3a, &bytes) }
    }
    put(s.opcode, &bytes)
    return count
  }

  /// Fills in a case; the instruction, and whether it is one of `wanted`.
  mutating func make(_ c: UnsafeMutablePointer<native_case>, wanted: (X86.Operation) -> Bool) -> Instruction {
    while true {
      let operation = random.pick(operations)
      let skeleton = random.pick(skeletons[Int(operation.rawValue)])
      if let instruction = fill(c, skeleton, wanted) { return instruction }
    }
  }

  private mutating func fill(
    _ c: UnsafeMutablePointer<native_case>, _ skeleton: Skeleton, _ wanted: (X86.Operation) -> Bool
  ) -> Instruction? {
    var bytes = [UInt8](repeating: 0, count: 32)
    for index in 0..<16 { bytes[index] = UInt8(truncatingIfNeeded: random.oneIn(4) ? random.integer() : random.next()) }
    let start = putPrefixes(&bytes, skeleton)
    let rex = mode == .code64 && random.oneIn(2) ? UInt8(random.below(8)) : 0
    let vex = random.oneIn(3) ? 0xf : UInt8(mode == .code64 ? random.below(16) : 8 + random.below(8))
    let length = Self.begin(
      &bytes, skeleton, rex: skeleton.isVEX && mode != .code64 ? rex & 1 : rex, vex: vex, at: start)
    // Keep what selects the row, and vary the rest.
    let modRM = skeleton.modRM
    bytes[length] =
      switch random.below(4) {
      case 0: modRM
      case 1: modRM & 0xc0 | UInt8(random.below(64))
      default: modRM & 0xf8 | UInt8(random.below(8))
      }
    if modRM < 0xc0, random.oneIn(2) { bytes[length] = bytes[length] & 0x3f | UInt8(random.below(3)) << 6 }
    guard var i = Self.decode(Array(bytes[..<15]), mode), wanted(i.operation) else { return nil }
    makeRegisters(c)
    let r = native_before(c)
    aim(&i, &bytes, r)
    place(c, i, bytes)
    // Nothing that must not be executed at all, however it came about.
    guard !Freedom.exempts(i), wanted(i.operation) else { return nil }
    return i
  }

  private mutating func putPrefixes(_ bytes: inout [UInt8], _ skeleton: Skeleton) -> Int {
    var count = 0
    func put(_ byte: UInt8, _ bytes: inout [UInt8]) {
      bytes[count] = byte
      count += 1
    }
    if skeleton.prefix == 0, !skeleton.isVEX, random.oneIn(8) { put(0x66, &bytes) }
    if random.oneIn(10) { put(0x67, &bytes) }
    if random.oneIn(8) { put(random.pick([0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]), &bytes) }
    if skeleton.prefix == 0, skeleton.map == 0, random.oneIn(8) { put(random.pick([0xf2, 0xf3]), &bytes) }
    if !skeleton.isVEX, random.oneIn(16) { put(0xf0, &bytes) }
    return count
  }

  // MARK: State

  private mutating func makeRegisters(_ c: UnsafeMutablePointer<native_case>) {
    let r = native_before(c)
    let isLong = mode == .code64
    let general = native_general(r)
    for index in 0..<16 {
      general[index] = random.oneIn(4) ? target() : random.integer()
      if !isLong { general[index] = index < 8 ? general[index] & 0xffff_ffff : 0 }
    }
    r.pointee.flags = 0x202 | random.next() & 0xcd5 & ~(random.oneIn(2) ? 0x400 : 0)
    if random.oneIn(32) { r.pointee.flags |= 1 << 18 }
    if random.oneIn(32) { r.pointee.flags |= 1 << 14 }
    if random.oneIn(32) { r.pointee.flags |= 1 << 21 }
    r.pointee.fs_base = random.oneIn(4) ? 0 : UInt64(NATIVE_DATA) + UInt64(random.below(0x1000))
    r.pointee.gs_base = isLong && random.oneIn(8) ? 0x7000_1234_0000 : UInt64(NATIVE_DATA)
    let selectors = native_selectors(r)
    for index in 0..<6 { selectors[index] = NativeSelector.data }
    selectors[1] = isLong ? NativeSelector.code64 : NativeSelector.code32
    makeVectors(r)
  }

  private mutating func makeVectors(_ r: UnsafeMutablePointer<native_registers>) {
    // Exceptions masked, mostly; all roundings; flushing and denormals as zeros at times.
    r.pointee.mxcsr =
      (random.oneIn(4) ? UInt32(truncatingIfNeeded: random.next()) & 0x1f80 : 0x1f80) | UInt32(random.below(4)) << 13
      | (random.oneIn(4) ? UInt32(random.below(64)) : 0) | (random.oneIn(6) ? 0x40 : 0) | (random.oneIn(6) ? 0x8000 : 0)
    let masks: UInt16 = random.oneIn(4) ? UInt16(random.below(64)) : 0x3f
    r.pointee.control = masks | 0x40 | UInt16(random.pick([0, 2, 3, 3, 3])) << 8 | UInt16(random.below(4)) << 10
    // No exception is pending, but for a few cases.
    var status = UInt16(truncatingIfNeeded: random.next()) & 0x7f7f
    if !random.oneIn(64) { status &= 0x7f40 | masks }
    if random.oneIn(2) { status &= 0x3f3f & ~0x3f }
    let isPending = status & 0x3f & ~masks != 0
    r.pointee.status = status | (isPending ? 0x8080 : 0)
    r.pointee.valid = random.oneIn(4) ? UInt32(random.below(256)) : 0xff
    for index in 0..<8 {
      let (exponent, significand) = random.extended()
      UnsafeMutableRawPointer(native_stack(r, index)).initializeMemory(as: UInt8.self, repeating: 0, count: 16)
      UnsafeMutableRawPointer(native_stack(r, index)).storeBytes(of: significand, as: UInt64.self)
      UnsafeMutableRawPointer(native_stack(r, index)).storeBytes(of: exponent, toByteOffset: 8, as: UInt16.self)
    }
    let kind = random.below(4)
    for index in 0..<16 {
      let register = UnsafeMutableRawPointer(native_vector(r, index))
      let isZero = mode != .code64 && index >= 8
      for part in 0..<4 {
        let value: UInt64 = isZero ? 0 : kind == 0 ? random.next() : kind == 1 ? random.integer() : random.real()
        register.storeBytes(of: value, toByteOffset: part * 8, as: UInt64.self)
      }
    }
  }

  /// What memory holds: numbers of all kinds, and addresses of code.
  static func makeData(_ random: inout Random, _ data: UnsafeMutablePointer<UInt8>) {
    let memory = UnsafeMutableRawPointer(data)
    for offset in stride(from: 0, to: Int(NATIVE_DATA_SIZE), by: 8) {
      let value: UInt64 =
        switch random.below(16) {
        case 0...5: random.real()
        case 6...12: random.integer()
        case 13: UInt64(NATIVE_CODE) + UInt64(random.below(Int(NATIVE_CODE_SIZE)))
        case 14: random.pick([0x2b, 0x33, 0x23, 0]) | random.next() << 16
        default: UInt64(NATIVE_DATA) + UInt64(random.below(Int(NATIVE_DATA_SIZE)))
        }
      memory.storeBytes(of: value, toByteOffset: offset, as: UInt64.self)
    }
    for _ in 0..<200 {
      let offset = random.below(Int(NATIVE_DATA_SIZE) / 16 - 1) * 16
      let (exponent, significand) = random.extended()
      memory.storeBytes(of: significand, toByteOffset: offset, as: UInt64.self)
      memory.storeBytes(of: exponent, toByteOffset: offset + 8, as: UInt16.self)
    }
  }

  private static let edges: [UInt64] = [
    0, 0x7fff_ffff_fff8, 0xffff_8000_0000_0000, 0xffff_ffff_ffff_fff8, 0xffff_fff8,
  ]

  /// An address worth an access.
  private mutating func target() -> UInt64 {
    let data = UInt64(NATIVE_DATA)
    return switch random.below(32) {
    case 0...15: data + UInt64(random.below(0x1f00 / 64)) * 64
    case 16...21: data + UInt64(random.below(0x1fc0))
    case 22...23: data + 0x1000 - UInt64(random.below(64))
    case 24: data + 0x2000 - UInt64(random.below(64))
    case 25: data + 0x2000 + UInt64(random.below(0xf80))
    case 26: data + 0x3000 - UInt64(random.below(64))
    case 27: data - UInt64(random.below(64))
    case 28: UInt64(NATIVE_CODE) + UInt64(random.below(Int(NATIVE_CODE_SIZE)))
    case 29: random.pick(Self.edges) &+ UInt64(random.below(9))
    case 30: 0x8000_0000_0000 - UInt64(random.below(16))
    default: mode == .code64 ? 0x1234_5678_0000_0000 : 0x4000_0000
    }
  }

  // MARK: Addresses

  /// Makes the instruction's addresses fall where something is.
  private mutating func aim(_ i: inout Instruction, _ bytes: inout [UInt8], _ r: UnsafeMutablePointer<native_registers>)
  {
    let general = native_general(r)
    let addressMask: UInt64 = i.addressSize == 8 ? ~0 : i.addressSize == 4 ? 0xffff_ffff : 0xffff
    if !random.oneIn(8) { general[4] = UInt64(NATIVE_DATA) + 0x100 + UInt64(random.below(0x1e00)) & ~7 }
    if random.oneIn(2) { general[5] = UInt64(NATIVE_DATA) + 0x800 + UInt64(random.below(0x1000)) & ~7 }
    if i.operation.isString {
      for index in [6, 7] {
        let base = index == 7 || i.segment == .ds || i.segment == .none ? 0 : base(of: i.segment, r)
        let address = target() &- base
        general[index] = random.oneIn(16) ? random.next() << 32 | address : address
      }
      if !random.oneIn(16) { general[1] = UInt64(random.below(40)) | (i.addressSize == 4 ? random.next() << 32 : 0) }
    }
    let name = i.operation.mnemonic
    switch name {
    case .bt, .bts, .btr, .btc:
      if i.operands[1].kind == .register, random.below(4) != 0 {
        general[Int(i.operands[1].register.index)] = UInt64(bitPattern: Int64(random.below(0x400) - 0x200))
      }
    case .maskmovq, .maskmovdqu, .vmaskmovdqu: general[7] = target() &- base(of: i.segment, r)
    case .enter, .leave: general[5] = UInt64(NATIVE_DATA) + 0x200 + UInt64(random.below(0x1c00)) & ~7
    default: break
    }
    if mode != .code64 { for index in 0..<16 { general[index] = index < 8 ? general[index] & 0xffff_ffff : 0 } }
    for position in 0..<4 {
      let kind = i.operands[position].kind
      if kind == .translateTable {
        general[3] = (target() &- base(of: i.segment, r) &- (general[0] & 0xff)) & addressMask
      }
      guard kind == .memory else { continue }
      aimMemory(&i, &bytes, r, addressMask)
    }
    if i.operation.feature == .fxsr || name == .lea, i.operands[0].kind == .memory {
      aimMemory(&i, &bytes, r, addressMask)
    }
    match(i, r)
    if mode != .code64 { for index in 0..<16 { general[index] = index < 8 ? general[index] & 0xffff_ffff : 0 } }
  }

  private func base(of segment: Register, _ r: UnsafeMutablePointer<native_registers>) -> UInt64 {
    segment == .fs ? r.pointee.fs_base : segment == .gs ? r.pointee.gs_base : 0
  }

  private mutating func aimMemory(
    _ i: inout Instruction, _ bytes: inout [UInt8], _ r: UnsafeMutablePointer<native_registers>, _ mask: UInt64
  ) {
    let general = native_general(r)
    var rest = (target() &- base(of: i.segment, r)) & mask
    if i.index.class == .xmm || i.index.class == .ymm {
      let register = UnsafeMutableRawPointer(native_vector(r, Int(i.index.index)))
      for part in 0..<8 where !random.oneIn(16) {
        let is64 = [.vpgatherqd, .vpgatherqq, .vgatherqps, .vgatherqpd].contains(i.operation.mnemonic)
        let value = Int64(random.below(0x100) - 0x80)
        if !is64 {
          register.storeBytes(of: Int32(value), toByteOffset: part * 4, as: Int32.self)
        } else if part < 4 {
          register.storeBytes(of: value, toByteOffset: part * 8, as: Int64.self)
        }
      }
    } else if i.index.class != .none, i.index != i.base {
      if random.oneIn(2) { general[Int(i.index.index)] = UInt64(bitPattern: Int64(random.below(0x80) - 0x40)) }
      rest = rest &- general[Int(i.index.index)] &* UInt64(i.scale)
    }
    switch i.base.class {
    case .general16, .general32, .general64:
      let scale: UInt64 = i.index == i.base && i.index.class != .none ? UInt64(i.scale) + 1 : 1
      let value = (rest &- UInt64(bitPattern: i.displacement)) & mask
      guard scale == 1 else { break }
      general[Int(i.base.index)] = random.oneIn(16) && mode == .code64 ? value | random.next() << 32 & ~mask : value
    default:
      // An absolute address, or one relative to RIP: the displacement itself, which `place` makes relative.
      guard i.displacementSize == 4 || i.displacementSize == 2 || i.displacementSize == 8 else { return }
      let size = Int(i.displacementSize)
      let at = Int(i.length) - Int(i.immediateSize) - size - (i.operands[1].kind == .secondImmediate ? 1 : 0)
      if i.base.class == .instructionPointer { rest = rest &- UInt64(NATIVE_CODE) }
      for byte in 0..<size { bytes[at + byte] = UInt8(truncatingIfNeeded: rest >> UInt64(byte * 8)) }
      if let again = Self.decode(Array(bytes[..<15]), mode) { i = again }
    }
  }

  /// Compared values that are equal at times.
  private mutating func match(_ i: Instruction, _ r: UnsafeMutablePointer<native_registers>) {
    guard random.oneIn(2) else { return }
    let general = native_general(r)
    let address = general[Int(i.base.index & 15)] &+ UInt64(bitPattern: i.displacement)
    let offset = Int(truncatingIfNeeded: address &- UInt64(NATIVE_DATA))
    guard offset >= 0, offset <= Int(NATIVE_DATA_SIZE) - 16, i.index.class == .none else { return }
    let memory = UnsafeRawPointer(data) + offset
    switch i.operation.mnemonic {
    case .cmpxchg where i.base.index != 0: general[0] = memory.loadUnaligned(as: UInt64.self)
    case .cmpxchg8b where i.base.index != 0 && i.base.index != 2:
      general[0] = UInt64(memory.loadUnaligned(as: UInt32.self))
      general[2] = UInt64(memory.loadUnaligned(fromByteOffset: 4, as: UInt32.self))
    case .cmpxchg16b where i.base.index != 0 && i.base.index != 2:
      general[0] = memory.loadUnaligned(as: UInt64.self)
      general[2] = memory.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
    default: break
    }
  }

  /// Puts the code somewhere: now and then across pages, or where the last byte is out of reach.
  private mutating func place(_ c: UnsafeMutablePointer<native_case>, _ i: Instruction, _ bytes: [UInt8]) {
    let length = Int(i.length)
    let offset =
      switch random.below(32) {
      case 0: 0x1000 - random.below(length + 1)
      case 1: 0x2000 - length
      case 2: random.oneIn(4) ? 0x2000 - 1 - random.below(length) : random.below(0x1ff0)
      default: 64 + random.below(0x1f00)
      }
    c.pointee.registers.rip = UInt64(NATIVE_CODE) + UInt64(max(0, offset))
    c.pointee.length = UInt8(length)
    let code = native_code(c)
    for index in 0..<16 { code[index] = index < length ? bytes[index] : 0 }
    if i.base.class == .instructionPointer, i.displacementSize == 4 {
      let at = length - Int(i.immediateSize) - 4
      let displacement = UInt32(truncatingIfNeeded: i.displacement) &- UInt32(offset + length)
      for byte in 0..<4 { code[at + byte] = UInt8(truncatingIfNeeded: displacement >> UInt32(byte * 8)) }
    }
    c.pointee.repetitions = i.isRepeated && !random.oneIn(8) ? 100 : 0
  }
}
