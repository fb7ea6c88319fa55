import Accelerator
import StateTree
import Testing

/// A vCPU's state as bytes; no accelerator is needed.
@Suite struct StateNodes {
  /// A state with no two fields alike.
  private static let state: VCPUState = {
    var state = VCPUState()
    for (number, path) in GeneralRegisters.fields.enumerated() { state.general[keyPath: path] = UInt64(number) << 40 }
    state.system.fs = SegmentRegister(base: 1 << 47, limit: 0x1234, selector: 0x33, attributes: 0x1cf3)
    state.system.gdt = DescriptorTable(base: 0x500, limit: 63)
    state.system.cr3 = 0x1000
    state.extended = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 13) }
    state.xcr0 = 7
    state.modelSpecific = [.init(index: 0x10, value: 5), .init(index: 0xc000_0082, value: .max)]
    state.localAPIC = (0..<1024).map { UInt8(truncatingIfNeeded: $0 &* 11) }
    state.events.exceptionPending = true
    state.events.exceptionPayload = 0xdead
    state.events.interruptShadow = 2
    state.events.nmiMasked = true
    state.debug.addresses = [1, 2, 3, 4]
    state.activity = .waitForStartup
    state.tscKilohertz = 2_400_000
    return state
  }()

  @Test func areReadAsTheyWereWritten() throws {
    #expect(try VCPUState(Self.state.node(index: 3), index: 3) == Self.state)
    #expect(try VCPUState(VCPUState().node(index: 0), index: 0) == VCPUState())
  }

  @Test func areRefusedWhereTheyEndEarly() throws {
    let node = Self.state.node(index: 0)
    for length in 0..<node.payload.count {
      var short = node
      short.payload = Array(node.payload.prefix(length))
      #expect(throws: StateError.self) { try VCPUState(short, index: 0) }
    }
    var long = node
    long.payload.append(0)
    #expect(throws: StateError.self) { try VCPUState(long, index: 0) }
    #expect(throws: StateError.self) { try VCPUState(node, index: 1) }
  }

  @Test func neverTrap() {
    var random = SplitMix(state: 1)
    var node = Self.state.node(index: 0)
    let payload = node.payload
    var read = 0
    for round in 0..<5_000 {
      if round % 2 == 0 {
        node.payload = payload
        node.payload[Int.random(in: 0..<payload.count, using: &random)] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      } else {
        let count = Int.random(in: 0..<600, using: &random)
        node.payload = (0..<count).map { _ in UInt8.random(in: 0...255, using: &random) }
      }
      if (try? VCPUState(node, index: 0)) != nil { read += 1 }
    }
    // A flipped bit in a plain register is a state all the same; noise is none.
    #expect(read > 0 && read <= 2_500)
  }
}

/// Steele, Lea and Flood's generator: the same inputs in every run.
private struct SplitMix: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var mixed = (state ^ state >> 30) &* 0xbf58_476d_1ce4_e5b9
    mixed = (mixed ^ mixed >> 27) &* 0x94d0_49bb_1331_11eb
    return mixed ^ mixed >> 31
  }
}
