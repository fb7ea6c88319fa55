import CSoftCPU
import Glibc

/// Where a CPU's time comes from: nanoseconds of a clock that never goes back. The time-stamp counter counts them, so
/// that it runs at 1 GHz on every host.
///
/// A plain function and its context, so that reading the time is neither an existential call nor counts references.
struct TimeSource {
  /// Nanoseconds now.
  var read: @convention(c) (UnsafeMutableRawPointer?) -> UInt64
  /// What `read` is given; it outlives the CPU.
  var context: UnsafeMutableRawPointer?

  /// The host's monotonic clock.
  static var monotonic: TimeSource {
    TimeSource(
      read: { _ in
        var now = timespec()
        clock_gettime(CLOCK_MONOTONIC, &now)
        return UInt64(now.tv_sec) &* 1_000_000_000 &+ UInt64(now.tv_nsec)
      }, context: nil)
  }

  /// Ticks of the time-stamp counter a millisecond.
  static let kilohertz: UInt32 = 1_000_000
}

extension Processor {
  /// The time-stamp counter.
  var timeStampCounter: UInt64 { timeSource.read(timeSource.context) &+ cpu.pointee.tsc_offset }
}
