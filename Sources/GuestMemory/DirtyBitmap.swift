import Host
import Synchronization

/// One bit a 4 KiB page of the memory file, set by the VMM's own writes while tracking is on.
///
/// Marking is wait-free and may come from any thread; `take` sees every mark made before it was called, and whoever
/// finds a mark sees the write that it stands for.
public final class DirtyBitmap: @unchecked Sendable {
  /// Number of pages.
  public let pages: Int

  /// Fresh mappings read as zero and cost nothing until a word is touched, however much memory they describe.
  private let mapping: MemoryMapping
  private let words: UnsafeMutablePointer<Atomic<UInt64>>
  private let wordCount: Int
  private let tracking = Atomic(false)

  /// A clean bitmap that does not track yet.
  public init(pages: Int) throws(HostError) {
    self.pages = pages
    wordCount = (pages + 63) / 64
    mapping = try MemoryMapping(anonymous: max(1, wordCount) * MemoryLayout<Atomic<UInt64>>.stride)
    words = mapping.base.assumingMemoryBound(to: Atomic<UInt64>.self)
  }

  /// Whether writes are recorded.
  @inline(__always)
  public var isTracking: Bool { tracking.load(ordering: .acquiring) }

  /// Starts from a clean bitmap, or stops recording.
  public func setTracking(_ on: Bool) {
    if on { _ = take() }
    tracking.store(on, ordering: .releasing)
  }

  /// Marks pages `firstPage` to `lastPage`, both included.
  public func mark(firstPage: Int, lastPage: Int) {
    for page in firstPage...lastPage {
      words[page >> 6].bitwiseOr(1 << UInt64(page & 63), ordering: .releasing)
    }
  }

  /// The bitmap as 64-page words, lowest page in bit 0; it is clean afterwards.
  public func take() -> [UInt64] {
    (0..<wordCount).map { words[$0].exchange(0, ordering: .acquiring) }
  }
}
