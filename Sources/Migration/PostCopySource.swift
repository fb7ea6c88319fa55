import Glibc
import GuestMemory
import Host

/// The source's side of a machine that runs elsewhere before all of its pages are there: they wait here until they are.
final class PostCopySource: @unchecked Sendable {
  /// Where pages stand in the trace.
  struct Place {
    var round: Int
    var iteration: Int
  }

  private let memory: GuestMemory
  private let parameters: MigrationParameters
  private let session: SIMD2<UInt64>
  private let progress: MigrationProgress
  private let trace: MigrationTrace?
  private let place: Place
  private let state: Condition<State>
  private let pages: Int
  private var thread: HostThread?

  private struct State {
    var endpoint: StreamEndpoint
    var links: [MigrationLink] = []
    /// Pages that the destination lacks and that nobody has taken yet.
    var left = PageSet(pages: 0)
    /// The word of `left` where pushing goes on: behind what was asked for last, as its neighbours are likely to be next.
    var next = 0
    var counts = PageEncoder.Counts()
    var requests: UInt64 = 0
    /// Whether the machine is there; nil as long as that is open.
    var isThere: Bool?
    /// Somebody wants the links to stay cut.
    var isHeld = false
  }

  /// Connects; what is missing is said to the destination by another link.
  init(
    _ memory: GuestMemory, to endpoint: StreamEndpoint, _ parameters: MigrationParameters, session: SIMD2<UInt64>,
    _ progress: MigrationProgress, _ trace: MigrationTrace?, _ place: Place
  ) throws(MigrationError) {
    self.memory = memory
    self.parameters = parameters
    self.session = session
    self.progress = progress
    self.trace = trace
    self.place = place
    pages = Int(memory.size >> 12)
    state = Condition(State(endpoint: endpoint))
    let links = try connect()
    do throws(HostError) {
      thread = try HostThread(name: "post-copy") { [self] in work(links) }
    } catch {
      throw .host(error)
    }
  }

  /// The machine is here again.
  func giveUp() {
    let links = state.withLock { state in
      state.isThere = false
      return state.links
    }
    for link in links { link.shut() }
    thread?.join()
  }

  /// The machine is there: waits until its pages are, however often the links are cut.
  func finish() {
    progress.update { $0.status = .postCopyActive }
    state.withLock { $0.isThere = true }
    thread?.join()
  }

  /// Cuts the links; `resume` connects again.
  func pause() {
    let links = state.withLock { state in
      state.isHeld = true
      return state.links
    }
    for link in links { link.shut() }
  }

  /// Connects again, to where the destination listens by now.
  func resume(_ endpoint: StreamEndpoint) {
    state.withLock { state in
      state.endpoint = endpoint
      state.isHeld = false
    }
  }

  /// What went over the links.
  var counts: PageEncoder.Counts { state.withLock { $0.counts } }

  // MARK: Attempts

  private func connect() throws(MigrationError) -> [MigrationLink] {
    let endpoint = state.withLock { $0.endpoint }
    let count = parameters.links + 1
    var links: [MigrationLink] = []
    for index in 0..<count {
      let link = try MigrationLink.connect(endpoint, parameters.tls)
      link.setRoom(MigrationLink.postCopyRoom)
      try link.send(MigrationGreeting(.postCopy, link: index, of: count, session: session).bytes)
      links.append(link)
    }
    state.withLock { [links] in $0.links = links }
    return links
  }

  private func work(_ first: [MigrationLink]) {
    var links = first
    while true {
      do throws(MigrationError) {
        return try serve(links)
      } catch {
        for link in links { link.shut() }
        guard state.wait({ $0.isThere }) else { return }
        tell(error)
        links = connectAgain()
      }
    }
  }

  private func tell(_ error: MigrationError) {
    progress.update {
      $0.status = .postCopyPaused
      $0.error = "\(error)"
    }
  }

  /// Tries again and again, unless told to wait: nobody else has the pages.
  private func connectAgain() -> [MigrationLink] {
    var pause = Self.shortestPause
    while true {
      usleep(pause)
      pause = min(pause * 2, Self.longestPause)
      if state.withLock({ $0.isHeld }) { continue }
      do throws(MigrationError) { return try connect() } catch { tell(error) }
    }
  }

  private static let shortestPause: UInt32 = 20_000
  private static let longestPause: UInt32 = 1_000_000

  // MARK: Pages

