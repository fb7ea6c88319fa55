/// Pages that follow one another, are of one class and are sent in one iteration.
public struct OrderedRun: Equatable, Sendable {
  /// Flat page numbers; never empty.
  public var pages: Range<Int>
  /// From 1, and never falling from run to run.
  public var iteration: Int
  /// Of all of them.
  public var pageClass: PageClass

  /// A run of pages.
  public init(pages: Range<Int>, iteration: Int, pageClass: PageClass) {
    self.pages = pages
    self.iteration = iteration
    self.pageClass = pageClass
  }
}

/// How often pages were found written, by rounds of a dirty log that were looked at before.
public struct DirtyCounts: Sendable {
  /// Rounds in which each page was written, 255 at most.
  public private(set) var counts: [UInt8]

  /// Nothing has been written.
  public init(pages: Int) { counts = [UInt8](repeating: 0, count: pages) }

  /// Adds a round: 64 pages a word, the lowest in bit 0. Words beyond the pages are not looked at.
  public mutating func add(_ words: [UInt64]) {
    for (index, word) in words.prefix((counts.count + 63) / 64).enumerated() {
      var word = word
      while word != 0 {
        let page = index << 6 + word.trailingZeroBitCount
        word &= word - 1
        if page < counts.count, counts[page] < 255 { counts[page] += 1 }
      }
    }
  }
}

/// An order in which a machine's pages are sent the first time, run by run, made as it is asked for. A page is in one run or,
/// where it need not be sent at all, in none.
public protocol PageOrder: IteratorProtocol<OrderedRun>, Sendable {
  /// What users call it.
  static var name: String { get }
  /// - Parameters:
  ///   - classes: the class of each page.
  ///   - dirty: how often each was written of late, of as many pages; nil where nobody has looked.
  init(classes: PageClassMap, dirty: DirtyCounts?)
}

/// The orders that there are.
public enum PageOrders {
  private static let all: [any PageOrder.Type] = [ClassedOrder.self, LinearOrder.self, HotLastOrder.self]

  /// Their names; the first is what is done unless told.
  public static var names: [String] { all.map { $0.name } }

  /// The order with a name, at its beginning; nil where there is none.
  public static func order(
    named name: String, classes: PageClassMap, dirty: DirtyCounts? = nil
  ) -> (any PageOrder)? {
    all.first { $0.name == name }?.init(classes: classes, dirty: dirty)
  }
}

/// Goes over pages and finds runs of those that are wanted.
struct RunScan: Sendable {
  private let classes: PageClassMap
  private var page = 0

  init(_ classes: PageClassMap) { self.classes = classes }

  mutating func restart() { page = 0 }

  /// The next run of pages of one class that are all wanted; nil at the end.
  mutating func next(iteration: Int, _ isWanted: (Int, PageClass) -> Bool) -> OrderedRun? {
    while page < classes.count {
      let first = page
      let pageClass = classes[first]
      page += 1
      guard isWanted(first, pageClass) else { continue }
      while page < classes.count, classes[page] == pageClass, isWanted(page, pageClass) { page += 1 }
      return OrderedRun(pages: first..<page, iteration: iteration, pageClass: pageClass)
    }
    return nil
  }
}
