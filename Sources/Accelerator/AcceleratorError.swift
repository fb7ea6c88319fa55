import GuestMemory
import StateTree

/// Why an accelerator could not do what it was asked.
public enum AcceleratorError: Error, Equatable, CustomStringConvertible {
  /// The accelerator does not exist on this host.
  case missing(engine: String, path: String, reason: String)
  /// The user may not use it.
  case noPermission(path: String)
  /// The host's interface is not the one this program speaks.
  case interfaceVersion(found: Int32, wanted: Int32)
  /// The host cannot do what is needed.
  case unsupported(engine: String, what: String)
  /// A call to the host failed.
  case call(String, errno: Int32, reason: String)
  /// A state does not fit the accelerator.
  case state(StateError)
  /// A memory slot is not made of whole pages of guest RAM.
  case badSlot(number: UInt32, range: GuestRange)
  /// A memory slot's number is beyond the host's last one.
  case slotNumber(UInt32, limit: Int)
  /// No memory slot has this number.
  case unknownSlot(UInt32)
  /// The machine has no memory view with this number.
  case unknownView(UInt32)
  /// A breakpoint watches a number of bytes that the processor cannot.
  case breakpointLength(address: UInt64, length: UInt8)
  /// More breakpoints than the processor has registers for.
  case breakpointCount(Int, limit: Int)
  /// The host took only part of a list of model-specific registers.
  case modelSpecificRegister(index: UInt32, write: Bool)
  /// The host's time-stamp counter cannot be set, and is behind that of the machine.
  case counterBehind(saved: UInt64, here: UInt64)

  /// One line: what failed, why, what to do.
  public var description: String {
    switch self {
    case .missing(let engine, let path, let reason):
      "engine \(engine): cannot open \(path): \(reason); load the host's kvm_intel or kvm_amd module"
    case .noPermission(let path):
      "engine kvm: no permission to open \(path): join the group that owns it (usually kvm)"
    case .interfaceVersion(let found, let wanted):
      "engine kvm: the kernel speaks KVM interface version \(found), this program version \(wanted)"
    case .unsupported(let engine, let what): "engine \(engine): this host lacks \(what)"
    case .call(let call, _, let reason): "\(call) failed: \(reason)"
    case .state(let error): "\(error)"
    case .badSlot(let number, let range): "memory slot \(number) at \(range) is not made of whole pages"
    case .slotNumber(let number, let limit): "memory slot \(number) is beyond the \(limit) slots of this host"
    case .unknownSlot(let number): "there is no memory slot \(number)"
    case .unknownView(let number): "memory view \(number) is not one of this machine"
    case .breakpointLength(let address, let length):
      "a breakpoint at 0x\(String(address, radix: 16)) cannot cover \(length) bytes: 1, 2, 4 or 8, and 1 to execute"
    case .breakpointCount(let count, let limit): "\(count) hardware breakpoints; the processor has \(limit)"
    case .counterBehind(let saved, let here):
      "the machine's time-stamp counter is at \(saved), and this host's, which its KVM cannot set, at \(here): "
        + "time would go backwards in the guest; use another host, or --engine soft"
    case .modelSpecificRegister(let index, let write):
      "the host refused to \(write ? "set" : "read") MSR 0x\(String(index, radix: 16))"
    }
  }
}
