/// Why bytes do not decode.
public enum DecodeError: Error, Equatable {
  /// The bytes end before the instruction does: fetch those that follow (from the next page, say) and try again.
  case needsMoreBytes
  /// No instruction this table knows, or one used as the architecture forbids (LOCK, register numbers): #UD.
  /// EVEX (AVX-512), XOP, 3DNow! and MPX are not in the table.
  case invalidOpcode
  /// The instruction would be longer than 15 bytes: #GP(0).
  case tooLong
}

extension DecodeError: CustomStringConvertible {
  /// One line for a report.
  public var description: String {
    switch self {
    case .needsMoreBytes: "the instruction continues past the bytes at hand"
    case .invalidOpcode: "not a known instruction"
    case .tooLong: "the instruction is longer than 15 bytes"
    }
  }
}

extension Instruction {
  /// The longest instruction in bytes (Intel SDM, volume 2, section 2.3.11).
  public static var maximumLength: Int { 15 }

  /// Decodes the instruction that `bytes` begin with. Bytes after it are not looked at.
  ///
  /// - Throws: `DecodeError`. With 15 bytes at hand it is never `.needsMoreBytes`.
  public init(decoding bytes: UnsafeRawBufferPointer, mode: CodeMode) throws(DecodeError) {
    self.init(mode: mode)
    var decoder = Decoder(bytes: bytes)
    try decoder.decode(into: &self)
  }

  private init(mode: CodeMode) {
    operation = .invalid
    self.mode = mode
    length = 0
    prefixes = []
    rex = 0
    vectorLength = 16
    operandSize = mode == .code16 ? 2 : 4
    addressSize = 2 << mode.rawValue
    opcodeMap = 0
    opcode = 0
    modRM = 0
    segment = .ds
    base = .none
    index = .none
    scale = 1
    displacementSize = 0
    immediateSize = 0
    displacement = 0
    immediate = 0
    secondImmediate = 0
    operands = [.none, .none, .none, .none]
  }
}

/// The state of decoding one instruction: a cursor over the bytes, and what only the decoder needs to know.
///
/// Prefixes, opcode, a walk down `decisionNodes` to the operation, ModRM's memory operand, operands: in byte order.
private struct Decoder {
  private let bytes: UnsafeRawBufferPointer
  private let limit: Int
  private var position = 0
  /// The segment that a prefix names.
  private var segmentOverride = Register.none
  /// The SIB byte.
  private var sib: UInt8 = 0
  /// VEX.vvvv, not inverted.
  private var vvvv: UInt8 = 0
  /// The mandatory prefix as the table numbers it: 0 none, 1 66, 2 F3, 3 F2.
  private var mandatoryPrefix: UInt8 = 0

  init(bytes: UnsafeRawBufferPointer) {
    self.bytes = bytes
    limit = min(bytes.count, Instruction.maximumLength)
  }

  mutating func decode(into instruction: inout Instruction) throws(DecodeError) {
    try readPrefixesAndOpcode(&instruction)
    let node = try findOperation(&instruction)
    let flags = OperationFlags(rawValue: operationFlags[node])
    instruction.operation = unsafeBitCast(UInt16(truncatingIfNeeded: node), to: Operation.self)
    setOperandSize(&instruction, flags)
    if flags.contains(.vvvvUnused), vvvv != 0 { throw .invalidOpcode }

    if flags.contains(.hasModRM) {
      instruction.modRM = try next()
      if !instruction.isRegisterForm, !flags.contains(.registerForm) { try readMemoryOperand(&instruction) }
    }
    if segmentOverride != .none { instruction.segment = segmentOverride }

    var encodings = operationOperands[node]
    var count = 0
    while encodings != 0, count < 4 {
      let low = UInt8(truncatingIfNeeded: encodings)
      let method = OperandMethod(rawValue: UInt8(truncatingIfNeeded: encodings >> 8))
      instruction.operands[count] = try readOperand(method, low, &instruction)
      encodings >>= 16
      count += 1
    }
    if instruction.prefixes.contains(.lock) {
      guard flags.contains(.lockable), instruction.operands[0].kind == .memory else { throw .invalidOpcode }
    }
    // MOV to CS is the one segment move that no encoding allows.
    if instruction.operands[0].register == .cs, instruction.opcode == 0x8e { throw .invalidOpcode }
    instruction.length = UInt8(truncatingIfNeeded: position)
  }

