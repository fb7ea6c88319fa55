import CGuest

/// This processor's local APIC, through memory or, in x2APIC mode, through MSRs (Intel SDM volume 3, chapter 12).
enum LocalAPIC {
  nonisolated(unsafe) private(set) static var isX2 = false
  private static let base: UInt64 = 0xfee0_0000
  private static let baseMSR: UInt32 = 0x1b

  /// Registers, by their offsets in memory.
  enum Register: UInt32 {
    case id = 0x20
    case version = 0x30
    case taskPriority = 0x80
    case endOfInterrupt = 0xb0
    case spurious = 0xf0
    case command = 0x300
    case commandHigh = 0x310
    case timer = 0x320
    case initialCount = 0x380
    case currentCount = 0x390
    case divide = 0x3e0
  }

  /// On every processor, before anything else here. `x2apic=1` on the command line asks for x2APIC mode.
  static func begin() {
    isX2 = StartInfo.flag("x2apic") && cpuid(1, 0).ecx & 1 << 21 != 0
    if isX2 { wrmsr(baseMSR, rdmsr(baseMSR) | 0xc00) }
    write(.spurious, 0x1ff)
    write(.taskPriority, 0)
  }

  static func read(_ register: Register) -> UInt32 {
    isX2
      ? UInt32(truncatingIfNeeded: rdmsr(0x800 + register.rawValue >> 4)) : load32(base + UInt64(register.rawValue))
  }

  static func write(_ register: Register, _ value: UInt32) {
    if isX2 {
      wrmsr(0x800 + register.rawValue >> 4, UInt64(value))
    } else {
      store32(base + UInt64(register.rawValue), value)
    }
  }

  static var id: UInt32 { isX2 ? read(.id) : read(.id) >> 24 }

  static func endOfInterrupt() { write(.endOfInterrupt, 0) }

  /// Who gets an interprocessor interrupt.
  enum Destination {
    case processor(UInt32)
    case this
    case all
    case others

    var bits: (command: UInt32, id: UInt32) {
      switch self {
      case .processor(let id): (0, id)
      case .this: (1 << 18, 0)
      case .all: (2 << 18, 0)
      case .others: (3 << 18, 0)
      }
    }
  }

  /// Sends a fixed interrupt, or with `mode` an NMI (4), INIT (5) or start-up (6).
  static func send(_ vector: UInt8, to destination: Destination, mode: UInt32 = 0) {
    let (shorthand, id) = destination.bits
    let command = UInt32(vector) | mode << 8 | 1 << 14 | shorthand
    if isX2 {
      wrmsr(0x830, UInt64(id) << 32 | UInt64(command))
    } else {
      while read(.command) & 1 << 12 != 0 { cpu_pause() }
      write(.commandHigh, id << 24)
      write(.command, command)
    }
  }

  enum TimerMode: UInt32 {
    case oneShot = 0
    case periodic = 0x20000
    case deadline = 0x40000
  }

  /// Starts the timer, which counts at its input clock / 16; a deadline is written to MSR 0x6e0 afterwards.
  static func startTimer(_ mode: TimerMode, vector: UInt8, count: UInt32) {
    write(.divide, 3)
    write(.timer, UInt32(vector) | mode.rawValue)
    if mode != .deadline { write(.initialCount, count) }
  }

  static func stopTimer() {
    write(.timer, 0x10000)
    write(.initialCount, 0)
  }
}

/// The first I/O APIC of the MADT.
enum IOAPIC {
  static var base: UInt64 {
    var address: UInt64 = 0
    ACPI.forEachInMADT { type, entry in
      if type == 1 && address == 0 { address = UInt64(load32(entry + 4)) }
    }
    return address
  }

  static func read(_ register: UInt32) -> UInt32 {
    let address = base
    store32(address, register)
    return load32(address + 16)
  }

  static func write(_ register: UInt32, _ value: UInt32) {
    let address = base
    store32(address, register)
    store32(address + 16, value)
  }

  /// The pin that an ISA interrupt comes in on: the MADT's overrides.
  static func pin(ofISA irq: UInt8) -> UInt32 {
    var pin = UInt32(irq)
    ACPI.forEachInMADT { type, entry in
      if type == 2 && load8(entry + 3) == irq { pin = load32(entry + 4) }
    }
    return pin
  }

  /// An edge-triggered pin to one processor.
  static func route(pin: UInt32, vector: UInt8, to id: UInt32) {
    write(0x11 + 2 * pin, id << 24)
    write(0x10 + 2 * pin, UInt32(vector))
  }

  static func mask(pin: UInt32) { write(0x10 + 2 * pin, 0x10000) }
}
