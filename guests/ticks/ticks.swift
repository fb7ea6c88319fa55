import CGuest
import Synchronization

private let ticks = Atomic<UInt64>(0)
/// PM timer at the last tick, and the least that lay between two.
private let lastTick = Atomic<UInt64>(0)
private let leastGap = Atomic<UInt64>(0)
private let vector: UInt8 = 0x40
nonisolated(unsafe) private var verbose = false

/// Timer interrupts from every timer there is, measured by ACPI's PM timer.
///
/// A tick that comes late on a busy host is no fault of the machine's. So nothing may ever be early, and being in time is
/// asked for once in many ticks: a timer that is dead, or wrong by a factor, is found, a busy host is not.
/// `verbose=1` prints what was measured.
func guestMain() {
  verbose = StartInfo.flag("verbose")
  expect("a PM timer", PMTimer.isPresent)
  LocalAPIC.begin()
  PIC.begin()
  set_interrupt_handler(PIC.base) { _ in
    tick()
    PIC.endOfInterrupt()
  }
  set_interrupt_handler(vector) { _ in
    tick()
    LocalAPIC.endOfInterrupt()
  }

  for _ in 0..<StartInfo.number("rounds", default: 1) {
    pitThroughPIC()
    pitThroughIOAPIC()
    let rate = localTimerRate()
    localTimer(rate)
    if StartInfo.number("tsc", default: 1) != 0 {
      let tsc = tscRate()
      if cpuid(1, 0).ecx & 1 << 24 != 0 { tscDeadline(tsc) }
    }
    if let base = HPET.base { hpet(base) }
  }
  say("ticks: all passed")
}

private func tick() {
  let now = UInt64(PMTimer.read())
  let gap = (now &- lastTick.load(ordering: .relaxed)) & 0xff_ffff
  if gap < leastGap.load(ordering: .relaxed) { leastGap.store(gap, ordering: .relaxed) }
  lastTick.store(now, ordering: .relaxed)
  ticks.add(1, ordering: .relaxed)
}

private func microseconds(_ pmTicks: UInt64) -> UInt64 { pmTicks * 1_000_000 / PMTimer.frequency }

private func report(_ what: StaticString, _ expected: UInt64, _ measured: UInt64) {
  if verbose {
    say("\(what): expected \(expected) us, measured \(measured) us")
  } else {
    say("\(what): ok")
  }
}

/// Waits for a tick without halting: nothing else would end the wait for a dead timer.
private func awaitTick(_ what: StaticString, after count: UInt64) {
  var watch = Stopwatch()
  while ticks.load(ordering: .relaxed) == count {
    sti()
    let waited = watch.read()
    cli()
    if waited > 3_000_000 { expect(what, 0, equals: 1) }
  }
}

/// A periodic timer: many ticks are never early together, and two follow each other in about `period` microseconds. Time
/// counts from the start: after a pause of the host's, some machines deliver what was missed in a burst.
private func periodic(_ what: StaticString, _ period: UInt64, start: () -> Void) {
  let first = ticks.load(ordering: .relaxed)
  leastGap.store(.max, ordering: .relaxed)
  var watch = Stopwatch()
  lastTick.store(UInt64(PMTimer.read()), ordering: .relaxed)
  start()
  awaitTick(what, after: first)
  var count: UInt64 = 0
  while count < 10 || (count < 1000 && microseconds(leastGap.load(ordering: .relaxed)) > period * 3 / 2) {
    sti_hlt_cli()
    count = ticks.load(ordering: .relaxed) - first
    _ = watch.read()
  }
  expect(what, watch.read(), in: (count - 1) * period * 3 / 4...UInt64.max)
  let gap = microseconds(leastGap.load(ordering: .relaxed))
  expect(what, gap, in: 0...period * 3 / 2)
  report(what, period, gap)
}

