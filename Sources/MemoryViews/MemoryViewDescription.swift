import GuestMemory

extension PageRights: CustomStringConvertible {
  /// As `ls` writes them: `rwx`, `r--`.
  public var description: String {
    (contains(.read) ? "r" : "-") + (contains(.write) ? "w" : "-") + (contains(.execute) ? "x" : "-")
  }
}

extension MemoryView: CustomStringConvertible {
  /// Pages that follow one another and of which the view says the same.
  public struct Run: Equatable, Sendable {
    /// Guest-physical addresses, whole pages.
    public var range: GuestRange
    /// What the view says of the first page; where host pages stand in for the guest's, those of a run follow one
    /// another too.
    public var entry: Entry
  }

  /// Everything that the view has entries for, by rising address; while others change it, a mixture of old and new.
  public var runs: [Run] {
    var runs: [Run] = []
    forEachEntry { address, entry in
      if let last = runs.last, last.range.start.rawValue + last.range.size == address,
        last.entry.continues(in: entry, last.range.size)
      {
        runs[runs.count - 1].range = last.range.grown(by: 0x1000)
      } else if let range = GuestRange(start: GuestPhysicalAddress(address), size: 0x1000) {
        runs.append(Run(range: range, entry: entry))
      }
    }
    return runs
  }

  /// How many runs `description` has.
  private static let lineLimit = 256

  /// For a debugger: the view's number, then a line a run.
  public var description: String {
    let runs = runs
    var text = "view \(number)"
    for run in runs.prefix(Self.lineLimit) {
      text += "\n  \(run.range) \(run.entry.rights)" + (run.entry.hostPage == 0 ? "" : ", other memory")
    }
    if runs.count > Self.lineLimit { text += "\n  and \(runs.count - Self.lineLimit) ranges more" }
    return text + "\n  everything else \(defaultRights)"
  }
}

extension MemoryView.Entry {
  /// Whether `next`, of the page `distance` bytes after this entry's, says the same.
  fileprivate func continues(in next: Self, _ distance: UInt64) -> Bool {
    rights == next.rights
      && (hostPage == 0 ? next.hostPage == 0 : next.hostPage == hostPage &+ UInt(distance))
  }
}

extension GuestRange {
  fileprivate func grown(by size: UInt64) -> GuestRange { GuestRange(start: start, size: self.size + size) ?? self }
}
