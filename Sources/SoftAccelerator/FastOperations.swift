import X86

/// Which instructions have a fast operation, and which one.
extension Processor {
  /// The fast operation of an instruction of 64-bit mode; nil where it has none. `next` is the address after it.
  func fastOperation(_ i: Instruction, next: UInt64) -> FastOperation? {
    guard var shape = Shape(i, next: next), let code = code(i, &shape) else { return nil }
    shape.operation.code = code
    return shape.operation
  }

  /// The operands of an instruction in the form that fast operations take.
  private struct Shape {
    /// The kinds, destination first: R, I, M.
    var kinds: (UInt8, UInt8, UInt8) = (0, 0, 0)
    var operation = FastOperation(code: .step)
    /// The address after the instruction.
    let next: UInt64
    /// The size of the destination in bytes.
    var size: UInt8

    static let register = UInt8(ascii: "R")
    static let immediate = UInt8(ascii: "I")
    static let memory = UInt8(ascii: "M")

    /// nil where an operand is of another kind.
    init?(_ i: Instruction, next: UInt64) {
      size = i.operands[0].size
      self.next = next
      guard let first = Self.kind(i.operands[0]), let second = Self.kind(i.operands[1]),
        let third = Self.kind(i.operands[2])
      else { return nil }
      kinds = (first, second, third)
      if first == Self.register { operation.a = Self.offset(i.operands[0].register) }
      if second == Self.register { operation.b = Self.offset(i.operands[1].register) }
      operation.immediate = UInt64(bitPattern: i.immediate)
      guard first == Self.memory || second == Self.memory || i.operation.mnemonic == .lea else { return }
      guard operation.setMemory(i, next: next) else { return nil }
    }

    private static func kind(_ operand: Operand) -> UInt8? {
      switch operand.kind {
      case .none: return 0
      case .register: return operand.register.class.rawValue <= Register.Class.general64.rawValue ? register : nil
      case .memory: return memory
      case .immediate, .one, .relative: return immediate
      default: return nil
      }
    }

    private static func offset(_ register: Register) -> UInt8 {
      register.class == .general8High ? (register.index & 3) &* 8 &+ 1 : register.index &* 8
    }
  }

  private func code(_ i: Instruction, _ shape: inout Shape) -> OperationCode? {
    let name = i.operation.mnemonic
    switch name {
    case .add: return arithmetic(shape, .addBRR)
    case .or: return arithmetic(shape, .orBRR)
    case .adc: return arithmetic(shape, .adcBRR)
    case .sbb: return arithmetic(shape, .sbbBRR)
    case .and: return arithmetic(shape, .andBRR)
    case .sub: return arithmetic(shape, .subBRR)
    case .xor: return arithmetic(shape, .xorBRR)
    case .cmp: return arithmetic(shape, .cmpBRR)
    case .test: return arithmetic(shape, .testBRR)
    case .mov, .movnti: return move(shape)
    case .movzx: return extend(i, shape, .movzxBLRR, .movzxWLRR, nil)
    case .movsx where i.operands[0].size == 4: return extend(i, shape, .movsxBLRR, .movsxWLRR, nil)
    case .movsx where i.operands[0].size == 8, .movsxd where i.operands[0].size == 8:
      return extend(i, shape, .movsxBQRR, .movsxWQRR, .movsxLQRR)
    case .lea: return shape.size == 4 ? .leaL : shape.size == 8 ? .leaQ : nil
    case .inc: return unary(shape, (.incLR, .incLM), (.incQR, .incQM))
    case .dec: return unary(shape, (.decLR, .decLM), (.decQR, .decQM))
    case .neg: return unary(shape, (.negLR, nil), (.negQR, nil))
    case .not: return unary(shape, (.notLR, nil), (.notQR, nil))
    case .shl: return shift(i, &shape, (.shlLRI, .shlLRC), (.shlQRI, .shlQRC))
    case .shr: return shift(i, &shape, (.shrLRI, .shrLRC), (.shrQRI, .shrQRC))
    case .sar: return shift(i, &shape, (.sarLRI, .sarLRC), (.sarQRI, .sarQRC))
    case .rol: return shift(i, &shape, (.rolLRI, nil), (.rolQRI, nil))
    case .ror: return shift(i, &shape, (.rorLRI, nil), (.rorQRI, nil))
    case .imul: return multiply(shape)
    case .bt: return bitTest(i, &shape)
    case .xchg:
      guard shape.kinds.0 == Shape.register else { return nil }
      return pick(shape, .xchgLRR, .xchgQRR)
    case .cwde: return .cwde
    case .cdqe: return .cdqe
    case .cdq: return .cdq
    case .cqo: return .cqo
    case .push:
      guard i.operandSize == 8 else { return nil }
      return shape.kinds.0 == Shape.register ? .pushR : shape.kinds.0 == Shape.immediate ? .pushI : nil
    case .pop:
      // POP RSP: the popped value stays.
      guard i.operandSize == 8, shape.kinds.0 == Shape.register, shape.operation.a != 32 else { return nil }
      return .popR
    case .leave: return i.operandSize == 8 ? .leave : nil
    case .cmovo, .cmovno, .cmovb, .cmovae, .cmove, .cmovne, .cmovbe, .cmova, .cmovs, .cmovns, .cmovp, .cmovnp, .cmovl,
      .cmovge, .cmovle, .cmovg:
      return conditional(i, shape)
    case .seto, .setno, .setb, .setae, .sete, .setne, .setbe, .seta, .sets, .setns, .setp, .setnp, .setl, .setge,
      .setle,
      .setg:
      guard shape.kinds.0 == Shape.register else { return nil }
      return OperationCode(rawValue: OperationCode.setO.rawValue &+ UInt16(i.opcode & 15))
    default: return branch(i, &shape)
    }
  }

