import GuestMemory

/// Executes single instructions that an accelerator cannot; the software CPU does.
public protocol InstructionAssist: Sendable {
  /// Tells what the machine's vCPUs find in guest-physical memory; once, before any of them runs.
  func attach(_ memory: GuestMemory, slots: [MemorySlot]) throws(AcceleratorError)
  /// Executes the instruction at the vCPU's RIP on its state, which is as before the instruction.
  ///
  /// - Parameters:
  ///   - vcpu: a vCPU that does not run.
  ///   - handle: answers the accesses to devices that the instruction makes.
  /// - Throws: what the vCPU, or `handle`, throws.
  /// - Returns: false where it cannot be executed here either; nothing has changed then.
  func execute(
    _ vcpu: any VirtualCPU, handle: (VCPUExit) throws(AcceleratorError) -> Void
  ) throws(AcceleratorError) -> Bool
  /// Pages of a slot that instructions executed here have written since the last call, as `VirtualMachine.takeDirtyLog` tells
  /// them; nil where none was executed yet.
  func takeDirtyLog(slot: UInt32) throws(AcceleratorError) -> [UInt64]?
}
