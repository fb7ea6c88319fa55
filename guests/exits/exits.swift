import CGuest
import Synchronization

private let ticks = Atomic<UInt64>(0)
private let vector: UInt8 = 0x40
nonisolated(unsafe) private var count: UInt64 = 0

/// What each way out of the guest costs: a line of JSON a row, with cycles of the TSC and nanoseconds of the PM timer for all
/// of `count` repetitions. `port=` is where pio-out writes (0x80: no device), `count=` how often (1000).
func guestMain() {
  expect("a PM timer", PMTimer.isPresent)
  count = StartInfo.number("count", default: 1000)
  expect("count", count, in: 1...100_000)
  PIC.begin()
  LocalAPIC.begin()
  set_interrupt_handler(vector) { _ in
    ticks.add(1, ordering: .relaxed)
    LocalAPIC.endOfInterrupt()
  }
  let port = UInt16(truncatingIfNeeded: StartInfo.number("port", default: 0x80))

  row("instruction") { nop() }
  row("pio-out") { outb(port, 0) }
  row("pio-in") { _ = inb(port) }
  row("pm-timer") { _ = PMTimer.read() }
  let ioapic = IOAPIC.base
  if ioapic != 0 {
    row("mmio-read-ioapic") { _ = load32(ioapic) }
    row("mmio-write-ioapic") { store32(ioapic, 0) }
  }
  if let hpet = HPET.base { row("mmio-read-hpet") { _ = load32(hpet) } }
  row("mmio-read-hole") { _ = load32(0xcabc_d000) }
  row("mmio-write-hole") { store32(0xcabc_d000, 0) }
  if let ecam = PCI.ecam { row("mmio-read-ecam") { _ = load32(ecam) } }
  row("cpuid") { _ = cpuid(0, 0) }
  row("rdmsr") { _ = rdmsr(0x1b) }
  row("rdtsc") { _ = rdtsc() }
  row("page-fault") { _ = Fault.catching { _ in store64(0x40_0000_0000, 0) } }
  row("ipi-self") {
    let before = ticks.load(ordering: .relaxed)
    LocalAPIC.send(vector, to: .this)
    while ticks.load(ordering: .relaxed) == before { sti_hlt_cli() }
  }
  row("halt-wake") {
    let before = ticks.load(ordering: .relaxed)
    LocalAPIC.startTimer(.oneShot, vector: vector, count: 100)
    while ticks.load(ordering: .relaxed) == before { sti_hlt_cli() }
  }
}

/// In batches, because the PM timer wraps after four seconds.
@inline(__always)
private func row(_ name: StaticString, _ body: () -> Void) {
  body()
  var watch = Stopwatch()
  let start = rdtsc()
  var left = count
  while left > 0 {
    let batch = min(left, 500)
    for _ in 0..<batch { body() }
    left -= batch
    _ = watch.read()
  }
  let cycles = rdtsc() - start
  let nanoseconds = watch.ticks * 1_000_000_000 / PMTimer.frequency
  say("{\"exit\":\"\(name)\",\"count\":\(count),\"cycles\":\(cycles),\"nanoseconds\":\(nanoseconds)}")
}
