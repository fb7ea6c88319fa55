import Accelerator
import CSoftCPU
import X86

// Placeholders while the files that replace them are being written.
extension Processor {
  func executeSystem(_ i: Instruction) throws(Interruption) { throw .invalidOpcode }
  var watchesData: Bool { false }
  func noteDataAccess(_ linear: UInt64, count: Int, isWrite: Bool) {}
  func holdsCode(_ host: UnsafeMutableRawPointer) -> Bool { false }
  func memoryWritten(_ host: UnsafeMutableRawPointer, count: Int) {}
  func reset() {}
}
