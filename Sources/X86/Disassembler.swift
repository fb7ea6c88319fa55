extension Instruction {
  /// The instruction in Intel syntax as GNU `objdump -M intel` writes it: `mov    eax,DWORD PTR [rax+0x10]`.
  ///
  /// - Parameter address: the instruction pointer it was fetched at (an offset in CS), for branch targets and
  ///   RIP-relative addresses.
  /// - Returns: the text, with the prefixes that mean something and without the bytes.
  public func text(at address: UInt64) -> String {
    var text = repeatPrefix + name
    for position in 0..<4 where operands[position].kind != .none {
      if position == 0 {
        text += String(repeating: " ", count: max(6 - text.utf8.count, 0) + 1)
      } else {
        text += ","
      }
      text += self.text(of: operands[position], at: position, address)
    }
    if base.class == .instructionPointer {
      let target = address &+ UInt64(length) &+ UInt64(bitPattern: displacement)
      text += "        # " + Self.hexadecimal(Self.cut(target, to: addressSize))
    }
    return text
  }

  private var repeatPrefix: String {
    if prefixes.contains(.lock) { return "lock " }
    guard isRepeated else { return "" }
    if prefixes.contains(.repne) { return "repnz " }
    return operation.isRepeatedByZF ? "repz " : "rep "
  }

  private var name: String {
    let mnemonic = operation.mnemonic
    if mnemonic == .mov, immediateSize == 8 || displacementSize == 8 { return "movabs" }
    guard operation.flags.contains(.sizeSuffix), operandSize != usualOperandSize else { return mnemonic.text }
    return mnemonic.text + (operandSize == 2 ? "w" : operandSize == 4 ? "d" : "q")
  }

  private var usualOperandSize: UInt8 {
    switch mode {
    case .code16: 2
    case .code32: 4
    case .code64: operation.flags.isDisjoint(with: [.default64, .force64]) ? 4 : 8
    }
  }

  private func text(of operand: Operand, at position: Int, _ address: UInt64) -> String {
    switch operand.kind {
    case .none:
      return ""
    case .register:
      // The implied top of the x87 stack has no number.
      let method = operationOperands[Int(operation.rawValue)] >> (UInt64(position) * 16 + 8) & 0xff
      let isImpliedTop = operand.register.class == .x87 && method == OperandMethod.fixed.rawValue
      return isImpliedTop ? "st" : operand.register.description
    case .memory:
      return (isOffset ? "" : Self.sizeText(operand.size)) + memoryText
    case .stringSource:
      return Self.sizeText(operand.size) + "\(segment):[\(Register.general(6, bytes: addressSize))]"
    case .stringDestination:
      return Self.sizeText(operand.size) + "es:[\(Register.general(7, bytes: addressSize))]"
    case .translateTable:
      return "BYTE PTR \(segment):[\(Register.general(3, bytes: addressSize))]"
    case .immediate:
      return Self.hexadecimal(Self.cut(UInt64(bitPattern: immediate), to: operand.size))
    case .secondImmediate:
      return Self.hexadecimal(UInt64(secondImmediate))
    case .one:
      return "1"
    case .relative:
      let target = address &+ UInt64(length) &+ UInt64(bitPattern: immediate)
      return Self.hexadecimal(Self.cut(target, to: operand.size))
    case .farPointer:
      return Self.hexadecimal(UInt64(secondImmediate)) + ":" + Self.hexadecimal(UInt64(bitPattern: immediate))
    }
  }

  /// Whether the memory operand is a bare offset in the instruction (MOV's A0 to A3).
  private var isOffset: Bool { displacementSize != 0 && !operation.flags.contains(.hasModRM) }

  private var memoryText: String {
    let isOverridden = segment != .ds && !(segment == .ss && hasStackBase)
    let hasSIB = addressSize != 2 && modRM & 7 == 4 && operation.flags.contains(.hasModRM)
    // GNU shows a SIB byte without index by a pseudo-register where an assembler would not have encoded one.
    let isPlain = base != .none ? base.index & 7 == 4 : mode == .code16 || addressSize == 8
    let hasVoidIndex = hasSIB && index == .none && !(isPlain && scale == 1)
    guard base != .none || index != .none || hasVoidIndex else {
      return "\(segment):" + Self.hexadecimal(Self.cut(UInt64(bitPattern: displacement), to: addressSize))
    }
    var text = isOverridden ? "\(segment):[" : "["
    if base != .none { text += base.description }
    if index != .none || hasVoidIndex {
      if base != .none { text += "+" }
      text += index != .none ? index.description : addressSize == 8 ? "riz" : "eiz"
      if addressSize != 2 { text += "*\(scale)" }
    }
    if base.class == .instructionPointer {
      text += "+" + Self.hexadecimal(UInt64(bitPattern: displacement))
    } else if displacementSize != 0 {
      text += (displacement < 0 ? "-" : "+") + Self.hexadecimal(displacement.magnitude)
    }
    return text + "]"
  }

  private var hasStackBase: Bool {
    (base.index == 4 || base.index == 5) && base.class != .none && base.class != .instructionPointer
  }

  private static func sizeText(_ size: UInt8) -> String {
    switch size {
    case 1: "BYTE PTR "
    case 2: "WORD PTR "
    case 4: "DWORD PTR "
    case 6: "FWORD PTR "
    case 8: "QWORD PTR "
    case 10: "TBYTE PTR "
    case 16: "XMMWORD PTR "
    case 32: "YMMWORD PTR "
    default: ""
    }
  }

  private static func cut(_ value: UInt64, to bytes: UInt8) -> UInt64 {
    bytes >= 8 ? value : value & (1 << (UInt64(bytes) * 8) - 1)
  }

  private static func hexadecimal(_ value: UInt64) -> String {
    "0x" + String(value, radix: 16)
  }
}
