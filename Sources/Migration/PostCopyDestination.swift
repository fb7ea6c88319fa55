import GuestMemory
import Host
import StateTree

/// The destination's side of a machine that runs here before all of its pages have come.
final class PostCopyDestination: @unchecked Sendable {
  private let memory: GuestMemory
  private let progress: MigrationProgress
  private let state = Condition(State())
  private var pages: ArrivingPages?
  private var thread: HostThread?

  private struct State {
    /// Links of an attempt of which not all have come yet.
    var joining: [Int: MigrationLink] = [:]
    /// Those of the next attempt.
    var next: [MigrationLink]?
    /// Those of the present one.
    var links: [MigrationLink] = []
    /// The machine is here, and nowhere else.
    var isTaken = false
    /// It was cut off before, and its pages do not come any more.
    var isAbandoned = false
    var isOver = false
  }

  /// Opens what it takes, so that nothing is begun that cannot be ended.
  init(_ memory: GuestMemory, _ progress: MigrationProgress) throws(MigrationError) {
    self.memory = memory
    self.progress = progress
    pages = try ArrivingPages(memory) { [weak self] pages in self?.ask(for: pages) }
  }

  /// A source's link for missing pages; all of one attempt end those of the one before.
  func join(_ link: MigrationLink, _ greeting: MigrationGreeting) {
    if state.withLock({ $0.isOver }) { return repeatThatAllArrived(link, saysSo: greeting.link == 0) }
    link.setRoom(MigrationLink.postCopyRoom)
    // Nothing comes on the last one while nothing is asked for.
    link.setPatience(greeting.link == greeting.links - 1 ? 0 : MigrationLink.patience)
    let former = state.withLock { state -> [MigrationLink] in
      guard !state.isAbandoned, greeting.links > 1 else { return [link] }
      if greeting.link == 0 { state.joining = [:] }
      state.joining[Int(greeting.link)] = link
      guard state.joining.count == Int(greeting.links) else { return [] }
      state.next = state.joining.keys.sorted().compactMap { state.joining[$0] }
      state.joining = [:]
      return state.links
    }
    for link in former { link.shut() }
    pages?.wake()
  }

  /// A source to which that has not come.
  private func repeatThatAllArrived(_ link: MigrationLink, saysSo: Bool) {
    guard let counts = pages?.counts else { return }
    _ = try? HostThread(name: "arrived") { [memory] in
      if saysSo {
        try? link.send(.wanted, PageSet(pages: Int(memory.size >> 12)).bytes)
        try? link.send(.arrived, Self.bytes(counts))
      }
      // It ends the link once it has read that.
      while let (_, count) = try? link.receiveHeader(), (try? link.receive(count: count)) != nil {}
    }
  }

  private static func bytes(_ counts: MigrationProgress.PostCopy) -> [UInt8] {
    var writer = StateWriter()
    writer.write(counts.faults)
    writer.write(counts.stall)
    writer.write(counts.longest)
    return writer.bytes
  }

  /// These pages are missing: what has come of them is old. From now on they are asked for.
  func begin(without missing: [UInt8]) throws(MigrationError) {
    try pages?.leaveOut(PageSet(missing, pages: Int(memory.size >> 12)))
    try pages?.begin()
    do throws(HostError) {
      thread = try HostThread(name: "post-copy") { [self] in work() }
    } catch {
      pages?.end()
      throw .host(error)
    }
  }

  /// The machine is here from now on, unless it was cut off before.
  func take() -> Bool {
    state.withLock { state in
      state.isTaken = !state.isAbandoned
      return state.isTaken
    }
  }

  /// Ends it where the machine does not come.
  func abandon() {
    let links = state.withLock { state in
      state.isAbandoned = !state.isTaken
      return state.isTaken ? [] : state.links
    }
    for link in links { link.shut() }
    guard !state.withLock({ $0.isTaken }) else { return }
    thread?.join()
    thread = nil
  }

