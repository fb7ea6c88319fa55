import CSoftCPU
import NativeRunner
import Testing
import X86

@testable import SoftAccelerator

extension NativeTests {
  /// Every MMX, SSE, AVX and x87 instruction of the opcode table against the physical CPU.
  @Suite
  struct VectorTests {
    /// Encodings of the opcode maps that decode as vector instructions, with random prefixes and registers.
    static func vectorBytes(_ generator: inout Generator) -> [UInt8] {
      let map = UInt8.random(in: 1...3, using: &generator)
      var opcode = UInt8.random(in: 0...255, using: &generator)
      // No way into another map.
      if map == 1, opcode & 0xfd == 0x38 { opcode = 0x10 }
      let isMemory = UInt8.random(in: 0...3, using: &generator) == 0
      let registers = UInt8.random(in: 0...63, using: &generator)
      let modRM = isMemory ? registers & 0x38 | 6 : 0xc0 | registers
      var bytes: [UInt8] = []
      if Bool.random(using: &generator) {
        // With VEX: registers above 7 through inverted bits.
        let rex = UInt8.random(in: 0...7, using: &generator)
        bytes += [0xc4, (~rex & (isMemory ? 6 : 7)) << 5 | (isMemory ? 0x20 : 0) | map]
        var last = UInt8.random(in: 0...255, using: &generator)
        // Half of the instructions have no second source: 1111.
        if Bool.random(using: &generator) { last |= 0x78 }
        bytes += [last, opcode, modRM]
      } else {
        switch UInt8.random(in: 0...3, using: &generator) {
        case 0: bytes += [0x66]
        case 1: bytes += [0xf3]
        case 2: bytes += [0xf2]
        default: break
        }
        let rex = UInt8.random(in: 0...15, using: &generator)
        if Bool.random(using: &generator) { bytes += [0x40 | rex & (isMemory ? 14 : 15)] }
        bytes += [0x0f] + (map == 2 ? [0x38] : map == 3 ? [0x3a] : []) + [opcode, modRM]
      }
      return bytes + (0..<4).map { _ in UInt8.random(in: 0...255, using: &generator) }
    }

    /// Instructions that the state transfer's own tests look at, and those whose addresses are not [rsi].
    static func isExcluded(_ mnemonic: Mnemonic) -> Bool {
      switch mnemonic {
      case .vgatherdps, .vgatherdpd, .vgatherqps, .vgatherqpd, .vpgatherdd, .vpgatherdq, .vpgatherqd, .vpgatherqq,
        .fxsave, .fxsave64, .fxrstor, .fxrstor64:
        true
      default: false
      }
    }

    static let features: [Feature] = [
      .mmx, .sse, .sse2, .sse3, .ssse3, .sse41, .sse42, .aes, .pclmulqdq, .sha, .avx, .avx2, .f16c, .fma,
    ]

    @Test(arguments: [UInt64(1)])
    func randomVectorInstructions(seed: UInt64) throws {
      guard let oracle = NativeOracle() else { return }
      var comparison = Comparison(oracle: oracle, seed: seed)
      for _ in 0..<1_000_000 {
        let bytes = Self.vectorBytes(&comparison.generator)
        comparison.run(bytes, limit: 100) {
          Self.features.contains($0.operation.feature) && $0.opcodeMap != 0 && !Self.isExcluded($0.operation.mnemonic)
            && !isInteger($0.operation)
        }
      }
      let missing = comparison.missing {
        Self.features.contains($0.feature) && !Self.isExcluded($0.mnemonic) && !isInteger($0)
          && !"\($0)".hasPrefix("fisttp")
      }
      #expect(missing.isEmpty)
    }

    @Test(arguments: [UInt64(1)])
    func randomX87Instructions(seed: UInt64) throws {
      guard let oracle = NativeOracle() else { return }
      var comparison = Comparison(oracle: oracle, seed: seed)
      for _ in 0..<400_000 {
        let opcode = UInt8.random(in: 0xd8...0xdf, using: &comparison.generator)
        var modRM = UInt8.random(in: 0...255, using: &comparison.generator)
        if modRM < 0xc0 { modRM = modRM & 0x38 | 6 }
        comparison.run([opcode, modRM], limit: 500) {
          // Images and their pointers have their own tests.
          switch $0.operation.mnemonic {
          case .fnstenv, .fnsave, .fldenv, .frstor: false
          default: true
          }
        }
      }
      let missing = comparison.missing { _ in false }
      #expect(missing.isEmpty)
    }

    /// Instructions of these features that other files execute.
    private func isInteger(_ operation: Operation) -> Bool {
      switch operation.mnemonic {
      case .crc32, .movnti, .pause, .sfence, .lfence, .mfence, .prefetchnta, .prefetcht0, .prefetcht1, .prefetcht2: true
      default: false
      }
    }
  }
}

