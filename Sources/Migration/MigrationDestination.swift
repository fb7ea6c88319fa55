import Glibc
import GuestMemory
import Host
import StateTree
import Synchronization
import TLS

/// Takes a machine from another process. One attempt: where it fails before the machine is here, this process has none, and
/// the source goes on.
public final class MigrationDestination: @unchecked Sendable {
  /// How far it is.
  public let progress: MigrationProgress

  private let machine: any ArrivingMachine
  private let door: Door
  private let credentials: TLSCredentials?
  private let linkTime: Int
  private let onRefusal: @Sendable (MigrationError) -> Void
  private let state = Condition(State())

  /// Where sources come in.
  private final class Door: Sendable {
    let listener: StreamListener
    init(_ listener: consuming StreamListener) { self.listener = listener }
  }

  private enum Phase {
    case receiving, ready, taking, taken, abandoned
  }

  private struct State {
    var phase = Phase.receiving
    var session: SIMD2<UInt64>?
    var links: [Int: MigrationLink] = [:]
    var wanted = 0
    /// Records of pages that each link has brought, once it says that there are no more.
    var ended: Set<Int> = []
    var failure: MigrationError?
    /// Where the source may have the machine go on here before all of its pages have come.
    var postCopy: PostCopyDestination?
    var isOver = false
  }

  /// How long a source may take to say what it wants, in seconds.
  private static let greetingTime = 5
  /// How long a source that was cut off at the hand-over may take to ask, in seconds.
  private static let questionTime = 30

  /// A destination that listens; with `credentials` it takes sources by TLS alone. A source may take `linkTime` seconds from
  /// one link to the next. `onRefusal` is told why one was turned away before it was known what it wants.
  public init(
    _ machine: any ArrivingMachine, on listener: consuming StreamListener, credentials: TLSCredentials? = nil,
    linkTime: Int = 10, onRefusal: @escaping @Sendable (MigrationError) -> Void = { _ in },
    onStatus: @escaping @Sendable (MigrationProgress.Status) -> Void = { _ in }
  ) {
    self.credentials = credentials
    self.linkTime = linkTime
    self.onRefusal = onRefusal
    progress = MigrationProgress(onStatus)
    self.machine = machine
    door = Door(listener)
  }

  /// Waits for a source and takes its machine, which runs when this returns.
  public func run() throws(MigrationError) {
    do throws(HostError) {
      _ = try HostThread(name: "incoming") { [self] in accept(door) }
    } catch {
      throw .host(error)
    }
    try take(waitForLinks())
  }

  func take(_ links: [MigrationLink]) throws(MigrationError) {
    do throws(MigrationError) {
      progress.update { $0.status = .active }
      try receive(links)
      progress.end(nil)
    } catch {
      let (links, postCopy) = state.withLock { ($0.links.values, $0.postCopy) }
      for link in links { link.shut() }
      postCopy?.abandon()
      progress.end(error)
      throw error
    }
  }

  // MARK: Links

  private func accept(_ door: Door) {
    while !state.withLock({ $0.isOver }) {
      guard let socket = try? door.listener.accept() else { return }
      // Whoever says nothing keeps nobody from being heard for longer than that.
      let link = MigrationLink(socket, patience: Self.greetingTime)
      let greeting: MigrationGreeting
      do throws(MigrationError) {
        if let credentials { try link.accept(credentials, within: Self.greetingTime) }
        greeting = try MigrationGreeting(link.receive(count: MigrationGreeting.size))
      } catch {
        switch error {
        case .notAMigration, .wantsTLS, .version, .tls: onRefusal(error)
        default: break
        }
        continue
      }
      switch greeting.purpose {
      case .move: join(link, greeting)
      case .question: answer(link, greeting)
      case .postCopy: joinPostCopy(link, greeting)
      }
    }
  }

  private func joinPostCopy(_ link: MigrationLink, _ greeting: MigrationGreeting) {
    let postCopy = state.withLock { $0.session == greeting.session ? $0.postCopy : nil }
    guard let postCopy else {
      try? link.send(.refuse, Array("no machine of this migration has come here".utf8))
      return
    }
    postCopy.join(link, greeting)
  }

