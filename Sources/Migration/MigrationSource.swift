import Glibc
import GuestMemory
import Host
import PageClasses
import StateTree
import Synchronization

/// Sends a machine to another process.
///
/// All pages go once, in the order that was chosen; then, round by round, those that were written meanwhile; then the machine
/// stops and the rest follows with its state. It is the destination's from the moment in which that has said so: whatever
/// goes wrong before, the machine goes on here.
public final class MigrationSource: Sendable {
  /// How far it is.
  public let progress: MigrationProgress

  private let machine: any MigratingMachine
  private let endpoint: StreamEndpoint
  private let parameters: MigrationParameters
  private let session: SIMD2<UInt64>
  private let control = Mutex(Control())

  private struct Control {
    var isCancelled = false
    /// From here on it cannot be undone.
    var isHandedOver = false
    var links: [MigrationLink] = []
  }

  /// A migration that has not begun.
  public init(
    _ machine: any MigratingMachine, to endpoint: StreamEndpoint, _ parameters: MigrationParameters,
    onStatus: @escaping @Sendable (MigrationProgress.Status) -> Void = { _ in }
  ) {
    progress = MigrationProgress(onStatus)
    self.machine = machine
    self.endpoint = endpoint
    self.parameters = parameters
    session = SIMD2(UInt64.random(in: .min ... .max), UInt64.random(in: .min ... .max))
    progress.update { $0.status = .setup }
  }

  /// Ends the migration where it is, unless the destination may have the machine already; tells which.
  public func cancel() -> Bool {
    control.withLock { control in
      guard !control.isHandedOver else { return false }
      control.isCancelled = true
      for link in control.links { link.shut() }
      return true
    }
  }

  /// Moves the machine. On an error it goes on here, but for `unknownOutcome`, where it stays stopped.
  public func run() throws(MigrationError) {
    let started = monotonicNanoseconds()
    progress.update {
      $0.order = parameters.order
      $0.memory = machine.memory.size
    }
    do throws(MigrationError) {
      try move(started)
      progress.update { $0.total = monotonicNanoseconds() - started }
      progress.end(nil)
    } catch {
      let error = control.withLock { $0.isCancelled } ? MigrationError.cancelled : error
      for link in control.withLock({ $0.links }) { link.shut() }
      progress.update { $0.total = monotonicNanoseconds() - started }
      progress.end(error)
      throw error
    }
  }

  private func move(_ started: UInt64) throws(MigrationError) {
    let links = try connect()
    try links[0].send(.machine, machine.description().encoded())
    try links[0].receiveAnswer(.accept)
    try machine.startDirtyTracking()
    defer {
      machine.throttle(0)
      machine.stopDirtyTracking()
    }
    let trace = try parameters.trace.map { path throws(MigrationError) in try MigrationTrace(path) }
    defer { trace?.flush() }
    let sender = try PageSender(machine.memory, links, parameters, trace)
    defer { sender.stop() }
    progress.update {
      $0.setup = monotonicNanoseconds() - started
      $0.status = .active
    }
    var dirty = try sendAll(sender, started)
    var convergence = Convergence(limit: parameters.downtimeLimit, mayThrottle: parameters.mayThrottle)
    while true {
      let last = progress.now.rounds[progress.now.rounds.count - 1]
      let decision = convergence.decide(
        Convergence.Round(pages: last.pages, nanoseconds: last.nanoseconds, dirty: dirty.count))
      tell(convergence, last)
      guard case .goOn(let throttle) = decision else { break }
      machine.throttle(throttle)
      dirty = try sendRound(sender, started, dirty, throttle: throttle)
    }
    machine.throttle(0)
    try handOver(sender, links, dirty, started)
  }

  private func connect() throws(MigrationError) -> [MigrationLink] {
    var links: [MigrationLink] = []
    for index in 0..<parameters.links {
      let link = try MigrationLink.connect(endpoint)
      let isCancelled = control.withLock { control in
        control.links.append(link)
        return control.isCancelled
      }
      if isCancelled { throw .cancelled }
      let greeting = MigrationGreeting(.move, link: index, of: parameters.links, session: session)
      try link.send(greeting.bytes)
      links.append(link)
    }
    return links
  }

  // MARK: Rounds

  /// The first round. What is found written meanwhile and is still to come waits for the next one, unless the order is by
  /// address alone: it is sent once instead of twice. Returns what the next round has to send.
  private func sendAll(_ sender: PageSender, _ started: UInt64) throws(MigrationError) -> PageSet {
    let round = sender.begin(round: 1, started)
    let classes = machine.pageClasses()
    let isLinear = parameters.order == LinearOrder.name
    var later = PageSet(try machine.takeDirtyPages())
    guard var order = PageOrders.order(named: parameters.order, classes: classes, dirty: dirtyCounts(later)) else {
      throw .machine("there is no order \(parameters.order)")
    }
    var lastLook = monotonicNanoseconds()
    while let run = order.next() {
      for pages in run.pages.pieces(of: PageSender.piece) {
        let now = monotonicNanoseconds()
        if now - lastLook > Self.lookInterval {
          try sender.sendWaiting()
          later.formUnion(try machine.takeDirtyPages())
          lastLook = monotonicNanoseconds()
          try pace(sender, started)
        }
        try sender.add(OrderedRun(pages: pages, iteration: run.iteration, pageClass: run.pageClass)) {
          !isLinear && later[$0]
        }
      }
    }
    try sender.sendWaiting()
    later.formUnion(try machine.takeDirtyPages())
    progress.update {
      $0.classes = classes.counts
      $0.ignored = parameters.order == ClassedOrder.name ? classes.counts[.ignored] ?? 0 : 0
    }
    finish(round, sender, later, throttle: 0)
    return later
  }