  /// Waits until all pages are here.
  func finish() {
    progress.update { if $0.status != .postCopyPaused { $0.status = .postCopyActive } }
    thread?.join()
    thread = nil
  }

  /// Ends the links, as if they had been cut.
  func pause() { for link in state.withLock({ $0.links }) { link.shut() } }

  // MARK: Attempts

  private func work() {
    guard let pages else { return }
    while true {
      let links = state.wait { state -> [MigrationLink]?? in
        if state.isAbandoned { return .some(nil) }
        guard let next = state.next else { return nil }
        state.links = next
        state.next = nil
        return next
      }
      guard let links else { break }
      do throws(MigrationError) {
        tell(.postCopyActive, nil)
        try receive(links, pages)
        break
      } catch {
        for link in links { link.shut() }
        // What is not here yet can be had from nowhere else: a machine that is not here either need not wait for it.
        let isTaken = state.withLock { state in
          state.isAbandoned = !state.isTaken
          state.links = []
          return state.isTaken
        }
        guard isTaken else { break }
        tell(.postCopyPaused, error)
      }
    }
    pages.end()
    progress.update { $0.postCopy = pages.counts }
  }

  private func tell(_ status: MigrationProgress.Status, _ error: MigrationError?) {
    guard state.withLock({ $0.isTaken }) else { return }
    progress.update {
      $0.status = status
      $0.error = error.map { "\($0)" }
      $0.postCopy = pages?.counts
    }
  }

  private func receive(_ links: [MigrationLink], _ pages: ArrivingPages) throws(MigrationError) {
    try links[0].send(.wanted, pages.missing.bytes)
    let asked = pages.waiting
    if !asked.isEmpty { ask(for: asked) }
    let failure = Condition<MigrationError?>(nil)
    let last = links.count - 1
    var threads: [HostThread] = []
    defer { for thread in threads { thread.join() } }
    do throws(HostError) {
      for (index, link) in links.enumerated() {
        threads.append(
          try HostThread(name: "arriving\(index)") { [memory, state] in
            let result = Result { () throws(MigrationError) in
              try Self.receivePages(PageDecoder(link, memory, pages), link, endsItself: index != last)
            }
            // What ends once all are here is no failure: the source may be about to say that it has no more.
            guard case .failure(let error) = result, !state.withLock({ $0.isOver }) else { return }
            failure.withLock { $0 = $0 ?? error }
            for link in links { link.shut() }
            pages.wake()
          })
      }
    } catch {
      for link in links { link.shut() }
      throw .host(error)
    }
    guard pages.waitForAll(or: { failure.withLock { $0 != nil } }) else {
      throw failure.withLock { $0 } ?? .closed
    }
    // All are here, whether the source hears it or not: it asks again then.
    state.withLock { $0.isOver = true }
    try? links[0].send(.arrived, Self.bytes(pages.counts))
    // Whatever follows is there already.
    links[last].shut()
  }

  private static func receivePages(
    _ decoder: PageDecoder, _ link: MigrationLink, endsItself: Bool
  ) throws(MigrationError) {
    while true {
      let (kind, count) = try link.receiveHeader()
      switch kind {
      case .pages, .compressedPages: try decoder.take(kind, count: count)
      case .endOfPages where endsItself:
        _ = try link.receive(count: count)
        return
      default: throw .malformed(.order)
      }
    }
  }

  private func ask(for pages: [Int]) {
    guard let link = state.withLock({ $0.links.last }) else { return }
    for first in stride(from: 0, to: pages.count, by: MigrationRecord.mostRequests) {
      var writer = StateWriter()
      for page in pages[first..<min(pages.count, first + MigrationRecord.mostRequests)] { writer.write(UInt64(page)) }
      // Where it does not get there, the next attempt asks again.
      guard (try? link.send(.request, writer.bytes)) != nil else { return }
    }
  }
}