  func join(_ link: MigrationLink, _ greeting: MigrationGreeting) {
    let isWelcome = state.withLock { state in
      guard state.phase == .receiving, state.session == nil || state.session == greeting.session,
        state.wanted == 0 || state.wanted == Int(greeting.links), state.links[Int(greeting.link)] == nil
      else { return false }
      state.session = greeting.session
      state.wanted = Int(greeting.links)
      state.links[Int(greeting.link)] = link
      return true
    }
    guard isWelcome else {
      try? link.send(.refuse, Array("it takes one machine at a time".utf8))
      return
    }
    link.setPatience(MigrationLink.patience)
  }

  private func answer(_ link: MigrationLink, _ greeting: MigrationGreeting) {
    let isTaken = state.wait { state -> Bool? in
      guard greeting.session == state.session else { return false }
      switch state.phase {
      // The disks are being opened: it is about to be known.
      case .taking: return nil
      case .taken: return true
      case .receiving, .ready, .abandoned:
        state.phase = .abandoned
        return false
      }
    }
    try? link.send(isTaken ? .taken : .notTaken)
  }

  /// Waits until all links of a source have come. One that goes before it has made them all, as where it is killed, is forgotten:
  /// another one may come.
  private func waitForLinks() -> [MigrationLink] {
    while true {
      let known = state.wait { state in state.links.isEmpty ? nil : state.links.count }
      let deadline = monotonicNanoseconds() + UInt64(linkTime) * 1_000_000_000
      let more = state.wait(until: deadline) { state -> [MigrationLink]?? in
        if state.links.count == state.wanted { return (0..<state.wanted).compactMap { state.links[$0] } }
        return state.links.count > known ? .some(nil) : nil
      }
      if let links = more ?? nil { return links }
      guard more == nil else { continue }
      let left = state.withLock { state in
        defer { (state.session, state.wanted, state.links) = (nil, 0, [:]) }
        return state.links.values
      }
      for link in left { link.shut() }
    }
  }

  // MARK: The machine

  private func receive(_ links: [MigrationLink]) throws(MigrationError) {
    let first = links[0]
    let (kind, count) = try first.receiveHeader()
    guard kind == .machine else { throw .malformed(.order) }
    try refusing(first) { () throws(MigrationError) in
      try machine.check(Self.tree(first.receive(count: count)))
    }
    try first.send(.accept)
    var threads: [HostThread] = []
    do throws(HostError) {
      for (index, link) in links.enumerated().dropFirst() {
        threads.append(
          try HostThread(name: "incoming\(index)") { [self] in
            let result = Result { () throws(MigrationError) in try receivePages(index, link) }
            if case .failure(let error) = result { fail(error) }
          })
      }
    } catch {
      throw .host(error)
    }
    defer { for thread in threads { thread.join() } }
    do throws(MigrationError) {
      try receivePages(0, first)
      try refusing(first) { () throws(MigrationError) in try receiveState(first) }
    } catch {
      fail(error)
      throw state.withLock { $0.failure } ?? error
    }
  }

  /// The first error counts, and ends all links.
  private func fail(_ error: MigrationError) {
    let links = state.withLock { state in
      state.failure = state.failure ?? error
      return state.links.values
    }
    for link in links { link.shut() }
  }

  private func receivePages(_ index: Int, _ link: MigrationLink) throws(MigrationError) {
    let decoder = PageDecoder(link, machine.memory)
    while true {
      let (kind, count) = try link.receiveHeader()
      switch kind {
      case .pages, .compressedPages: try decoder.take(kind, count: count)
      case .postCopy where index == 0 && decoder.batches == 0:
        try refusing(link) { () throws(MigrationError) in
          let postCopy = try PostCopyDestination(machine.memory, progress)
          state.withLock { $0.postCopy = postCopy }
        }
        try link.send(.accept)
      case .endOfPages:
        let payload = try link.receive(count: count)
        guard payload.count == 8, UInt64(littleEndian: payload) == decoder.batches else { throw .malformed(.order) }
        return state.withLock { _ = $0.ended.insert(index) }
      default: throw .malformed(.order)
      }
    }
  }

