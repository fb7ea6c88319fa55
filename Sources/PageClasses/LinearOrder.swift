/// By address: all pages, in one iteration, whatever they are.
public struct LinearOrder: PageOrder {
  /// See `PageOrder`.
  public static let name = "linear"

  private var scan: RunScan

  /// See `PageOrder`.
  public init(classes: PageClassMap, dirty: DirtyCounts?) { scan = RunScan(classes) }

  /// The next run.
  public mutating func next() -> OrderedRun? { scan.next(iteration: 1) { _, _ in true } }
}
