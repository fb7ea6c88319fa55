/// One NBD request: all of a disk's request, or as much of it as the server takes at once.
///
/// One thread has it at a time: its maker until it is handed over, then the sender, the receiver, and its maker again.
final class NBDPart: @unchecked Sendable {
  let command: NBDProtocol.Command
  let flags: NBDProtocol.CommandFlags
  let offset: UInt64
  let length: UInt64
  /// What is written, or filled.
  var memory = IOVectors()
  /// The request that has ended once all of its parts have; nil where the maker waits for this part.
  let whole: NBDWhole?
  var error: BlockError?
  var isDone = false
  /// Of `blockStatus`: lengths and flags.
  var extents: [(length: UInt64, flags: UInt32)] = []
  /// Of a structured read: what has come, in the order in which it did.
  private var covered: [Range<UInt64>] = []
  private var coveredBytes: UInt64 = 0

  /// Chunks of one reply.
  private static let chunkLimit = 4096

  init(
    _ command: NBDProtocol.Command, flags: NBDProtocol.CommandFlags = [], offset: UInt64 = 0, length: UInt64 = 0,
    whole: NBDWhole? = nil
  ) {
    self.command = command
    self.flags = flags
    self.offset = offset
    self.length = length
    self.whole = whole
  }

  /// Notes that bytes of the disk have come; false where they are none of this part's or have come before.
  func cover(_ start: UInt64, _ count: UInt64) -> Bool {
    let (end, overflow) = start.addingReportingOverflow(count)
    guard !overflow, count > 0, start >= offset, end <= offset + length, covered.count < Self.chunkLimit else {
      return false
    }
    // Chunks mostly come in order, so that one range covers them all.
    if let last = covered.last, last.upperBound == start, covered.count == 1 {
      covered[0] = last.lowerBound..<end
    } else {
      guard !covered.contains(where: { $0.overlaps(start..<end) }) else { return false }
      covered.append(start..<end)
    }
    coveredBytes += count
    return true
  }

  var isCovered: Bool { coveredBytes == length }
}

/// A disk's request on its way, in parts.
final class NBDWhole {
  let request: BlockRequest
  var outstanding = 0
  var error: BlockError?
  /// What is written for a server that knows no zeroes.
  var zeros: DiskBuffer?

  init(_ request: BlockRequest) { self.request = request }
}
