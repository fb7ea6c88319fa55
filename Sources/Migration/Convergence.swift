/// Decides after each round whether the machine is to stop for the last one.
struct Convergence {
  /// What a round has shown.
  struct Round {
    /// Pages that it sent, and how long that took.
    var pages: Int
    var nanoseconds: UInt64
    /// Pages that were written meanwhile.
    var dirty: Int
  }

  enum Decision: Equatable {
    /// Another round, the vCPUs at this per cent less than all of their time.
    case goOn(throttle: Int)
    case stop
  }

  /// Rounds with no gain after which it counts as stalled.
  static let patience = 3
  /// What stopping takes whatever there is to send.
  private static let overhead: Double = 1e6

  let limit: Double
  let mayThrottle: Bool
  private(set) var rounds = 0
  /// Nanoseconds that the machine would stand still if it were stopped now.
  private(set) var predicted = Double.infinity
  /// Rounds without a gain, while the prediction is above the limit.
  private(set) var stalled = 0
  private(set) var throttle = 0

  init(limit: UInt64, mayThrottle: Bool) {
    self.limit = Double(limit)
    self.mayThrottle = mayThrottle
  }

  mutating func decide(_ round: Round) -> Decision {
    rounds += 1
    let before = predicted
    let each = round.pages > 0 ? Double(round.nanoseconds) / Double(round.pages) : 0
    predicted = Double(round.dirty) * each
    let gains = predicted < 0.75 * before
    guard predicted <= limit else {
      stalled = gains ? 0 : stalled + 1
      if mayThrottle, stalled >= Self.patience { throttle = min(95, throttle == 0 ? 20 : throttle + 10) }
      return .goOn(throttle: throttle)
    }
    stalled = 0
    // The first resend of a page is whole; only the one after it shows what the last round will cost.
    if predicted <= Self.overhead || rounds >= 3 && !gains || rounds >= 30 { return .stop }
    return .goOn(throttle: throttle)
  }
}