/// Runs cases on both CPUs and counts them.
struct Comparison {
  let oracle: NativeOracle
  var generator: Generator
  private let seed: UInt64
  private var seen: [UInt16: Int] = [:]
  private var completed: [UInt16: Int] = [:]
  private var failures = 0

  init(oracle: NativeOracle, seed: UInt64) {
    self.oracle = oracle
    self.seed = seed
    generator = Generator(state: seed)
  }

  /// Runs the instruction that the bytes begin with from a random state, if it is one, and is wanted, and was not run
  /// `limit` times.
  mutating func run(_ bytes: [UInt8], limit: Int, where isWanted: (Instruction) -> Bool) {
    guard let i = try? bytes.withUnsafeBytes({ try Instruction(decoding: $0, mode: .code64) }), isWanted(i),
      !usesStackPointer(i), seen[i.operation.rawValue, default: 0] < limit
    else { return }
    let state = RandomState.make(&generator)
    let code = Array(bytes.prefix(Int(i.length)))
    let soft = oracle.runSoft(i, state)
    let native = oracle.runNative(code, state)
    seen[i.operation.rawValue, default: 0] += 1
    if native.vector < 0 { completed[i.operation.rawValue, default: 0] += 1 }
    let block = oracle.runBlock(code, state)
    if block != soft { note("\(i.operation) \(code) in a block:\(block.difference(from: soft))") }
    if soft == native || isKnownDifference(i, soft, native) { return }
    let text = code.map { String($0, radix: 16) }.joined(separator: " ")
    let words = "mxcsr \(String(state.mxcsr, radix: 16)) fcw \(String(state.control, radix: 16))"
    note("\(i.operation) \(text), \(words):\(soft.difference(from: native))")
  }

  private mutating func note(_ difference: String) {
    failures += 1
    if failures < 50 { Issue.record("seed \(seed): \(difference)") }
  }

  /// What processors do not agree on among themselves.
  private func isKnownDifference(
    _ i: Instruction, _ soft: NativeOracle.State, _ native: NativeOracle.State
  ) -> Bool {
    // AMD's SHA instructions take unaligned memory, Intel's do not.
    return i.operation.feature == .sha && soft.vector == 13
  }

  /// The operations that were never run to their end.
  func missing(where isWanted: (Operation) -> Bool) -> [String] {
    print("seed \(seed): \(seen.count) operations, \(seen.values.reduce(0, +)) cases, of these without an exception")
    print("\(completed.values.reduce(0, +)), \(failures) differ")
    return (1..<UInt16(Operation.count)).compactMap {
      guard let operation = Operation(rawValue: $0), isWanted(operation) || seen[$0] != nil, completed[$0] == nil else {
        return nil
      }
      return "\(operation)"
    }
  }

  /// The test's own, on the physical CPU.
  private func usesStackPointer(_ i: Instruction) -> Bool {
    (0..<4).contains {
      let register = i.operands[$0].register
      return register.index == 4 && register.class.rawValue <= Register.Class.general64.rawValue
    }
  }
}

/// Random states that look at the corners of number formats.
enum RandomState {
  static func make(_ generator: inout Generator) -> NativeOracle.State {
    var state = NativeOracle.State()
    for index in 0..<16 { state.general[index] = integer(&generator) }
    state.general[4] = 0
    // Mostly aligned.
    state.general[6] = NativeOracle.memoryAddress + 64
    if UInt8.random(in: 0...3, using: &generator) == 0 { state.general[6] += generator.next() & 31 }
    state.general[7] = NativeOracle.memoryAddress + 96
    state.flags = generator.next() & RFLAGS.status.rawValue
    state.mxcsr = 0x1f80 | UInt32(truncatingIfNeeded: generator.next()) & 0xe07f
    // A flag that is set and not masked is #XM only for the instruction that sets it, so any will do.
    if UInt8.random(in: 0...7, using: &generator) == 0 {
      state.mxcsr &= UInt32(truncatingIfNeeded: generator.next()) | 0xe07f
    }
    let format = UInt8.random(in: 0...3, using: &generator)
    for index in 0..<16 { state.vectors[index] = vector(&generator, format) }
    state.memory = (0..<16).flatMap { _ in vector(&generator, format) }
    setX87(&state, &generator)
    return state
  }

