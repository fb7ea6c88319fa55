import Accelerator
import GuestMemory

/// x86-64 CPUs in software: needs nothing of the host, shows all of its state, and obeys read, write and execute rights
/// of every page.
public final class SoftAccelerator: Accelerator {
  /// `soft`.
  public let name = "soft"
  /// What the software CPUs can do, on every host.
  public let capabilities: AcceleratorCapabilities = [
    .readOnlyMemory, .dirtyLog, .guestDebug, .watchpoints, .nativeRing0, .executePermission,
    .controllerRegisters,
  ]

  /// The engine; it has no state of its own.
  public init() {}

  /// The leaves of the CPU that is implemented here.
  public func supportedCPUID() -> [CPUIDLeaf] { SoftCPUID.leaves }

  /// A virtual machine without slots or vCPUs. Its interrupt controllers are in the VMM.
  public func makeVirtualMachine(
    memory: GuestMemory, interrupts: InterruptControllerModel
  ) throws(AcceleratorError) -> any VirtualMachine {
    guard interrupts == .userSpace else {
      throw .unsupported(engine: name, what: "interrupt controllers of its own")
    }
    return SoftVirtualMachine(memory: memory)
  }
}
