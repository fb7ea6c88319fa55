import CSoftCPU
import Testing
import X86

@testable import SoftAccelerator

/// Sequences of instructions as blocks and one at a time: what a block decides beforehand (forms without flags among it)
/// must not show, wherever the block is left.
@Suite struct BlockTests {
  @Test func sequencesAreTheirInstructions() {
    var random = SplitMix(state: 0x5eed_0007)
    var faults = 0
    var silenced = 0
    for number in 0..<1000 {
      let count = Int(random.next() % 30) + 2
      var code: [UInt8] = []
      for _ in 0..<count { code += Self.instruction(&random) }
      code += [0x0f, 0x0b]
      let general = (0..<16).map { _ in random.next() }
      let inBlocks = Self.run(code, general, isStepped: false)
      let stepped = Self.run(code, general, isStepped: true)
      #expect(inBlocks.vector == stepped.vector, "case \(number): \(code)")
      #expect(inBlocks.frame == stepped.frame, "case \(number): \(code)")
      #expect(inBlocks.general == stepped.general, "case \(number): \(code)")
      #expect(inBlocks.data == stepped.data, "case \(number): \(code)")
      if stepped.vector == 14 { faults += 1 }
      silenced += inBlocks.silenced
    }
    #expect(faults > 50)
    #expect(silenced > 3000)
  }

  private struct Result {
    var vector: UInt64?
    var frame: [UInt64] = []
    var general: [UInt64] = []
    var data: [UInt64] = []
    var silenced = 0
  }

  private static func run(_ code: [UInt8], _ general: [UInt64], isStepped: Bool) -> Result {
    let cpu = SystemCPU(.long, code: code)
    let processor = cpu.processor
    for index in 0..<16 where index != 4 { processor.general[index] = general[index] }
    // Both are data; the page behind R11's is not there.
    processor.general[6] = 0x20000 + general[6] & 0xff0
    processor.general[11] = UInt64(SystemCPU.size) - 0x40
    for word in 0..<64 as Range<UInt64> { cpu.put(word &* 0x9e37_79b9_7f4a_7c15, at: 0x20e00 + word * 8) }
    processor.tracesInstructions = isStepped
    var result = Result()
    guard cpu.runToHalt() else { return result }
    result.vector = cpu.vector
    result.frame = cpu.stack(result.vector == 14 ? 6 : 5, as: UInt64.self)
    result.general = (0..<16).map { processor.general[$0] }
    result.data =
      (0..<640 as Range<UInt64>).map { cpu.get(0x20000 + $0 * 8, as: UInt64.self) }
      + (0..<8).map { cpu.get(UInt64(SystemCPU.size) - 0x40 + $0 * 8, as: UInt64.self) }
    if !isStepped, let block = try? processor.find(0x1000) {
      var op = block.pointee.ops
      while !op.pointee.code.endsBlock {
        if "\(op.pointee.code)".hasSuffix("Silent") { result.silenced += 1 }
        op += 1
      }
    }
    return result
  }

  /// A random instruction that reads or sets flags, or might; one in eight touches memory, some of which is not there.
  private static func instruction(_ random: inout SplitMix) -> [UInt8] {
    let wide: [UInt8] = random.next() & 1 == 0 ? [0x48] : []
    // Not RSP, and not RSI, which is a pointer.
    let registers: [UInt8] = [0, 1, 2, 3, 5, 7]
    let first = registers[Int(random.next() % 6)]
    let second = registers[Int(random.next() % 6)]
    let choice = random.next()
    let isMemory = choice & 7 == 0
    let byte = UInt8(truncatingIfNeeded: random.next())
    func operand(_ register: UInt8) -> [UInt8] {
      isMemory ? [0x40 | register << 3 | 6, byte & 0x78] : [0xc0 | register << 3 | first]
    }
    let group = UInt8(choice >> 8 & 7)
    switch (choice >> 16) % 20 {
    case 0, 1, 2, 3: return wide + [group << 3 | (choice >> 32 & 1 == 0 ? 1 : 3)] + operand(second)
    case 4, 5: return wide + [0x83] + operand(group) + [byte]
    case 6: return [group << 3] + operand(second)
    case 7: return wide + [0xff] + operand(group & 1)
    case 8: return wide + [0xf7] + operand(2 | group & 1)
    case 9, 10: return wide + [0xc1] + operand([4, 5, 7][Int(group) % 3]) + [byte & 31]
    case 11: return wide + [0xc1] + operand(group & 1) + [byte & 31]
    case 12: return wide + [0xd3] + operand([4, 5, 7][Int(group) % 3])
    case 13: return wide + [0x0f, 0xaf] + operand(second)
    case 14: return wide + [0x6b] + operand(second) + [byte]
    case 15: return wide + [0x8d, 0x44 | second << 3, 0x40 | first << 3 | 1, byte]
    case 16: return wide + [0x0f, 0x40 | byte & 15] + operand(second)
    case 17: return [0x0f, 0x90 | byte & 15, 0xc0 | first & 3]
    case 18: return wide + [0x0f, 0xba] + [0xe0 | first, byte & 31]
    default:
      // A page's end, now and then beyond it.
      return choice >> 40 & 3 == 0 ? [0x49, 0x01 | byte & 0x38, 0x43, byte & 0x7f] : wide + [0x85] + operand(second)
    }
  }
}
