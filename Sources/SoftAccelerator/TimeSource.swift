import CSoftCPU
import Glibc

/// What a CPU's time-stamp counter counts: ticks of a clock that never goes back, nanoseconds unless told, so that the
/// counter runs at 1 GHz on every host.
///
/// A plain function and its context, so that reading the time is neither an existential call nor counts references. Any
/// thread may read it: the context is a number, or what virtual time keeps for everybody.
struct TimeSource: @unchecked Sendable {
  /// Ticks now.
  var read: @convention(c) (UnsafeMutableRawPointer?) -> UInt64
  /// What `read` is given; it outlives the CPU.
  var context: UnsafeMutableRawPointer?
  /// Ticks a millisecond.
  var kilohertz = TimeSource.kilohertz

  /// The host's monotonic clock.
  static var monotonic: TimeSource { TimeSource(read: { _ in monotonicNow() }, context: nil) }

  /// The host's own time-stamp counter, which runs at this rate: what a guest of KVM counts on this host.
  static func hostCounter(kilohertz: UInt32) -> TimeSource {
    TimeSource(read: { _ in soft_host_counter() }, context: nil, kilohertz: kilohertz)
  }

  /// The host's monotonic clock at another rate.
  static func scaled(kilohertz: UInt32) -> TimeSource {
    TimeSource(
      read: { context in
        let (rate, now) = (UInt64(UInt(bitPattern: context)), monotonicNow())
        return now / 1_000_000 &* rate &+ now % 1_000_000 * rate / 1_000_000
      }, context: UnsafeMutableRawPointer(bitPattern: UInt(kilohertz)), kilohertz: kilohertz)
  }

  /// How long so many ticks take; nil for longer than 584 years.
  func nanoseconds(ofTicks ticks: UInt64) -> UInt64? {
    let product = ticks.multipliedFullWidth(by: 1_000_000)
    return product.high < kilohertz ? UInt64(kilohertz).dividingFullWidth(product).quotient : nil
  }

  /// Ticks of the time-stamp counter a millisecond, unless told.
  static let kilohertz: UInt32 = 1_000_000
}

/// Nanoseconds of the host's monotonic clock.
private func monotonicNow() -> UInt64 {
  var now = timespec()
  clock_gettime(CLOCK_MONOTONIC, &now)
  return UInt64(now.tv_sec) &* 1_000_000_000 &+ UInt64(now.tv_nsec)
}

extension Processor {
  /// The time-stamp counter.
  var timeStampCounter: UInt64 { timeSource.read(timeSource.context) &+ cpu.pointee.tsc_offset }

  /// Lets the counter run at another rate from here on, as that of a machine that comes from elsewhere does.
  func setCounterRate(_ kilohertz: UInt32) {
    guard kilohertz != 0, kilohertz != timeSource.kilohertz, !isDeterministic else { return }
    timeSource = kilohertz == ownTimeSource.kilohertz ? ownTimeSource : .scaled(kilohertz: kilohertz)
  }
}
