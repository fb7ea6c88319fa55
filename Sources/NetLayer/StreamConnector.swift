import Host

/// Keeps a connection to a switch: makes it again after it was lost, at growing intervals.
final class StreamConnector: @unchecked Sendable {
  /// Nanoseconds between the first attempts, and at most.
  static let firstDelay: UInt64 = 50_000_000
  static let longestDelay: UInt64 = 2_000_000_000

  let endpoint: StreamEndpoint
  private let loop: EventLoop
  private let traffic: Traffic
  /// The link of the moment.
  private(set) var link: StreamLink?
  private var timer: EventLoop.Timer?
  private var delay = firstDelay
  private var since: UInt64 = 0
  /// There may be frames in the link's reader.
  var framesArrived: () -> Void = {}
  /// There is a link, or none any more; never from within a call.
  var linkChanged: () -> Void = {}
  /// Whether a new link reads.
  var receives = true {
    didSet { link?.receives = receives }
  }

  init(_ endpoint: StreamEndpoint, on loop: EventLoop, traffic: Traffic) {
    self.endpoint = endpoint
    self.loop = loop
    self.traffic = traffic
  }

  /// Makes the first connection, which must succeed: a wrong path would be waited for without end.
  func start() throws(HostError) {
    timer = loop.makeTimer { [weak self] in self?.retry() }
    try connect()
  }

  func close() {
    timer?.cancel()
    timer = nil
    link?.close()
    link = nil
  }

  private func connect() throws(HostError) {
    let link = try StreamLink(
      endpoint.connectAtOnce(), on: loop, traffic: traffic, framesArrived: { [unowned self] in framesArrived() },
      lost: { [unowned self] in lose() })
    since = monotonicNanoseconds()
    link.receives = receives
    self.link = link
  }

  private func lose() {
    link = nil
    // One that accepts and drops at once is not asked more and more often.
    if monotonicNanoseconds() - since > Self.longestDelay { delay = Self.firstDelay }
    again()
    linkChanged()
  }

  private func again() {
    timer?.arm(at: monotonicNanoseconds() + delay)
    delay = min(delay * 2, Self.longestDelay)
  }

  private func retry() {
    do throws(HostError) {
      try connect()
    } catch {
      return again()
    }
    linkChanged()
  }
}
