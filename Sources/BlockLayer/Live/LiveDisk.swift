/// A disk under a running guest: what a device holds, while layers are put on, merged and copied below it.
///
/// Requests pass through to the top layer. Whoever changes the layers holds the disk first: requests that come meanwhile wait,
/// and those under way end. Jobs that move data lock the ranges that they move against the guest's writes. It belongs to the
/// thread of its layers.
public final class LiveDisk: BlockNode {
  /// The id that users know it by.
  public let name: String
  /// The top layer.
  public private(set) var top: LiveNode
  /// Told of a new size.
  public var onResize: () -> Void = {}

  /// What limits its writes; nil for nothing.
  var quota: WriteQuota?
  private var underWay = 0
  private var holds = 0
  private var held: [BlockRequest] = []
  private var waitingForIdle: [() -> Void] = []
  /// Layers that were the top with writes that no flush has covered yet; a flush of the disk begins with them.
  private var unflushed: [LiveNode] = []
  /// Names of files that are going, and flushes that wait until they are gone for good.
  private var removals = 0
  private var waitingFlushes: [() -> Void] = []
  private let claims = RangeClaims()
  private var isClaiming = 0
  private var guards: [(owner: ObjectIdentifier, guard: any WriteGuard)] = []

  /// A disk whose top layer is `top`.
  public init(name: String, top: LiveNode) {
    self.name = name
    self.top = top
    top.users += 1
  }

  /// The top layer's size.
  public var size: UInt64 { top.node.size }
  /// Whether writes are refused.
  public var isReadOnly: Bool { absence.map { !$0.access.writable } ?? top.node.isReadOnly }
  /// Its image is another process's for now, and is opened so when it comes back.
  public internal(set) var absence: BlockGraph.Options?
  /// The image of an absent disk, open because it is being filled for the machine that is to come.
  public internal(set) var filled: LiveNode?

  /// The state of the bytes as the top layer has it.
  public func extent(at offset: UInt64, length: UInt64) throws(BlockError) -> BlockExtent {
    try top.node.extent(at: offset, length: length)
  }

  /// The layers are the graph's to close.
  public func close() {}

  // MARK: Requests

  /// Begins a request, or keeps it until the disk is not held any more.
  public func submit(_ request: BlockRequest) {
    if holds > 0 { return held.append(request) }
    underWay += 1
    let completion = request.completion
    let isFlush = request.operation == .flush
    request.completion = { [self, unowned request] error in
      if isFlush, removals > 0 { return waitingFlushes.append { [request] in request.completion(error) } }
      request.completion = completion
      completion(error)
      underWay -= 1
      checkIdle()
    }
    switch request.operation {
    case .read: top.node.submit(request)
    case .flush: flush(request)
    case .write, .discard, .writeZeroes: change(request)
    }
  }

  private func change(_ request: BlockRequest) {
    if let quota, request.length > 0, rangeError(request) == nil {
      let range = request.offset..<(request.offset + request.length)
      if let error = quota.refuse(self, range) { return request.completion(error) }
    }
    guard request.length > 0, rangeError(request) == nil, isClaiming > 0 || !guards.isEmpty else {
      top.mark(request.offset, request.length)
      return top.node.submit(request)
    }
    let range = request.offset..<(request.offset + request.length)
    guard isClaiming > 0 else { return guarded(request, range, from: 0) }
    claims.add(range, isExclusive: false) { [self] claim in
      let completion = request.completion
      request.completion = { [self] error in
        completion(error)
        claims.remove(claim)
      }
      guarded(request, range, from: 0)
    }
  }

  /// Asks the guards one after another, then begins the write.
  private func guarded(_ request: BlockRequest, _ range: Range<UInt64>, from index: Int) {
    guard index < guards.count else {
      top.mark(request.offset, request.length)
      return top.node.submit(request)
    }
    guards[index].guard.willWrite(range) { [self] in guarded(request, range, from: index + 1) }
  }

  /// What was written below before the layers changed is made durable first.
  private func flush(_ request: BlockRequest) {
    guard let layer = unflushed.first else { return top.node.submit(request) }
    layer.node.submit(
      BlockRequest(.flush) { [self] error in
        if let error { return request.completion(error) }
        unflushed.removeAll { $0 === layer }
        flush(request)
      })
  }

  /// No quota limits it any more, and what it has used is free.
  public func leaveQuota() { quota?.release(self) }

  // MARK: Changing the layers

