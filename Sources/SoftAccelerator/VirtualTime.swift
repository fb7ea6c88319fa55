import Accelerator
import CSoftCPU
import Glibc

/// Virtual time of a machine whose CPUs take turns: a nanosecond an instruction.
final class SoftVirtualTime: VirtualTime, @unchecked Sendable {
  private let state = UnsafeMutablePointer<soft_time>.allocate(capacity: 1)

  init() {
    state.initialize(to: soft_time(running: nil))
  }

  deinit {
    state.deallocate()
  }

  var now: UInt64 { soft_now(state) }

  func set(_ nanoseconds: UInt64) {
    if let cpu = state.pointee.running { soft_time_run(state, cpu, nanoseconds) }
  }

  /// Whose instructions count from now on.
  func run(_ cpu: UnsafeMutablePointer<soft_cpu>) {
    if state.pointee.running != cpu { soft_time_run(state, cpu, now) }
  }

  /// Called for a CPU that is going away.
  func forget(_ cpu: UnsafeMutablePointer<soft_cpu>) {
    if state.pointee.running == cpu { state.pointee.running = nil }
  }

  /// For the CPUs' time-stamp counters; they do not outlive this.
  var source: TimeSource {
    TimeSource(
      read: { soft_now(UnsafePointer($0.unsafelyUnwrapped.assumingMemoryBound(to: soft_time.self))) }, context: state)
  }
}

extension Processor {
  /// A number for RDRAND and RDSEED: the host's, or the next of a fixed sequence (SplitMix64).
  func randomNumber() -> UInt64 {
    guard isDeterministic else {
      var value: UInt64 = 0
      getentropy(&value, 8)
      return value
    }
    randomState &+= 0x9e37_79b9_7f4a_7c15
    var value = randomState
    value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
    value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
    return value ^ value >> 31
  }
}
