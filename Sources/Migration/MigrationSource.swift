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
    /// The machine is to go on there with the pages that it has.
    var wantsPostCopy = false
    var postCopy: PostCopySource?
    /// Nobody can tell where the machine is, but somebody has said that it is not there.
    var isReclaimed = false
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

  /// Has the machine go on there as soon as it can, its pages after it; false where it was not prepared for that.
  public func startPostCopy() -> Bool {
    control.withLock { control in
      guard parameters.mayPostCopy else { return false }
      control.wantsPostCopy = true
      return true
    }
  }

  /// Cuts the links of a machine that runs there while its pages follow; false where there is none.
  public func pausePostCopy() -> Bool { withPostCopy { $0.pause() } }

  /// Goes on after `pausePostCopy` or where the links were cut; `endpoint` is where the destination listens by now.
  public func resumePostCopy(_ endpoint: StreamEndpoint) -> Bool { withPostCopy { $0.resume(endpoint) } }

  private func withPostCopy(_ body: (PostCopySource) -> Void) -> Bool {
    guard [.postCopyActive, .postCopyPaused].contains(progress.now.status),
      let postCopy = control.withLock({ $0.postCopy })
    else { return false }
    body(postCopy)
    return true
  }

  /// Says that the machine does not run there, where the source cannot find out and goes on asking; false where it does not.
  public func reclaim() -> Bool {
    control.withLock { control in
      guard progress.now.status == .postCopyPaused, !control.isReclaimed else { return false }
      control.isReclaimed = true
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
    if parameters.mayPostCopy {
      try links[0].send(.postCopy)
      try links[0].receiveAnswer(.accept)
    }
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
    while !wantsPostCopy {
      let last = progress.now.rounds[progress.now.rounds.count - 1]
      let decision = convergence.decide(
        Convergence.Round(pages: last.pages, nanoseconds: last.nanoseconds, dirty: dirty.count))
      tell(convergence, last)
      guard case .goOn(let throttle) = decision else { break }
      if convergence.stalled >= Convergence.patience, startPostCopy() { break }
      machine.throttle(throttle)
      dirty = try sendRound(sender, started, dirty, throttle: throttle)
    }
    machine.throttle(0)
    try handOver(sender, links, dirty, started, trace)
  }

  private var wantsPostCopy: Bool { control.withLock { $0.wantsPostCopy } }

  private func connect() throws(MigrationError) -> [MigrationLink] {
    var links: [MigrationLink] = []
    for index in 0..<parameters.links {
      let link = try MigrationLink.connect(endpoint, parameters.tls)
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
    let classes = machine.pageClasses(hintWait: parameters.hintWait)
    let isLinear = parameters.order == LinearOrder.name
    var later = PageSet(try machine.takeDirtyPages())
    guard var order = PageOrders.order(named: parameters.order, classes: classes, dirty: dirtyCounts(later)) else {
      throw .machine("there is no order \(parameters.order)")
    }
    var lastLook = monotonicNanoseconds()
    var nextBytes = bytesAtLook(sender)
    var rest = PageSet(pages: later.words.count << 6)
    var goesOn = !wantsPostCopy
    while let run = order.next() {
      for pages in run.pages.pieces(of: PageSender.piece) {
        guard goesOn else {
          rest.insert(pages)
          continue
        }
        let now = monotonicNanoseconds()
        if now - lastLook > Self.lookInterval || sender.bytes > nextBytes {
          try sender.sendWaiting()
          later.formUnion(try machine.takeDirtyPages())
          lastLook = monotonicNanoseconds()
          goesOn = try pace(sender, started)
          nextBytes = bytesAtLook(sender)
        }
        try sender.add(OrderedRun(pages: pages, iteration: run.iteration, pageClass: run.pageClass)) {
          !isLinear && later[$0]
        }
      }
    }
    try sender.sendWaiting()
    // How long the round took says what the links carry.
    if goesOn { _ = try pace(sender, started) }
    later.formUnion(try machine.takeDirtyPages())
    later.formUnion(sender.notZeros(of: rest).words)
    progress.update {
      $0.classes = classes.counts
      $0.ignored = parameters.order == ClassedOrder.name ? classes.counts[.ignored] ?? 0 : 0
    }
    finish(round, sender, later, throttle: 0)
    return later
  }

  /// Often enough to see what is hot; each look has the accelerator forget which pages are known to be written.
  private static let lookInterval: UInt64 = 20_000_000

  /// Bytes in all at which it is time to look again: what the bandwidth allows between two looks.
  private func bytesAtLook(_ sender: PageSender) -> UInt64 {
    parameters.bandwidth == 0 ? .max : sender.bytes + parameters.bandwidth / (1_000_000_000 / Self.lookInterval)
  }

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
    var dirty = try sender.addAgain(pages) { () throws(MigrationError) in try pace(sender, started) }
    _ = try pace(sender, started)
    dirty.formUnion(try machine.takeDirtyPages())
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

  /// Keeps to the bandwidth, and notices that it was cancelled; false where the rest is to come once the machine is there.
  private func pace(_ sender: PageSender, _ started: UInt64) throws(MigrationError) -> Bool {
    progress.update {
      $0.bytes = sender.bytes
      $0.total = monotonicNanoseconds() - started
    }
    while true {
      let (isCancelled, wantsPostCopy) = control.withLock { ($0.isCancelled, $0.wantsPostCopy) }
      if isCancelled { throw .cancelled }
      if wantsPostCopy { return false }
      guard parameters.bandwidth > 0 else { return true }
      let due = Double(sender.bytes) / Double(parameters.bandwidth) * 1e9
      let wait = due - Double(monotonicNanoseconds() - started)
      guard wait > 0 else { return true }
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
    _ sender: PageSender, _ links: [MigrationLink], _ dirty: PageSet, _ started: UInt64, _ trace: MigrationTrace?
  ) throws(MigrationError) {
    let postCopy = wantsPostCopy ? try makePostCopy(sender, trace) : nil
    // Nothing of the rounds before is to be waited for while the machine stands.
    for link in links { link.settle() }
    let stopped = monotonicNanoseconds()
    progress.update { $0.status = .device }
    let ran: Bool
    do throws(MigrationError) {
      let state: StateNode
      (state, ran) = try machine.leave()
      do throws(MigrationError) {
        try sendLast(sender, links, dirty, started, isPostCopy: postCopy != nil)
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
        try settle(error, ran, mayGiveUp: postCopy == nil)
      }
    } catch {
      postCopy?.giveUp()
      throw error
    }
    machine.stayAway()
    progress.update { $0.downtime = monotonicNanoseconds() - stopped }
    for link in links { link.shut() }
    if let postCopy { finish(postCopy, started) }
  }

  /// What the machine has written since the round before, or its page numbers.
  private func sendLast(
    _ sender: PageSender, _ links: [MigrationLink], _ dirty: PageSet, _ started: UInt64, isPostCopy: Bool
  ) throws(MigrationError) {
    var last = dirty
    last.formUnion(try machine.takeDirtyPages())
    if isPostCopy {
      try sender.endPages()
      progress.update {
        $0.postCopy = MigrationProgress.PostCopy()
        $0.postCopy?.pages = last.count
        $0.postCopy?.left = last.count
      }
      return try links[0].send(.missing, last.bytes)
    }
    let round = sender.begin(round: progress.now.rounds.count + 1, started)
    _ = try sender.addAgain(last) { true }
    try sender.endPages()
    finish(round, sender, PageSet(pages: 0), throttle: 0)
  }

  /// The destination was told to go on and has not answered. Returns where it has the machine. Where its pages are here it
  /// is asked for as long as nobody says that it is not there.
  private func settle(_ error: MigrationError, _ ran: Bool, mayGiveUp: Bool) throws(MigrationError) {
    while true {
      switch MigrationQuestion(endpoint, session, parameters.tls).ask() {
      case .taken: return
      case .notTaken:
        try machine.comeBack(ran)
        throw error
      case .unknown:
        if case .refused = error {
          try machine.comeBack(ran)
          throw error
        }
        if mayGiveUp {
          machine.stayAway()
          throw .unknownOutcome(endpoint)
        }
      }
      progress.update {
        $0.status = .postCopyPaused
        $0.error = "\(MigrationError.unknownOutcome(endpoint))"
      }
      if control.withLock({ $0.isReclaimed }) {
        try machine.comeBack(ran)
        throw error
      }
    }
  }

  // MARK: Post-copy

  /// Connects before the machine stops.
  private func makePostCopy(_ sender: PageSender, _ trace: MigrationTrace?) throws(MigrationError) -> PostCopySource {
    let round = progress.now.rounds.count + 1
    _ = sender.begin(round: round, 0)
    let postCopy = try PostCopySource(
      machine.memory, to: endpoint, parameters, session: session, progress, trace,
      PostCopySource.Place(round: round, iteration: sender.iteration))
    control.withLock { $0.postCopy = postCopy }
    return postCopy
  }

  private func finish(_ postCopy: PostCopySource, _ started: UInt64) {
    let begun = monotonicNanoseconds()
    postCopy.finish()
    let counts = postCopy.counts
    progress.update {
      $0.rounds.append(
        MigrationProgress.Round(
          number: $0.rounds.count + 1, start: begun - started, nanoseconds: monotonicNanoseconds() - begun,
          pages: counts.pages, zeros: counts.zeros, whole: counts.whole, changed: counts.changed, bytes: counts.bytes,
          classes: [.other: counts.pages], dirty: 0, throttle: 0))
      $0.bytes += counts.bytes
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
