import GuestMemory
import MemoryViews
import PageClasses
import Testing

@Suite struct OrderTests {
  private func memory(_ pages: UInt64) throws -> GuestMemory { try Tables(pages: pages).memory }

  private func map(_ pages: UInt64, views: [MemoryView] = [], _ hints: [PageHint]) throws -> PageClassMap {
    PageClassMap(memory: try memory(pages), processors: [], views: views, hints: hints)
  }

  private func runs(_ name: String, _ map: PageClassMap, _ dirty: DirtyCounts? = nil) throws -> [OrderedRun] {
    var order = try #require(PageOrders.order(named: name, classes: map, dirty: dirty))
    var runs: [OrderedRun] = []
    while let run = order.next() { runs.append(run) }
    return runs
  }

  @Test func hintsOverlapAndTheMostUrgentCounts() throws {
    let map = try map(
      16,
      [
        PageHint(firstPage: 4, count: 4, kind: .prioritized), PageHint(firstPage: 0, count: 8, kind: .ignored),
        PageHint(firstPage: 2, count: 4, kind: .deprioritized), PageHint(firstPage: 14, count: .max, kind: .ignored),
        PageHint(firstPage: .max, count: .max, kind: .prioritized), PageHint(firstPage: 9, count: 0, kind: .ignored),
      ])
    let expected: [PageClass] = [
      .ignored, .ignored, .deprioritized, .deprioritized, .prioritized, .prioritized, .prioritized, .prioritized,
      .other, .other, .other, .other, .other, .other, .ignored, .ignored,
    ]
    #expect((0..<16).map { map[$0] } == expected)
    #expect(map.counts == [.readOnly: 0, .prioritized: 4, .other: 6, .deprioritized: 2, .ignored: 4])
  }

  @Test func manyHintsOfAllOfMemoryEnd() throws {
    let hints = [PageHint](repeating: PageHint(firstPage: 0, count: .max, kind: .ignored), count: 1 << 20)
    #expect(try map(1 << 16, hints).counts[.ignored] == 1 << 16)
  }

  @Test func pagesThatNoViewLetsBeWrittenAreReadOnly() throws {
    let open = MemoryView(number: 1)
    open.set([.read], for: try #require(GuestRange(start: GuestPhysicalAddress(0x2000), size: 0x4000)))
    let closed = MemoryView(number: 2, defaultRights: [.read])
    closed.set(.all, for: try #require(GuestRange(start: GuestPhysicalAddress(0x3000), size: 0x1000)))
    let hints = [
      PageHint(firstPage: 4, count: 1, kind: .ignored), PageHint(firstPage: 5, count: 1, kind: .prioritized),
    ]
    let one = try map(8, views: [open], hints)
    #expect((0..<8).filter { one[$0] == .readOnly } == [2, 3, 5])
    let both = try map(8, views: [open, closed], hints)
    #expect((0..<8).filter { both[$0] == .readOnly } == [2, 5])
    #expect(both[4] == .ignored)
  }

  @Test func readOnlyThenPrioritizedThenTheOthers() throws {
    let view = MemoryView(number: 1)
    view.set([.read, .execute], for: try #require(GuestRange(start: GuestPhysicalAddress(0x6000), size: 0x2000)))
    let map = try map(
      10, views: [view],
      [
        PageHint(firstPage: 0, count: 2, kind: .deprioritized), PageHint(firstPage: 3, count: 1, kind: .ignored),
        PageHint(firstPage: 5, count: 2, kind: .prioritized),
      ])
    #expect(
      try runs("classed", map) == [
        OrderedRun(pages: 6..<8, iteration: 1, pageClass: .readOnly),
        OrderedRun(pages: 5..<6, iteration: 2, pageClass: .prioritized),
        OrderedRun(pages: 2..<3, iteration: 3, pageClass: .other),
        OrderedRun(pages: 4..<5, iteration: 3, pageClass: .other),
        OrderedRun(pages: 8..<10, iteration: 3, pageClass: .other),
        OrderedRun(pages: 0..<2, iteration: 3, pageClass: .deprioritized),
      ])
    #expect(try runs("linear", map).map(\.pages.lowerBound) == [0, 2, 3, 4, 5, 6, 8])
  }

  @Test func whatIsWrittenMostComesLast() throws {
    var dirty = DirtyCounts(pages: 6)
    dirty.add([0b00_1010, .max])
    dirty.add([0b00_1000])
    dirty.add([0b00_1100 | 1 << 63])
    for _ in 0..<300 { dirty.add([0b10_0000]) }
    #expect(dirty.counts == [0, 1, 1, 3, 0, 255])
    let runs = try runs("hot-last", PageClassMap(pages: 6), dirty)
    #expect(runs.map(\.pages) == [0..<1, 4..<5, 1..<3, 3..<4, 5..<6])
    #expect(runs.map(\.iteration) == [1, 1, 2, 3, 4])
    let unknown = try self.runs("hot-last", PageClassMap(pages: 6))
    #expect(unknown == [OrderedRun(pages: 0..<6, iteration: 1, pageClass: .other)])
  }

  @Test func anUnknownNameIsNone() {
    #expect(PageOrders.names == ["classed", "linear", "hot-last"])
    #expect(PageOrders.order(named: "random", classes: PageClassMap(pages: 1)) == nil)
    var empty = PageOrders.order(named: "classed", classes: PageClassMap(pages: 0))
    #expect(empty?.next() == nil)
  }

  /// Whatever the classes and counts are: each page is in one run or, ignored and in the classed order, in none.
  @Test func everyOrderIsAPartition() throws {
    var random = SplitMix(state: 0x0bde5)
    for round in 0..<50 {
      let hints = (0..<random.next() % 30).map { _ in
        PageHint(
          firstPage: random.next() % 300, count: random.next() % 60,
          kind: PageHint.Kind.allCases[Int(random.next() % 3)])
      }
      let map = try map(256, hints)
      var dirty = DirtyCounts(pages: 256)
      for _ in 0..<4 { dirty.add((0..<4).map { _ in random.next() & random.next() }) }
      for name in PageOrders.names {
        var seen = [Int](repeating: 0, count: 256)
        var iteration = 1
        for run in try runs(name, map, dirty) {
          #expect(run.iteration >= iteration)
          iteration = run.iteration
          for page in run.pages {
            seen[page] += 1
            #expect(map[page] == run.pageClass)
          }
        }
        let expected = (0..<256).map { name == "classed" && map[$0] == .ignored ? 0 : 1 }
        #expect(seen == expected, "\(name), round \(round)")
      }
    }
  }
}
