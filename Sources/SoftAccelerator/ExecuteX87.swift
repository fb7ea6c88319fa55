import CSoftCPU
import X86

/// The x87 unit (SDM vol. 1, chapter 8). Arithmetic, the stack, its faults and the responses to unmasked exceptions are
/// the host's own: it executes the instruction on the whole x87 state. Results of transcendental functions therefore are
/// the host's, to the last bit. The words, the pointers and the images in memory are here.
///
/// Selectors are not kept beside the pointers, as CPUID says (leaf 7, FCS and FDS deprecated).
/// A pending error is always #MF: CR0.NE=0 reports it so too, as under KVM; there is no FERR# and no IRQ 13.
extension Processor {
  /// Executes an instruction with an opcode of D8 to DF, or FWAIT.
  func executeX87(_ i: Instruction) throws(Interruption) {
    let cr0 = CR0(rawValue: cpu.pointee.cr0)
    if i.opcode == 0x9b {
      if cr0.isSuperset(of: [.mp, .ts]) { throw .exception(.deviceNotAvailable) }
      return try checkPendingX87()
    }
    if !cr0.isDisjoint(with: [.em, .ts]) { throw .exception(.deviceNotAvailable) }
    switch i.operation.mnemonic {
    case .fninit: initializeX87()
    case .fnclex: cpu.pointee.fpu_status &= X87Status.condition.union(.top).rawValue
    // What the 8087 and the 80287 had to be told.
    case .fneni, .fndisi, .fnsetpm: break
    case .fnstsw: try write(i, 0, UInt64(cpu.pointee.fpu_status))
    case .fnstcw: try write(i, 0, UInt64(cpu.pointee.fpu_control))
    case .fnstenv:
      try storeX87Environment(i, withRegisters: false)
      cpu.pointee.fpu_control |= 0x3f
      updateX87Summary()
    case .fnsave:
      try storeX87Environment(i, withRegisters: true)
      initializeX87()
    case .fldcw:
      try checkPendingX87()
      cpu.pointee.fpu_control = UInt16(truncatingIfNeeded: try read(i, 0))
      updateX87Summary()
    case .fldenv:
      try checkPendingX87()
      try loadX87Environment(i, withRegisters: false)
    case .frstor:
      try checkPendingX87()
      try loadX87Environment(i, withRegisters: true)
    default:
      try checkPendingX87()
      try executeX87Unit(i)
    }
  }

  /// #MF where an unmasked exception is pending.
  func checkPendingX87() throws(Interruption) {
    if cpu.pointee.fpu_status & X87Status.summary.rawValue != 0 { throw .exception(.x87FloatingPoint) }
  }

  /// The state after FNINIT; the registers keep their values, but all are empty.
  func initializeX87() {
    cpu.pointee.fpu_control = 0x37f
    cpu.pointee.fpu_status = 0
    cpu.pointee.fpu_valid = 0
    cpu.pointee.fpu_opcode = 0
    cpu.pointee.fpu_instruction = 0
    cpu.pointee.fpu_data = 0
  }

  /// Makes the control and status word consistent after one was loaded.
  func updateX87Summary() {
    // Bit 6 is always 1, the reserved others 0.
    cpu.pointee.fpu_control = cpu.pointee.fpu_control & 0x1f3f | 0x40
    let pending = cpu.pointee.fpu_status & ~cpu.pointee.fpu_control & X87Status.exceptions.rawValue
    let summary = X87Status([.summary, .busy]).rawValue
    cpu.pointee.fpu_status = pending != 0 ? cpu.pointee.fpu_status | summary : cpu.pointee.fpu_status & ~summary
  }

