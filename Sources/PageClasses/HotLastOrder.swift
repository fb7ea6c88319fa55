/// By how often pages are written: iteration 1 those that nobody was seen to write, each further one those that were written
/// more often. All pages, whatever class they are.
public struct HotLastOrder: PageOrder {
  /// See `PageOrder`.
  public static let name = "hot-last"

  private var scan: RunScan
  private let counts: [UInt8]
  /// The counts that there are, rising.
  private let steps: [UInt8]
  private var step = 0

  /// See `PageOrder`.
  public init(classes: PageClassMap, dirty: DirtyCounts?) {
    scan = RunScan(classes)
    counts = dirty?.counts ?? []
    var isThere = [Bool](repeating: false, count: 256)
    // Pages that nobody has counted were not written.
    isThere[0] = counts.count < classes.count
    for count in counts { isThere[Int(count)] = true }
    steps = (0...255).filter { isThere[$0] }.map { UInt8($0) }
  }

  /// The next run.
  public mutating func next() -> OrderedRun? {
    while step < steps.count {
      let wanted = steps[step]
      let run = scan.next(iteration: step + 1) { page, _ in (page < counts.count ? counts[page] : 0) == wanted }
      if let run { return run }
      step += 1
      scan.restart()
    }
    return nil
  }
}
