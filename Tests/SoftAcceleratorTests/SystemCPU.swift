import CSoftCPU
import X86

@testable import SoftAccelerator

/// A processor over two megabytes with the tables that system software makes: a GDT at 0x800, an IDT at 0x2000, a TSS
/// at 0x3000, page tables at 0x10000. Code is at 0x1000, handlers at 0x4000 + 16 * vector: a HLT each.
final class SystemCPU {
  let memory: UnsafeMutableRawPointer
  let processor: Processor
  private let physical = PhysicalMemory()
  static let size = 2 << 20

  enum Mode {
    case real
    case protected
    case long
  }

  // Selectors of the GDT.
  static let code0: UInt16 = 0x08
  static let data0: UInt16 = 0x10
  static let code3: UInt16 = 0x1b
  static let data3: UInt16 = 0x23
  static let task: UInt16 = 0x28
  /// For the tests themselves; 0x30 is the upper half of the TSS in long mode.
  static let own: UInt16 = 0x38

  static let idt: UInt64 = 0x2000
  static let tss: UInt64 = 0x3000
  static let stack0: UInt64 = 0x9000
  static let stack3: UInt64 = 0x8000

  init(_ mode: Mode, code: [UInt8] = [], ring: UInt8 = 0) {
    memory = .allocate(byteCount: Self.size, alignment: 4096)
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: Self.size)
    physical.publish([
      PhysicalMemory.Slot(
        number: 0, start: 0, size: UInt64(Self.size), host: memory, isWritable: true, dirtyPages: nil)
    ])
    processor = Processor(memory: physical, features: ProcessorFeatures(leaves: SoftCPUID.leaves))
    put(code, at: 0x1000)
    for vector in 0..<256 as Range<UInt64> {
      memory.storeBytes(of: 0xf4, toByteOffset: Int(0x4000 + vector * 16), as: UInt8.self)
    }
    cpu.pointee.rip = 0x1000
    switch mode {
    case .real:
      processor.loadRealSegment(SegmentIndex.cs, 0)
      processor.general[4] = 0x8000
      cpu.pointee.idt_limit = 0x3ff
      for vector in 0..<256 as Range<UInt64> { put(UInt32(0x4000 + vector * 16), at: vector * 4) }
    case .protected, .long:
      makeTables(isLong: mode == .long)
      if mode == .long { makePageTables() }
      cpu.pointee.cr0 = mode == .long ? 0x8001_0011 : 0x11
      cpu.pointee.cr4 = mode == .long ? CR4.pae.rawValue : 0
      cpu.pointee.cr3 = 0x10000
      cpu.pointee.efer = mode == .long ? 0xd01 : 0
      let user = UInt16(ring) * 0x20
      let code: UInt16 = mode == .long ? 0xa9b : 0xc9b
      processor.segments[SegmentIndex.cs] = soft_segment(
        flat: ring == 0 ? Self.code0 : Self.code3, attributes: code | user)
      for index in [0, 2, 3, 4, 5] {
        processor.segments[index] = soft_segment(flat: ring == 0 ? Self.data0 : Self.data3, attributes: 0xc93 | user)
      }
      processor.segments[SegmentIndex.tr] = soft_segment(
        base: Self.tss, limit: 0x7f, selector: Self.task, attributes: 0x8b)
      processor.general[4] = ring == 0 ? Self.stack0 : Self.stack3
      processor.updateMode()
      processor.flushTLB()
    }
  }

  deinit {
    memory.deallocate()
  }

  var cpu: UnsafeMutablePointer<soft_cpu> { processor.cpu }

  // MARK: Memory

  func put(_ bytes: [UInt8], at address: UInt64) {
    (memory + Int(address)).copyMemory(from: bytes, byteCount: bytes.count)
  }
  func put<T: FixedWidthInteger>(_ value: T, at address: UInt64) {
    memory.storeBytes(of: value, toByteOffset: Int(address), as: T.self)
  }
  func get<T: FixedWidthInteger>(_ address: UInt64, as type: T.Type) -> T {
    memory.loadUnaligned(fromByteOffset: Int(address), as: T.self)
  }
  /// The topmost values of the stack, `T` each.
  func stack<T: FixedWidthInteger>(_ count: Int, as type: T.Type) -> [UInt64] {
    let base = cpu.pointee.code_mode == 0 ? processor.segments[SegmentIndex.ss].base : 0
    return (0..<count).map {
      UInt64(truncatingIfNeeded: get(base + processor.general[4] + UInt64($0 * MemoryLayout<T>.size), as: T.self))
    }
  }

  // MARK: Tables

  private func makeTables(isLong: Bool) {
    let code: UInt64 = isLong ? 0x00af_9b00_0000_ffff : 0x00cf_9b00_0000_ffff
    let data: UInt64 = 0x00cf_9300_0000_ffff
    put(code, at: 0x808)
    put(data, at: 0x810)
    put(code | 3 << 45, at: 0x818)
    put(data | 3 << 45, at: 0x820)
    put(SegmentDescriptor(base: UInt32(Self.tss), limit: 0x7f, attributes: 0x8b).rawValue, at: 0x828)
    cpu.pointee.gdt_base = 0x800
    cpu.pointee.gdt_limit = 0x7f
    cpu.pointee.idt_base = Self.idt
    cpu.pointee.idt_limit = isLong ? 0xfff : 0x7ff
    for vector in 0..<256 as Range<UInt64> { setGate(vector, isLong: isLong) }
    if isLong {
      put(Self.stack0, at: Self.tss + 4)
    } else {
      put(UInt32(Self.stack0), at: Self.tss + 4)
      put(UInt32(Self.data0), at: Self.tss + 8)
    }
  }

  /// An interrupt gate to the vector's handler.
  func setGate(_ vector: UInt64, isLong: Bool, attributes: UInt64 = 0x8e, stack: UInt64 = 0) {
    let low = (0x4000 + vector * 16) | UInt64(Self.code0) << 16 | attributes << 40 | stack << 32
    put(low, at: Self.idt + vector * (isLong ? 16 : 8))
  }

  func setDescriptor(_ selector: UInt16, _ value: UInt64) { put(value, at: 0x800 + UInt64(selector & ~7)) }

  /// The first 2 MiB in 4 KiB pages, mapped to themselves for all.
  private func makePageTables() {
    put(0x11007 as UInt64, at: 0x10000)
    put(0x12007 as UInt64, at: 0x11000)
    put(0x13007 as UInt64, at: 0x12000)
    for page in 0..<512 as Range<UInt64> { put(page << 12 | 7, at: 0x13000 + page * 8) }
  }

  /// Runs until HLT; true where it came to one.
  func runToHalt() -> Bool {
    if case .halt = processor.run() { return true }
    return false
  }

  /// The vector whose handler the CPU halted in.
  var vector: UInt64? {
    let rip = cpu.pointee.rip &- 1
    return rip >= 0x4000 && rip < 0x5000 && rip & 15 == 0 ? (rip - 0x4000) >> 4 : nil
  }
}
