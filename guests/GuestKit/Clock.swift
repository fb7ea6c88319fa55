import CGuest

/// ACPI's PM timer: 3.579545 MHz, 24 bits (ACPI 6.5, 4.8.3.3). The clock that every other one is measured against.
enum PMTimer {
  static let frequency: UInt64 = 3_579_545
  nonisolated(unsafe) private static var port: UInt16 = 0

  static var isPresent: Bool {
    if port == 0, let fadt = ACPI.find("FACP") { port = UInt16(truncatingIfNeeded: load32(fadt.address + 76)) }
    return port != 0
  }

  static func read() -> UInt32 { inl(port) & 0xff_ffff }
}

/// Time since it was made, in ticks of the PM timer. It must be read at least every four seconds.
struct Stopwatch {
  private var last = PMTimer.read()
  private(set) var ticks: UInt64 = 0

  /// Microseconds.
  mutating func read() -> UInt64 {
    let now = PMTimer.read()
    ticks += UInt64((now &- last) & 0xff_ffff)
    last = now
    return ticks * 1_000_000 / PMTimer.frequency
  }
}

/// Waits without interrupts.
func delay(microseconds: UInt64) {
  var watch = Stopwatch()
  while watch.read() < microseconds { cpu_pause() }
}

/// Waits until `done`; gives up after ten seconds. Interrupts come in between: while the timer is read, because a kernel that
/// emulates ring 0 looks for them when it comes back from an access, not after every instruction.
func wait(_ what: StaticString, until done: () -> Bool) {
  var watch = Stopwatch()
  while !done() {
    sti()
    let waited = watch.read()
    cli()
    expect(what, waited < 10_000_000)
  }
}