  private func executeX87Unit(_ i: Instruction) throws(Interruption) {
    let unit = soft_unit_of(Int(i.operation.rawValue))
    guard unit.pointee.code.0 != 0 else { throw .invalidOpcode }
    let image = soft_area(cpu)
    let buffer = soft_operand(cpu)
    let size = Int(i.operands[0].size)
    let hasMemory = i.operands[0].kind == .memory
    var isStore = false
    if hasMemory {
      switch i.operation.mnemonic {
      case .fst, .fstp, .fist, .fistp, .fisttp, .fbstp: isStore = true
      default: try loadVector(address(i, size: size, isWrite: false), into: buffer, count: size)
      }
    }
    storeX87(to: image)
    image.storeBytes(of: 0x1f80, toByteOffset: 24, as: UInt32.self)
    // FSTP ST(i) is not the same in its encoding D9 D8.
    let code = soft_unit_entry(unit, 0, Int(i.modRM & 7 | (i.opcode == 0xd9 ? 8 : 0)))
    let flags = soft_run(code, image, buffer, buffer, buffer, statusFlags, 0)
    if isStore {
      // Nothing is stored where an exception other than loss of precision is not masked.
      let status = image.load(fromByteOffset: 2, as: UInt16.self)
      if status & ~cpu.pointee.fpu_control & 0x1f == 0 {
        try storeVector(from: buffer, address(i, size: size, isWrite: true), count: size)
      }
    }
    loadX87(from: image)
    if unit.pointee.flags & UInt16(SOFT_UNIT_STATUS) != 0 { statusFlags = flags }
    cpu.pointee.fpu_opcode = UInt16(i.opcode & 7) << 8 | UInt16(i.modRM)
    cpu.pointee.fpu_instruction = cpu.pointee.rip
    if hasMemory { cpu.pointee.fpu_data = offset(i) }
  }

  // MARK: Images

  /// Writes control, status and tag word and the registers as FXSAVE lays them out (SDM vol. 1, table 10-2).
  func storeX87(to image: UnsafeMutableRawPointer) {
    image.storeBytes(of: cpu.pointee.fpu_control, as: UInt16.self)
    image.storeBytes(of: cpu.pointee.fpu_status, toByteOffset: 2, as: UInt16.self)
    image.storeBytes(of: UInt16(cpu.pointee.fpu_valid), toByteOffset: 4, as: UInt16.self)
    let top = x87Top
    for index in 0..<8 {
      let register = soft_st(cpu, top &+ index)
      (image + 32 + index * 16).copyMemory(from: register, byteCount: 16)
    }
  }

  /// Takes over what `storeX87` writes.
  func loadX87(from image: UnsafeRawPointer) {
    cpu.pointee.fpu_control = image.load(as: UInt16.self)
    cpu.pointee.fpu_status = image.load(fromByteOffset: 2, as: UInt16.self)
    cpu.pointee.fpu_valid = image.load(fromByteOffset: 4, as: UInt8.self)
    let top = x87Top
    for index in 0..<8 {
      let register = soft_st(cpu, top &+ index)
      register.copyMemory(from: image + 32 + index * 16, byteCount: 10)
    }
  }

  /// The physical register that ST(0) is.
  var x87Top: Int { Int(cpu.pointee.fpu_status >> 11 & 7) }

  /// The full tag word: two bits a physical register (SDM vol. 1, 8.1.7).
  private var x87Tags: UInt16 {
    var tags: UInt16 = 0
    for index in 0..<8 {
      var tag: UInt16 = 3
      if cpu.pointee.fpu_valid >> UInt8(index) & 1 != 0 {
        let register = soft_st(cpu, index)
        let significand = register.load(as: UInt64.self)
        let exponent = register.load(fromByteOffset: 8, as: UInt16.self) & 0x7fff
        tag =
          exponent == 0 && significand == 0 ? 1 : exponent == 0 || exponent == 0x7fff || significand >> 63 == 0 ? 2 : 0
      }
      tags |= tag << UInt16(index * 2)
    }
    return tags
  }