  static func setX87(_ state: inout NativeOracle.State, _ generator: inout Generator) {
    state.control = 0x37f
    let random = UInt16(truncatingIfNeeded: generator.next())
    switch UInt8.random(in: 0...3, using: &generator) {
    case 0: state.control = random & 0xf7f | 0x40
    case 1: state.control = random & 0xf00 | 0x7f
    default: break
    }
    let status = UInt16(truncatingIfNeeded: generator.next())
    state.status = status & 0x7f00
    // Pending exceptions only where they are masked, or now and then.
    let flags = UInt16(truncatingIfNeeded: generator.next()) & 0x7f
    state.status |= UInt8.random(in: 0...15, using: &generator) == 0 ? flags : flags & (state.control | 0x40)
    if state.status & ~state.control & 0x3f != 0 { state.status |= 0x8080 }
    state.valid = UInt8.random(in: 0...2, using: &generator) == 0 ? UInt8(truncatingIfNeeded: generator.next()) : 0xff
    for index in 0..<8 { state.stack[index] = extended(&generator) }
  }

  static func integer(_ generator: inout Generator) -> UInt64 {
    let random = generator.next()
    return switch random & 7 {
    case 0: random >> 60
    case 1: 0 &- random >> 60
    case 2: 1 << (random >> 58)
    case 3: UInt64(UInt32(truncatingIfNeeded: random >> 8))
    default: generator.next()
    }
  }

  static func vector(_ generator: inout Generator, _ format: UInt8) -> [UInt8] {
    switch format {
    case 0: (0..<8).flatMap { _ in bytes(single(&generator)) }
    case 1: (0..<4).flatMap { _ in bytes(double(&generator)) }
    case 2: (0..<4).flatMap { _ in bytes(integer(&generator)) }
    default: (0..<4).flatMap { _ in bytes(generator.next()) }
    }
  }

  static func single(_ generator: inout Generator) -> UInt32 {
    let random = UInt32(truncatingIfNeeded: generator.next())
    let sign = random & 0x8000_0000
    return switch random & 15 {
    case 0: sign
    case 1: sign | 0x7f80_0000
    case 2: sign | 0x7fc0_0000 | random >> 10
    case 3: sign | 0x7f80_0001 | random >> 12
    case 4: sign | random >> 9
    case 5: sign | 0x0080_0000 | random >> 20
    case 6: sign | 0x7f7f_ff00 | random >> 24
    case 7, 8, 9: sign | Float(random >> 4 & 0xfff).bitPattern
    case 10, 11, 12: sign | 0x3f00_0000 | random >> 6
    default: random
    }
  }

  static func double(_ generator: inout Generator) -> UInt64 {
    let random = generator.next()
    let sign = random & 1 << 63
    return switch random & 15 {
    case 0: sign
    case 1: sign | 0x7ff << 52
    case 2: sign | 0xfff << 51 | random >> 14
    case 3: sign | 0x7ff << 52 | 1 | random >> 15
    case 4: sign | random >> 12
    case 5: sign | 1 << 52 | random >> 40
    case 6: sign | 0x7fef_ffff_ffff_0000 | random >> 48
    case 7, 8, 9: sign | Double(random >> 4 & 0xff_ffff).bitPattern
    case 10, 11: sign | 0x3fe << 52 | random >> 10
    // Near the edges of single precision.
    case 12: sign | Double(Float(bitPattern: single(&generator))).bitPattern & ~(1 << 63)
    case 13: sign | 0x3810 << 48 | random >> 16
    default: random
    }
  }

  static func extended(_ generator: inout Generator) -> [UInt8] {
    let random = generator.next()
    let sign = UInt16(random >> 63) << 15
    let significand = generator.next()
    let (exponent, bits): (UInt16, UInt64) =
      switch random & 15 {
      case 0: (0, 0)
      case 1: (0x7fff, 1 << 63)
      case 2: (0x7fff, significand | 3 << 62)
      case 3: (0x7fff, significand & ~(1 << 62) | 1 << 63 | 1)
      case 4: (0, significand >> 1)
      case 5: (0, significand | 1 << 63)
      case 6: (UInt16(random >> 8 & 0x7fff), significand >> 1)
      case 7: (0x7ffe, significand | 1 << 63)
      case 8: (1, significand | 1 << 63)
      case 9: (0x3fff + UInt16(random >> 8 & 63), significand | 1 << 63)
      case 10: (0x3fff &- UInt16(random >> 8 & 63), significand | 1 << 63)
      case 11: (0x3fff + UInt16(random >> 8 & 15), significand & ~0xffff_ffff_ffff | 1 << 63)
      case 12: (0x3fff, 1 << 63)
      case 13: (0x3c01 &+ UInt16(random >> 8 & 15) &- 8, significand | 1 << 63)
      default: (UInt16(random >> 8 & 0x7fff), significand | 1 << 63)
      }
    return bytes(bits) + bytes(sign | exponent)
  }

  static func bytes<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    withUnsafeBytes(of: value.littleEndian) { Array($0) }
  }
}
