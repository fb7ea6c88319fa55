/// By classes: iteration 1 is what is read only, since it stays as it is; 2 what is prioritized; 3 everything else, what is
/// deprioritized last. What is ignored is not sent.
public struct ClassedOrder: PageOrder {
  /// See `PageOrder`.
  public static let name = "classed"

  private static let steps: [(iteration: Int, pageClass: PageClass)] = [
    (1, .readOnly), (2, .prioritized), (3, .other), (3, .deprioritized),
  ]

  private var scan: RunScan
  private var step = 0

  /// See `PageOrder`.
  public init(classes: PageClassMap, dirty: DirtyCounts?) { scan = RunScan(classes) }

  /// The next run.
  public mutating func next() -> OrderedRun? {
    while step < Self.steps.count {
      let (iteration, wanted) = Self.steps[step]
      if let run = scan.next(iteration: iteration, { _, pageClass in pageClass == wanted }) { return run }
      step += 1
      scan.restart()
    }
    return nil
  }
}