  /// FNSTENV and FNSAVE (SDM vol. 1, figures 8-9 to 8-12).
  private func storeX87Environment(_ i: Instruction, withRegisters: Bool) throws(Interruption) {
    let isWide = i.operandSize != 2
    let size = isWide ? 28 : 14
    let total = size + (withRegisters ? 80 : 0)
    let linear = try address(i, size: total, isWrite: true)
    try checkAlignment(linear, size: isWide ? 4 : 2)
    let image = soft_area(cpu)
    let instruction = UInt32(truncatingIfNeeded: cpu.pointee.fpu_instruction)
    let data = UInt32(truncatingIfNeeded: cpu.pointee.fpu_data)
    let opcode = UInt32(cpu.pointee.fpu_opcode)
    var words: [7 of UInt32] = [
      UInt32(cpu.pointee.fpu_control), UInt32(cpu.pointee.fpu_status), UInt32(x87Tags), instruction,
      isWide ? opcode << 16 : 0, data, 0,
    ]
    if !isProtected {
      // The upper parts of the addresses are beside the opcode.
      words[3] = instruction & 0xffff
      words[4] = (instruction >> 16) << 12 | opcode
      words[5] = data & 0xffff
      words[6] = (data >> 16) << 12
    }
    if isWide {
      for index in [0, 1, 2, 6] where isProtected || index < 3 { words[index] |= 0xffff_0000 }
      for index in 0..<7 { image.storeBytes(of: words[index], toByteOffset: index * 4, as: UInt32.self) }
    } else {
      for index in 0..<7 {
        image.storeBytes(of: UInt16(truncatingIfNeeded: words[index]), toByteOffset: index * 2, as: UInt16.self)
      }
    }
    if withRegisters {
      let top = x87Top
      for index in 0..<8 {
        let register = soft_st(cpu, top &+ index)
        (image + size + index * 10).copyMemory(from: register, byteCount: 10)
      }
    }
    try store(from: image, linear, count: total)
  }

  /// FLDENV and FRSTOR.
  private func loadX87Environment(_ i: Instruction, withRegisters: Bool) throws(Interruption) {
    let isWide = i.operandSize != 2
    let size = isWide ? 28 : 14
    let total = size + (withRegisters ? 80 : 0)
    let image = soft_area(cpu)
    let linear = try address(i, size: total, isWrite: false)
    try checkAlignment(linear, size: isWide ? 4 : 2)
    try load(linear, into: image, count: total)
    func word(_ index: Int) -> UInt32 {
      isWide
        ? image.load(fromByteOffset: index * 4, as: UInt32.self)
        : UInt32(image.load(fromByteOffset: index * 2, as: UInt16.self))
    }
    cpu.pointee.fpu_control = UInt16(truncatingIfNeeded: word(0))
    cpu.pointee.fpu_status = UInt16(truncatingIfNeeded: word(1))
    let tags = word(2)
    cpu.pointee.fpu_valid = (0..<8).reduce(0) { $0 | (tags >> UInt32($1 * 2) & 3 != 3 ? 1 << UInt8($1) : 0) }
    if isProtected {
      cpu.pointee.fpu_instruction = UInt64(word(3))
      cpu.pointee.fpu_data = UInt64(word(5))
      if isWide { cpu.pointee.fpu_opcode = UInt16(truncatingIfNeeded: word(4) >> 16) & 0x7ff }
    } else {
      cpu.pointee.fpu_instruction = UInt64(word(3) & 0xffff | (word(4) >> 12) << 16)
      cpu.pointee.fpu_data = UInt64(word(5) & 0xffff | (word(6) >> 12) << 16)
      cpu.pointee.fpu_opcode = UInt16(truncatingIfNeeded: word(4)) & 0x7ff
    }
    if withRegisters {
      let top = x87Top
      for index in 0..<8 {
        soft_st(cpu, top &+ index).copyMemory(from: image + size + index * 10, byteCount: 10)
      }
    }
    updateX87Summary()
  }
}

/// The x87 status word (SDM vol. 1, figure 8-4).
struct X87Status: OptionSet {
  let rawValue: UInt16

  static let exceptions = X87Status(rawValue: 0x3f)
  static let summary = X87Status(rawValue: 1 << 7)
  /// C0 to C3.
  static let condition = X87Status(rawValue: 0x4700)
  static let top = X87Status(rawValue: 7 << 11)
  static let busy = X87Status(rawValue: 1 << 15)
}