/// A timer that fires once `expected` microseconds after `start`: never early, and in time once.
private func oneShot(_ what: StaticString, _ expected: UInt64, start: () -> Void) {
  var best: UInt64 = .max
  var attempts = 0
  while attempts < 100 && best > expected * 3 / 2 {
    let before = ticks.load(ordering: .relaxed)
    let from = UInt64(PMTimer.read())
    start()
    if attempts == 0 { awaitTick(what, after: before) }
    while ticks.load(ordering: .relaxed) == before { sti_hlt_cli() }
    let took = microseconds((lastTick.load(ordering: .relaxed) &- from) & 0xff_ffff)
    expect(what, took, in: expected * 3 / 4...UInt64.max)
    best = min(best, took)
    attempts += 1
  }
  expect(what, best, in: expected * 3 / 4...expected * 3 / 2)
  report(what, expected, best)
}

/// A tick of a timer that has been stopped may be waiting still.
private func takeWaiting() {
  sti()
  delay(microseconds: 100)
  cli()
}

private func pitThroughPIC() {
  let divisor = UInt16(PIT.frequency / 250)
  PIC.mask(0xfffe)
  periodic("pit periodic through pic", 4_000) { PIT.periodic(divisor: divisor) }
  PIT.stop()
  takeWaiting()
  oneShot("pit one-shot through pic", 8_000) { PIT.oneShot(count: divisor * 2) }
  PIT.stop()
  PIC.mask(0xffff)
}

private func pitThroughIOAPIC() {
  let pin = IOAPIC.pin(ofISA: 0)
  IOAPIC.route(pin: pin, vector: vector, to: LocalAPIC.id)
  periodic("pit periodic through ioapic", 4_000) { PIT.periodic(divisor: UInt16(PIT.frequency / 250)) }
  PIT.stop()
  IOAPIC.mask(pin: pin)
  takeWaiting()
}

/// Counts of the local APIC's timer a second.
private func localTimerRate() -> UInt64 {
  LocalAPIC.startTimer(.oneShot, vector: vector, count: .max)
  var watch = Stopwatch()
  let first = LocalAPIC.read(.currentCount)
  while watch.read() < 20_000 { cpu_pause() }
  let last = LocalAPIC.read(.currentCount)
  let ticks = watch.ticks
  LocalAPIC.stopTimer()
  let rate = UInt64(first &- last) * PMTimer.frequency / ticks
  if verbose { say("local apic timer: \(rate) counts a second") }
  expect("local apic timer counts down", rate, in: 100_000...20_000_000_000)
  return rate
}

private func localTimer(_ rate: UInt64) {
  let count = UInt32(truncatingIfNeeded: rate / 250)
  periodic("local apic periodic", 4_000) { LocalAPIC.startTimer(.periodic, vector: vector, count: count) }
  LocalAPIC.stopTimer()
  takeWaiting()
  oneShot("local apic one-shot", 8_000) { LocalAPIC.startTimer(.oneShot, vector: vector, count: count * 2) }
  let before = ticks.load(ordering: .relaxed)
  var watch = Stopwatch()
  sti()
  while watch.read() < 20_000 {}
  cli()
  expect("a one-shot timer fires once", ticks.load(ordering: .relaxed) - before, equals: 0)
}

/// Cycles of the time-stamp counter a second.
private func tscRate() -> UInt64 {
  var watch = Stopwatch()
  let first = rdtsc()
  while watch.read() < 20_000 { cpu_pause() }
  let rate = (rdtsc() - first) * PMTimer.frequency / watch.ticks
  if verbose { say("tsc: \(rate) Hz") }
  expect("tsc advances", rate, in: 10_000_000...20_000_000_000)
  return rate
}

private func tscDeadline(_ rate: UInt64) {
  LocalAPIC.startTimer(.deadline, vector: vector, count: 0)
  oneShot("tsc deadline", 8_000) { wrmsr(0x6e0, rdtsc() + rate / 125) }
  LocalAPIC.stopTimer()
}

private func hpet(_ base: UInt64) {
  let period = load64(base) >> 32  // femtoseconds
  expect("hpet period", period, in: 1_000_000...100_000_000)
  store64(base + 0x10, load64(base + 0x10) | 1)
  var watch = Stopwatch()
  let first = load64(base + 0xf0)
  while watch.read() < 20_000 {}
  let counted = (load64(base + 0xf0) &- first) * (period / 1000) / 1_000_000
  let waited = watch.read()
  expect("hpet counter", counted, in: waited / 2...waited * 2)
  report("hpet counter", waited, counted)
}
