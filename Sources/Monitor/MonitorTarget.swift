/// What the monitor needs of a machine. All of it is called on the monitor's own thread, one call at a time.
public protocol MonitorTarget: AnyObject, Sendable {
  /// What the machine does now.
  var runState: RunState { get }
  /// The vCPUs in the order of their index.
  var virtualCPUs: [MonitorVCPU] { get }
  /// Exits since the start by reason, in a stable order.
  var exitCounts: [ExitCount] { get }
  /// The views of the machine's memory; nil where it is not hardened.
  var views: MonitorViews? { get }
  /// Gives whole pages other rights (`rwx`, `r--`) in every view of a hardened machine; `name` is what the audit calls them.
  func protect(_ name: String, start: UInt64, size: UInt64, rights: String) throws(MonitorError)
  /// Whether the accelerator is KVM.
  var usesKVM: Bool { get }

  /// Takes every vCPU out of the guest and returns when all are; no effect on a machine that does not run.
  func pause() throws(MonitorError)
  /// Goes on from a pause, or from `prelaunch`.
  func resume() throws(MonitorError)
  /// Asks the guest to power off, as the power button does.
  func powerDown() throws(MonitorError)
  /// Resets the machine.
  func reset() throws(MonitorError)
  /// Asks the machine's owner to end it; returns before it has ended.
  func quit()
}

/// A vCPU as `query-cpus-fast` tells of it.
public struct MonitorVCPU: Equatable, Sendable {
  /// Its number.
  public let index: Int
  /// The host's id of the thread that runs it (gettid(2)).
  public let threadID: Int32

  /// A vCPU and its thread.
  public init(index: Int, threadID: Int32) {
    self.index = index
    self.threadID = threadID
  }
}

/// How often the guest left for one reason.
public struct ExitCount: Equatable, Sendable {
  /// The reason, in words of lower case with hyphens.
  public let reason: String
  /// How often.
  public let count: UInt64

  /// A reason and how often.
  public init(reason: String, count: UInt64) {
    self.reason = reason
    self.count = count
  }
}

/// What a machine does, by QEMU's names (`RunState` in its run-state.json).
public enum RunState: String, Sendable, CaseIterable {
  /// Stopped by the debugger.
  case debug
  /// The last part of an outgoing migration.
  case finishMigrate = "finish-migrate"
  /// Waiting for an incoming migration.
  case inMigrate = "inmigrate"
  /// Stopped by an error of the accelerator.
  case internalError = "internal-error"
  /// Stopped by an I/O error.
  case ioError = "io-error"
  /// Stopped by `stop`.
  case paused
  /// Stopped after an outgoing migration.
  case postMigrate = "postmigrate"
  /// Not started yet.
  case prelaunch
  /// A saved state is being put in place.
  case restore = "restore-vm"
  /// Running.
  case running
  /// The state is being saved.
  case save = "save-vm"
  /// The guest has powered off.
  case shutdown
  /// The guest sleeps in ACPI S3.
  case suspended
  /// The guest has crashed.
  case guestPanicked = "guest-panicked"
}