  /// Often enough to see what is hot; each look has the accelerator forget which pages are known to be written.
  private static let lookInterval: UInt64 = 20_000_000

  private func dirtyCounts(_ dirty: PageSet) -> DirtyCounts {
    var counts = DirtyCounts(pages: Int(machine.memory.size >> 12))
    counts.add(dirty.words)
    return counts
  }

  /// One more round; returns what the next one has to send.
  private func sendRound(
    _ sender: PageSender, _ started: UInt64, _ pages: PageSet, throttle: Int
  ) throws(MigrationError) -> PageSet {
    let round = sender.begin(round: progress.now.rounds.count + 1, started)
    try sender.addAgain(pages) { () throws(MigrationError) in try pace(sender, started) }
    let dirty = PageSet(try machine.takeDirtyPages())
    finish(round, sender, dirty, throttle: throttle)
    return dirty
  }

  private func finish(_ round: PageSender.Round, _ sender: PageSender, _ dirty: PageSet, throttle: Int) {
    var result = sender.end(round)
    result.dirty = dirty.count
    result.throttle = throttle
    progress.update {
      $0.rounds.append(result)
      $0.bytes = sender.bytes
    }
  }

  /// Keeps to the bandwidth, and notices that it was cancelled.
  private func pace(_ sender: PageSender, _ started: UInt64) throws(MigrationError) {
    progress.update {
      $0.bytes = sender.bytes
      $0.total = monotonicNanoseconds() - started
    }
    while true {
      if control.withLock({ $0.isCancelled }) { throw .cancelled }
      guard parameters.bandwidth > 0 else { return }
      let due = Double(sender.bytes) / Double(parameters.bandwidth) * 1e9
      let wait = due - Double(monotonicNanoseconds() - started)
      guard wait > 0 else { return }
      usleep(UInt32(min(wait / 1000, 50_000)) + 1)
    }
  }

  private func tell(_ convergence: Convergence, _ round: MigrationProgress.Round) {
    let isStalled = convergence.stalled >= Convergence.patience
    let rate = round.nanoseconds > 0 ? Double(round.dirty) * 4096 / Double(round.nanoseconds) * 1000 : 0
    let speed = round.nanoseconds > 0 ? Double(round.bytes) / Double(round.nanoseconds) * 1000 : 0
    let stall = MigrationStall(dirtyRate: rate, bandwidth: speed, throttle: convergence.throttle)
    progress.update {
      $0.expectedDowntime = UInt64(min(convergence.predicted, 1e18))
      $0.stall = isStalled ? stall.description : nil
    }
  }

  // MARK: Hand-over

  private func handOver(
    _ sender: PageSender, _ links: [MigrationLink], _ dirty: PageSet, _ started: UInt64
  ) throws(MigrationError) {
    let stopped = monotonicNanoseconds()
    progress.update { $0.status = .device }
    let (state, ran) = try machine.leave()
    do throws(MigrationError) {
      let round = sender.begin(round: progress.now.rounds.count + 1, started)
      var last = dirty
      last.formUnion(try machine.takeDirtyPages())
      try sender.addAgain(last) {}
      try sender.endPages()
      finish(round, sender, PageSet(pages: 0), throttle: 0)
      try links[0].send(.state, [ran ? 1 : 0] + state.encoded())
      try links[0].receiveAnswer(.ready)
      try machine.releaseDisks()
      let isCancelled = control.withLock { control in
        control.isHandedOver = !control.isCancelled
        return control.isCancelled
      }
      if isCancelled { throw MigrationError.cancelled }
    } catch {
      try machine.comeBack(ran)
      throw error
    }
    do throws(MigrationError) {
      try links[0].send(.go)
      try links[0].receiveAnswer(.taken)
    } catch {
      try settle(error, ran)
    }
    machine.stayAway()
    progress.update { $0.downtime = monotonicNanoseconds() - stopped }
    for link in links { link.shut() }
  }

  /// The destination was told to go on and has not answered. Returns where it has the machine.
  private func settle(_ error: MigrationError, _ ran: Bool) throws(MigrationError) {
    switch MigrationQuestion(endpoint, session).ask() {
    case .taken: return
    case .notTaken:
      try machine.comeBack(ran)
      throw error
    case .unknown:
      if case .refused = error {
        try machine.comeBack(ran)
        throw error
      }
      machine.stayAway()
      throw .unknownOutcome(endpoint)
    }
  }
}

/// Why a migration does not come to an end.
struct MigrationStall: CustomStringConvertible {
  /// Megabytes a second that the guest writes, and that the links carry.
  let dirtyRate: Double
  let bandwidth: Double
  let throttle: Int

  var description: String {
    "the guest writes \(Int(dirtyRate)) MB/s and the links carry \(Int(bandwidth)) MB/s"
      + (throttle > 0 ? " with the vCPUs slowed by \(throttle) %" : "")
      + ": raise downtime-limit or max-bandwidth, or set auto-converge"
  }
}

extension Range<Int> {
  /// The range in pieces that begin and end at multiples of `size`, but for the ends.
  func pieces(of size: Int) -> some Sequence<Range<Int>> {
    sequence(state: lowerBound) { next -> Range<Int>? in
      guard next < upperBound else { return nil }
      let end = Swift.min(upperBound, (next / size + 1) * size)
      defer { next = end }
      return next..<end
    }
  }
}
