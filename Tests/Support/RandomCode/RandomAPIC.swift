import Accelerator

/// A local APIC that answers anything.
final class RandomAPIC: LocalInterruptController, @unchecked Sendable {
  var random: RandomSource

  init(_ random: RandomSource) { self.random = random }

  var hasInterrupt: Bool { random.oneIn(64) }
  func acknowledgeInterrupt() -> UInt8? { random.oneIn(4) ? nil : random.byte() }
  func read(register offset: UInt16) -> UInt32 { UInt32(truncatingIfNeeded: random.integer()) }
  func write(register offset: UInt16, value: UInt32) {}
  func readMSR(_ index: UInt32) -> UInt64? { random.oneIn(4) ? nil : random.integer() }
  func writeMSR(_ index: UInt32, value: UInt64) -> Bool { !random.oneIn(4) }
  var taskPriority: UInt8 = 0
}
