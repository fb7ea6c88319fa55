import CDirty
import CGuest
import Synchronization

private let tickVector: UInt8 = 0x51
private let generationVector: UInt8 = 0x52
private let started = Atomic<Bool>(false)
private let ended = Atomic<Bool>(false)
private let finished = Atomic<Int>(0)
nonisolated(unsafe) private var workers = InlineArray<64, Worker?>(repeating: nil)
nonisolated(unsafe) private var timerCount: UInt32 = 0
/// With the option `generation`.
nonisolated(unsafe) private var tellsGeneration = false
/// With the option `agent`, on the first processor.
nonisolated(unsafe) private var hints: Hints?

enum Report {
  /// Held while a line is printed.
  static let lock = SpinLock()
}

/// Writes pages at a rate and verifies them, on every processor, and looks after the clocks: what a machine that is saved,
/// restored or moved must not notice.
func guestMain() {
  Clocks.begin()
  let areas = Areas()
  User.prepare { _, _ in 0 }
  set_interrupt_handler(3) { dirty_end_user($0) }
  let processors = min(ACPI.processorCount, SMP.limit)
  for number in 0..<processors { workers[number] = Worker(number, of: UInt64(processors), areas) }
  workers[0]?.fill()
  areas.protect()
  set_interrupt_handler(tickVector) { _ in LocalAPIC.endOfInterrupt() }
  SMP.start { run($0) }
  expect("processors", UInt64(SMP.count), equals: UInt64(processors))
  timerCount = UInt32(truncatingIfNeeded: max(1, timerRate() / 100))
  sayPart("dirty: \(areas.pages(DIRTY_SET)) pages, \(areas.pages(DIRTY_FILL)) filled, ")
  say("\(areas.pages(DIRTY_READ_ONLY)) read-only, \(areas.pages(DIRTY_FREE)) free")
  if StartInfo.flag("agent") { hints = Hints(areas) }
  tellsGeneration = StartInfo.flag("generation")
  if tellsGeneration { expect("a generation id", GenerationID.listen(vector: generationVector)) }
  started.store(true, ordering: .releasing)
  LocalAPIC.send(tickVector, to: .others)
  work(0)
  wait("processors finish") { finished.load(ordering: .acquiring) == processors }
  var pages: UInt64 = 0
  var verified: UInt64 = 0
  var gap: UInt64 = 0
  var skew: UInt64 = 0
  for number in 0..<processors {
    guard let worker = workers[number] else { continue }
    pages += worker.written
    verified += worker.verified
    gap = max(gap, worker.clocks.largestGap)
    skew = max(skew, worker.clocks.largestSkew)
  }
  say("PASS pages \(pages) verified \(verified) longest gap \(gap) ms largest skew \(skew) ms")
  say("dirty: all passed")
}

private func run(_ number: Int) {
  while !started.load(ordering: .acquiring) { sti_hlt_cli() }
  work(number)
}

/// Counts of the local APIC's timer a second.
private func timerRate() -> UInt64 {
  LocalAPIC.startTimer(.oneShot, vector: tickVector, count: .max)
  var watch = Stopwatch()
  let first = LocalAPIC.read(.currentCount)
  while watch.read() < 20_000 { cpu_pause() }
  let last = LocalAPIC.read(.currentCount)
  LocalAPIC.stopTimer()
  return UInt64(first &- last) * PMTimer.frequency / watch.ticks
}

private func work(_ number: Int) {
  guard let worker = workers[number] else { return }
  worker.begin()
  let seconds = StartInfo.number("seconds", default: 0)
  var next: UInt64 = 1000
  if !worker.isHurried { LocalAPIC.startTimer(.periodic, vector: tickVector, count: timerCount) }
  while !ended.load(ordering: .acquiring) {
    worker.round()
    if number == 0 {
      hints?.look(taken: worker.taken)
      let now = worker.clocks.milliseconds
      if now >= next {
        next = now / 1000 * 1000 + 1000
        report(worker.passes, now)
        if seconds > 0 && now >= seconds * 1000 || isToldToEnd() { ended.store(true, ordering: .releasing) }
      }
    }
    if !worker.isHurried { sti_hlt_cli() }
  }
  LocalAPIC.stopTimer()
  worker.finish()
  finished.add(1, ordering: .releasing)
}

/// A `q` on the serial line.
private func isToldToEnd() -> Bool { inb(0x3fd) & 1 != 0 && inb(0x3f8) == 113 }

private func report(_ passes: UInt64, _ now: UInt64) {
  var pages: UInt64 = 0
  for number in 0..<SMP.count { pages += workers[number]?.written ?? 0 }
  Report.lock.lock()
  say("dirty: pass \(passes) pages \(pages) clock \(now)")
  if tellsGeneration {
    // A processor that writes as fast as it can takes no interrupts otherwise.
    sti()
    delay(microseconds: 10)
    cli()
    say("generation \(hex: GenerationID.low) \(hex: GenerationID.high) after \(GenerationID.events) events")
  }
  Report.lock.unlock()
}
