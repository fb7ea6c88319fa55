/// What drives a vCPU's INTR pin, where that is in the VMM.
public protocol InterruptSource: AnyObject, Sendable {
  /// Whether INTR would be delivered now; an atomic read. It may be true in vain: `acknowledgeInterrupt` says for certain.
  var hasInterrupt: Bool { get }
  /// The processor's acknowledge cycle: the vector, now in service; nil where there is none.
  func acknowledgeInterrupt() -> UInt8?
}

/// The local APIC of one vCPU, where it lives in the VMM (Intel SDM vol. 3, chapter 11).
///
/// The vCPU's thread calls it; `hasInterrupt` may be asked by any. Other vCPUs and devices post to it meanwhile, and kick
/// the vCPU when `hasInterrupt` has become true.
public protocol LocalInterruptController: InterruptSource {
  /// Reads the 4-byte register at `offset`, a multiple of 16, of the xAPIC page (table 11-1); 0 for reserved ones.
  func read(register offset: UInt16) -> UInt32
  /// Writes the 4-byte register at `offset`, a multiple of 16, of the xAPIC page.
  func write(register offset: UInt16, value: UInt32)
  /// Reads IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0) or an x2APIC register (0x800-0x8ff); nil means #GP.
  func readMSR(_ index: UInt32) -> UInt64?
  /// Writes one of the registers that `readMSR` reads; false means #GP, and nothing has changed.
  func writeMSR(_ index: UInt32, value: UInt64) -> Bool
  /// The task priority class, 0-15: CR8.
  var taskPriority: UInt8 { get set }
}

// What a vCPU needs of these depends on where its accelerator has the interrupt controllers.
extension VirtualCPU {
  /// Nothing: this accelerator's vCPUs have their own local APICs.
  public func attach(_ controller: any LocalInterruptController) throws(AcceleratorError) {}
  /// Nothing: this accelerator has the PIC, too.
  public func attach(external source: any InterruptSource) throws(AcceleratorError) {}
  /// nil: a local APIC of the VMM has no TSC deadline here.
  public func nanoseconds(untilTimestamp ticks: UInt64) -> UInt64? { nil }
}