  private func serve(_ links: [MigrationLink]) throws(MigrationError) {
    let wanted = try PageSet(links[0].receivePayload(of: .wanted), pages: pages)
    let begun = state.withLock { state in
      state.left = wanted
      return state.counts.bytes
    }
    let isThere = state.withLock { $0.isThere ?? false }
    progress.update {
      if isThere { $0.status = .postCopyActive }
      $0.error = nil
      $0.postCopy = $0.postCopy ?? MigrationProgress.PostCopy()
    }
    let failure = Condition<MigrationError?>(nil)
    let started = monotonicNanoseconds()
    var threads: [HostThread] = []
    defer {
      for link in links { link.shut() }
      for thread in threads { thread.join() }
    }
    for (index, link) in links.enumerated() {
      do throws(HostError) {
        threads.append(
          try HostThread(name: "post-copy\(index)") { [self] in
            let result = Result { () throws(MigrationError) in
              if index == links.count - 1 { try answer(link) } else { try push(link, started, begun) }
            }
            // The last one ends where all are there; where they are not, the destination ends the others, too.
            guard case .failure(let error) = result, index < links.count - 1 || error != .closed else { return }
            failure.withLock { $0 = $0 ?? error }
            for link in links { link.shut() }
          })
      } catch {
        throw .host(error)
      }
    }
    for thread in threads.dropLast() { thread.join() }
    threads.removeFirst(links.count - 1)
    if let error = failure.withLock({ $0 }) { throw error }
    let arrived = try links[0].receivePayload(of: .arrived)
    guard arrived.count == 24 else { throw .malformed(.record) }
    let numbers = (0..<3).map { UInt64(littleEndian: arrived[$0 * 8..<$0 * 8 + 8]) }
    let requests = state.withLock { $0.requests }
    progress.update {
      $0.postCopy?.left = 0
      $0.postCopy?.requests = requests
      $0.postCopy?.faults = numbers[0]
      $0.postCopy?.stall = numbers[1]
      $0.postCopy?.longest = numbers[2]
    }
  }

  /// Sends what nobody has asked for.
  private func push(_ link: MigrationLink, _ started: UInt64, _ begun: UInt64) throws(MigrationError) {
    let encoder = try makeEncoder(link)
    try encoder.begin(iteration: place.iteration, class: 0)
    // Until then nothing may keep the machine from getting there.
    guard state.wait({ $0.isThere }) else { return }
    while let (index, word) = takeWord() {
      try send(word, from: index << 6, encoder, atOnce: parameters.postCopyBandwidth > 0)
      pace(started, begun)
    }
    try encoder.end()
  }

  /// Sends what is asked for, at once.
  private func answer(_ link: MigrationLink) throws(MigrationError) {
    // It may be that nothing is asked for.
    link.setPatience(0)
    let encoder = try makeEncoder(link)
    try encoder.begin(iteration: place.iteration, class: 0)
    while true {
      let asked = try link.receivePayload(of: .request)
      guard asked.count % 8 == 0 else { throw .malformed(.record) }
      for start in stride(from: 0, to: asked.count, by: 8) {
        let page = UInt64(littleEndian: asked[start..<start + 8])
        guard page < UInt64(pages) else { throw .malformed(.pages) }
        if take(Int(page)) { try send(1, from: Int(page), encoder, atOnce: true) }
      }
    }
  }

  private func makeEncoder(_ link: MigrationLink) throws(MigrationError) -> PageEncoder {
    try PageEncoder(link, pages: pages, copies: 0, compression: parameters.compression)
  }

  /// Sends the pages from `first` on whose bits are set.
  private func send(_ word: UInt64, from first: Int, _ encoder: PageEncoder, atOnce: Bool) throws(MigrationError) {
    let base = UnsafeRawPointer(memory.regions[0].hostBase)
    let before = encoder.counts
    var rest = word
    while rest != 0 {
      let page = first + rest.trailingZeroBitCount
      rest &= rest - 1
      try encoder.add(page, base + page << 12, isAgain: false)
    }
    if atOnce { try encoder.flush() }
    state.withLock { $0.counts += encoder.counts - before }
  }

  private func takeWord() -> (index: Int, word: UInt64)? {
    state.withLock { state in
      let count = state.left.words.count
      for _ in 0..<count {
        if state.next >= count { state.next = 0 }
        let index = state.next
        state.next += 1
        let word = state.left.words[index]
        guard word != 0 else { continue }
        state.left.remove(index << 6..<min(pages, (index + 1) << 6))
        record(word, from: index << 6)
        return (index, word)
      }
      return nil
    }
  }

  private func take(_ page: Int) -> Bool {
    state.withLock { state in
      state.requests += 1
      // Otherwise it is on its way.
      guard state.left[page] else { return false }
      state.left.remove(page..<(page + 1))
      state.next = page >> 6
      record(1, from: page)
      return true
    }
  }

  private func record(_ word: UInt64, from first: Int) {
    guard let trace else { return }
    var set = PageSet(pages: 64)
    set.formUnion([word])
    set.forEachRun { run in
      trace.record(
        round: place.round, iteration: place.iteration, pages: first + run.lowerBound..<first + run.upperBound,
        pageClass: "other")
    }
  }

  /// Keeps to the bandwidth, and tells how far it is.
  private func pace(_ started: UInt64, _ begun: UInt64) {
    let (sent, requests, left) = state.withLock { ($0.counts.bytes, $0.requests, $0.left.count) }
    progress.update {
      $0.postCopy?.requests = requests
      $0.postCopy?.left = left
    }
    guard parameters.postCopyBandwidth > 0 else { return }
    let due = Double(sent - begun) / Double(parameters.postCopyBandwidth) * 1e9
    let wait = due - Double(monotonicNanoseconds() - started)
    if wait > 0 { usleep(UInt32(min(wait / 1000, 50_000)) + 1) }
  }
}
