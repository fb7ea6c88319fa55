import GuestMemory
import MemoryViews
import Testing

@Suite struct MemoryViewTests {
  private func address(_ value: UInt64) -> GuestPhysicalAddress { GuestPhysicalAddress(value) }

  @Test func pagesWithoutAnEntryHaveTheDefault() {
    let open = MemoryView(number: 1)
    let closed = MemoryView(number: 2, defaultRights: [])
    for place: UInt64 in [0, 0xfff, 0x1000, 0xffff_ffff, 0x1_0000_0000, 0xffff_ffff_f000] {
      #expect(open[address(place)] == .init(rights: .all, hostPage: 0))
      #expect(closed[address(place)].rights == [])
    }
  }

  @Test func rightsCoverEveryPageThatARangeTouches() throws {
    let view = MemoryView(number: 1)
    // Across a boundary of every level of tables.
    view.set([.read], for: try #require(GuestRange(start: address(0x7f_ffff_f800), size: 0x1000)))
    #expect(view[address(0x7f_ffff_efff)].rights == .all)
    #expect(view[address(0x7f_ffff_f000)].rights == [.read])
    #expect(view[address(0x80_0000_0fff)].rights == [.read])
    #expect(view[address(0x80_0000_1000)].rights == .all)
    view.set([.read, .execute], for: try #require(GuestRange(start: address(0x80_0000_0000), size: 1)))
    #expect(view[address(0x80_0000_0123)].rights == [.read, .execute])
    #expect(view[address(0x7f_ffff_f123)].rights == [.read])
    view.set([], for: try #require(GuestRange(start: address(0x10_0000), size: 0)))
    #expect(view[address(0x10_0000)].rights == .all)
  }

  @Test func aReplacedPageStaysReplacedWhenItsRightsChange() throws {
    let view = MemoryView(number: 1)
    let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
    defer { page.deallocate() }
    view.replace(address(0x3000), by: page, rights: [.read])
    #expect(view[address(0x3fff)] == .init(rights: [.read], hostPage: UInt(bitPattern: page)))
    view.set(.all, for: try #require(GuestRange(start: address(0x2000), size: 0x3000)))
    #expect(view[address(0x3000)] == .init(rights: .all, hostPage: UInt(bitPattern: page)))
    #expect(view[address(0x2000)].hostPage == 0)
    view.replace(address(0x3000), by: nil, rights: .all)
    #expect(view[address(0x3000)].hostPage == 0)
  }

  @Test func aViewMadeFromAnotherGoesItsOwnWay() throws {
    let base = MemoryView(number: 1)
    let low = try #require(GuestRange(start: address(0x1000), size: 0x1000))
    let high = try #require(GuestRange(start: address(0x7f_ffff_f000), size: 0x1000))
    base.set([.read], for: low)
    base.set([.read], for: high)
    let copy = MemoryView(number: 2, base: base)
    #expect(copy.runs == base.runs)
    // The same table of the lowest level, changed by the one and by the other.
    copy.set([.write], for: try #require(GuestRange(start: address(0x2000), size: 0x1000)))
    base.set([.execute], for: low)
    base.defaultRights = []
    #expect(base[address(0x1000)].rights == .execute)
    #expect(base[address(0x2000)].rights == [])
    #expect(copy[address(0x1000)].rights == .read)
    #expect(copy[address(0x2000)].rights == .write)
    #expect(copy[address(0x3000)].rights == .all)
    // What neither touched is still what both say, also after the base and its base are gone.
    let third = MemoryView(number: 3, base: copy)
    copy.set(.all, for: high)
    #expect(third[address(0x7f_ffff_f000)].rights == .read)
    #expect(base[address(0x7f_ffff_f000)].rights == .read)
  }

  @Test func aCopyOutlivesWhatItWasMadeFrom() throws {
    var base: MemoryView? = MemoryView(number: 1)
    let range = try #require(GuestRange(start: address(0), size: 1 << 22))
    base?.set([.read], for: range)
    let copy = MemoryView(number: 2, base: try #require(base))
    base = nil
    copy.set([.write], for: try #require(GuestRange(start: address(0x1000), size: 1)))
    #expect(copy.runs.map(\.range.size) == [0x1000, 0x1000, (1 << 22) - 0x2000])
  }

  @Test func describesItsRangesForADebugger() throws {
    let view = MemoryView(number: 5, defaultRights: [.read, .write])
    #expect(view.description == "view 5\n  everything else rw-")
    let pages = UnsafeMutableRawPointer.allocate(byteCount: 8192, alignment: 4096)
    defer { pages.deallocate() }
    // Across a table's end; two pages of other memory that follow one another, and the same one twice.
    view.set([.read], for: try #require(GuestRange(start: address(0x1f_f000), size: 0x3000)))
    view.set([.read, .execute], for: try #require(GuestRange(start: address(0x20_2000), size: 0x1000)))
    view.replace(address(0x40_0000), by: pages, rights: .all)
    view.replace(address(0x40_1000), by: pages + 4096, rights: .all)
    view.replace(address(0x40_2000), by: pages + 4096, rights: .all)
    #expect(
      view.description == """
        view 5
          0x1ff000-0x201fff r--
          0x202000-0x202fff r-x
          0x400000-0x401fff rwx, other memory
          0x402000-0x402fff rwx, other memory
          everything else rw-
        """)
    // No more than a debugger's user reads.
    for page in 0..<600 as Range<UInt64> where page & 1 == 0 {
      view.set([], for: try #require(GuestRange(start: address(0x1000_0000 + page << 12), size: 1)))
    }
    #expect(view.runs.count == 304)
    #expect(view.description.contains("and 48 ranges more"))
  }
}
