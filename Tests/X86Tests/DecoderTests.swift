import Testing
import X86

@Suite struct DecoderTests {
  @Test func operationsAndOperands() throws {
    let add = try Instruction([0x48, 0x03, 0x44, 0xb5, 0xf0], .code64)
    #expect(add.operation == .addGvEv)
    #expect(add.operation.mnemonic == .add)
    #expect(add.length == 5)
    #expect(add.operandSize == 8 && add.addressSize == 8)
    #expect(add.operands[0].register == Register(.general64, 0))
    #expect(add.operands[1].kind == .memory && add.operands[1].size == 8)
    #expect(add.operands[2].kind == .none)
    #expect(add.segment == .ss && add.base == Register(.general64, 5) && add.index == Register(.general64, 6))
    #expect(add.scale == 4 && add.displacement == -16)
  }

  @Test func ripRelativeAndImmediates() throws {
    let mov = try Instruction([0xc7, 0x05, 0x10, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], .code64)
    #expect(mov.base == Register(.instructionPointer, 4) && mov.displacement == 16)
    #expect(mov.immediate == -1 && mov.operands[1].size == 4)
    #expect(mov.text(at: 0x1000) == "mov    DWORD PTR [rip+0x10],0xffffffff        # 0x101a")
    let movabs = try Instruction([0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8], .code64)
    #expect(movabs.immediate == 0x0807_0605_0403_0201)
    let enter = try Instruction([0xc8, 0x34, 0x12, 0x03], .code32)
    #expect(enter.immediate == 0x1234 && enter.secondImmediate == 3)
    let far = try Instruction([0x66, 0xea, 0x34, 0x12, 0, 0xf0, 0x10, 0], .code16)
    #expect(far.immediate == 0xf000_1234 && far.secondImmediate == 0x10)
  }

  @Test func byteRegistersDependOnREX() throws {
    #expect(try Instruction([0x88, 0xe0], .code64).text(at: 0) == "mov    al,ah")
    #expect(try Instruction([0x40, 0x88, 0xe0], .code64).text(at: 0) == "mov    al,spl")
    #expect(try Instruction([0x45, 0x88, 0xe0], .code64).text(at: 0) == "mov    r8b,r12b")
  }

  @Test func prefixes() throws {
    let string = try Instruction([0xf3, 0x64, 0xa5], .code32)
    #expect(string.isRepeated && string.segment == .fs)
    #expect(string.text(at: 0) == "rep movs DWORD PTR es:[edi],DWORD PTR fs:[esi]")
    #expect(try Instruction([0xf0, 0x0f, 0xb1, 0x0f], .code32).text(at: 0) == "lock cmpxchg DWORD PTR [edi],ecx")
    // The last of F2 and F3 counts, and REX only right before the opcode.
    #expect(try Instruction([0xf2, 0xf3, 0xa6], .code64).prefixes.contains(.repne) == false)
    #expect(try Instruction([0x48, 0x66, 0x89, 0xc8], .code64).operandSize == 2)
    // 64-bit mode ignores DS, ES, CS and SS prefixes.
    #expect(try Instruction([0x36, 0x8b, 0x00], .code64).segment == .ds)
    #expect(try Instruction([0x36, 0x8b, 0x00], .code32).segment == .ss)
  }

  @Test func operandSizes() throws {
    // push and near branches are 64-bit in 64-bit mode; 66 makes push 16-bit and leaves branches alone.
    #expect(try Instruction([0x50], .code64).operandSize == 8)
    #expect(try Instruction([0x66, 0x50], .code64).operandSize == 2)
    #expect(try Instruction([0x66, 0xe8, 0, 0, 0, 0], .code64).length == 6)
    #expect(try Instruction([0x66, 0xe8, 0, 0], .code32).length == 4)
    #expect(try Instruction([0x98], .code16).operation == .cbw)
    #expect(try Instruction([0x98], .code32).operation == .cwde)
    #expect(try Instruction([0x48, 0x98], .code64).operation == .cdqe)
    #expect(try Instruction([0x67, 0xe3, 0], .code64).operation == .jecxzJb)
    // mov to and from control registers knows no 66 and no ModRM.mod.
    #expect(try Instruction([0x66, 0x0f, 0x20, 0x00], .code32).text(at: 0) == "mov    eax,cr0")
  }

  @Test func branchTargetsWrap() throws {
    #expect(try Instruction([0xeb, 0xfe], .code16).text(at: 0xfff0) == "jmp    0xfff0")
    #expect(try Instruction([0xeb, 0x7f], .code16).text(at: 0xfff0) == "jmp    0x71")
    #expect(try Instruction([0xe8, 0xfb, 0xff, 0xff, 0xff], .code64).text(at: 0) == "call   0x0")
    #expect(try Instruction([0xe9, 0xf0, 0xff, 0xff, 0xff], .code64).text(at: 0) == "jmp    0xfffffffffffffff5")
  }

  @Test func twoMeaningsOfOneOpcode() throws {
    #expect(try Instruction([0x63, 0xc8], .code64).operation == .movsxdGvEd)
    #expect(try Instruction([0x63, 0xc8], .code32).operation == .arplEwGw)
    #expect(try Instruction([0xc5, 0x08], .code32).operation == .ldsGzMp)
    #expect(try Instruction([0x90], .code64).operation == .nop)
    #expect(try Instruction([0x41, 0x90], .code64).text(at: 0) == "xchg   r8d,eax")
    #expect(try Instruction([0xf3, 0x90], .code64).operation == .pause)
    #expect(try Instruction([0xf3, 0x0f, 0xbc, 0xc1], .code64).operation == .tzcntGvEv)
    #expect(try Instruction([0x0f, 0xbc, 0xc1], .code64).operation == .bsfGvEv)
    #expect(try Instruction([0xc4, 0xe2, 0x78, 0xf2, 0xc1], .code64).text(at: 0) == "andn   eax,eax,ecx")
  }

