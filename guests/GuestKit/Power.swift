import CGuest

/// Ways to end.
enum Power {
  /// ACPI soft off (S5). The VMM's exit status is 0.
  static func off() -> Never {
    Console.drain()
    guard let fadt = ACPI.find("FACP") else {
      say("FAIL power-off: no FADT")
      fail()
    }
    let type = ACPI.dsdt(of: fadt).flatMap { ACPI.powerOffType(in: $0) } ?? 5
    let hardwareReduced = fadt.length >= 116 && load32(fadt.address + 112) & 1 << 20 != 0
    if hardwareReduced {
      // SLEEP_CONTROL_REG is a generic address: memory or I/O.
      let register = fadt.address + 244
      let value = type << 2 | 0x20
      if load8(register) == 0 {
        store8(load64(register + 4), value)
      } else {
        outb(UInt16(truncatingIfNeeded: load64(register + 4)), value)
      }
    } else {
      outw(UInt16(truncatingIfNeeded: load32(fadt.address + 64)), UInt16(type) << 10 | 1 << 13)
    }
    // The machine may take a moment to stop us.
    halt()
  }

  /// A hard reset, by the reset control register.
  static func restart() -> Never {
    Console.drain()
    outb(0xcf9, 6)
    halt()
  }

  /// The debug-exit port: the VMM's exit status is `value * 2 + 1`.
  static func debugExit(_ value: UInt8) -> Never {
    Console.drain()
    outb(0xf4, value)
    halt()
  }

  private static func halt() -> Never {
    while true {
      cli()
      hlt()
    }
  }

  static func fail() -> Never { debugExit(1) }
}