  private func branch(_ i: Instruction, _ shape: inout Shape) -> OperationCode? {
    let displacement = UInt64(bitPattern: i.immediate)
    switch i.operation.mnemonic {
    case .jo, .jno, .jb, .jae, .je, .jne, .jbe, .ja, .js, .jns, .jp, .jnp, .jl, .jge, .jle, .jg:
      guard setTarget(i, &shape, displacement: displacement) else { return nil }
      return OperationCode(rawValue: OperationCode.jO.rawValue &+ UInt16(i.opcode & 15))
    case .jmp, .call:
      let isCall = i.operation.mnemonic == .call
      guard i.operandSize == 8 else { return nil }
      switch i.operands[0].kind {
      case .relative:
        guard setTarget(i, &shape, displacement: displacement) else { return nil }
        return isCall ? .call : .jmp
      case .register:
        shape.operation.immediate = shape.next
        return isCall ? .callR : .jmpR
      case .memory where !isCall && i.modRM >> 3 & 7 == 4: return .jmpM
      default: return nil
      }
    case .ret:
      return i.operandSize == 8 && i.operands[0].kind == .none ? .ret : nil
    default: return nil
    }
  }

  /// Puts the target into `address` and the instruction after into `immediate`; false where the target is no address.
  private func setTarget(_ i: Instruction, _ shape: inout Shape, displacement: UInt64) -> Bool {
    let target = shape.next &+ displacement
    guard i.operandSize == 8, Int64(bitPattern: target << 16) >> 16 == Int64(bitPattern: target) else { return false }
    shape.operation.address = target
    shape.operation.immediate = shape.next
    return true
  }

  /// `add` and its like: from the operation on bytes and registers, which the others follow in a fixed order.
  private func arithmetic(_ shape: Shape, _ first: OperationCode) -> OperationCode? {
    let form: UInt16
    switch (shape.kinds.0, shape.kinds.1) {
    case (Shape.register, Shape.register): form = 0
    case (Shape.register, Shape.immediate): form = 1
    case (Shape.register, Shape.memory): form = 2
    case (Shape.memory, Shape.register): form = 3
    case (Shape.memory, Shape.immediate): form = 4
    default: return nil
    }
    let size: UInt16
    switch shape.size {
    case 1: size = 0
    case 4: size = OperationCode.addLRR.rawValue &- OperationCode.addBRR.rawValue
    case 8: size = OperationCode.addQRR.rawValue &- OperationCode.addBRR.rawValue
    default: return nil
    }
    return OperationCode(rawValue: first.rawValue &+ size &+ form)
  }