  @Test(
    arguments: [
      [0x06], [0x27], [0x62, 0x00], [0x9a], [0xf0, 0x90], [0xf0, 0x89, 0xc8], [0xf0, 0x8b, 0x00], [0x0f, 0x04],
      [0x8e, 0xc8], [0x8e, 0xf0], [0x0f, 0x22, 0xc8], [0x44, 0x0f, 0x23, 0xc0], [0x0f, 0xc7, 0xc8], [0x8d, 0xc0],
      [0x66, 0xc5, 0xf8, 0x77], [0x48, 0xc5, 0xf8, 0x77],
    ] as [[UInt8]])
  func invalidIn64BitMode(bytes: [UInt8]) {
    #expect(throws: DecodeError.invalidOpcode) { try Instruction(bytes, .code64) }
  }

  @Test func vexOutside64BitMode() throws {
    // VEX.B and the top bit of a used vvvv are ignored; an unused vvvv must be 1111. So a CPU does it.
    #expect(try Instruction([0xc4, 0xc1, 0x78, 0x28, 0xd5], .code32).text(at: 0) == "vmovaps xmm2,xmm5")
    #expect(try Instruction([0xc4, 0xe1, 0x38, 0x58, 0xd5], .code32).text(at: 0) == "vaddps xmm2,xmm0,xmm5")
    #expect(throws: DecodeError.invalidOpcode) { try Instruction([0xc4, 0xe1, 0x38, 0x28, 0xd5], .code32) }
  }

  @Test func gathersNeedThreeRegisters() throws {
    let gather = try Instruction([0xc4, 0xe2, 0x6d, 0x90, 0x0c, 0xa0], .code64)
    #expect(gather.text(at: 0) == "vpgatherdd ymm1,DWORD PTR [rax+ymm4*4],ymm2")
    #expect(gather.index == Register(.ymm, 4) && gather.base == Register(.general64, 0))
    #expect(throws: DecodeError.invalidOpcode) { try Instruction([0xc4, 0xe2, 0x6d, 0x90, 0x0c, 0x90], .code64) }
    #expect(throws: DecodeError.invalidOpcode) { try Instruction([0xc4, 0xe2, 0x6d, 0x90, 0x08], .code64) }
  }

  @Test func x87StackTop() throws {
    #expect(try Instruction([0xd8, 0xc0], .code64).text(at: 0) == "fadd   st,st(0)")
    #expect(try Instruction([0xdc, 0xe9], .code64).operation == .fsubStiSt0)
  }

  /// A fetch that ends at a page boundary asks for more, whatever the length, and never decodes wrongly.
  @Test func everyTruncationAsksForMore() throws {
    let long: [UInt8] = [0x66, 0x64, 0x67, 0xf0, 0x81, 0x84, 0x81, 1, 2, 3, 4, 5, 6]
    #expect(try Instruction(long, .code64).length == 13)
    for count in 0..<long.count {
      #expect(throws: DecodeError.needsMoreBytes) { try Instruction(Array(long.prefix(count)), .code64) }
    }
  }

  @Test func fifteenBytesAreTheLimit() throws {
    let prefixes = [UInt8](repeating: 0x26, count: 14)
    #expect(try Instruction(prefixes + [0x90], .code32).length == 15)
    #expect(throws: DecodeError.tooLong) { try Instruction(prefixes + [0x26, 0x90], .code32) }
    #expect(throws: DecodeError.tooLong) { try Instruction(prefixes + [0x04, 0x00], .code32) }
    #expect(throws: DecodeError.needsMoreBytes) { try Instruction(prefixes, .code32) }
  }

  /// Whatever the bytes, decoding and disassembling end, and within the bytes at hand.
  @Test(arguments: [CodeMode.code16, .code32, .code64])
  func randomBytesNeverTrap(mode: CodeMode) {
    var random = ObjdumpTests.SplitMix64(state: ObjdumpTests.seed)
    var buffer = [UInt8](repeating: 0, count: 16)
    var decoded = 0
    var outOfBounds = 0
    for round in 0..<400_000 * ObjdumpTests.rounds {
      let low = random.next()
      let high = random.next()
      let count = Int(high >> 60) + 1
      let result = buffer.withUnsafeMutableBytes { raw -> Instruction? in
        raw.storeBytes(of: low, as: UInt64.self)
        raw.storeBytes(of: high, toByteOffset: 8, as: UInt64.self)
        // The opcode map evenly, the rest at random.
        if round & 1 == 0 { raw[0] = 0x0f }
        return try? Instruction(decoding: UnsafeRawBufferPointer(rebasing: raw[..<count]), mode: mode)
      }
      guard let instruction = result else { continue }
      decoded += 1
      if instruction.length == 0 || instruction.length > min(count, 15) { outOfBounds += 1 }
      if round & 15 == 0, instruction.text(at: low).isEmpty { outOfBounds += 1 }
    }
    #expect(outOfBounds == 0, "seed \(ObjdumpTests.seed)")
    #expect(decoded > 50_000)
  }
}
