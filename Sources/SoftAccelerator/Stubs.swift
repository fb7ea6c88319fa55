import Accelerator
import CSoftCPU
import X86

// Placeholders while the files that replace them are being written.
extension Processor {
  func executeSystem(_ i: Instruction) throws(Interruption) { throw .invalidOpcode }
  var watchesData: Bool { false }
  func noteDataAccess(_ linear: UInt64, count: Int, isWrite: Bool) {}
  func deliver(_ interruption: Interruption) -> PendingExit? { .tripleFault }
  func deliverNMI() -> PendingExit? { nil }
  func deliverInterrupt(_ vector: UInt8) -> PendingExit? { nil }
  func reset() {}
}

enum SoftCPUID { static let leaves: [CPUIDLeaf] = [] }
extension ProcessorFeatures {
  init(leaves: [CPUIDLeaf]) {
    self.init(leaves: leaves, instructions: ~0, physicalAddressBits: 40, hasGigabytePages: true)
  }
}
extension Processor {
  var state: VCPUState { VCPUState() }
  func setState(_ state: VCPUState) throws(AcceleratorError) {}
  var generalRegisters: GeneralRegisters {
    get { GeneralRegisters() }
    set {}
  }
  var systemRegisters: SystemRegisters {
    get { SystemRegisters() }
    set {}
  }
  func translate(_ linear: UInt64) -> UInt64? { nil }
}
