import Accelerator
import GuestMemory

/// x86-64 CPUs in software: needs nothing of the host, shows all of its state, and obeys read, write and execute rights
/// of every page.
public final class SoftAccelerator: Accelerator {
  /// `soft`.
  public let name = "soft"
  /// What the software CPUs can do, on every host.
  public var capabilities: AcceleratorCapabilities { isDeterministic ? Self.all : Self.all.union(.tscScaling) }

  private static let all: AcceleratorCapabilities = [
    .readOnlyMemory, .dirtyLog, .guestDebug, .watchpoints, .nativeRing0, .executePermission,
    .controllerRegisters, .instructionLimit, .readWatchpoints, .registerPinning, .memoryViews,
  ]

  private let isDeterministic: Bool
  private let counter: TimeSource

  /// The engine. A deterministic one's machines have virtual time, fixed random numbers and the same CPU on every host.
  ///
  /// With `hostCounterKilohertz`, the rate of the host's time-stamp counter, guests count that one, as KVM's do, and not
  /// nanoseconds.
  public init(isDeterministic: Bool = false, hostCounterKilohertz: UInt32? = nil) {
    self.isDeterministic = isDeterministic
    counter = hostCounterKilohertz.map { .hostCounter(kilohertz: $0) } ?? .monotonic
  }

  /// The leaves of the CPU that is implemented here.
  public func supportedCPUID() -> [CPUIDLeaf] { isDeterministic ? SoftCPUID.portableLeaves : SoftCPUID.leaves }

  /// A virtual machine without slots or vCPUs. Its interrupt controllers are in the VMM.
  public func makeVirtualMachine(
    memory: GuestMemory, interrupts: InterruptControllerModel
  ) throws(AcceleratorError) -> any VirtualMachine {
    guard interrupts == .userSpace else {
      throw .unsupported(engine: name, what: "interrupt controllers of its own")
    }
    guard !isDeterministic || SoftCPUID.hasPortableUnits else { throw .unsupported(engine: name, what: "SSE4.2") }
    return SoftVirtualMachine(memory: memory, time: isDeterministic ? SoftVirtualTime() : nil, counter: counter)
  }
}