  // MARK: The cursor

  private var end: DecodeError { limit == Instruction.maximumLength ? .tooLong : .needsMoreBytes }

  private mutating func next() throws(DecodeError) -> UInt8 {
    let byte = try peek()
    position += 1
    return byte
  }

  private func peek() throws(DecodeError) -> UInt8 {
    guard position < limit else { throw end }
    return bytes[position]
  }

  /// A little-endian number of `size` (1, 2, 4 or 8) bytes, sign-extended.
  private mutating func nextSigned(_ size: UInt8) throws(DecodeError) -> Int64 {
    guard limit - position >= Int(size) else { throw end }
    defer { position += Int(size) }
    switch size {
    case 1: return Int64(bytes.loadUnaligned(fromByteOffset: position, as: Int8.self))
    case 2: return Int64(Int16(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: Int16.self)))
    case 4: return Int64(Int32(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: Int32.self)))
    default: return Int64(littleEndian: bytes.loadUnaligned(fromByteOffset: position, as: Int64.self))
    }
  }

  // MARK: Prefixes and opcode

  private mutating func readPrefixesAndOpcode(_ instruction: inout Instruction) throws(DecodeError) {
    let is64 = instruction.mode == .code64
    var byte = try next()
    prefixes: while true {
      switch byte {
      case 0x66:
        instruction.prefixes.insert(.operandSize)
      case 0x67:
        instruction.prefixes.insert(.addressSize)
      case 0xf0:
        instruction.prefixes.insert(.lock)
      case 0xf2:
        instruction.prefixes.insert(.repne)
        instruction.prefixes.remove(.rep)
      case 0xf3:
        instruction.prefixes.insert(.rep)
        instruction.prefixes.remove(.repne)
      case 0x26, 0x2e, 0x36, 0x3e:
        // 64-bit mode ignores them.
        if !is64 { segmentOverride = Register(.segment, byte >> 3 & 3) }
      case 0x64, 0x65:
        segmentOverride = Register(.segment, byte & 7)
      case 0x40...0x4f where is64:
        // REX counts only right before the opcode.
        instruction.rex = byte & 15
        instruction.prefixes.insert(.rex)
        byte = try next()
        if Self.isPrefix(byte) {
          instruction.rex = 0
          instruction.prefixes.remove(.rex)
          continue prefixes
        }
        break prefixes
      default:
        break prefixes
      }
      byte = try next()
    }
    if instruction.prefixes.contains(.addressSize) {
      instruction.addressSize = instruction.mode == .code32 ? 2 : 4
    }
    if instruction.prefixes.contains(.repne) {
      mandatoryPrefix = 3
    } else if instruction.prefixes.contains(.rep) {
      mandatoryPrefix = 2
    } else if instruction.prefixes.contains(.operandSize) {
      mandatoryPrefix = 1
    }

    if byte == 0x0f {
      byte = try next()
      instruction.opcodeMap = byte == 0x38 ? 2 : byte == 0x3a ? 3 : 1
      if instruction.opcodeMap != 1 { byte = try next() }
    } else if byte & 0xfe == 0xc4 {
      // Outside 64-bit mode a memory form is LDS or LES.
      let following = try peek()
      if is64 || following >= 0xc0 { byte = try readVEX(byte, &instruction) }
    }
    instruction.opcode = byte
  }

  private static func isPrefix(_ byte: UInt8) -> Bool {
    switch byte {
    case 0x26, 0x2e, 0x36, 0x3e, 0x40...0x4f, 0x64...0x67, 0xf0, 0xf2, 0xf3: true
    default: false
    }
  }

  /// Reads the rest of a VEX prefix (Intel SDM, volume 2, section 2.3.5) and the opcode byte.
  private mutating func readVEX(_ first: UInt8, _ instruction: inout Instruction) throws(DecodeError) -> UInt8 {
    guard instruction.prefixes.isDisjoint(with: [.operandSize, .rep, .repne, .lock, .rex]) else { throw .invalidOpcode }
    instruction.prefixes.insert(.vex)
    var map: UInt8 = 1
    let inverted = ~(try next())
    instruction.rex = inverted >> 5 & 4
    var last = ~inverted
    if first == 0xc4 {
      map = last & 31
      instruction.rex = inverted >> 5
      last = try next()
      instruction.rex |= last >> 4 & 8
    }
    vvvv = ~last >> 3 & 15
    if instruction.mode != .code64 {
      // Only eight registers: VEX.B is ignored; R and X are 0, or this is LDS or LES.
      instruction.rex &= 8
    }
    if last & 4 != 0 { instruction.vectorLength = 32 }
    mandatoryPrefix = last & 3
    guard (1...3).contains(map) else { throw .invalidOpcode }
    instruction.opcodeMap = map + 3
    return try next()
  }

  // MARK: The operation

  /// Walks from the opcode's node to its operation.
  private func findOperation(_ instruction: inout Instruction) throws(DecodeError) -> Int {
    var node = decisionNodes[Int(instruction.opcodeMap) << 8 | Int(instruction.opcode)]
    while let selector = Selector(rawValue: UInt8(truncatingIfNeeded: node >> 16)) {
      let answer: UInt8 =
        switch selector {
        case .mode: instruction.mode == .code64 ? 1 : 0
        case .prefix: mandatoryPrefix
        case .mod: try peek() >= 0xc0 ? 1 : 0
        case .reg: try peek() >> 3 & 7
        case .rm: try peek() & 7
        case .w: instruction.rex >> 3
        case .l: instruction.vectorLength >> 5
        case .b: instruction.rex & 1
        case .operandSize: operandSize(instruction, ignoring66: false) >> 2
        case .addressSize: instruction.addressSize >> 2
        }
      node = decisionNodes[Int(node & 0xffff) + Int(answer)]
    }
    guard node != 0 else { throw .invalidOpcode }
    return Int(node)
  }

  /// The operand size in bytes that the mode, REX.W and the prefix 66 give (Intel SDM, volume 1, table 3-4).
  private func operandSize(_ instruction: Instruction, ignoring66: Bool) -> UInt8 {
    if instruction.rex & 8 != 0, instruction.mode == .code64 { return 8 }
    let overridden = instruction.prefixes.contains(.operandSize) && !ignoring66
    return (instruction.mode == .code16) == overridden ? 4 : 2
  }

  private func setOperandSize(_ instruction: inout Instruction, _ flags: OperationFlags) {
    var size = operandSize(instruction, ignoring66: flags.contains(.mandatory66))
    if instruction.mode == .code64 {
      if flags.contains(.force64) || (flags.contains(.default64) && size == 4) { size = 8 }
    }
    instruction.operandSize = size
  }

  // MARK: Memory

  private mutating func readMemoryOperand(_ instruction: inout Instruction) throws(DecodeError) {
    if instruction.addressSize == 2 {
      try readMemoryOperand16(&instruction)
    } else {
      try readMemoryOperand32(&instruction)
    }
    instruction.displacement = instruction.displacementSize == 0 ? 0 : try nextSigned(instruction.displacementSize)
  }

  /// Intel SDM, volume 2, table 2-1.
  private func readMemoryOperand16(_ instruction: inout Instruction) throws(DecodeError) {
    let mod = instruction.modRM >> 6
    let rm = instruction.modRM & 7
    instruction.displacementSize = mod
    switch rm {
    case 0, 1, 7: instruction.base = Register(.general16, 3)
    case 2, 3: instruction.base = Register(.general16, 5)
    case 4: instruction.base = Register(.general16, 6)
    case 5: instruction.base = Register(.general16, 7)
    default:
      if mod == 0 {
        instruction.displacementSize = 2
      } else {
        instruction.base = Register(.general16, 5)
      }
    }
    if rm < 4 { instruction.index = Register(.general16, 6 + rm & 1) }
    if instruction.base == Register(.general16, 5) { instruction.segment = .ss }
  }

  /// Intel SDM, volume 2, tables 2-2, 2-3 and 2-7.
  private mutating func readMemoryOperand32(_ instruction: inout Instruction) throws(DecodeError) {
    let mod = instruction.modRM >> 6
    let rm = instruction.modRM & 7
    let size = instruction.addressSize
    var base = rm
    if rm == 4 {
      sib = try next()
      base = sib & 7
      let index = sib >> 3 & 7 | instruction.rex << 2 & 8
      if index != 4 { instruction.index = Register.general(index, bytes: size) }
      instruction.scale = 1 << (sib >> 6)
    }
    instruction.displacementSize = mod == 2 ? 4 : mod
    if mod == 0, base == 5 {
      instruction.displacementSize = 4
      // Without SIB this form is relative to RIP in 64-bit mode, and absolute elsewhere.
      if rm == 5, instruction.mode == .code64 { instruction.base = Register(.instructionPointer, size >> 1) }
      return
    }
    instruction.base = Register.general(base | instruction.rex << 3 & 8, bytes: size)
    // REX.B makes r12 and r13 of them, whose segment is DS.
    if instruction.base.index & 14 == 4 { instruction.segment = .ss }
  }

  // MARK: Operands

  private mutating func readOperand(
    _ method: OperandMethod?, _ low: UInt8, _ instruction: inout Instruction
  ) throws(DecodeError) -> Operand {
    guard let method else { throw .invalidOpcode }
    let bytes = self.bytes(of: OperandSize(rawValue: low) ?? .none, instruction)
    let reg = instruction.modRM >> 3 & 7
    let extendedReg = reg | instruction.rex << 1 & 8
    let rm = instruction.modRM & 7 | instruction.rex << 3 & 8

    switch method {
    case .modRMGeneral, .modRMRegister, .modRMMemory:
      guard method == .modRMRegister || instruction.isRegisterForm else { return memory(bytes) }
      return general(rm, bytes, instruction)
    case .general:
      return general(extendedReg, bytes, instruction)
    case .opcodeRegister:
      return general(instruction.opcode & 7 | instruction.rex << 3 & 8, bytes, instruction)
    case .vexGeneral:
      return general(vvvvRegister(instruction), bytes, instruction)
    case .accumulator:
      return general(0, bytes, instruction)
    case .fixed:
      let register = Register(rawValue: low)
      return Operand(kind: .register, register: register, size: Self.bytes(of: register))
    case .segment:
      guard reg < 6 else { throw .invalidOpcode }
      return Operand(kind: .register, register: Register(.segment, reg), size: 2)
    case .control:
      // CR0, CR2, CR3, CR4 and CR8 exist.
      guard 0x11d >> UInt16(extendedReg) & 1 != 0 else { throw .invalidOpcode }
      return Operand(kind: .register, register: Register(.control, extendedReg), size: bytes)
    case .debug:
      guard extendedReg < 8 else { throw .invalidOpcode }
      return Operand(kind: .register, register: Register(.debug, extendedReg), size: bytes)
    case .immediate:
      let extendsToOperand = low == OperandSize.operand32.rawValue
      return try readImmediate(bytes, size: extendsToOperand ? instruction.operandSize : bytes, &instruction)
    case .signedByte:
      instruction.immediateSize = 1
      instruction.immediate = try nextSigned(1)
      return Operand(kind: .immediate, register: .none, size: instruction.operandSize)
    case .one:
      instruction.immediate = 1
      return Operand(kind: .one, register: .none, size: 1)
    case .relative:
      // 66 leaves near branches in 64-bit mode at 32 bits, as on Intel's processors; AMD's cut them to 16.
      instruction.immediateSize = min(bytes, 4)
      instruction.immediate = try nextSigned(instruction.immediateSize)
      return Operand(kind: .relative, register: .none, size: instruction.operandSize)
    case .farPointer:
      instruction.immediateSize = min(instruction.operandSize, 4)
      let offset = try nextSigned(instruction.immediateSize)
      instruction.immediate = offset & (1 << (Int64(instruction.immediateSize) * 8) - 1)
      instruction.secondImmediate = UInt16(truncatingIfNeeded: try nextSigned(2))
      return Operand(kind: .farPointer, register: .none, size: bytes)
    case .offset:
      instruction.displacementSize = instruction.addressSize
      let offset = try nextSigned(instruction.addressSize)
      instruction.displacement =
        instruction.addressSize == 8 ? offset : offset & (1 << (Int64(instruction.addressSize) * 8) - 1)
      return memory(bytes)
    case .stringSource:
      return Operand(kind: .stringSource, register: .none, size: bytes)
    case .stringDestination:
      return Operand(kind: .stringDestination, register: .none, size: bytes)
    case .translate:
      return Operand(kind: .translateTable, register: .none, size: 1)
    case .x87:
      return Operand(kind: .register, register: Register(.x87, instruction.modRM & 7), size: 10)
    case .vector:
      return vector(extendedReg, bytes)
    case .modRMVector, .modRMVectorRegister:
      return instruction.isRegisterForm ? vector(rm, bytes) : memory(bytes)
    case .vexVector:
      return vector(vvvvRegister(instruction), bytes)
    case .immediateVector:
      instruction.immediateSize = 1
      let register = try next() >> 4
      return vector(instruction.mode == .code64 ? register : register & 7, bytes)
    case .mmx:
      return Operand(kind: .register, register: Register(.mmx, reg), size: 8)
    case .modRMMMX, .modRMMMXRegister:
      guard instruction.isRegisterForm else { return memory(bytes) }
      return Operand(kind: .register, register: Register(.mmx, instruction.modRM & 7), size: 8)
    case .vectorIndex, .xmmIndex:
      // VSIB needs a SIB byte, in which 4 is an index like any other.
      guard instruction.addressSize != 2, instruction.modRM & 7 == 4 else { throw .invalidOpcode }
      let isYMM = method == .vectorIndex && instruction.vectorLength == 32
      let index = sib >> 3 & 7 | instruction.rex << 2 & 8
      instruction.index = Register(isYMM ? .ymm : .xmm, index)
      // Destination, index and mask must be three registers.
      let mask = vvvvRegister(instruction)
      guard index != extendedReg, index != mask, extendedReg != mask else { throw .invalidOpcode }
      return memory(bytes)
    }
  }

  /// The register number in VEX.vvvv. Outside 64-bit mode its top bit counts only where the field must be unused.
  private func vvvvRegister(_ instruction: Instruction) -> UInt8 {
    instruction.mode == .code64 ? vvvv : vvvv & 7
  }

  private func memory(_ bytes: UInt8) -> Operand {
    Operand(kind: .memory, register: .none, size: bytes)
  }

  private func vector(_ index: UInt8, _ bytes: UInt8) -> Operand {
    Operand(kind: .register, register: Register(bytes == 32 ? .ymm : .xmm, index), size: bytes)
  }

  private func general(_ index: UInt8, _ bytes: UInt8, _ instruction: Instruction) -> Operand {
    if bytes == 1, index & 12 == 4, !instruction.prefixes.contains(.rex) {
      return Operand(kind: .register, register: Register(.general8High, index), size: 1)
    }
    return Operand(kind: .register, register: Register.general(index, bytes: bytes), size: bytes)
  }

  /// An immediate of `bytes` bytes for an operand of `size` bytes, which is more for Iz in 64-bit operations.
  private mutating func readImmediate(
    _ bytes: UInt8, size: UInt8, _ instruction: inout Instruction
  ) throws(DecodeError) -> Operand {
    if instruction.operands[0].kind == .immediate {
      instruction.secondImmediate = UInt16(UInt8(truncatingIfNeeded: try nextSigned(1)))
      return Operand(kind: .secondImmediate, register: .none, size: 1)
    }
    instruction.immediateSize = bytes
    let value = try nextSigned(bytes)
    // Bytes and words (RET, IN, shifts) are unsigned; Iz sign-extends to the operand size.
    instruction.immediate = bytes == 1 ? value & 0xff : bytes == 2 ? value & 0xffff : value
    return Operand(kind: .immediate, register: .none, size: size)
  }

  private static func bytes(of register: Register) -> UInt8 {
    switch register.class {
    case .general8: 1
    case .general16, .segment: 2
    case .x87: 10
    default: 16
    }
  }

  private func bytes(of size: OperandSize, _ instruction: Instruction) -> UInt8 {
    let operand = instruction.operandSize
    let vector = instruction.vectorLength
    return switch size {
    case .none, .descriptor: 0
    case .byte: 1
    case .word: 2
    case .dword: 4
    case .qword: 8
    case .tenBytes: 10
    case .xmm: 16
    case .ymm: 32
    case .operand: operand
    case .operand32: min(operand, 4)
    case .dwordOrQword: operand == 8 ? 8 : 4
    case .vector: vector
    case .vectorHalf: vector >> 1
    case .vectorQuarter: vector >> 2
    case .vectorEighth: vector >> 3
    case .farPointer: operand + 2
    case .boundPair: operand << 1
    }
  }
}
