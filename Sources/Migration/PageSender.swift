import Glibc
import GuestMemory
import Host
import PageClasses
import Synchronization

/// Sends pages over all links at once. A page always takes the same link, so that what is sent of it later arrives later.
final class PageSender: @unchecked Sendable {
  /// Pages that take one link together.
  static let piece = 64
  /// Pages that are handed to the links at a time.
  private static let most = 4096

  struct Round {
    fileprivate let number: Int
    fileprivate let begun: UInt64
    fileprivate let start: UInt64
    fileprivate let before: PageEncoder.Counts
  }

  private struct Job {
    var runs: [OrderedRun]
    var isAgain: Bool
  }

  private let memory: GuestMemory
  private let trace: MigrationTrace?
  private let encoders: [PageEncoder]
  private let workers: [Worker]
  /// Pages that may hold anything but zeros as far as the host knows, when it began.
  private var used: PageSet
  private var waiting: [OrderedRun] = []
  private var waitingPages = 0
  private var round = 0
  private var lastIteration = 0
  private var classes: [PageClass: Int] = [:]

  init(
    _ memory: GuestMemory, _ links: [MigrationLink], _ parameters: MigrationParameters, _ trace: MigrationTrace?
  ) throws(MigrationError) {
    self.memory = memory
    self.trace = trace
    let pages = Int(memory.size >> 12)
    var used = PageSet(pages: pages)
    for region in memory.regions {
      memory.forEachUsedRun(of: region) { start, count in
        let first = (Int(region.fileOffset) + start) >> 12
        used.insert(first..<(first + ((count + 4095) >> 12)))
      }
    }
    self.used = used
    var encoders: [PageEncoder] = []
    for link in links {
      encoders.append(
        try PageEncoder(
          link, pages: pages, copies: parameters.copies / links.count, compression: parameters.compression))
    }
    self.encoders = encoders
    var workers: [Worker] = []
    do throws(HostError) {
      for index in links.indices.dropFirst() { workers.append(try Worker("migration\(index)")) }
    } catch {
      for worker in workers { worker.stop() }
      throw .host(error)
    }
    self.workers = workers
  }

  /// Ends the threads.
  func stop() { for worker in workers { worker.stop() } }

  /// Bytes sent so far.
  var bytes: UInt64 { encoders.reduce(0) { $0 + $1.counts.bytes } }

  // MARK: Rounds

  func begin(round number: Int, _ started: UInt64) -> Round {
    round = number
    classes = [:]
    let now = monotonicNanoseconds()
    return Round(number: number, begun: now, start: now - started, before: counts)
  }

  /// What has become of a round.
  func end(_ round: Round) -> MigrationProgress.Round {
    let (now, then) = (counts, round.before)
    return MigrationProgress.Round(
      number: round.number, start: round.start, nanoseconds: monotonicNanoseconds() - round.begun,
      pages: now.pages - then.pages, zeros: now.zeros - then.zeros, whole: now.whole - then.whole,
      changed: now.changed - then.changed, bytes: now.bytes - then.bytes, classes: classes, dirty: 0, throttle: 0)
  }

  private var counts: PageEncoder.Counts {
    var sum = PageEncoder.Counts()
    for encoder in encoders { sum += encoder.counts }
    return sum
  }

  /// Pages of the first round, but for those that wait for the next one.
  func add(_ run: OrderedRun, butFor waits: (Int) -> Bool) throws(MigrationError) {
    lastIteration = max(lastIteration, run.iteration)
    var first = run.pages.lowerBound
    for page in run.pages where waits(page) {
      try put(first..<page, run, isAgain: false)
      first = page + 1
    }
    try put(first..<run.pages.upperBound, run, isAgain: false)
  }

  /// The iteration of pages that go again, or at last, in this round.
  var iteration: Int { lastIteration + round - 1 }

