/// The vectors that the architecture uses itself (Intel SDM, volume 3, table 6-1; AMD APM, volume 2, section 8.2).
public enum ExceptionVector: UInt8, CaseIterable, Sendable {
  /// #DE: division by zero or a quotient too large.
  case divideError = 0
  /// #DB: single step, breakpoint registers, ICEBP.
  case debug = 1
  /// The non-maskable interrupt.
  case nonMaskableInterrupt = 2
  /// #BP: INT3.
  case breakpoint = 3
  /// #OF: INTO.
  case overflow = 4
  /// #BR: BOUND.
  case boundRangeExceeded = 5
  /// #UD.
  case invalidOpcode = 6
  /// #NM: no x87, or CR0.TS.
  case deviceNotAvailable = 7
  /// #DF.
  case doubleFault = 8
  /// #TS.
  case invalidTSS = 10
  /// #NP.
  case segmentNotPresent = 11
  /// #SS.
  case stackFault = 12
  /// #GP.
  case generalProtection = 13
  /// #PF.
  case pageFault = 14
  /// #MF: a pending x87 error.
  case x87FloatingPoint = 16
  /// #AC.
  case alignmentCheck = 17
  /// #MC.
  case machineCheck = 18
  /// #XM.
  case simdFloatingPoint = 19
  /// #VE.
  case virtualization = 20
  /// #CP.
  case controlProtection = 21
  /// #VC (AMD).
  case vmmCommunication = 29
  /// #SX (AMD).
  case security = 30

  /// Whether the exception pushes an error code.
  public var hasErrorCode: Bool {
    switch self {
    case .doubleFault, .invalidTSS, .segmentNotPresent, .stackFault, .generalProtection, .pageFault,
      .alignmentCheck, .controlProtection, .vmmCommunication, .security:
      true
    default:
      false
    }
  }

  /// Whether a second one of these while delivering a first is a double fault (Intel SDM, volume 3, table 6-5).
  public var isContributory: Bool {
    switch self {
    case .divideError, .invalidTSS, .segmentNotPresent, .stackFault, .generalProtection, .controlProtection: true
    default: false
    }
  }
}

extension ExceptionVector: CustomStringConvertible {
  /// The SDM's mnemonic: `#GP`.
  public var description: String {
    switch self {
    case .divideError: "#DE"
    case .debug: "#DB"
    case .nonMaskableInterrupt: "NMI"
    case .breakpoint: "#BP"
    case .overflow: "#OF"
    case .boundRangeExceeded: "#BR"
    case .invalidOpcode: "#UD"
    case .deviceNotAvailable: "#NM"
    case .doubleFault: "#DF"
    case .invalidTSS: "#TS"
    case .segmentNotPresent: "#NP"
    case .stackFault: "#SS"
    case .generalProtection: "#GP"
    case .pageFault: "#PF"
    case .x87FloatingPoint: "#MF"
    case .alignmentCheck: "#AC"
    case .machineCheck: "#MC"
    case .simdFloatingPoint: "#XM"
    case .virtualization: "#VE"
    case .controlProtection: "#CP"
    case .vmmCommunication: "#VC"
    case .security: "#SX"
    }
  }
}

/// The error code of #PF (Intel SDM, volume 3, figure 4-12).
public struct PageFaultErrorCode: NamedBits {
  /// The error code.
  public var rawValue: UInt64
  /// The bits of an error code.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// A translation exists but forbids the access; clear: there is none.
  public static let present = PageFaultErrorCode(rawValue: 1 << 0)
  /// The access was a write.
  public static let write = PageFaultErrorCode(rawValue: 1 << 1)
  /// The access was a user-mode access.
  public static let user = PageFaultErrorCode(rawValue: 1 << 2)
  /// A reserved bit is set in a paging-structure entry.
  public static let reserved = PageFaultErrorCode(rawValue: 1 << 3)
  /// The access was an instruction fetch.
  public static let fetch = PageFaultErrorCode(rawValue: 1 << 4)
  /// A protection key forbids the access.
  public static let protectionKey = PageFaultErrorCode(rawValue: 1 << 5)

  /// The names, for `description`.
  public static var names: [(bits: PageFaultErrorCode, name: String)] {
    [(.present, "P"), (.write, "W"), (.user, "U"), (.reserved, "RSVD"), (.fetch, "I"), (.protectionKey, "PK")]
  }
}
