import GuestMemory
import PageClasses
import StateTree

/// What a source needs of its machine. It is called on the migration's thread, one call at a time.
public protocol MigratingMachine: AnyObject, Sendable {
  /// RAM.
  var memory: GuestMemory { get }
  /// What the machine is made of; the destination compares it with its own.
  func description() throws(MigrationError) -> StateNode
  /// Records every write to RAM from now on.
  func startDirtyTracking() throws(MigrationError)
  /// Pages written since the last call, by their flat numbers.
  func takeDirtyPages() throws(MigrationError) -> [UInt64]
  /// Ends recording.
  func stopDirtyTracking()
  /// The classes of the pages as they are now.
  ///
  /// - Parameter hintWait: milliseconds to wait for the guest's agent, without whose word there are fewer classes.
  /// - Returns: a class for every page.
  func pageClasses(hintWait: UInt64) -> PageClassMap
  /// Keeps the vCPUs from running for so much of their time, until told otherwise; 0: not at all.
  func throttle(_ percent: Int)
  /// Stops the machine and returns its state, and whether it ran. What the guest has written to disks is durable.
  func leave() throws(MigrationError) -> (state: StateNode, ran: Bool)
  /// Gives the disks up, so that the destination can open them.
  func releaseDisks() throws(MigrationError)
  /// Undoes `leave`, and `releaseDisks`; on an error the machine stays stopped.
  func comeBack(_ ran: Bool) throws(MigrationError)
  /// The machine is elsewhere.
  func stayAway()
}

/// What a destination needs of the machine that it fills.
public protocol ArrivingMachine: AnyObject, Sendable {
  /// RAM, all zeros.
  var memory: GuestMemory { get }
  /// Says why a machine that is made so cannot go on here.
  func check(_ description: StateNode) throws(MigrationError)
  /// Puts the state in place; the vCPUs stand.
  func arrive(_ state: StateNode) throws(MigrationError)
  /// Opens the disks.
  func takeDisks() throws(MigrationError)
  /// Lets the vCPUs run, if they `ran` before.
  func goOn(_ ran: Bool)
}

/// How a machine is to be moved.
public struct MigrationParameters: Sendable {
  /// In which order pages go: one of `PageOrders.names`.
  public var order = PageOrders.names.first ?? ""
  /// Links, 1 to 16; each has a thread on either side.
  public var links = 2
  /// Bytes a second; 0 for as many as there go.
  public var bandwidth: UInt64 = 0
  /// Nanoseconds that the guest may stand still.
  public var downtimeLimit: UInt64 = 300_000_000
  /// zstd's level for pages; 0 for none.
  public var compression = 0
  /// Bytes of memory for copies of what was sent, of which only changes are sent again.
  public var copies = 512 << 20
  /// The vCPUs may be kept from running where they write faster than the links carry.
  public var mayThrottle = false
  /// The machine may go on there before all of its pages have come.
  public var mayPostCopy = false
  /// Bytes a second of pages that nobody waits for, then; 0 for as many as there go.
  public var postCopyBandwidth: UInt64 = 0
  /// Milliseconds to wait for what the guest's agent says of its pages.
  public var hintWait: UInt64 = 2000
  /// How the links are encrypted; nil: not at all.
  public var tls: MigrationTLS?
  /// Where the order of pages is written to.
  public var trace: String?

  /// What is done unless told.
  public init() {}
}
