import Accelerator
import CSoftCPU
import Glibc
import NativeRunner
import Testing
import X86

@testable import SoftAccelerator

/// Tests against the physical CPU: one at a time, for they share an address.
@Suite(.serialized)
enum NativeTests {}

/// A reproducible source of random numbers (SplitMix64).
struct Generator: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
    return z ^ z >> 31
  }
}

/// Executes instructions on the physical CPU and on a `Processor`, from the same state in the same memory.
///
/// The memory is mapped where its guest-physical, linear and host addresses are the same, so addresses in registers
/// are too. The state travels as an image of XSAVE in the standard format.
final class NativeOracle {
  static let memoryAddress: UInt64 = 0x1000_0000
  static let memorySize = 0x4000
  static let alwaysOn: UInt64 = RFLAGS.alwaysSet.rawValue | RFLAGS.if.rawValue

  let processor: Processor
  let memory: UnsafeMutableRawPointer
  let native: UnsafeMutablePointer<native_state>
  /// Where the next block goes in the last page of memory.
  private var codePosition = 0

  /// nil, with the reason printed, where the host cannot tell.
  init?() {
    guard native_components() & 3 == 3 else {
      print("skipped: the host has no XSAVE")
      return nil
    }
    let mapped = mmap(
      UnsafeMutableRawPointer(bitPattern: UInt(Self.memoryAddress)), Self.memorySize, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | Int32(MAP_FIXED), -1, 0)
    guard let mapped, mapped != MAP_FAILED else {
      print("skipped: no memory at 0x10000000")
      return nil
    }
    memory = mapped
    native = UnsafeMutableRawPointer.allocate(byteCount: MemoryLayout<native_state>.size, alignment: 64)
      .bindMemory(to: native_state.self, capacity: 1)
    let physical = PhysicalMemory()
    physical.publish([
      PhysicalMemory.Slot(
        number: 0, start: Self.memoryAddress, size: UInt64(Self.memorySize), host: mapped, isWritable: true,
        dirtyPages: nil)
    ])
    processor = Processor(
      memory: physical,
      features: ProcessorFeatures(leaves: Self.everything))
    let cpu = processor.cpu
    cpu.pointee.cr0 = CR0([.pe, .mp, .ne, .et]).rawValue
    cpu.pointee.cr4 = CR4([.osfxsr, .osxmmexcpt, .osxsave]).rawValue
    cpu.pointee.xcr0 = UInt64(native_components())
    cpu.pointee.efer = EFER.lma.rawValue
    cpu.pointee.code_mode = CodeMode.code64.rawValue
    cpu.pointee.cpl = 3
    processor.updateContext()
  }

  /// Every feature there is.
  private static let everything: [CPUIDLeaf] = [
    CPUIDLeaf(function: 1, eax: 0, ebx: 0, ecx: ~0, edx: ~0),
    CPUIDLeaf(function: 7, index: 0, hasIndex: true, ebx: ~0, ecx: ~0, edx: ~0),
    CPUIDLeaf(function: 0xd, index: 0, hasIndex: true, eax: 7),
    CPUIDLeaf(function: 0xd, index: 1, hasIndex: true, eax: ~0),
  ]

  deinit {
    native.deallocate()
  }

  /// The state that both start from and end in.
  struct State: Equatable {
    var general = [UInt64](repeating: 0, count: 16)
    var flags: UInt64 = 0
    var control: UInt16 = 0x37f
    var status: UInt16 = 0
    var valid: UInt8 = 0
    /// ST(0) to ST(7), 10 bytes each.
    var stack = [[UInt8]](repeating: [UInt8](repeating: 0, count: 10), count: 8)
    var mxcsr: UInt32 = 0x1f80
    /// YMM0 to YMM15.
    var vectors = [[UInt8]](repeating: [UInt8](repeating: 0, count: 32), count: 16)
    var memory: [UInt8] = []
    /// The exception, -1: none.
    var vector = -1

    /// What differs, for a failed test.
    func difference(from other: State) -> String {
      var text = ""
      for index in 0..<16 where general[index] != other.general[index] {
        text += " r\(index) \(hex(general[index])) native \(hex(other.general[index]))"
      }
      if flags != other.flags { text += " flags \(hex(flags)) native \(hex(other.flags))" }
      if control != other.control { text += " fcw \(hex(control)) native \(hex(other.control))" }
      if status != other.status { text += " fsw \(hex(status)) native \(hex(other.status))" }
      if valid != other.valid { text += " ftw \(hex(valid)) native \(hex(other.valid))" }
      if mxcsr != other.mxcsr { text += " mxcsr \(hex(mxcsr)) native \(hex(other.mxcsr))" }
      for index in 0..<8 where stack[index] != other.stack[index] {
        text += " st\(index) \(hex(stack[index])) native \(hex(other.stack[index]))"
      }
      for index in 0..<16 where vectors[index] != other.vectors[index] {
        text += " ymm\(index) \(hex(vectors[index])) native \(hex(other.vectors[index]))"
      }
      if vector != other.vector { text += " exception \(vector) native \(other.vector)" }
      if memory != other.memory, let at = memory.indices.first(where: { memory[$0] != other.memory[$0] }) {
        text += " memory from +\(at)"
      }
      return text
    }

    private func hex(_ value: some FixedWidthInteger) -> String { String(value, radix: 16) }
    private func hex(_ bytes: [UInt8]) -> String {
      bytes.reversed().map { String(UInt16($0) + 256, radix: 16).dropFirst() }.joined()
    }
  }

