import Accelerator
import CSoftCPU
import NativeProcess
import X86

@testable import SoftAccelerator

/// Selectors of Linux's GDT.
enum NativeSelector {
  static let code32: UInt16 = 0x23
  static let data: UInt16 = 0x2b
  static let code64: UInt16 = 0x33
}

/// A `Processor` in the place of a Linux process: ring 3, with the child's pages at the child's addresses.
final class SoftSide {
  let processor: Processor
  let mode: CodeMode
  private let memory: UnsafeMutableRawPointer
  private let physical = PhysicalMemory()
  private let flat: [soft_segment]

  // Guest-physical pages. Page tables: the root at 0, a directory pointer table and directory for each half.
  private static let codeTable = 0x5000
  private static let dataTable = 0x6000
  private static let kernelTable = 0x7000
  private static let descriptors = 0x8000
  private static let interrupts = 0x9000
  private static let stack = 0xa000
  private static let code = 0xb000
  private static let data = 0xd000
  private static let size = 0x10000
  /// No exception yet.
  private static let none: Int32 = -2
  /// The linear addresses of descriptor tables, the IDT and the kernel's stack: a page each.
  private static let kernel: UInt64 = 0xffff_8000_0000_0000
  /// Where exceptions that deliver themselves go, 16 bytes each; nothing is executed there.
  private static let handlers: UInt64 = kernel + 0x10000

