import Accelerator
import CSoftCPU
import NativeRunner
import Testing
import X86

@testable import SoftAccelerator

extension NativeTests {
  /// What random registers do not reach: control registers, gathers and masked moves over the end of memory.
  @Suite
  struct VectorRulesTests {
    private func decode(_ bytes: [UInt8], mode: CodeMode = .code64) throws -> Instruction {
      try bytes.withUnsafeBytes { try Instruction(decoding: $0, mode: mode) }
    }

    private static let addps: [UInt8] = [0x0f, 0x58, 0xc1]
    private static let paddbMMX: [UInt8] = [0x0f, 0xfc, 0xc1]
    private static let vaddps: [UInt8] = [0xc5, 0xf0, 0x58, 0xc2]
    private static let fadd: [UInt8] = [0xd8, 0xc1]
    private static let fwait: [UInt8] = [0x9b]
    private static let fxsave: [UInt8] = [0x0f, 0xae, 0x06]
    private static let xsave: [UInt8] = [0x0f, 0xae, 0x26]
    private static let emms: [UInt8] = [0x0f, 0x77]

    /// Exceptions by SDM vol. 3, tables 2-2 and 14-1: 6 #UD, 7 #NM, -1 none.
    @Test(
      arguments: [
        (addps, CR0.em, CR4.osfxsr, 6), (addps, CR0.ts, CR4.osfxsr, 7), (addps, CR0([]), CR4([]), 6),
        (addps, CR0.mp, CR4.osfxsr, -1), (addps, [CR0.em, .ts], CR4.osfxsr, 6),
        (paddbMMX, CR0.em, CR4([]), 6), (paddbMMX, CR0.ts, CR4([]), 7), (paddbMMX, CR0([]), CR4([]), -1),
        (emms, CR0.em, CR4([]), 6), (emms, CR0.ts, CR4([]), 7), (emms, CR0([]), CR4([]), -1),
        (vaddps, CR0.ts, CR4.osxsave, 7), (vaddps, CR0.em, CR4.osxsave, -1), (vaddps, CR0([]), CR4.osfxsr, 6),
        (fadd, CR0.em, CR4([]), 7), (fadd, CR0.ts, CR4([]), 7), (fadd, CR0.mp, CR4([]), -1),
        (fwait, CR0.em, CR4([]), -1), (fwait, CR0.ts, CR4([]), -1), (fwait, [CR0.mp, .ts], CR4([]), 7),
        (fxsave, CR0.em, CR4([]), 7), (fxsave, CR0.ts, CR4([]), 7), (fxsave, CR0([]), CR4([]), -1),
        (xsave, CR0.em, CR4.osxsave, -1), (xsave, CR0.ts, CR4.osxsave, 7), (xsave, CR0([]), CR4.osfxsr, 6),
      ] as [([UInt8], CR0, CR4, Int)])
    func controlRegisters(bytes: [UInt8], cr0: CR0, cr4: CR4, exception: Int) throws {
      guard let oracle = NativeOracle() else { return }
      oracle.processor.cpu.pointee.cr0 = cr0.union([.pe, .ne]).rawValue
      oracle.processor.cpu.pointee.cr4 = cr4.rawValue
      var state = NativeOracle.State()
      state.general[6] = NativeOracle.memoryAddress
      #expect(oracle.runSoft(try decode(bytes), state).vector == exception)
    }

    @Test func maskedComponentsOfXCR0() throws {
      guard let oracle = NativeOracle() else { return }
      for (xcr0, exception) in [(1, 6), (3, 6), (7, -1)] as [(UInt64, Int)] {
        oracle.processor.cpu.pointee.xcr0 = xcr0
        #expect(oracle.runSoft(try decode(Self.vaddps), NativeOracle.State()).vector == exception)
      }
    }

    @Test func unmaskedExceptionWithoutOSXMMEXCPT() throws {
      guard let oracle = NativeOracle() else { return }
      var state = NativeOracle.State()
      // 0 / 0: invalid operation, which is not masked.
      state.mxcsr = 0x1f00
      let divps = try decode([0x0f, 0x5e, 0xc1])
      #expect(oracle.runSoft(divps, state).vector == 19)
      oracle.processor.cpu.pointee.cr4 = CR4.osfxsr.rawValue
      let result = oracle.runSoft(divps, state)
      #expect(result.vector == 6)
      #expect(result.mxcsr == 0x1f01)
      #expect(result.vectors == state.vectors)
    }