  private func move(_ shape: Shape) -> OperationCode? {
    let first: OperationCode
    switch shape.size {
    case 1: first = .movBRR
    case 2: first = .movWRR
    case 4: first = .movLRR
    default: first = .movQRR
    }
    switch (shape.kinds.0, shape.kinds.1) {
    case (Shape.register, Shape.register): return first
    case (Shape.register, Shape.immediate): return OperationCode(rawValue: first.rawValue &+ 1)
    case (Shape.register, Shape.memory): return OperationCode(rawValue: first.rawValue &+ 2)
    case (Shape.memory, Shape.register): return OperationCode(rawValue: first.rawValue &+ 3)
    case (Shape.memory, Shape.immediate): return OperationCode(rawValue: first.rawValue &+ 4)
    default: return nil
    }
  }

  private func extend(
    _ i: Instruction, _ shape: Shape, _ byte: OperationCode, _ word: OperationCode, _ double: OperationCode?
  ) -> OperationCode? {
    guard shape.size >= 4 else { return nil }
    let first: OperationCode
    switch i.operands[1].size {
    case 1: first = byte
    case 2: first = word
    default:
      guard let double else { return nil }
      first = double
    }
    return shape.kinds.1 == Shape.register ? first : OperationCode(rawValue: first.rawValue &+ 1)
  }

  private func unary(
    _ shape: Shape, _ long: (OperationCode, OperationCode?), _ quad: (OperationCode, OperationCode?)
  ) -> OperationCode? {
    guard shape.size >= 4 else { return nil }
    let pair = shape.size == 4 ? long : quad
    return shape.kinds.0 == Shape.register ? pair.0 : pair.1
  }

  private func shift(
    _ i: Instruction, _ shape: inout Shape, _ long: (OperationCode, OperationCode?),
    _ quad: (OperationCode, OperationCode?)
  ) -> OperationCode? {
    guard shape.size >= 4, shape.kinds.0 == Shape.register else { return nil }
    let pair = shape.size == 4 ? long : quad
    guard shape.kinds.1 == Shape.immediate else { return pair.1 }
    shape.operation.immediate &= shape.size == 8 ? 63 : 31
    return shape.operation.immediate == 0 ? nil : pair.0
  }

  private func multiply(_ shape: Shape) -> OperationCode? {
    guard shape.kinds.0 == Shape.register else { return nil }
    switch (shape.kinds.1, shape.kinds.2) {
    case (Shape.register, 0): return pick(shape, .imulLRR, .imulQRR)
    case (Shape.memory, 0): return pick(shape, .imulLRM, .imulQRM)
    case (Shape.register, Shape.immediate): return pick(shape, .imulLRRI, .imulQRRI)
    default: return nil
    }
  }

  private func bitTest(_ i: Instruction, _ shape: inout Shape) -> OperationCode? {
    guard shape.kinds.0 == Shape.register else { return nil }
    if shape.kinds.1 == Shape.register { return pick(shape, .btLRR, .btQRR) }
    shape.operation.immediate &= shape.size == 8 ? 63 : 31
    return pick(shape, .btLRI, .btQRI)
  }

  private func conditional(_ i: Instruction, _ shape: Shape) -> OperationCode? {
    guard let first = pick(shape, .cmovOLRR, .cmovOQRR) else { return nil }
    let isMemory: UInt16 = shape.kinds.1 == Shape.memory ? 1 : 0
    return OperationCode(rawValue: first.rawValue &+ UInt16(i.opcode & 15) &* 2 &+ isMemory)
  }

  private func pick(_ shape: Shape, _ long: OperationCode, _ quad: OperationCode) -> OperationCode? {
    shape.size == 4 ? long : shape.size == 8 ? quad : nil
  }
}

extension FastOperation {
  /// Describes the memory operand; false where it is none that fast operations know. `next` is the address after the
  /// instruction.
  mutating func setMemory(_ i: Instruction, next: UInt64) -> Bool {
    guard i.addressSize == 8 else { return false }
    address = UInt64(bitPattern: i.displacement)
    switch i.base.class {
    case .none: break
    case .instructionPointer: address &+= next
    default: base = i.base.index &* 8
    }
    if i.index != .none {
      guard i.index.class == .general64 else { return false }
      index = i.index.index &* 8
      shift = UInt8(i.scale.trailingZeroBitCount)
    }
    if i.segment.index >= 4, i.operation.mnemonic != .lea { segment = i.segment.index }
    return true
  }
}