  init(mode: CodeMode) {
    self.mode = mode
    memory = .allocate(byteCount: Self.size, alignment: 4096)
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: Self.size)
    physical.publish([
      PhysicalMemory.Slot(
        number: 0, start: 0, size: UInt64(Self.size), host: memory, isWritable: true, dirtyPages: nil)
    ])
    processor = Processor(memory: physical, features: ProcessorFeatures(leaves: SoftCPUID.leaves))
    let isLong = mode == .code64
    flat = (0..<6).map {
      $0 == SegmentIndex.cs
        ? soft_segment(
          flat: isLong ? NativeSelector.code64 : NativeSelector.code32, attributes: isLong ? 0xafb : 0xcfb)
        : soft_segment(flat: NativeSelector.data, attributes: 0xcf3)
    }
    (memory + Self.code).initializeMemory(
      as: UInt8.self, repeating: UInt8(NATIVE_FILLER), count: Int(NATIVE_CODE_SIZE))
    makePageTables()
    makeDescriptors()
    let cpu = processor.cpu
    // As Linux sets them: paging, alignment checks, write protection; PAE, FXSAVE, UMIP, FSGSBASE, XSAVE, SMEP, SMAP.
    cpu.pointee.cr0 = 0x8005_0033
    cpu.pointee.cr4 = 0x35_0ee0
    cpu.pointee.efer = 0xd01
    cpu.pointee.xcr0 = 7
    for index in 0..<6 { processor.segments[index] = flat[index] }
    processor.segments[SegmentIndex.ldtr] = soft_segment(null: 0)
    processor.flushTLB()
    processor.updateMode()
  }

  deinit { memory.deallocate() }

  private func put(_ value: UInt64, _ offset: Int) {
    memory.storeBytes(of: value, toByteOffset: offset, as: UInt64.self)
  }

  private func makePageTables() {
    put(0x1027, 0)
    put(0x2027, 0x1000)
    put(UInt64(Self.codeTable) | 0x27, 0x2000 + Int(NATIVE_CODE) >> 21 * 8)
    put(UInt64(Self.dataTable) | 0x27, 0x2000 + Int(NATIVE_DATA) >> 21 * 8)
    put(0x3027, 256 * 8)
    put(0x4027, 0x3000)
    put(UInt64(Self.kernelTable) | 0x27, 0x4000)
    let noExecution: UInt64 = 1 << 63
    for page in 0..<2 { put(UInt64(Self.code + page << 12) | 0x25, Self.codeTable + page * 8) }
    for page in 0..<3 {
      put(UInt64(Self.data + page << 12) | noExecution | (page < 2 ? 0x67 : 0x25), Self.dataTable + page * 8)
    }
    for (page, offset) in [Self.descriptors, Self.interrupts, Self.stack].enumerated() {
      put(UInt64(offset) | 0x63, Self.kernelTable + page * 8)
    }
  }

  /// The descriptors that Linux has, and gates for what user code may raise by itself.
  private func makeDescriptors() {
    let table: [UInt64] = [
      0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_fb00_0000_ffff,
      0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, 0, 0x0000_8b00_0000_0067, 0xffff_8000, 0, 0,
      0, 0, 0, 0x0040_f500_0000_0000,
    ]
    for (index, descriptor) in table.enumerated() { put(descriptor, Self.descriptors + index * 8) }
    let cpu = processor.cpu
    (cpu.pointee.gdt_base, cpu.pointee.gdt_limit) = (Self.kernel, 0x7f)
    (cpu.pointee.idt_base, cpu.pointee.idt_limit) = (Self.kernel + 0x1000, 0xfff)
    processor.segments[SegmentIndex.tr] = soft_segment(
      base: Self.kernel + 0x800, limit: 0x67, selector: 0x40, attributes: 0x8b)
    memory.storeBytes(of: Self.kernel + 0x3000, toByteOffset: Self.descriptors + 0x804, as: UInt64.self)
    // No permission bitmap.
    memory.storeBytes(of: 0x8000, toByteOffset: Self.descriptors + 0x866, as: UInt16.self)
    for vector in [3, 4] {
      let handler = Self.handlers + UInt64(vector * 16)
      put(
        handler & 0xffff | 0x10 << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48, Self.interrupts + vector * 16)
      put(handler >> 32, Self.interrupts + vector * 16 + 8)
    }
  }

  /// The data that cases start from.
  func setData(_ bytes: UnsafeRawPointer) {
    (memory + Self.data).copyMemory(from: bytes, byteCount: Int(NATIVE_DATA_SIZE))
  }

  // MARK: Execution

  /// Executes a case, and says how it ended as the native side does.
  func run(_ c: UnsafeMutablePointer<native_case>, before: UnsafePointer<UInt8>, _ result: inout native_result) {
    let cpu = processor.cpu
    load(&c.pointee.registers)
    let offset = Int(c.pointee.registers.rip &- UInt64(NATIVE_CODE))
    let length = min(Int(c.pointee.length), Int(NATIVE_CODE_SIZE) - offset)
    let code = memory + Self.code + offset
    code.copyMemory(from: native_code(c), byteCount: length)
    let start = cpu.pointee.rip
    var repetitions = c.pointee.repetitions
    result.vector = Self.none
    result.error = 0
    result.address = 0
    repeat {
      do throws(Interruption) {
        try processor.step()
        if cpu.pointee.cpl == 0 {
          returnFromHandler(&result)
        } else if processor.pendingDebug & 0x4000 != 0 {
          result.vector = 1
        }
        guard result.vector == 1, cpu.pointee.rip == start, repetitions > 0 else { continue }
        repetitions -= 1
        result.vector = Self.none
        processor.pendingDebug = 0
      } catch {
        switch error {
        case .exception(let vector): result.vector = Int32(vector.rawValue)
        case .fault(let vector, let code):
          result.vector = Int32(vector.rawValue)
          result.error = code
          if vector == .pageFault { result.address = processor.faultAddress }
        case .exit: result.vector = -1
        }
      }
    } while result.vector == Self.none
    store(&result.registers)
    code.initializeMemory(as: UInt8.self, repeating: UInt8(NATIVE_FILLER), count: length)
    noteChanges(before, &result)
  }

  /// Executes a case once more, as the run loop does: decoded into a block that a HLT ends. How it ended is told by
  /// where; false for what a block cannot repeat.
  func runAsBlock(
    _ c: UnsafeMutablePointer<native_case>, _ i: Instruction, before: UnsafePointer<UInt8>, expected: native_result,
    _ result: inout native_result
  ) -> Bool {
    let cpu = processor.cpu
    let start = c.pointee.registers.rip
    let end = expected.registers.rip
    switch i.operation.mnemonic {
    // What TF shows in, and what delivers itself.
    case .pushf, .popf, .iret, .int, .int3, .into: return false
    default: break
    }
    if i.isRepeated {
      let count = native_general(native_before(c))[1] & Processor.mask(i.addressSize)
      guard c.pointee.repetitions > 0, count <= 64 else { return false }
    }
    // After a load of SS it was the next instruction that ended the case.
    if expected.vector != 1, end != start { return false }
    // A branch into the instruction itself executes its bytes.
    if expected.vector == 1, end >= start, end < start &+ UInt64(i.length) { return false }
    load(&c.pointee.registers)
    cpu.pointee.other_flags &= ~RFLAGS.tf.rawValue
    let offset = Int(start &- UInt64(NATIVE_CODE))
    let length = min(Int(c.pointee.length), Int(NATIVE_CODE_SIZE) - offset)
    let code = memory + Self.code + offset
    code.copyMemory(from: native_code(c), byteCount: length)
    forgetCode()
    cpu.pointee.budget = 1
    result.vector = Self.none
    result.error = 0
    result.address = 0
    do throws(Interruption) {
      try processor.runBlocks()
      // Left before the end of the block: the instruction is done, or an iteration of it.
      for _ in 0..<100 where cpu.pointee.rip == start && end != start { try processor.step() }
    } catch {
      switch error {
      case .exception(let vector): result.vector = Int32(vector.rawValue)
      case .fault(let vector, let code):
        result.vector = Int32(vector.rawValue)
        result.error = code
        if vector == .pageFault { result.address = processor.faultAddress }
      case .exit: result.vector = -1
      }
    }
    // The HLT's own fault, or that of what a branch led to.
    if expected.vector == 1, cpu.pointee.rip != start || end == start { result.vector = 1 }
    cpu.pointee.budget = .max
    cpu.pointee.other_flags |= RFLAGS.tf.rawValue
    store(&result.registers)
    code.initializeMemory(as: UInt8.self, repeating: UInt8(NATIVE_FILLER), count: length)
    forgetCode()
    noteChanges(before, &result)
    return true
  }

  private func forgetCode() {
    let page = UInt(bitPattern: memory + Self.code)
    processor.forgetCode(page: page)
    processor.forgetCode(page: page + 0x1000)
  }

  private func noteChanges(_ before: UnsafePointer<UInt8>, _ result: inout native_result) {
    let data = (memory + Self.data).assumingMemoryBound(to: UInt8.self)
    native_changes(before, data, &result)
    if result.end > result.first {
      UnsafeMutableRawPointer(data + Int(result.first)).copyMemory(
        from: before + Int(result.first), byteCount: Int(result.end - result.first))
    }
  }

  private func load(_ from: inout native_registers) {
    let cpu = processor.cpu
    let general = native_general(&from)
    for index in 0..<16 { processor.general[index] = general[index] }
    cpu.pointee.rip = from.rip
    processor.rflags = from.flags | RFLAGS.tf.rawValue | RFLAGS.if.rawValue
    for index in 0..<6 { processor.segments[index] = flat[index] }
    processor.segments[SegmentIndex.fs].base = from.fs_base
    processor.segments[SegmentIndex.gs].base = from.gs_base
    cpu.pointee.interrupt_shadow = 0
    processor.pendingDebug = 0
    cpu.pointee.fpu_control = from.control
    cpu.pointee.fpu_status = from.status
    cpu.pointee.fpu_valid = UInt8(truncatingIfNeeded: from.valid)
    cpu.pointee.mxcsr = from.mxcsr
    (cpu.pointee.fpu_opcode, cpu.pointee.fpu_instruction, cpu.pointee.fpu_data) = (0, 0, 0)
    (cpu.pointee.fpu_code_segment, cpu.pointee.fpu_data_segment) = (0, 0)
    let top = Int(from.status >> 11 & 7)
    for index in 0..<8 { soft_st(cpu, top + index).copyMemory(from: native_stack(&from, index), byteCount: 10) }
    for index in 0..<16 { soft_vector(cpu, index).copyMemory(from: native_vector(&from, index), byteCount: 32) }
    processor.updateMode()
  }

  private func store(_ to: inout native_registers) {
    let cpu = processor.cpu
    let general = native_general(&to)
    for index in 0..<16 { general[index] = processor.general[index] }
    to.rip = cpu.pointee.rip
    to.flags = processor.rflags
    to.fs_base = processor.segments[SegmentIndex.fs].base
    to.gs_base = processor.segments[SegmentIndex.gs].base
    let selectors = native_selectors(&to)
    for index in 0..<6 { selectors[index] = processor.segments[index].selector }
    to.control = cpu.pointee.fpu_control
    to.status = cpu.pointee.fpu_status
    to.valid = UInt32(cpu.pointee.fpu_valid)
    to.mxcsr = cpu.pointee.mxcsr
    let top = processor.x87Top
    for index in 0..<8 {
      let register = UnsafeMutableRawPointer(native_stack(&to, index))
      register.copyMemory(from: soft_st(cpu, top + index), byteCount: 10)
    }
    for index in 0..<16 {
      UnsafeMutableRawPointer(native_vector(&to, index)).copyMemory(from: soft_vector(cpu, index), byteCount: 32)
    }
  }

  /// The kernel's view of an exception that has delivered itself: back to what its frame holds.
  private func returnFromHandler(_ result: inout native_result) {
    let cpu = processor.cpu
    result.vector = Int32(truncatingIfNeeded: (cpu.pointee.rip &- Self.handlers) >> 4)
    let frame = memory + Self.stack + 0x1000 - 40
    cpu.pointee.rip = frame.load(as: UInt64.self)
    processor.rflags = frame.load(fromByteOffset: 16, as: UInt64.self)
    processor.general[4] = frame.load(fromByteOffset: 24, as: UInt64.self)
    for index in [SegmentIndex.cs, SegmentIndex.ss] { processor.segments[index] = flat[index] }
    processor.updateMode()
  }
}
