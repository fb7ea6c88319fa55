import PageClasses
import Synchronization

/// How far a migration is; any thread may look.
public final class MigrationProgress: Sendable {
  /// What it is doing, in QEMU's words (`MigrationStatus`).
  public enum Status: String, Sendable, CaseIterable {
    case none, setup, active, device, completed, failed, cancelled
    case postCopyActive = "postcopy-active"
    case postCopyPaused = "postcopy-paused"
  }

  /// One round: the first goes over all pages, each later one over those that were written.
  public struct Round: Sendable {
    /// From 1.
    public var number: Int
    /// Nanoseconds from the beginning of the migration.
    public var start: UInt64
    /// How long it took.
    public var nanoseconds: UInt64
    /// Pages that were sent.
    public var pages: Int
    /// Those of zeros.
    public var zeros: Int
    /// Those that went as they are.
    public var whole: Int
    /// Those of which only changed words went.
    public var changed: Int
    /// Bytes on the links.
    public var bytes: UInt64
    /// Pages by class.
    public var classes: [PageClass: Int]
    /// Pages that were written meanwhile.
    public var dirty: Int
    /// Per cent of their time that the vCPUs were kept from running.
    public var throttle: Int
  }

  /// What came of pages that the destination asked for while its machine ran.
  public struct PostCopy: Equatable, Sendable {
    /// Pages that were missing when it went on.
    public var pages = 0
    /// Those that are still to come.
    public var left = 0
    /// Pages that were asked for.
    public var requests: UInt64 = 0
    /// Pages that something waited for.
    public var faults: UInt64 = 0
    /// Nanoseconds from a page's being touched until it was there, of all of them.
    public var stall: UInt64 = 0
    /// The longest of them.
    public var longest: UInt64 = 0

    /// Nothing was asked for.
    public init() {}
  }

  /// All of it.
  public struct Snapshot: Sendable {
    /// What it is doing.
    public var status = Status.none
    /// Why it failed.
    public var error: String?
    /// Nanoseconds so far, or in all.
    public var total: UInt64 = 0
    /// Nanoseconds in which the guest stood still.
    public var downtime: UInt64 = 0
    /// What that would be if it were stopped now.
    public var expectedDowntime: UInt64 = 0
    /// Nanoseconds until the first page went.
    public var setup: UInt64 = 0
    /// Bytes on all links.
    public var bytes: UInt64 = 0
    /// Bytes of RAM.
    public var memory: UInt64 = 0
    /// The rounds that have ended.
    public var rounds: [Round] = []
    /// The order of the first one.
    public var order = ""
    /// Why it does not come to an end, in one line; nil where it does.
    public var stall: String?
    /// Pages by class as they were at the beginning; none where the order does not ask.
    public var classes: [PageClass: Int] = [:]
    /// Pages that were never sent, for nobody needs what they hold.
    public var ignored = 0
    /// nil where the machine has not gone on without all of its pages.
    public var postCopy: PostCopy?
  }

  private let state = Mutex(Snapshot())
  private let onStatus: @Sendable (Status) -> Void

  /// Nothing has begun; `onStatus` is told of every change of the status, on the thread that causes it.
  public init(_ onStatus: @escaping @Sendable (Status) -> Void = { _ in }) { self.onStatus = onStatus }

  /// As it is now.
  public var now: Snapshot { state.withLock { $0 } }

  func update(_ body: (inout Snapshot) -> Void) {
    let changed = state.withLock { snapshot -> Status? in
      let before = snapshot.status
      body(&snapshot)
      return snapshot.status == before ? nil : snapshot.status
    }
    if let changed { onStatus(changed) }
  }

  /// How it ended.
  public func end(_ error: MigrationError?) {
    update { snapshot in
      snapshot.status = error == nil ? .completed : error == .cancelled ? .cancelled : .failed
      snapshot.error = error.map { "\($0)" }
    }
  }
}

extension MigrationProgress.Snapshot {
  /// Pages that were sent more than once, counted each time.
  public var resent: Int { rounds.dropFirst().reduce(0) { $0 + $1.pages } }
}
