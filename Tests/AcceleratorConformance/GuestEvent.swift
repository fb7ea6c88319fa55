import Accelerator
import GuestMemory

/// What left the guest, as a value to compare. Its data is copied out of the exit.
enum GuestEvent: Equatable {
  case output(port: UInt16, size: UInt8, [UInt8])
  case input(port: UInt16, size: UInt8, count: UInt32)
  case store(UInt64, [UInt8])
  case load(UInt64, size: UInt8)
  case halt
  case interrupted
  case interruptWindow
  case instructionLimit
  case tripleFault
  case debug(address: UInt64, status: UInt64)
  case cannotExecute([UInt8])
  case memoryFault(UInt64)
  case endOfInterrupt(UInt8)
  case dirtyRingFull
  case other(String)

  /// The end of a guest (`END` in guest.h).
  static let done = GuestEvent.said(0x99)
  static let ready = GuestEvent.said(0x90)
  static let handled = GuestEvent.said(0x91)
  /// A byte to a port; which one does not matter.
  static func said(_ port: UInt16) -> GuestEvent { .output(port: port, size: 1, []) }

  /// The event of an exit; a read gets `answer`.
  init(_ exit: VCPUExit, answer: [UInt8]) {
    switch exit {
    case .portIO(let access):
      let count = Int(access.count) * Int(access.size)
      guard access.isWrite else {
        answer.withUnsafeBytes { access.data.copyMemory(from: $0.baseAddress!, byteCount: min($0.count, count)) }
        self = .input(port: access.port, size: access.size, count: access.count)
        return
      }
      let bytes = Array(UnsafeRawBufferPointer(start: access.data, count: count))
      self = .output(port: access.port, size: access.size, (0x90...0x99).contains(access.port) ? [] : bytes)
      if access.port == 0x98 { self = .other("exception \(bytes[0]) in the guest") }
    case .memoryIO(let access):
      let count = Int(access.size)
      guard access.isWrite else {
        answer.withUnsafeBytes { access.data.copyMemory(from: $0.baseAddress!, byteCount: min($0.count, count)) }
        self = .load(access.address.rawValue, size: access.size)
        return
      }
      self = .store(access.address.rawValue, Array(UnsafeRawBufferPointer(start: access.data, count: count)))
    case .halt: self = .halt
    case .interrupted: self = .interrupted
    case .interruptWindow: self = .interruptWindow
    case .instructionLimit: self = .instructionLimit
    case .tripleFault: self = .tripleFault
    case .debug(let event): self = .debug(address: event.address, status: event.status)
    case .emulationFailure(let bytes): self = .cannotExecute(bytes.array)
    case .memoryFault(let address, _, _): self = .memoryFault(address.rawValue)
    case .endOfInterrupt(let vector): self = .endOfInterrupt(vector)
    case .dirtyRingFull: self = .dirtyRingFull
    case .systemEvent, .hypercall, .viewViolation, .pinnedRegister, .entryFailure, .internalError, .unknown:
      self = .other("\(exit)")
    }
  }
}
