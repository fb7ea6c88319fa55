import MemoryViews
import StateTree

/// Decides what vCPUs may do with guest-physical memory, by views; loader hardening does. Everything but `attach` is
/// called on the thread of the vCPU in question, which does not run.
public protocol ViewSupervisor: AnyObject, Sendable {
  /// The port that guests call it through: 4-byte reads.
  var port: UInt16 { get }
  /// Takes over a machine; once, before any of its vCPUs runs.
  func attach(_ machine: any VirtualMachine, _ vcpus: [any VirtualCPU]) throws(AcceleratorError)
  /// The machine starts anew: nothing is registered any more. While no vCPU runs.
  func reset() throws(AcceleratorError)
  /// The views that vCPUs may be in.
  var memoryViews: [MemoryView] { get }
  /// A guest reads the port: arguments are in the vCPU's registers, the answer is what it reads.
  func call(_ vcpu: any VirtualCPU) throws(AcceleratorError) -> UInt32
  /// An access that the active view forbids. nil where the vCPU goes on, else why the machine stops.
  func violation(_ violation: ViewViolation, _ vcpu: any VirtualCPU) throws(AcceleratorError) -> String?
  /// An instruction that would change a pinned register. nil where the vCPU goes on, else why the machine stops.
  func pinned(_ register: PinnedRegister, value: UInt64, _ vcpu: any VirtualCPU) throws(AcceleratorError) -> String?
  /// The vCPU was kicked.
  func interrupted(_ vcpu: any VirtualCPU) throws(AcceleratorError)
  /// What the guest has made of it. While no vCPU runs.
  func save() -> StateNode
  /// Reads what `save` returned, a child of `node`, and returns what puts it in place: to be called before the vCPUs get
  /// their registers.
  func restore(_ node: StateNode) throws(StateError) -> @Sendable () throws(AcceleratorError) -> Void
}

/// A register, or a bit of one, that a guest can be kept from changing.
public enum PinnedRegister: String, Sendable, CaseIterable {
  /// Supervisor writes obey read-only pages.
  case writeProtect = "cr0.wp"
  /// The supervisor fetches nothing from user pages.
  case smep = "cr4.smep"
  /// The supervisor touches no data of user pages by chance.
  case smap = "cr4.smap"
  /// Pages can be non-executable.
  case noExecute = "efer.nxe"
  /// The interrupt descriptor table.
  case idtr
  /// The global descriptor table.
  case gdtr
}
