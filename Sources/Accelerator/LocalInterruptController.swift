/// The local APIC of one vCPU, where it lives in the VMM (Intel SDM vol. 3, chapter 11).
///
/// Registers belong to the vCPU's thread; `hasInterrupt` may be asked by any. Other vCPUs and devices post to it meanwhile.
public protocol LocalInterruptController: AnyObject, Sendable {
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
  /// Whether INTR would be delivered now: a request above the processor priority, or the PIC's where LINT0 takes it.
  /// An atomic read.
  var hasInterrupt: Bool { get }
  /// The processor's acknowledge cycle: the vector, now in service (the PIC's own for an ExtINT); nil where there is none.
  func acknowledgeInterrupt() -> UInt8?
}

extension VirtualCPU {
  /// Nothing: the VMM answers the APIC's page and injects interrupts itself, as KVM wants it.
  public func attach(_ controller: any LocalInterruptController) throws(AcceleratorError) {}
}
