import CLoops
import Host

/// The guest's loops on the physical CPU, in this process; those that need ring 0 are missing.
struct NativeLoops: ~Copyable {
  private let memory: MemoryMapping
  private static let half = 64 << 20

  init() throws(HostError) {
    memory = try MemoryMapping(anonymous: 2 * Self.half)
    memory.adviseHugePages()
    memory.base.initializeMemory(as: UInt8.self, repeating: 1, count: memory.count)
  }

  /// Million instructions a second, or gigabytes; nil for a loop that cannot run here. `size` is the guest's, at most 64 MiB
  /// for those that use memory.
  func rate(_ loop: String, size: Int) -> Double? {
    let count = UInt64(size)
    let bytes = min(size << 10, Self.half)
    let from = UInt64(UInt(bitPattern: memory.base))
    let to = from + UInt64(Self.half)
    switch loop {
    case "alu": return rate(loop_alu_instructions(count)) { _ = loop_alu(count) }
    case "calls": return rate(loop_calls_instructions(UInt32(size))) { _ = loop_calls(UInt32(size)) }
    case "branchy": return rate(loop_branchy_instructions(count)) { _ = loop_branchy(count) }
    case "chase":
      let order = UInt32((bytes / 64).trailingZeroBitCount)
      loop_chase_prepare(from, order)
      let loads = UInt64(1) << (order - 3)
      return rate(loop_chase_instructions(loads)) { _ = loop_chase(from, loads) }
    case "copy":
      let blocks = UInt64(bytes / 32)
      return rate(loop_copy_instructions(blocks)) { loop_copy(to, from, blocks) }
    case "rep-movsq": return rate(UInt64(bytes)) { loop_rep_movsq(to, from, UInt64(bytes / 8)) } / 1000
    default: return nil
    }
  }

  /// Millions of `work` a second: rounds for a fifth of a second.
  private func rate(_ work: UInt64, _ round: () -> Void) -> Double {
    let start = monotonicNanoseconds()
    var rounds: UInt64 = 0
    var elapsed: UInt64 = 0
    repeat {
      round()
      rounds += 1
      elapsed = monotonicNanoseconds() - start
    } while elapsed < 200_000_000
    return Double(rounds * work) / Double(elapsed) * 1000
  }
}
