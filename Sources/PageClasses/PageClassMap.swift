import GuestMemory
import MemoryViews

/// The class of each page of RAM.
///
/// Whoever leaves pages out because they are `ignored` starts to track writes **before** it asks the agent: a page that is
/// freed, told of and taken into use again is then found by its writes.
public struct PageClassMap: Sendable {
  /// A class's raw value for each page, by the flat numbers of `DirtyBitmap`: a region's pages follow those of the region
  /// below.
  public private(set) var classes: [UInt8]
  /// Whether the guest's page tables could be looked through; where they are too many, nothing is taken from them.
  public let tablesAreComplete: Bool

  /// Hints beyond these are not looked at.
  public static let hintLimit = 1 << 20

  /// A map in which every page is `other`.
  public init(pages: Int) {
    classes = [UInt8](repeating: PageClass.other.rawValue, count: pages)
    tablesAreComplete = true
  }

  /// The classes as they are now. It takes milliseconds a GiB, and half a second where the guest's page tables are made to
  /// take long; vCPUs may run meanwhile, since a class is an opinion and no promise.
  ///
  /// What is ignored by the agent's word stays ignored; else what is read only is that, whatever else is said; a page
  /// that several hints are about has the first class of prioritized, deprioritized and ignored.
  ///
  /// - Parameters:
  ///   - memory: the guest's RAM.
  ///   - processors: the registers of each vCPU; those that do not translate are left out.
  ///   - views: views that vCPUs use: a page that none of them lets be written is read only.
  ///   - hints: what the agent says, in any order, overlapping, outside of RAM: whatever it likes.
  public init(
    memory: GuestMemory, processors: [PagingRegisters], views: [MemoryView] = [], hints: [PageHint] = []
  ) {
    var scan = PageTableScan(memory)
    for registers in processors { scan.add(registers) }
    tablesAreComplete = scan.isComplete
    let numbers = PageNumbers(memory)
    var readOnly = scan.readOnly
    if let protected = Self.protected(views, numbers) { readOnly.formUnion(protected) }

    classes = [UInt8](repeating: PageClass.other.rawValue, count: numbers.total)
    for kind in [PageHint.Kind.ignored, .deprioritized, .prioritized] {
      let value = kind.pageClass.rawValue
      // A hint takes time for each page that it names: no more than each page a few times.
      var budget = 4 * numbers.total
      for hint in hints.prefix(Self.hintLimit) where hint.kind == kind && budget > 0 {
        numbers.forEachRun(first: hint.firstPage, count: hint.count) { pages in
          budget -= pages.count
          for page in pages { classes[page] = value }
        }
      }
    }
    for page in classes.indices where readOnly[page] && classes[page] != PageClass.ignored.rawValue {
      classes[page] = PageClass.readOnly.rawValue
    }
  }

  /// How many pages there are.
  public var count: Int { classes.count }

  /// A page's class.
  public subscript(page: Int) -> PageClass { PageClass(rawValue: classes[page]) ?? .other }

  /// How many pages each class has.
  public var counts: [PageClass: Int] {
    var counts = [Int](repeating: 0, count: 256)
    for value in classes { counts[Int(value)] += 1 }
    return Dictionary(uniqueKeysWithValues: PageClass.allCases.map { ($0, counts[Int($0.rawValue)]) })
  }

  /// Pages that no view lets be written; nil without views.
  private static func protected(_ views: [MemoryView], _ numbers: PageNumbers) -> PageBits? {
    var result: PageBits?
    for view in views {
      var pages = PageBits(pages: numbers.total)
      let isClosed = !view.defaultRights.contains(.write)
      if isClosed { pages.insert(0..<numbers.total) }
      for run in view.runs where run.entry.rights.contains(.write) == isClosed {
        numbers.forEachRun(first: run.range.start.rawValue >> 12, count: run.range.size >> 12) { range in
          if isClosed { pages.remove(range) } else { pages.insert(range) }
        }
      }
      if result == nil { result = pages } else { result?.formIntersection(pages) }
    }
    return result
  }
}

extension PageHint.Kind {
  fileprivate var pageClass: PageClass {
    switch self {
    case .prioritized: .prioritized
    case .deprioritized: .deprioritized
    case .ignored: .ignored
    }
  }
}
