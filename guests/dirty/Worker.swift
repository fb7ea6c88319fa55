import CDirty
import CGuest

/// One processor's share of the work: the ring-3 code of pages.user.c, its arguments, and the clocks.
final class Worker {
  private let state: UnsafeMutablePointer<dirty_worker>
  private let stack: UInt64
  /// Its descriptor tables: see processor.c.
  private let tables: UInt64
  private let number: Int
  private let own: UInt64
  /// Pages a second; 0 for as many as there can be.
  private let rate: UInt64
  /// Free pages that are taken back, a second.
  private let reuse: UInt64
  private var isToBreak: Bool
  private var due: UInt64 = 0
  var clocks = Clocks()

  /// Nothing to write, or all the time.
  var isHurried: Bool { rate == 0 && own > 0 }
  var written: UInt64 { state.pointee.written }
  var verified: UInt64 { state.pointee.verified }
  /// Free pages that have been taken back.
  var taken: UInt64 { state.pointee.reused }
  var passes: UInt64 { own == 0 ? 0 : written / own }

  init(_ number: Int, of processors: UInt64, _ areas: Areas) {
    self.number = number
    let page = guest_allocate(3 * 4096, 4096)
    for offset in 0..<UInt64(3) { User.share(page + offset * 4096) }
    tables = guest_allocate(256, 256)
    stack = page + 3 * 4096
    state = UnsafeMutableRawPointer(bitPattern: UInt(page)).unsafelyUnwrapped
      .bindMemory(to: dirty_worker.self, capacity: 1)
    own = areas.pages(DIRTY_SET) / processors
    let total = StartInfo.number("rate", default: 0)
    rate = total == 0 ? 0 : max(1, total / processors)
    reuse = number == 0 ? StartInfo.number("reuse", default: 0) : 0
    isToBreak = number == 0 && StartInfo.flag("break")
    areas.describe(to: state)
    state.pointee.pattern = Self.pattern
    state.pointee.number = UInt64(number)
    state.pointee.stride = processors
    state.pointee.random = UInt64(number) &* 0x9e37_79b9_7f4a_7c15 | 1
  }

  private static var pattern: UInt64 {
    guard let value = StartInfo.option("pattern") else { return UInt64(DIRTY_LINEAR) }
    if value.equals("linear") { return UInt64(DIRTY_LINEAR) }
    if value.equals("random") { return UInt64(DIRTY_RANDOM) }
    if value.equals("hot") { return UInt64(DIRTY_HOT) }
    say("FAIL pattern=\(value) is none of linear, random, hot")
    Power.fail()
  }

  /// On the processor itself.
  func begin() {
    if number > 0 { dirty_load_tables(tables) }
    run { dirty_begin($0) }
    clocks = Clocks()
  }

  /// Writes all pages of all areas, on the first processor, while the others are asleep.
  func fill() {
    dirty_load_tables(tables)
    run { dirty_fill($0) }
  }

  private func run(_ code: @convention(c) (UnsafeMutablePointer<dirty_worker>) -> Void) {
    dirty_enter_user(code, stack - 8, state, tables)
  }

  /// Writes some pages, verifies each before that and some others, and looks at the clocks.
  func round() {
    clocks.look()
    let now = clocks.milliseconds
    var count: UInt64 = 64
    if !isHurried {
      let goal = now * rate / 1000
      // After a standstill, not all at once.
      count = min(goal - min(due, goal), max(1, rate / 10))
      due = goal
    }
    state.pointee.writes = own > 0 ? count : 0
    state.pointee.checks = 4
    state.pointee.reuse = min(now * reuse / 1000, state.pointee.area.3.pages)
    if isToBreak && now > 500 {
      isToBreak = false
      corrupt(own > 0 ? state.pointee.area.0 : state.pointee.area.1)
    }
    run { dirty_round($0) }
    look()
  }

  /// Verifies all that is this processor's.
  func finish() {
    run { dirty_finish($0) }
    look()
    clocks.look()
  }

  private func corrupt(_ area: dirty_area) {
    let word = area.address + 2048
    store64(word, load64(word) ^ 1)
  }

  private func look() {
    if state.pointee.failed == 0 { return }
    Report.lock.lock()
    if state.pointee.failed == 2 {
      say("FAIL processor \(number): the working set has another checksum than what was written")
      Power.fail()
    }
    let number = Int(state.pointee.failed_area)
    let page = state.pointee.failed_page
    let area = Areas.area(number, of: state)
    let place = area.address + page * 4096
    sayPart("FAIL \(Areas.names[number]) page \(page) at \(hex: place): number \(hex: load64(place)) generation ")
    sayPart("\(load64(place + 8)), not \(hex: area.first + page) generation ")
    say("\(load32(area.generations + page * 4)), or another body")
    Power.fail()
  }
}
