import Glibc
import GuestMemory
import Host

/// Pages of RAM that come while the machine runs already: whoever touches one waits until it is here.
final class ArrivingPages: @unchecked Sendable {
  private let memory: GuestMemory
  private let faults: UserFaults
  private let stopping: EventNotifier
  private let ask: @Sendable ([Int]) -> Void
  private let state: Condition<State>
  private let thread = Condition<HostThread?>(nil)

  private struct State {
    var missing: PageSet
    var left = 0
    /// Pages that something waits for, and since when.
    var waiting: [Int: UInt64] = [:]
    var counts = MigrationProgress.PostCopy()
    var isOver = false
  }

  /// `ask` is called with pages that something waits for, once each, on a thread of its own.
  init(_ memory: GuestMemory, ask: @escaping @Sendable ([Int]) -> Void) throws(MigrationError) {
    self.memory = memory
    self.ask = ask
    state = Condition(State(missing: PageSet(pages: Int(memory.size >> 12))))
    do throws(HostError) {
      faults = try UserFaults(memory.regions[0].hostBase, count: Int(memory.size))
      stopping = try EventNotifier()
    } catch {
      if case .systemCall("userfaultfd", EPERM) = error { throw .needsFaults }
      throw .host(error)
    }
  }

  /// These pages are not here, whatever has come of them so far. Before `begin`.
  func leaveOut(_ pages: PageSet) throws(MigrationError) {
    do throws(GuestMemoryError) {
      try pages.forEachRun { (run: Range<Int>) throws(GuestMemoryError) in try memory.discard(pages: run) }
    } catch {
      throw .machine("\(error)")
    }
    state.withLock { state in
      state.missing.formUnion(pages.words)
      state.left = state.missing.count
      state.counts.pages = state.left
    }
  }

  /// From now on, whoever touches a page that is not here waits.
  func begin() throws(MigrationError) {
    do throws(HostError) {
      try faults.begin()
      memory.isArriving = true
      let started = try HostThread(name: "faults") { [self] in serve() }
      thread.withLock { $0 = started }
    } catch {
      end()
      throw .host(error)
    }
  }

  /// Nobody waits any more; what has not come is zeros.
  func end() {
    state.withLock { $0.isOver = true }
    stopping.signal()
    let ending = thread.withLock { thread -> HostThread? in
      defer { thread = nil }
      return thread
    }
    ending?.join()
    faults.end()
    memory.isArriving = false
  }

  /// Pages that have not come.
  var missing: PageSet { state.withLock { $0.missing } }
  /// Those of them that something waits for.
  var waiting: [Int] { state.withLock { Array($0.waiting.keys) } }
  var counts: MigrationProgress.PostCopy { state.withLock { $0.counts } }

  /// Waits until all have come, or `isOver` says that they do not; tells which. `wake` has it asked again.
  func waitForAll(or isOver: () -> Bool) -> Bool {
    state.wait { state in state.left == 0 ? true : isOver() ? false : nil }
  }
  func wake() { state.withLock { _ in } }

  // MARK: What comes

  /// A page has come; one that is here already stays as it is.
  func put(_ bytes: UnsafeRawPointer, _ page: Int) throws(MigrationError) {
    try placing(page..<(page + 1)) { (page, _) throws(HostError) in
      try faults.put(bytes, at: page << 12, count: PageBatch.pageSize)
    }
  }

  /// Pages of zeros have come. They take no memory until somebody touches them.
  func putZeros(_ pages: Range<Int>) throws(MigrationError) {
    try placing(pages) { (page, isWaitedFor) throws(HostError) in
      if isWaitedFor { try faults.putZeros(at: page << 12, count: PageBatch.pageSize) }
    }
  }

  private func placing(
    _ pages: Range<Int>, _ place: (Int, Bool) throws(HostError) -> Void
  ) throws(MigrationError) {
    // With the lock: a page that is here may be given up by the guest, and must not come a second time.
    let result = state.withLock { state in
      Result { () throws(HostError) in
        for page in pages where state.missing[page] {
          let since = state.waiting[page]
          try place(page, since != nil)
          state.missing.remove(page..<(page + 1))
          state.left -= 1
          guard let since else { continue }
          state.waiting[page] = nil
          let stall = monotonicNanoseconds() - since
          state.counts.faults += 1
          state.counts.stall += stall
          state.counts.longest = max(state.counts.longest, stall)
        }
      }
    }
    do { try result.get() } catch { throw .host(error) }
  }

  // MARK: Faults

  private func serve() {
    var sources = [
      pollfd(fd: faults.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
      pollfd(fd: stopping.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
    ]
    while !state.withLock({ $0.isOver }) {
      guard poll(&sources, 2, -1) >= 0 || errno == EINTR else { return }
      guard let offsets = try? faults.take() else { return }
      let now = monotonicNanoseconds()
      var wanted: [Int] = []
      for offset in offsets {
        let page = offset >> 12
        state.withLock { state in
          guard state.missing[page] else {
            // Nobody has ever written it, or the guest has given it up.
            try? faults.putZeros(at: page << 12, count: PageBatch.pageSize)
            return
          }
          guard state.waiting[page] == nil else { return }
          state.waiting[page] = now
          wanted.append(page)
        }
      }
      if !wanted.isEmpty { ask(wanted) }
    }
  }
}