  /// Pages that were written, and so go again or at last, until `goesOn` says no, which is asked now and then. Returns those
  /// that have not gone.
  func addAgain(
    _ pages: PageSet, while goesOn: () throws(MigrationError) -> Bool
  ) throws(MigrationError) -> PageSet {
    var rest = pages
    var isOver = false
    try pages.forEachRun { run throws(MigrationError) in
      for piece in run.pieces(of: Self.piece) where !isOver {
        used.insert(piece)
        rest.remove(piece)
        let isFull = waitingPages >= Self.most
        try put(piece, OrderedRun(pages: piece, iteration: iteration, pageClass: .other), isAgain: true)
        if isFull { isOver = try !goesOn() }
      }
    }
    try sendWaiting(isAgain: true)
    return rest
  }

  /// Those of pages that have never gone which may hold anything but zeros.
  func notZeros(of pages: PageSet) -> PageSet {
    var result = pages
    result.formIntersection(used)
    return result
  }

  private func put(_ pages: Range<Int>, _ run: OrderedRun, isAgain: Bool) throws(MigrationError) {
    guard !pages.isEmpty else { return }
    waiting.append(OrderedRun(pages: pages, iteration: run.iteration, pageClass: run.pageClass))
    classes[run.pageClass, default: 0] += pages.count
    trace?.record(round: round, iteration: run.iteration, pages: pages, pageClass: "\(run.pageClass)")
    waitingPages += pages.count
    if waitingPages >= Self.most { try sendWaiting(isAgain: isAgain) }
  }

  /// Sends what has been put.
  func sendWaiting(isAgain: Bool = false) throws(MigrationError) {
    let job = Job(runs: waiting, isAgain: isAgain)
    waiting = []
    waitingPages = 0
    try onAllLinks { [self] index throws(MigrationError) in try send(job, link: index) }
  }

  /// Says on every link that no more pages follow.
  func endPages() throws(MigrationError) {
    try onAllLinks { [self] index throws(MigrationError) in try encoders[index].end() }
  }

  /// Calls `body` for each link, on as many threads, and waits for all.
  private func onAllLinks(_ body: @escaping @Sendable (Int) throws(MigrationError) -> Void) throws(MigrationError) {
    for (index, worker) in workers.enumerated() {
      worker.begin { Result { () throws(MigrationError) in try body(index + 1) } }
    }
    let own = Result { () throws(MigrationError) in try body(0) }
    let others = workers.map { $0.wait() }
    try own.get()
    for other in others { try other.get() }
  }

  private func send(_ job: Job, link index: Int) throws(MigrationError) {
    let encoder = encoders[index]
    let base = UnsafeRawPointer(memory.regions[0].hostBase)
    var current: (iteration: Int, pageClass: PageClass)?
    for run in job.runs {
      for pages in run.pages.pieces(of: Self.piece)
      where pages.lowerBound / Self.piece % encoders.count == index {
        if current == nil || current! != (run.iteration, run.pageClass) {
          current = (run.iteration, run.pageClass)
          try encoder.begin(iteration: run.iteration, class: run.pageClass.rawValue)
        }
        for page in pages {
          if used[page] {
            try encoder.add(page, base + page << 12, isAgain: job.isAgain)
          } else {
            try encoder.addZeros(page..<(page + 1))
          }
        }
      }
    }
    try encoder.flush()
  }

  /// A thread that does one thing after another.
  private final class Worker: Sendable {
    typealias Work = @Sendable () -> Result<Void, MigrationError>

    private enum State {
      case idle
      case work(Work)
      case done(Result<Void, MigrationError>)
      case over
    }

    private let state = Condition(State.idle)
    private let thread: HostThread

    init(_ name: String) throws(HostError) {
      let state = state
      thread = try HostThread(name: name) {
        while true {
          let work = state.wait { state -> Work?? in
            switch state {
            case .work(let work): .some(work)
            case .over: .some(nil)
            case .idle, .done: nil
            }
          }
          guard let work else { return }
          let result = work()
          state.withLock { if case .work = $0 { $0 = .done(result) } }
        }
      }
    }

    func begin(_ work: @escaping Work) { state.withLock { $0 = .work(work) } }

    func wait() -> Result<Void, MigrationError> {
      state.wait { state in
        guard case .done(let result) = state else { return nil }
        state = .idle
        return result
      }
    }

    func stop() {
      state.withLock { $0 = .over }
      thread.join()
    }
  }
}
