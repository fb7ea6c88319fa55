import CGuest
import Synchronization

private let roundCount = 500
private let tokenRounds = 5
private let workVector: UInt8 = 0x50
private let countVector: UInt8 = 0x51
private let tokenVector: UInt8 = 0x52

private let phase = Atomic<Int>(0)
private let finished = Atomic<Int>(0)
private let added = Atomic<UInt64>(0)
private let exchanged = Atomic<UInt64>(0)
private let lock = SpinLock()
nonisolated(unsafe) private var guarded: UInt64 = 0

private let interrupts = Atomic<Int>(0)
private let nonMaskable = Atomic<Int>(0)
private let passes = Atomic<Int>(0)
/// One byte a processor: how many directed interrupts it got.
private let received = Atomic<UInt64>(0)

/// Starts every processor of the MADT; counts under contention and sends interrupts in every way there is, `rounds=1` times.
func guestMain() {
  expect("a PM timer", PMTimer.isPresent)
  set_interrupt_handler(workVector) { _ in LocalAPIC.endOfInterrupt() }
  set_interrupt_handler(countVector) { _ in
    let processor = SMP.current
    if processor < 8 { received.wrappingAdd(1 << UInt64(processor * 8), ordering: .relaxed) }
    interrupts.add(1, ordering: .releasing)
    LocalAPIC.endOfInterrupt()
  }
  set_interrupt_handler(tokenVector) { _ in passToken() }
  set_interrupt_handler(2) { _ in nonMaskable.add(1, ordering: .relaxed) }

  SMP.start { run($0) }
  say("processors: \(SMP.count)")
  expect("processors in the MADT", UInt64(SMP.count), equals: UInt64(min(ACPI.processorCount, SMP.limit)))
  for round in 1...max(1, Int(StartInfo.number("rounds", default: 1))) {
    contend(round)
    say("atomics and locks: ok")
    interprocessorInterrupts()
    say("interprocessor interrupts: ok")
  }
  say("smp: all passed")
}

/// A processor other than the first: asleep but for each phase's work and its interrupts.
private func run(_ number: Int) {
  var done = 0
  while true {
    while phase.load(ordering: .acquiring) == done { sti_hlt_cli() }
    work()
    done += 1
  }
}

private func work() {
  for _ in 0..<roundCount {
    added.wrappingAdd(3, ordering: .relaxed)
    var old = exchanged.load(ordering: .relaxed)
    while true {
      let (won, value) = exchanged.compareExchange(expected: old, desired: old &+ 5, ordering: .relaxed)
      if won { break }
      old = value
    }
    lock.lock()
    guarded &+= 7
    lock.unlock()
  }
  finished.add(1, ordering: .releasing)
}

private func contend(_ round: Int) {
  let count = SMP.count
  phase.store(round, ordering: .releasing)
  if count > 1 { LocalAPIC.send(workVector, to: .others) }
  work()
  wait("processors finish") { finished.load(ordering: .acquiring) == count * round }
  let rounds = UInt64(count * roundCount * round)
  expect("fetch and add", added.load(ordering: .relaxed), equals: rounds * 3)
  expect("compare and exchange", exchanged.load(ordering: .relaxed), equals: rounds * 5)
  expect("a sum under a lock", guarded, equals: rounds * 7)
}

private func interprocessorInterrupts() {
  let count = SMP.count
  var expected = 0
  interrupts.store(0, ordering: .relaxed)
  nonMaskable.store(0, ordering: .relaxed)
  passes.store(0, ordering: .relaxed)
  received.store(0, ordering: .relaxed)

  LocalAPIC.send(countVector, to: .this)
  expected += 1
  wait("an interrupt to this processor") { interrupts.load(ordering: .relaxed) == expected }

  for number in 0..<count {
    LocalAPIC.send(countVector, to: .processor(SMP.id(number)))
    expected += 1
    wait("a directed interrupt") { interrupts.load(ordering: .acquiring) == expected }
    if number < 8 {
      let got = received.load(ordering: .relaxed) >> UInt64(number * 8) & 0xff
      expect("the right processor gets it", got, equals: number == 0 ? 2 : 1)
    }
  }

  LocalAPIC.send(countVector, to: .all)
  expected += count
  wait("an interrupt to all") { interrupts.load(ordering: .relaxed) == expected }

  if count > 1 {
    LocalAPIC.send(countVector, to: .others)
    expected += count - 1
    wait("an interrupt to the others") { interrupts.load(ordering: .relaxed) == expected }
    LocalAPIC.send(0, to: .processor(SMP.id(count - 1)), mode: 4)
    wait("an NMI") { nonMaskable.load(ordering: .relaxed) == 1 }
  }
  delay(microseconds: 1_000)
  expect("no interrupt too many", UInt64(interrupts.load(ordering: .relaxed)), equals: UInt64(expected))

  // A token goes round all processors, each sending it to the next.
  LocalAPIC.send(tokenVector, to: .processor(SMP.id(1 % count)))
  wait("the token comes home") { passes.load(ordering: .relaxed) == count * tokenRounds }
}

private func passToken() {
  let pass = passes.add(1, ordering: .relaxed).newValue
  if pass < SMP.count * tokenRounds {
    LocalAPIC.send(tokenVector, to: .processor(SMP.id((SMP.current + 1) % SMP.count)))
  }
  LocalAPIC.endOfInterrupt()
}
