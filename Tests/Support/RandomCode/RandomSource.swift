/// A reproducible source of random numbers (SplitMix64).
struct RandomSource {
  private var state: UInt64

  init(seed: UInt64) { state = seed }

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
  mutating func byte() -> UInt8 { UInt8(truncatingIfNeeded: next() >> 24) }

  /// A bit or several of a word, as often as not.
  mutating func flips(_ mask: UInt64 = ~0) -> UInt64 {
    oneIn(2) ? 1 << UInt64(below(64)) & mask : next() & next() & next() & mask
  }

  /// Integers near all edges, and addresses.
  mutating func integer() -> UInt64 {
    let bits = UInt64(below(64))
    return switch below(12) {
    case 0: 0
    case 1: ~0
    case 2: 1 << bits
    case 3: (1 << bits) &- 1
    case 4: ~(1 << bits)
    case 5: next() & 0xff
    case 6: UInt64(bitPattern: Int64(Int8(truncatingIfNeeded: next())))
    case 7: next() & 0xffff_ffff
    case 8: next()
    default: address()
    }
  }

  /// Linear and physical addresses worth an access: RAM, its pages' ends, devices, edges of the address space.
  mutating func address() -> UInt64 {
    switch below(16) {
    case 0...7: UInt64(below(Int(RandomMachine.lowSize)))
    case 8, 9: UInt64(1 + below(65)) << 12 &- UInt64(below(17))
    case 10: RandomMachine.high + UInt64(below(0x3000))
    case 11: 0xfee0_0000 + UInt64(below(0x1000))
    case 12: 0x20_0000 + UInt64(below(0x80_0000))
    case 13: pick([0x7fff_ffff_fff8, 0xffff_8000_0000_0000, 0xffff_ffff_ffff_fff8, 0xffff_fff8, 0x7fff_fffe])
    case 14: 0xd000_0000 + UInt64(below(0x2000))
    default: UInt64(below(0x1_1000))
    }
  }
}
