import Accelerator
import CSoftCPU
import X86

// Placeholders while the files that replace them are being written.
extension Processor {
  func executeX87(_ i: Instruction) throws(Interruption) { throw .invalidOpcode }
  func executeVector(_ i: Instruction) throws(Interruption) -> Bool { false }
  func runBlocks() throws(Interruption) { try step() }
  func forgetCode(page: UInt) {}
  func holdsCode(_ host: UnsafeMutableRawPointer) -> Bool { false }
  func memoryWritten(_ host: UnsafeMutableRawPointer, count: Int) {}
}
