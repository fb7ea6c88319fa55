import Host
import Synchronization

/// Where vCPU threads park: the machine closes it, waits until every vCPU has parked, and opens it again.
final class VCPUGate: Sendable {
  private enum Wish {
    case run, park, end
  }

  private struct State {
    var wish = Wish.park
    /// vCPUs that stay parked while the others run: a debugger steps one and leaves the rest where they are.
    var held: Set<Int> = []
    var parked = 0
    var ended = 0
  }

  private let state = Condition(State())
  private let closed = Atomic(true)
  private let threads: Int

  init(threads: Int) {
    self.threads = threads
  }

  /// Whether vCPU threads should park; asked before every entry into the guest.
  @inline(__always)
  var isClosed: Bool { closed.load(ordering: .acquiring) }

  /// vCPUs that stay where they are; it changes while the gate is closed.
  var held: Set<Int> { state.withLock { $0.held } }

  /// Closes the gate without waiting: a vCPU thread may call it, and then parks before it enters the guest again.
  func close() {
    closed.store(true, ordering: .releasing)
    state.withLock { if $0.wish == .run { $0.wish = .park } }
  }

  /// Waits until every vCPU thread has parked or ended.
  func waitUntilParked() {
    state.wait { $0.parked + $0.ended == threads ? () : nil }
  }

  /// Lets the vCPU threads run, but for those in `held`.
  func open(holding held: Set<Int> = []) {
    state.withLock { state in
      guard state.wish != .end else { return }
      state.wish = .run
      state.held = held
      closed.store(false, ordering: .releasing)
    }
  }

  /// Makes every vCPU thread return from its next `park`.
  func end() {
    closed.store(true, ordering: .releasing)
    state.withLock { $0.wish = .end }
  }

  /// Called by a vCPU thread that found the gate closed: sleeps until it opens; false when the thread is to end.
  /// Without a number it is the thread of all, which looks at `held` itself.
  func park(_ vcpu: Int? = nil) -> Bool {
    state.withLock { $0.parked += 1 }
    return state.wait { state in
      switch state.wish {
      case .park: return nil
      case .run where vcpu.map(state.held.contains) ?? false: return nil
      case .run:
        state.parked -= 1
        return true
      case .end:
        state.parked -= 1
        state.ended += 1
        return false
      }
    }
  }
}
