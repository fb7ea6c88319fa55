import CSoftCPU
import Testing
import X86

@testable import SoftAccelerator

/// Nonsense as system code, over tables of nonsense, in every mode: nothing of it may trap the VMM.
@Suite struct RandomSystemTests {
  /// Opcodes of system instructions, and a few that make others' operands.
  private static let opcodes: [[UInt8]] = [
    [0x0f, 0x00], [0x0f, 0x01], [0x0f, 0x02], [0x0f, 0x03], [0x0f, 0x05], [0x0f, 0x06], [0x0f, 0x07], [0x0f, 0x09],
    [0x0f, 0x20], [0x0f, 0x21], [0x0f, 0x22], [0x0f, 0x23], [0x0f, 0x30], [0x0f, 0x31], [0x0f, 0x32], [0x0f, 0x34],
    [0x0f, 0x35], [0x0f, 0xa2], [0x0f, 0xae], [0x0f, 0xb2], [0x0f, 0xb4], [0x0f, 0xc7], [0x0f, 0x38, 0x82],
    [0xf3, 0x0f, 0xae], [0x48, 0x0f, 0x07], [0x48, 0xcf], [0x48, 0xcb], [0x48, 0xff], [0x66, 0xcf], [0x66, 0xff],
    [0x06],
    [0x07], [0x16], [0x17], [0x1f], [0x63], [0x8c], [0x8e], [0x9a], [0x9c], [0x9d], [0xc4], [0xc5], [0xca], [0xcb],
    [0xcc],
    [0xcd], [0xce], [0xcf], [0xea], [0xf1], [0xf4], [0xfa], [0xfb], [0xff], [0x90], [0x58], [0x50], [0x89], [0x8b],
  ]

  @Test(arguments: [SystemCPU.Mode.real, .protected, .long])
  func nonsenseNeverTraps(_ mode: SystemCPU.Mode) {
    let seed: UInt64 = 0x5eed_0003
    var random = SplitMix(state: seed)
    var delivered = 0
    var executed = 0
    for number in 0..<300 {
      let cpu = SystemCPU(mode, ring: number & 1 == 0 ? 0 : 3)
      prepare(cpu, &random)
      // One iteration of a repeated string instruction at a time.
      cpu.processor.finishesOnly = true
      for _ in 0..<150 {
        switch advance(cpu.processor, &random) {
        case .executed: executed += 1
        case .delivered: delivered += 1
        case .stopped:
          cpu.processor.cpu.pointee.rip = 0x1000
          cpu.processor.finishDeviceAccesses()
        }
      }
      // Whatever became of it, the state can be taken and put back.
      #expect(throws: Never.self, "seed \(seed), case \(number)") { try cpu.processor.setState(cpu.processor.state) }
    }
    #expect(delivered > 1000)
    #expect(executed > 1000)
  }

  private enum Step {
    case executed
    case delivered
    case stopped
  }

  private func advance(_ p: Processor, _ random: inout SplitMix) -> Step {
    p.isHalted = false
    do throws(Interruption) {
      if p.pendingDebug != 0 { throw .exception(.debug) }
      try p.step()
      return .executed
    } catch .exit {
      switch p.pendingExit {
      case .memory, .port:
        // Any answer of a device.
        p.replay.values.append(random.next())
        return p.replay.values.count > 64 ? .stopped : .executed
      default: return .stopped
      }
    } catch {
      p.finishDeviceAccesses()
      return p.deliver(error) == nil ? .delivered : .stopped
    }
  }

  private func prepare(_ cpu: SystemCPU, _ random: inout SplitMix) {
    var code: [UInt8] = []
    while code.count < 600 {
      if random.next() & 7 == 0 { code.append([0x66, 0x67, 0x48, 0x2e, 0xf3][Int(random.next() % 5)]) }
      code += Self.opcodes[Int(random.next() % UInt64(Self.opcodes.count))]
      let operands = Int(random.next() % 4)
      for _ in 0..<operands { code.append(UInt8(truncatingIfNeeded: random.next())) }
    }
    cpu.put(code, at: 0x1000)
    for vector in 0..<256 as Range<UInt64> where random.next() & 1 == 0 {
      cpu.put(Array(code[Int(random.next() % 500)...].prefix(15)), at: 0x4000 + vector * 16)
    }
    // Descriptors: true ones of every type with random bits flipped.
    for entry in 3..<16 as Range<UInt64> {
      let type = random.next() & 0x1f
      let dpl = random.next() & 3
      let present: UInt64 = random.next() & 7 == 0 ? 0 : 1
      let flags = random.next() & 15
      let base = random.next() & 0x1_ffff
      var descriptor = random.next() & 0xffff | base << 16 | type << 40 | dpl << 45 | present << 47 | flags << 52
      if random.next() & 1 == 0 { descriptor |= 0xf_0000_0000_ffff & 0xf << 48 | 0xffff }
      cpu.put(descriptor, at: 0x800 + entry * 8)
    }
    for vector in 0..<64 as Range<UInt64> where random.next() & 3 == 0 {
      let place = SystemCPU.idt + vector * (cpu.processor.isLongMode ? 16 : 8)
      cpu.put(cpu.get(place, as: UInt64.self) ^ 1 << (random.next() & 63), at: place)
    }
    for index in 0..<16 where index != 4 {
      let value = random.next()
      cpu.processor.general[index] =
        switch random.next() & 3 {
        case 0: value
        case 1: value & 0x7f
        case 2: value & 0x1_ffff
        default: [0x1b, 0xc000_0080, 0x10, 0x174, 0x277, 0x6e0, 0x800, 0x20, 0x8000_0011][Int(value % 9)]
        }
    }
    for offset in stride(from: 0x7800 as UInt64, to: 0x9800, by: 8) {
      cpu.put([0x1000, 0x08, 0x1b, 0x10, 0x23, 0x38, 0x3_0202, 0x102][Int(random.next() & 7)] as UInt64, at: offset)
    }
    cpu.processor.general[4] &-= 0x200
    cpu.cpu.pointee.star = random.next()
    cpu.cpu.pointee.lstar = random.next() & 0x1fff
    cpu.cpu.pointee.sysenter_cs = random.next() & 0x7f
    cpu.cpu.pointee.sysenter_eip = 0x1000
  }
}

/// A small generator with a seed.
struct SplitMix {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var value = state
    value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
    value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
    return value ^ value >> 31
  }
}