    @Test func pendingX87Exception() throws {
      guard let oracle = NativeOracle() else { return }
      var state = NativeOracle.State()
      state.control = 0x37e
      state.status = 0x8081
      for bytes in [Self.fadd, Self.fwait, Self.emms, Self.paddbMMX] {
        #expect(oracle.runSoft(try decode(bytes), state).vector == 16)
      }
      // FNCLEX, FNSTSW AX and FNINIT do not wait.
      #expect(oracle.runSoft(try decode([0xdb, 0xe2]), state).status == 0)
      #expect(oracle.runSoft(try decode([0xdf, 0xe0]), state).general[0] == 0x8081)
      #expect(oracle.runSoft(try decode([0xdb, 0xe3]), state).control == 0x37f)
    }

    @Test func opcodeAndPointers() throws {
      guard let oracle = NativeOracle() else { return }
      var state = NativeOracle.State()
      state.general[6] = NativeOracle.memoryAddress + 16
      state.memory = [UInt8](repeating: 0, count: 64)
      // fadd dword [rsi + 4]
      #expect(oracle.runSoft(try decode([0xd8, 0x46, 4]), state).vector == -1)
      let cpu = oracle.processor.cpu
      #expect(cpu.pointee.fpu_opcode == 0x046)
      #expect(cpu.pointee.fpu_instruction == 0x1000)
      #expect(cpu.pointee.fpu_data == NativeOracle.memoryAddress + 20)
    }

    /// Gathers: vpgatherdd ymm1, [rsi + ymm2 * 4], ymm3 and the like, all sizes of index and element.
    @Test func gathers() throws {
      guard let oracle = NativeOracle(), native_components() & 4 != 0 else { return }
      var generator = Generator(state: 8)
      for opcode: UInt8 in 0x90...0x93 {
        for last: UInt8 in [0x61, 0x65, 0xe1, 0xe5] {
          for _ in 0..<200 {
            var state = NativeOracle.State()
            for index in 0..<16 { state.vectors[index] = RandomState.vector(&generator, 3) }
            state.memory = (0..<1024).map { _ in UInt8(truncatingIfNeeded: generator.next()) }
            state.general[6] = NativeOracle.memoryAddress + 512
            // Indices from -100 to 99, as dwords or qwords.
            let isWide = opcode & 1 != 0
            state.vectors[2] = (0..<(isWide ? 4 : 8)).flatMap { _ -> [UInt8] in
              let index = Int64(generator.next() % 200) - 100
              return isWide ? RandomState.bytes(index) : RandomState.bytes(Int32(index))
            }
            let bytes: [UInt8] = [0xc4, 0xe2, last, opcode, 0x0c, 0x96]
            let soft = oracle.runSoft(try decode(bytes), state)
            let native = oracle.runNative(bytes, state)
            #expect(soft == native, "\(bytes): \(soft.difference(from: native))")
          }
        }
      }
    }

    /// Elements that are masked out lie where nothing is; those before the one that faults are done.
    @Test func touchesEnabledElementsAlone() throws {
      guard let oracle = NativeOracle(), native_components() & 4 != 0 else { return }
      var state = NativeOracle.State()
      state.memory = (0..<NativeOracle.memorySize).map { UInt8(truncatingIfNeeded: $0) }
      let end = NativeOracle.memoryAddress + UInt64(NativeOracle.memorySize)
      state.general[6] = end - 12
      state.vectors[0] = [UInt8](repeating: 0xaa, count: 32)
      let enabled = [UInt8](repeating: 0xff, count: 4)
      let disabled = [UInt8](repeating: 0x7f, count: 4)
      state.vectors[1] = (enabled + disabled + enabled) + (0..<5).flatMap { _ in disabled }
      // vmaskmovps ymm0, ymm1, [rsi], vmaskmovps [rsi], ymm1, ymm0, vpmaskmovd [rsi], ymm1, ymm0
      for bytes in [[0xc4, 0xe2, 0x75, 0x2c, 0x06], [0xc4, 0xe2, 0x75, 0x2e, 0x06], [0xc4, 0xe2, 0x75, 0x8e, 0x06]]
        as [[UInt8]]
      {
        let soft = oracle.runSoft(try decode(bytes), state)
        #expect(soft.vector == -1)
        #expect(soft == oracle.runNative(bytes, state))
      }
    }
  }
}
