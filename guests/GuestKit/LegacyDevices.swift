import CGuest

/// The pair of 8259s, as IRQ 0 to 15 at vectors 0x20 to 0x2f.
enum PIC {
  static let base: UInt8 = 0x20

  static func begin() {
    outb(0x20, 0x11)
    outb(0xa0, 0x11)
    outb(0x21, base)
    outb(0xa1, base + 8)
    outb(0x21, 4)
    outb(0xa1, 2)
    outb(0x21, 1)
    outb(0xa1, 1)
    mask(0xffff)
  }

  /// One bit an IRQ; 1 is off.
  static func mask(_ bits: UInt16) {
    outb(0x21, UInt8(truncatingIfNeeded: bits))
    outb(0xa1, UInt8(truncatingIfNeeded: bits >> 8))
  }

  static func endOfInterrupt() { outb(0x20, 0x20) }
}

/// Channel 0 of the 8254: 1.193182 MHz.
enum PIT {
  static let frequency: UInt64 = 1_193_182

  static func periodic(divisor: UInt16) { program(0x34, divisor) }
  static func oneShot(count: UInt16) { program(0x30, count) }

  /// One more tick in 55 ms, and then none: emulations go on ticking while a mode has no count.
  static func stop() { oneShot(count: 0) }

  private static func program(_ command: UInt8, _ count: UInt16) {
    outb(0x43, command)
    outb(0x40, UInt8(truncatingIfNeeded: count))
    outb(0x40, UInt8(truncatingIfNeeded: count >> 8))
  }
}

/// The HPET, where ACPI has a table for it.
enum HPET {
  static var base: UInt64? { ACPI.find("HPET").map { load64($0.address + 44) } }
}