  /// Lets no request begin, and calls `then` once none is under way. `release` lets them go on.
  public func hold(_ then: @escaping () -> Void) {
    holds += 1
    waitingForIdle.append(then)
    checkIdle()
  }

  /// Undoes one `hold`.
  public func release() {
    holds -= 1
    guard holds == 0 else { return }
    let requests = held
    held = []
    for request in requests { submit(request) }
  }

  private func checkIdle() {
    guard underWay == 0, holds > 0, !waitingForIdle.isEmpty else { return }
    let waiting = waitingForIdle
    waitingForIdle = []
    for body in waiting { body() }
  }

  /// The name of a layer's file is gone, but may be there again after a power cut: no flush ends before `endRemoval`. So what is
  /// newer than that layer is not promised to anybody meanwhile. The disk is held.
  func beginRemoval() { removals += 1 }

  /// The name is gone for good.
  func endRemoval() {
    removals -= 1
    guard removals == 0 else { return }
    let flushes = waitingFlushes
    waitingFlushes = []
    for flush in flushes { flush() }
  }

  /// Puts another layer at the top. The disk is held.
  func replaceTop(_ layer: LiveNode) {
    let old = top
    layer.users += 1
    top = layer
    old.users -= 1
    if !old.node.isReadOnly { unflushed.append(old) }
  }

  /// A layer is closed or was flushed by others: no flush has to care for it.
  func forget(_ layer: LiveNode) { unflushed.removeAll { $0 === layer } }

  /// Changes the disk's size and tells the device. The disk is held.
  public func resize(to size: UInt64, on queue: any IOQueue) throws(BlockError) {
    try top.node.resize(to: size, on: queue)
    onResize()
  }

  // MARK: Jobs

  /// From now on, writes claim their ranges, so that `lock` works. The disk is held.
  func beginClaiming() { isClaiming += 1 }
  /// Undoes `beginClaiming`.
  func endClaiming() { isClaiming -= 1 }

  /// Calls `body` once no write of the range is under way; none begins until `unlock`.
  func lock(_ range: Range<UInt64>, _ body: @escaping (RangeClaims.Claim) -> Void) {
    claims.add(range, isExclusive: true, body)
  }

  /// Ends what `lock` began.
  func unlock(_ claim: RangeClaims.Claim) {
    claims.remove(claim)
  }

  /// Asks `guard` before every write from now on. The disk is held.
  func add(_ guard: any WriteGuard) { guards.append((ObjectIdentifier(`guard`), `guard`)) }
  /// Undoes `add`.
  func remove(_ guard: any WriteGuard) { guards.removeAll { $0.owner == ObjectIdentifier(`guard`) } }
}

/// Whoever must do something before the guest's writes: copy what they replace.
protocol WriteGuard: AnyObject {
  /// A write of the range is about to begin; it begins when `proceed` is called, now or later.
  func willWrite(_ range: Range<UInt64>, proceed: @escaping () -> Void)
}

/// Who may touch which bytes now: exclusive claims overlap with none, others with each other. First come, first served.
final class RangeClaims {
  final class Claim {
    let range: Range<UInt64>
    let isExclusive: Bool
    fileprivate var onGrant: (() -> Void)?

    fileprivate init(_ range: Range<UInt64>, _ isExclusive: Bool, _ onGrant: @escaping () -> Void) {
      self.range = range
      self.isExclusive = isExclusive
      self.onGrant = onGrant
    }
  }

  /// In the order of their coming.
  private var claims: [Claim] = []

  /// Calls `onGrant` when no claim that came before stands against it: now or later.
  func add(_ range: Range<UInt64>, isExclusive: Bool, _ onGrant: @escaping (Claim) -> Void) {
    var claim: Claim?
    let new = Claim(range, isExclusive) {
      if let granted = claim { onGrant(granted) }
      claim = nil
    }
    claim = new
    claims.append(new)
    grant()
  }

  /// Gives a claim up; those that waited for it are granted.
  func remove(_ claim: Claim) {
    claims.removeAll { $0 === claim }
    grant()
  }

  /// What is granted may end at once and make room for more, so the list is looked at anew each time.
  private func grant() {
    while let next = claims.indices.first(where: isGrantable) {
      let body = claims[next].onGrant
      claims[next].onGrant = nil
      body?()
    }
  }

  private func isGrantable(_ index: Int) -> Bool {
    let claim = claims[index]
    return claim.onGrant != nil
      && !claims[..<index].contains { other in
        (other.isExclusive || claim.isExclusive) && other.range.overlaps(claim.range)
      }
  }
}
