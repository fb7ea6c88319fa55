import CSoftCPU
import NativeRunner
import Testing
import X86

@testable import SoftAccelerator

extension NativeTests {
  /// FXSAVE, the XSAVE family and the x87 environment, against the physical CPU.
  @Suite
  struct ExtendedStateTests {
    static let area: UInt64 = NativeOracle.memoryAddress + 64

    /// A state whose memory is an image of another state, or noise.
    private func makeState(_ generator: inout Generator) -> NativeOracle.State {
      var state = RandomState.make(&generator)
      state.memory = (0..<1280).map { _ in UInt8(truncatingIfNeeded: generator.next()) }
      state.general[6] = Self.area
      state.general[0] = generator.next() & 7
      state.general[2] = 0
      return state
    }

    private func put(_ value: some FixedWidthInteger, _ offset: Int, _ state: inout NativeOracle.State) {
      for (index, byte) in RandomState.bytes(value).enumerated() { state.memory[64 + offset + index] = byte }
    }

    /// Runs both, ignoring bytes of the area that processors fill in differently.
    private func compare(
      _ oracle: NativeOracle, _ bytes: [UInt8], _ state: NativeOracle.State, ignoring ranges: [Range<Int>] = []
    ) throws {
      let i = try bytes.withUnsafeBytes { try Instruction(decoding: $0, mode: .code64) }
      var soft = oracle.runSoft(i, state)
      var native = oracle.runNative(bytes, state)
      for range in ranges {
        for index in range {
          soft.memory[64 + index] = 0
          native.memory[64 + index] = 0
        }
      }
      #expect(soft == native, "\(i.operation):\(soft.difference(from: native))")
    }

    @Test func fxsave() throws {
      guard let oracle = NativeOracle() else { return }
      var generator = Generator(state: 2)
      for _ in 0..<500 {
        // MXCSR_MASK: AMD's has one bit more. Pointers: AMD's processors keep them only with a pending exception.
        let ignored = [6..<24, 28..<32]
        try compare(oracle, [0x0f, 0xae, 0x06], makeState(&generator), ignoring: ignored)
        try compare(oracle, [0x48, 0x0f, 0xae, 0x06], makeState(&generator), ignoring: ignored)
      }
    }

    @Test func fxrstor() throws {
      guard let oracle = NativeOracle() else { return }
      var generator = Generator(state: 3)
      for _ in 0..<500 {
        var state = makeState(&generator)
        put(UInt32(truncatingIfNeeded: generator.next() & 0xffff), 24, &state)
        try compare(oracle, [0x0f, 0xae, 0x0e], state)
        put(UInt32(0x0010_1f80), 24, &state)
        try compare(oracle, [0x48, 0x0f, 0xae, 0x0e], state)
        state.general[6] += 8
        try compare(oracle, [0x0f, 0xae, 0x0e], state)
      }
    }

    @Test func xsave() throws {
      guard let oracle = NativeOracle() else { return }
      var generator = Generator(state: 4)
      for _ in 0..<500 {
        let ignored = [6..<24, 28..<32]
        var state = makeState(&generator)
        try compare(oracle, [0x0f, 0xae, 0x26], state, ignoring: ignored)
        try compare(oracle, [0x48, 0x0f, 0xc7, 0x26], state, ignoring: ignored)
        state.general[6] += 32
        try compare(oracle, [0x0f, 0xae, 0x26], state, ignoring: ignored)
      }
    }

    @Test func xrstor() throws {
      guard let oracle = NativeOracle() else { return }
      var generator = Generator(state: 5)
      for _ in 0..<2000 {
        var state = makeState(&generator)
        put(UInt32(truncatingIfNeeded: generator.next() & 0xffff), 24, &state)
        for index in 512..<576 { state.memory[64 + index] = 0 }
        put(generator.next() & 7, 512, &state)
        let kind = generator.next() % 8
        if kind < 3 { put(1 << 63 | generator.next() & 7, 520, &state) }
        if kind == 1 { put(UInt64(7) | 1 << 63, 520, &state) }
        if kind == 4 { put(UInt64(1) << 40, 512, &state) }
        if kind == 5 { put(UInt8(1), 512 + Int(generator.next() % 24), &state) }
        if kind == 6 { put(UInt32(0x0010_0000), 24, &state) }
        try compare(oracle, [0x0f, 0xae, 0x2e], state)
      }
    }

    @Test func x87Environment() throws {
      guard let oracle = NativeOracle() else { return }
      var generator = Generator(state: 6)
      for _ in 0..<500 {
        for prefix in [[], [0x66]] as [[UInt8]] {
          // The pointers, which AMD's processors keep only with a pending exception.
          let pointers = prefix.isEmpty ? 12..<28 : 6..<14
          try compare(oracle, prefix + [0xd9, 0x36], makeState(&generator), ignoring: [pointers])
          try compare(oracle, prefix + [0xdd, 0x36], makeState(&generator), ignoring: [pointers])
          try compare(oracle, prefix + [0xd9, 0x26], makeState(&generator))
          try compare(oracle, prefix + [0xdd, 0x26], makeState(&generator))
        }
      }
    }

    /// What user mode cannot execute, and what may leave out more than the software CPU does: there and back.
    @Test(arguments: [[0x0f, 0xae, 0x36], [0x0f, 0xc7, 0x2e], [0x0f, 0xc7, 0x26]] as [[UInt8]])
    func savesAndRestores(save: [UInt8]) throws {
      guard let oracle = NativeOracle() else { return }
      let isSupervisor = save == [0x0f, 0xc7, 0x2e]
      oracle.processor.cpu.pointee.cpl = isSupervisor ? 0 : 3
      let restore: [UInt8] = isSupervisor ? [0x0f, 0xc7, 0x1e] : [0x0f, 0xae, 0x2e]
      var generator = Generator(state: 7)
      for _ in 0..<200 {
        var state = makeState(&generator)
        state.general[0] = 7
        // Some components in their initial state.
        if Bool.random(using: &generator) {
          for index in 0..<16 { state.vectors[index].replaceSubrange(16..<32, with: repeatElement(0, count: 16)) }
        }
        for index in 512..<576 { state.memory[64 + index] = 0 }
        let saved = oracle.runSoft(try decode(save), state)
        #expect(saved.vector == -1)
        var other = makeState(&generator)
        other.general = saved.general
        other.memory = saved.memory
        let restored = oracle.runSoft(try decode(restore), other)
        #expect(restored.vector == -1)
        #expect(restored.vectors == state.vectors)
        #expect(restored.stack == state.stack)
        #expect((restored.mxcsr, restored.control, restored.status) == (state.mxcsr, state.control, state.status))
      }
    }

    private func decode(_ bytes: [UInt8]) throws -> Instruction {
      try bytes.withUnsafeBytes { try Instruction(decoding: $0, mode: .code64) }
    }
  }
}
