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
  /// The host took only part of a list of model-specific registers.
  case modelSpecificRegister(index: UInt32, write: Bool)

  /// One line: what failed, why, what to do.
  public var description: String {
    switch self {
    case .missing(let engine, let path, let reason):
      "engine \(engine): cannot open \(path): \(reason); use --engine soft, or load the host's KVM module"
    case .noPermission(let path):
      "engine kvm: no permission to open \(path): join the group that owns it (usually kvm), or use --engine soft"
    case .interfaceVersion(let found, let wanted):
      "engine kvm: the kernel speaks KVM interface version \(found), this program version \(wanted)"
    case .unsupported(let engine, let what): "engine \(engine): this host lacks \(what)"
    case .call(let call, _, let reason): "\(call) failed: \(reason)"
    case .state(let error): "\(error)"
    case .badSlot(let number, let range): "memory slot \(number) at \(range) is not made of whole pages"
    case .modelSpecificRegister(let index, let write):
      "the host refused to \(write ? "set" : "read") MSR 0x\(String(index, radix: 16))"
    }
  }
}
