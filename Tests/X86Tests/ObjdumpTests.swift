import Foundation
import Testing
import X86

/// Every opcode of every map, with prefixes and random operands, against GNU objdump: length and text must agree.
@Suite(.enabled(if: Objdump.isInstalled, "GNU objdump (package binutils) is not installed"))
struct ObjdumpTests {
  /// Random, and reproducible from the seed that a failure prints.
  struct SplitMix64: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
      state &+= 0x9e37_79b9_7f4a_7c15
      var z = state
      z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
      z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
      return z ^ z >> 31
    }
  }

  /// X86_SEED is another run's seed; X86_ROUNDS multiplies the number of random operands.
  static let seed = ProcessInfo.processInfo.environment["X86_SEED"].flatMap { UInt64($0) } ?? 1
  static let rounds = ProcessInfo.processInfo.environment["X86_ROUNDS"].flatMap { Int($0) } ?? 1

  @Test(arguments: [CodeMode.code16, .code32, .code64])
  func everyOpcode(mode: CodeMode) throws {
    var random = SplitMix64(state: Self.seed)
    var sequences: [[UInt8]] = []
    for _ in 0..<Self.rounds { sequences += Self.opcodes(mode, &random) }
    try compare(sequences, mode)
  }

  /// Every ModRM byte, and every SIB byte for some, with each size of displacement and address.
  @Test(arguments: [CodeMode.code16, .code32, .code64])
  func everyAddressingForm(mode: CodeMode) throws {
    var random = SplitMix64(state: Self.seed)
    var sequences: [[UInt8]] = []
    let prefixes: [[UInt8]] = [[], [0x67], [0x65], [0x66]] + (mode == .code64 ? [[0x4f], [0x41], [0x67, 0x42]] : [])
    for prefix in prefixes {
      for modRM in UInt8.min ... .max { sequences.append(prefix + [0x8b, modRM] + bytes(9, &random)) }
      for sib in UInt8.min ... .max {
        sequences.append(prefix + [0x03, 0x04 | (sib & 3) << 6 & 0x80, sib] + bytes(9, &random))
      }
    }
    try compare(sequences, mode)
  }

  @Test(arguments: [CodeMode.code16, .code32, .code64])
  func randomBytes(mode: CodeMode) throws {
    var random = SplitMix64(state: Self.seed)
    try compare((0..<4000 * Self.rounds).map { _ in bytes(15, &random) }, mode)
  }

  private static func opcodes(_ mode: CodeMode, _ random: inout SplitMix64) -> [[UInt8]] {
    var sequences: [[UInt8]] = []
    let prefixes: [[UInt8]] = [[], [0x66], [0xf3], [0xf2], [0x67], [0x2e]]
    let extended: [[UInt8]] = mode == .code64 ? [[0x48], [0x66, 0x4d], [0xf3, 0x4a], [0xf2, 0x49]] : []
    for map in [[], [0x0f], [0x0f, 0x38], [0x0f, 0x3a]] as [[UInt8]] {
      for opcode in UInt8.min ... .max {
        for prefix in prefixes + extended {
          for modRM in [UInt8.random(in: 0x00...0xbf, using: &random), .random(in: 0xc0...0xff, using: &random)] {
            sequences.append(prefix + map + [opcode, modRM] + bytes(10 - map.count, &random))
          }
        }
      }
    }
    // Opcodes that are many instructions: every ModRM byte.
    for opcode in [[0x0f, 0x00], [0x0f, 0x01], [0x0f, 0xae], [0x0f, 0xc7]] + (0xd8...0xdf).map({ [$0] }) as [[UInt8]] {
      for prefix in prefixes.prefix(4) {
        for modRM in UInt8.min ... .max { sequences.append(prefix + opcode + [modRM] + bytes(8, &random)) }
      }
    }
    for map in UInt8(1)...3 {
      for opcode in UInt8.min ... .max {
        for fields in UInt8(0)..<16 {
          // W, vvvv (mostly unused), L, pp.
          let vvvv: UInt8 = fields & 2 == 0 ? 0x78 : UInt8.random(in: 8...15, using: &random) << 3
          let third = fields << 7 & 0x80 | vvvv | fields >> 1 & 7
          let second = (mode == .code64 ? UInt8.random(in: 0...7, using: &random) << 5 : 0xe0) | map
          sequences.append([0xc4, second, third, opcode] + bytes(10, &random))
        }
      }
    }
    return sequences
  }

  private func compare(_ sequences: [[UInt8]], _ mode: CodeMode) throws {
    var mismatches: [String] = []
    var compared = 0
    for start in stride(from: 0, to: sequences.count, by: Objdump.slotsPerRun) {
      let run = sequences[start..<min(start + Objdump.slotsPerRun, sequences.count)]
      let theirs = try Objdump.disassemble(run, mode: mode)
      for (slot, (bytes, their)) in zip(run, theirs).enumerated() {
        let our = decode(bytes, mode, address: UInt64(slot * Objdump.slotSize))
        if our.length == 0, their.text.contains("(bad)") { continue }
        compared += 1
        if our.length == their.length, Objdump.normalised(our.text) == Objdump.normalised(their.text) { continue }
        if KnownDifferences.contains(bytes, our, their, mode) { continue }
        mismatches.append("\(bytes.prefix(max(our.length, their.length)).hexadecimal): \(our) objdump: \(their)")
      }
    }
    #expect(compared > sequences.count / 8)
    let count = mismatches.count
    #expect(count == 0, "seed \(Self.seed): of \(compared), the first: \(mismatches.prefix(8))")
  }

  private func decode(_ bytes: [UInt8], _ mode: CodeMode, address: UInt64) -> Objdump.Line {
    do throws(DecodeError) {
      let instruction = try Instruction(bytes, mode)
      return Objdump.Line(length: Int(instruction.length), text: instruction.text(at: address))
    } catch {
      return Objdump.Line(length: 0, text: "(bad)")
    }
  }
}

private func bytes(_ count: Int, _ random: inout ObjdumpTests.SplitMix64) -> [UInt8] {
  // Zeros and ones often, for displacements and immediates near the edges.
  (0..<count).map { _ in [0, 0xff, .random(in: 0 ... .max, using: &random)][Int.random(in: 0..<3, using: &random)] }
}

extension [UInt8].SubSequence {
  var hexadecimal: String { map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined() }
}

extension Instruction {
  init(_ bytes: [UInt8], _ mode: CodeMode) throws(DecodeError) {
    let result = bytes.withUnsafeBytes { raw in
      Result<Instruction, DecodeError> { () throws(DecodeError) in try Instruction(decoding: raw, mode: mode) }
    }
    self = try result.get()
  }
}
