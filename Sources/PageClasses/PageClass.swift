/// What kind of page it is to somebody who moves the machine, by how soon it should be sent.
public enum PageClass: UInt8, CaseIterable, Sendable {
  /// Mapped by the guest's page tables and nowhere for writing (code, constants), or no view allows writes.
  case readOnly
  /// The agent says that the guest needs it soon.
  case prioritized
  /// Everything that nothing else is known of.
  case other
  /// The agent says that the guest can wait for it.
  case deprioritized
  /// The agent says that what is in it does not matter: free, ballooned.
  case ignored
}

/// What an agent tells of a range of guest-physical memory. It is the guest's word, and so is about nothing but order,
/// and about what the guest itself would lose.
public struct PageHint: Equatable, Sendable {
  /// What the agent says of the pages.
  public enum Kind: UInt8, CaseIterable, Sendable {
    case prioritized, deprioritized, ignored
  }

  /// Number of the first page: guest-physical address divided by 4096. Need not be RAM.
  public var firstPage: UInt64
  /// How many pages.
  public var count: UInt64
  /// What they are.
  public var kind: Kind

  /// A hint; any numbers will do.
  public init(firstPage: UInt64, count: UInt64, kind: Kind) {
    self.firstPage = firstPage
    self.count = count
    self.kind = kind
  }
}