  /// Executes on the physical CPU.
  func runNative(_ bytes: [UInt8], _ state: State) -> State {
    write(state.memory)
    let general = native_general(native)
    for index in 0..<16 { general[index] = state.general[index] }
    native.pointee.flags = state.flags | Self.alwaysOn
    let area = UnsafeMutableRawPointer(native_area(native))
    area.initializeMemory(as: UInt8.self, repeating: 0, count: 1024)
    area.storeBytes(of: state.control, as: UInt16.self)
    area.storeBytes(of: state.status, toByteOffset: 2, as: UInt16.self)
    area.storeBytes(of: state.valid, toByteOffset: 4, as: UInt8.self)
    area.storeBytes(of: state.mxcsr, toByteOffset: 24, as: UInt32.self)
    area.storeBytes(of: UInt64(native_components()), toByteOffset: 512, as: UInt64.self)
    for index in 0..<8 { (area + 32 + index * 16).copyMemory(from: state.stack[index], byteCount: 10) }
    for index in 0..<16 {
      state.vectors[index].withUnsafeBytes {
        guard let source = $0.baseAddress else { return }
        (area + 160 + index * 16).copyMemory(from: source, byteCount: 16)
        (area + 576 + index * 16).copyMemory(from: source + 16, byteCount: 16)
      }
    }
    var result = State()
    result.vector = Int(native_run(native, bytes, bytes.count))
    result.general = (0..<16).map { $0 == 4 ? state.general[4] : general[$0] }
    result.flags = native.pointee.flags & RFLAGS.status.rawValue
    result.control = area.load(as: UInt16.self)
    result.status = area.load(fromByteOffset: 2, as: UInt16.self)
    result.valid = area.load(fromByteOffset: 4, as: UInt8.self)
    result.mxcsr = area.load(fromByteOffset: 24, as: UInt32.self)
    let present = area.load(fromByteOffset: 512, as: UInt64.self)
    func saved(_ offset: Int, _ count: Int) -> [UInt8] {
      (0..<count).map { area.load(fromByteOffset: offset + $0, as: UInt8.self) }
    }
    result.stack = (0..<8).map { saved(32 + $0 * 16, 10) }
    let zero = [UInt8](repeating: 0, count: 16)
    result.vectors = (0..<16).map {
      saved(160 + $0 * 16, 16) + (present & 4 != 0 ? saved(576 + $0 * 16, 16) : zero)
    }
    result.memory = readMemory(state.memory.count)
    return result
  }

  /// Executes on the software CPU.
  func runSoft(_ instruction: Instruction, _ state: State) -> State {
    run(state, at: 0x1000) { processor throws(Interruption) in try processor.execute(instruction) }
  }

  /// Executes on the software CPU in a block, as its fast operation where it has one; HLT follows, a #GP in ring 3.
  func runBlock(_ bytes: [UInt8], _ state: State) -> State {
    if codePosition > 0xfe0 {
      processor.forgetAllCode()
      codePosition = 0
    }
    let ip = Self.memoryAddress + 0x3000 + UInt64(codePosition)
    (memory + 0x3000 + codePosition).copyMemory(from: bytes + [0xf4], byteCount: bytes.count + 1)
    codePosition += bytes.count + 1
    var result = run(state, at: ip) { processor throws(Interruption) in
      processor.cpu.pointee.budget = 1000
      while true { try processor.runBlocks() }
    }
    if processor.cpu.pointee.rip != ip { result.vector = -1 }
    return result
  }

  private func run(
    _ state: State, at ip: UInt64, _ body: (Processor) throws(Interruption) -> Void
  ) -> State {
    write(state.memory)
    let cpu = processor.cpu
    for index in 0..<16 { processor.general[index] = state.general[index] }
    processor.rflags = state.flags | Self.alwaysOn
    cpu.pointee.rip = ip
    cpu.pointee.fpu_control = state.control
    cpu.pointee.fpu_status = state.status
    cpu.pointee.fpu_valid = state.valid
    cpu.pointee.mxcsr = state.mxcsr
    (cpu.pointee.fpu_opcode, cpu.pointee.fpu_instruction, cpu.pointee.fpu_data) = (0, 0, 0)
    for index in 0..<8 {
      soft_st(cpu, processor.x87Top + index).copyMemory(from: state.stack[index], byteCount: 10)
    }
    for index in 0..<16 { soft_vector(cpu, index).copyMemory(from: state.vectors[index], byteCount: 32) }
    var result = State()
    do throws(Interruption) {
      try body(processor)
    } catch {
      switch error {
      case .exception(let vector), .fault(let vector, _): result.vector = Int(vector.rawValue)
      case .exit: result.vector = -2
      }
    }
    result.general = (0..<16).map { processor.general[$0] }
    result.flags = processor.statusFlags
    result.control = cpu.pointee.fpu_control
    result.status = cpu.pointee.fpu_status
    result.valid = cpu.pointee.fpu_valid
    result.mxcsr = cpu.pointee.mxcsr
    func bytes(_ pointer: UnsafeRawPointer, _ count: Int) -> [UInt8] {
      (0..<count).map { pointer.load(fromByteOffset: $0, as: UInt8.self) }
    }
    result.stack = (0..<8).map { bytes(soft_st(cpu, processor.x87Top + $0), 10) }
    result.vectors = (0..<16).map { bytes(soft_vector(cpu, $0), 32) }
    result.memory = readMemory(state.memory.count)
    return result
  }

  private func write(_ bytes: [UInt8]) { memory.copyMemory(from: bytes, byteCount: bytes.count) }

  private func readMemory(_ count: Int) -> [UInt8] {
    [UInt8](UnsafeRawBufferPointer(start: memory, count: count))
  }
}
