import CGuest

/// The guest's clocks as one processor sees them: the time-stamp counter and a reference, HPET or PM timer. Neither goes
/// backwards or jumps, and they agree.
struct Clocks {
  private static let usesHPET = HPET.base != nil && !isPMTimerAskedFor
  private static let jump = StartInfo.number("jump", default: 5000)
  private static let skew = StartInfo.number("skew", default: 500)
  /// Cycles of the time-stamp counter a millisecond.
  nonisolated(unsafe) private static var rate: UInt64 = 0

  private var watch = Stopwatch()
  private var lastCycles = rdtsc()
  private var cycles: UInt64 = 0
  private let firstCount: UInt64
  /// Milliseconds of the reference since this was made.
  private(set) var milliseconds: UInt64 = 0
  /// The largest step and the largest difference of the clocks that have been seen, in milliseconds.
  private(set) var largestGap: UInt64 = 0
  private(set) var largestSkew: UInt64 = 0

  private static var isPMTimerAskedFor: Bool { StartInfo.option("clock")?.equals("pm") ?? false }

  /// Measures the time-stamp counter.
  static func begin() {
    expect("a PM timer", PMTimer.isPresent)
    if usesHPET, let base = HPET.base { store64(base + 0x10, load64(base + 0x10) | 1) }
    // The shortest of some: the processor may be taken away in between.
    for _ in 0..<5 {
      var watch = Stopwatch()
      let first = rdtsc()
      while watch.read() < 20_000 { cpu_pause() }
      let measured = (rdtsc() - first) * PMTimer.frequency / (watch.ticks * 1000)
      if rate == 0 || measured < rate { rate = measured }
    }
    expect("cycles of the time-stamp counter a millisecond", rate, in: 10_000...20_000_000)
  }

  init() { firstCount = Self.usesHPET ? Self.count() : 0 }

  private static func count() -> UInt64 { HPET.base.map { load64($0 + 0xf0) } ?? 0 }

  private mutating func reference() -> UInt64 {
    guard Self.usesHPET, let base = HPET.base else { return watch.read() / 1000 }
    // Femtoseconds a count.
    let period = load64(base) >> 32
    return (load64(base + 0xf0) &- firstCount) * (period / 1000) / 1_000_000_000
  }

  /// Looks at both clocks.
  mutating func look() {
    let now = rdtsc()
    if now < lastCycles { fail("the time-stamp counter went backwards from", lastCycles, now) }
    cycles += now - lastCycles
    lastCycles = now
    let reference = reference()
    if reference < milliseconds { fail("the clock went backwards from", milliseconds, reference) }
    let gap = reference - milliseconds
    if gap > Self.jump { fail("the clock jumped from", milliseconds, reference) }
    largestGap = max(largestGap, gap)
    milliseconds = reference

    // Taken away between the two reads, the processor sees a difference that the next look has not: two must agree.
    let counted = cycles / Self.rate
    let skew = max(counted, reference) - min(counted, reference)
    if skew > Self.skew + reference / 64 {
      let again = rdtsc()
      let counted = (cycles + (again - now)) / Self.rate
      let reference = self.reference()
      if max(counted, reference) - min(counted, reference) > Self.skew + reference / 64 {
        fail("the clocks differ: counter and reference", counted, reference)
      }
    } else {
      largestSkew = max(largestSkew, skew)
    }
  }

  private func fail(_ what: StaticString, _ first: UInt64, _ second: UInt64) -> Never {
    Report.lock.lock()
    say("FAIL \(what) \(first) \(second) on processor \(SMP.current)")
    Power.fail()
  }
}