  private func receiveState(_ link: MigrationLink) throws(MigrationError) {
    var (kind, count) = try link.receiveHeader()
    let postCopy = kind == .missing ? state.withLock { $0.postCopy } : nil
    if let postCopy {
      let missing = try link.receive(count: count)
      if let failure = waitForPages() { throw failure }
      try postCopy.begin(without: missing)
      (kind, count) = try link.receiveHeader()
    }
    guard kind == .state, count > 1 else { throw .malformed(.order) }
    var bytes = try link.receive(count: count)
    let ran = bytes.removeFirst() != 0
    let tree = try Self.tree(bytes)
    if let failure = waitForPages() { throw failure }
    try machine.arrive(tree)
    state.withLock { if $0.phase == .receiving { $0.phase = .ready } }
    try link.send(.ready)
    try waitForGo(link)
    let isOurs = state.withLock { state in
      guard state.phase == .ready else { return false }
      state.phase = .taking
      return true
    }
    guard isOurs else { throw .closed }
    do throws(MigrationError) {
      try machine.takeDisks()
      guard postCopy?.take() ?? true else { throw .closed }
    } catch {
      state.withLock { $0.phase = .abandoned }
      throw error
    }
    state.withLock { $0.phase = .taken }
    // The source may ask again if this does not reach it.
    try? link.send(.taken)
    machine.goOn(ran)
    postCopy?.finish()
    endLater()
  }

  /// Ends the links of a machine that runs here while its pages come, as if they had been cut; false where there is none.
  public func pausePostCopy() -> Bool {
    guard [.postCopyActive, .postCopyPaused].contains(progress.now.status),
      let postCopy = state.withLock({ $0.postCopy })
    else { return false }
    postCopy.pause()
    return true
  }

  /// Listens at another place, too, for a source that cannot come to the first one any more.
  public func listenAgain(at endpoint: StreamEndpoint) throws(HostError) {
    let other = Door(try StreamListener(endpoint))
    _ = try HostThread(name: "incoming again") { [self] in accept(other) }
  }

  private static func tree(_ bytes: [UInt8]) throws(MigrationError) -> StateNode {
    do { return try StateNode(decoding: bytes) } catch { throw .state(error) }
  }

  /// All links' pages are in place; or what has gone wrong with one.
  private func waitForPages() -> MigrationError? {
    state.wait { state -> MigrationError?? in
      if let failure = state.failure { return .some(failure) }
      return state.ended.count == state.wanted ? .some(nil) : nil
    }
  }

  /// A source that is cut off once it has said so cannot know whether it was heard, and asks: by TCP it must be answered.
  private func waitForGo(_ link: MigrationLink) throws(MigrationError) {
    do throws(MigrationError) {
      guard try link.receiveHeader().kind == .go else { throw .malformed(.order) }
    } catch {
      if case .tcp = door.listener.endpoint {
        for _ in 0..<(Self.questionTime * 10) where state.withLock({ $0.phase }) == .ready { usleep(100_000) }
      }
      throw error
    }
  }

  /// Questions are answered for a while.
  private func endLater() {
    _ = try? HostThread(name: "handed-over") { [self] in
      sleep(UInt32(Self.questionTime))
      state.withLock { $0.isOver = true }
      // Wakes the thread that waits for links.
      shutdown(door.listener.descriptor.rawValue, Int32(SHUT_RDWR))
    }
  }

  /// Tells the source why, where `body` fails for a reason of this side's.
  private func refusing(
    _ link: MigrationLink, _ body: () throws(MigrationError) -> Void
  ) throws(MigrationError) {
    do throws(MigrationError) {
      try body()
    } catch {
      switch error {
      case .closed, .stalled: break
      default: try? link.send(.refuse, Array("\(error)".utf8.prefix(MigrationRecord.Kind.refuse.limit)))
      }
      throw error
    }
  }
}
