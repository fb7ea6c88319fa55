/// How often, and when, a network device tells where it is now (QEMU's `AnnounceParameters`); milliseconds.
public struct NetworkAnnouncement: Equatable, Sendable {
  /// Between the first time and the second.
  public var initial: UInt64 = 50
  /// Between two times, at most.
  public var maximum: UInt64 = 550
  /// How many times.
  public var rounds: UInt64 = 5
  /// How much longer each wait is than the one before.
  public var step: UInt64 = 100

  /// QEMU's numbers: at once, then after 50, 150, 250 and 350 ms.
  public init() {}

  /// Milliseconds from round `round`, the first being 0, to the next.
  func wait(after round: UInt64) -> UInt64 {
    let (more, overflow) = step.multipliedReportingOverflow(by: round)
    let (wait, isTooLong) = initial.addingReportingOverflow(more)
    return overflow || isTooLong ? maximum : min(wait, maximum)
  }
}
