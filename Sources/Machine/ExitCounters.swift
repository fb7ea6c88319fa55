import Accelerator
import Synchronization

/// Why vCPUs left the guest, counted; read by reports while vCPUs run.
public final class ExitCounters: @unchecked Sendable {
  /// A reason, under the name that reports print.
  public enum Reason: Int, CaseIterable, Sendable {
    case portIn, portOut, memoryRead, memoryWrite, halt, kick, interruptWindow, instructionLimit, tripleFault
    case systemEvent, debug
    case emulationFailure, memoryFault, viewViolation, pinnedRegister, endOfInterrupt, dirtyRingFull, hypercall
    case entryFailure, internalError, unknown

    /// The reason of an exit.
    @inline(__always)
    init(_ exit: VCPUExit) {
      self =
        switch exit {
        case .portIO(let access): access.isWrite ? .portOut : .portIn
        case .memoryIO(let access): access.isWrite ? .memoryWrite : .memoryRead
        case .halt: .halt
        case .interrupted: .kick
        case .interruptWindow: .interruptWindow
        case .instructionLimit: .instructionLimit
        case .tripleFault: .tripleFault
        case .systemEvent: .systemEvent
        case .debug: .debug
        case .emulationFailure: .emulationFailure
        case .memoryFault: .memoryFault
        case .viewViolation: .viewViolation
        case .pinnedRegister: .pinnedRegister
        case .endOfInterrupt: .endOfInterrupt
        case .dirtyRingFull: .dirtyRingFull
        case .hypercall: .hypercall
        case .entryFailure: .entryFailure
        case .internalError: .internalError
        case .unknown: .unknown
        }
    }

    /// The name in reports and traces: `port-in`, `memory-read`, ...
    public var name: String {
      switch self {
      case .portIn: "port-in"
      case .portOut: "port-out"
      case .memoryRead: "memory-read"
      case .memoryWrite: "memory-write"
      case .halt: "halt"
      case .kick: "kick"
      case .interruptWindow: "interrupt-window"
      case .instructionLimit: "instruction-limit"
      case .tripleFault: "triple-fault"
      case .systemEvent: "system-event"
      case .debug: "debug"
      case .emulationFailure: "emulation-failure"
      case .memoryFault: "memory-fault"
      case .viewViolation: "view-violation"
      case .pinnedRegister: "pinned-register"
      case .endOfInterrupt: "end-of-interrupt"
      case .dirtyRingFull: "dirty-ring-full"
      case .hypercall: "hypercall"
      case .entryFailure: "entry-failure"
      case .internalError: "internal-error"
      case .unknown: "unknown"
      }
    }
  }

  private let counts: UnsafeMutablePointer<Atomic<UInt64>>

  /// All zero.
  public init() {
    counts = .allocate(capacity: Reason.allCases.count)
    for index in Reason.allCases.indices { (counts + index).initialize(to: Atomic(0)) }
  }

  deinit {
    counts.deinitialize(count: Reason.allCases.count)
    counts.deallocate()
  }

  /// Counts one exit; only the vCPU's own thread calls it, so no locked instruction is needed.
  @inline(__always)
  func count(_ reason: Reason) {
    let counter = counts + reason.rawValue
    counter.pointee.store(counter.pointee.load(ordering: .relaxed) &+ 1, ordering: .relaxed)
  }

  /// The count of a reason.
  public subscript(reason: Reason) -> UInt64 { counts[reason.rawValue].load(ordering: .relaxed) }

  /// All exits.
  public var total: UInt64 { Reason.allCases.reduce(0) { $0 + self[$1] } }
}
