import Accelerator
import CSoftCPU
import X86

@testable import SoftAccelerator

/// A processor over a megabyte of memory at address 0, in 64-bit mode without paging (which no real one has): for
/// instructions alone.
final class TestCPU {
  let memory: UnsafeMutableRawPointer
  let physical = PhysicalMemory()
  let processor: Processor
  static let size = 1 << 20

  init(code: [UInt8], at address: UInt64 = 0x1000) {
    memory = .allocate(byteCount: Self.size, alignment: 4096)
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: Self.size)
    memory.advanced(by: Int(address)).copyMemory(from: code, byteCount: code.count)
    physical.publish([
      PhysicalMemory.Slot(
        number: 0, start: 0, size: UInt64(Self.size), host: memory, isWritable: true, dirtyPages: nil)
    ])
    processor = Processor(memory: physical, features: ProcessorFeatures(leaves: SoftCPUID.leaves))
    processor.cpu.pointee.cr0 = 0x11
    processor.cpu.pointee.code_mode = CodeMode.code64.rawValue
    processor.cpu.pointee.rip = address
    processor.cpu.pointee.other_flags = 2
    processor.general[4] = 0x8000
    processor.updateContext()
  }

  deinit {
    memory.deallocate()
  }
}
