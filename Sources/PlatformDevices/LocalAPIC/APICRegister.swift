/// Offsets in the local APIC's register page (Intel SDM vol. 3, table 11-1); an x2APIC register's MSR is 0x800 plus a
/// sixteenth of its offset (table 11-6).
enum APICRegister {
  static let id: UInt16 = 0x020
  static let version: UInt16 = 0x030
  static let taskPriority: UInt16 = 0x080
  static let arbitrationPriority: UInt16 = 0x090
  static let processorPriority: UInt16 = 0x0a0
  static let endOfInterrupt: UInt16 = 0x0b0
  static let logicalDestination: UInt16 = 0x0d0
  static let destinationFormat: UInt16 = 0x0e0
  static let spuriousVector: UInt16 = 0x0f0
  static let inService: UInt16 = 0x100
  static let triggerMode: UInt16 = 0x180
  static let requests: UInt16 = 0x200
  static let errorStatus: UInt16 = 0x280
  static let command: UInt16 = 0x300
  static let commandHigh: UInt16 = 0x310
  static let timer: UInt16 = 0x320
  static let thermal: UInt16 = 0x330
  static let performance: UInt16 = 0x340
  static let lint0: UInt16 = 0x350
  static let lint1: UInt16 = 0x360
  static let error: UInt16 = 0x370
  static let initialCount: UInt16 = 0x380
  static let currentCount: UInt16 = 0x390
  static let divide: UInt16 = 0x3e0
  static let selfInterrupt: UInt16 = 0x3f0

  /// The local vector table.
  static let localVectors = timer...error
  /// Registers in the page, 16 bytes apart.
  static let count = 64
}

/// Model-specific registers of the local APIC.
enum APICModelSpecific {
  static let base: UInt32 = 0x1b
  static let deadline: UInt32 = 0x6e0
  static let first: UInt32 = 0x800
  static let last: UInt32 = 0x8ff
}

/// Bits of IA32_APIC_BASE (SDM vol. 3, 11.4.4 and 11.12.1).
enum APICBase {
  static let isBootProcessor: UInt64 = 1 << 8
  static let extended: UInt64 = 1 << 10
  static let enabled: UInt64 = 1 << 11
}

/// Bits of a local vector table entry (SDM vol. 3, figure 11-8).
enum LocalVector {
  static let masked: UInt32 = 1 << 16
  /// Bits 17-18 of the timer's entry.
  static func timerMode(_ entry: UInt32) -> UInt32 { entry >> 17 & 3 }
  static func delivery(_ entry: UInt32) -> DeliveryMode? { DeliveryMode(rawValue: UInt8(entry >> 8 & 7)) }

  /// What software can set of the entry at an offset.
  static func writable(_ offset: UInt16) -> UInt32 {
    switch offset {
    case APICRegister.timer: 0x7_00ff
    case APICRegister.thermal, APICRegister.performance: 0x1_07ff
    case APICRegister.error: 0x1_00ff
    default: 0x1_a7ff
    }
  }
}

/// Bits of the spurious-interrupt vector register (SDM vol. 3, figure 11-23).
enum SpuriousVector {
  static let enabled: UInt32 = 1 << 8
  static let suppressesBroadcast: UInt32 = 1 << 12
  static let writable: UInt32 = 0x13ff
}

/// Bits of the error status register (SDM vol. 3, figure 11-9).
enum APICError {
  static let sendIllegalVector: UInt32 = 1 << 5
  static let receiveIllegalVector: UInt32 = 1 << 6
  static let illegalRegister: UInt32 = 1 << 7
}

/// How an interrupt is delivered (SDM vol. 3, 11.5.1 and 11.6.1).
enum DeliveryMode: UInt8 {
  case fixed = 0
  case lowestPriority = 1
  case systemManagement = 2
  case nonMaskable = 4
  case initialize = 5
  case startUp = 6
  case external = 7
}
