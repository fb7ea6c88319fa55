/// The size of code that a CPU runs: what CS.D and CS.L select (Intel SDM, volume 3, section 3.4.5).
public enum CodeMode: UInt8, Sendable, BitwiseCopyable {
  /// Real mode, virtual-8086 mode, and protected mode with CS.D clear.
  case code16
  /// Protected and compatibility mode with CS.D set.
  case code32
  /// 64-bit mode: CS.L set in long mode.
  case code64
}

/// The prefixes of an instruction that still mean something after decoding.
public struct Prefixes: OptionSet, Sendable, BitwiseCopyable {
  /// The bits.
  public let rawValue: UInt8

  /// A set of prefixes from its bits.
  @inlinable
  public init(rawValue: UInt8) { self.rawValue = rawValue }

  /// F0: LOCK. Only set where the instruction allows it.
  public static let lock = Prefixes(rawValue: 1)
  /// F3: REP or REPE, or a mandatory prefix. Excludes `repne`: the last one counts.
  public static let rep = Prefixes(rawValue: 2)
  /// F2: REPNE, or a mandatory prefix.
  public static let repne = Prefixes(rawValue: 4)
  /// 66: the operand-size override, or a mandatory prefix.
  public static let operandSize = Prefixes(rawValue: 8)
  /// 67: the address-size override.
  public static let addressSize = Prefixes(rawValue: 16)
  /// A REX prefix that counts, whatever its bits.
  public static let rex = Prefixes(rawValue: 32)
  /// A VEX prefix.
  public static let vex = Prefixes(rawValue: 64)
}

/// One operand of a decoded instruction. Memory, immediates and branch targets are in the instruction's own fields.
public struct Operand: Sendable, BitwiseCopyable {
  /// Where the operand is.
  public enum Kind: UInt8, Sendable, BitwiseCopyable {
    /// There is no such operand.
    case none
    /// `register`.
    case register
    /// Memory at `segment:[base + index * scale + displacement]`.
    case memory
    /// Memory at `segment:[rSI]`, `segment` being DS or its override.
    case stringSource
    /// Memory at `ES:[rDI]`.
    case stringDestination
    /// Memory at `segment:[rBX + AL]`.
    case translateTable
    /// `immediate`, already extended to 64 bits as the instruction says.
    case immediate
    /// `secondImmediate`: the nesting level of ENTER.
    case secondImmediate
    /// The constant 1, also in `immediate`.
    case one
    /// A branch target: the address after the instruction plus `immediate`, cut to the operand size.
    case relative
    /// A far branch target: `secondImmediate` is the selector, `immediate` the offset.
    case farPointer
  }

  /// Where the operand is.
  public var kind: Kind
  /// The register, for `Kind.register`.
  public var register: Register
  /// The operand's size in bytes; 0 where the instruction gives none (LEA, FXSAVE). A far pointer in memory: 4, 6 or 10.
  public var size: UInt8

  /// No operand.
  public static let none = Operand(kind: .none, register: .none, size: 0)
}

/// A decoded instruction: plain data, copied by value, that refers to nothing.
///
/// It holds what the bytes say. What depends on the CPU's state (privilege, paging, whether a feature is enabled,
/// real mode) is for its reader to judge, with the help of `Operation`'s properties.
public struct Instruction: Sendable, BitwiseCopyable {
  /// What to do; the row of the opcode table.
  public var operation: Operation
  /// The code size that the instruction was decoded for.
  public var mode: CodeMode
  /// The length in bytes, 1 to 15.
  public var length: UInt8
  /// The prefixes.
  public var prefixes: Prefixes
  /// The W, R, X and B bits (8, 4, 2, 1) of a REX or VEX prefix.
  public var rex: UInt8
  /// The vector length in bytes: 32 where VEX.L is set, else 16.
  public var vectorLength: UInt8
  /// The operand size in bytes: 2, 4 or 8.
  public var operandSize: UInt8
  /// The address size in bytes: 2, 4 or 8.
  public var addressSize: UInt8
  /// The opcode map: 0 one byte, 1 0F, 2 0F 38, 3 0F 3A; 4 to 6 the last three with VEX.
  public var opcodeMap: UInt8
  /// The last opcode byte.
  public var opcode: UInt8
  /// The ModRM byte, 0 if there is none.
  public var modRM: UInt8
  /// The segment of memory operands: a prefix's, or else SS for the bases rSP and rBP, or else DS. In 64-bit mode
  /// only FS and GS prefixes count.
  public var segment: Register
  /// The base register of the memory operand, `rip` or `eip` for RIP-relative ones, or `.none`.
  public var base: Register
  /// The index register of the memory operand (a vector for VSIB), or `.none`.
  public var index: Register
  /// What the index is multiplied by: 1, 2, 4 or 8.
  public var scale: UInt8
  /// The bytes of displacement that are encoded: 0, 1, 2, 4 or 8.
  public var displacementSize: UInt8
  /// The bytes of immediate that are encoded, without the second one: 0, 1, 2, 4 or 8.
  public var immediateSize: UInt8
  /// The displacement of the memory operand, sign-extended; for an offset (`mov al, [moffs]`), zero-extended.
  public var displacement: Int64
  /// The immediate or branch displacement, extended as the instruction says.
  public var immediate: Int64
  /// The second immediate of ENTER; the selector of a far pointer.
  public var secondImmediate: UInt16
  /// The operands in Intel's order, destination first; `Kind.none` from the first that is absent.
  public var operands: InlineArray<4, Operand>

  /// Whether a string instruction repeats: F3 or F2 before MOVS, STOS, LODS, INS, OUTS, CMPS or SCAS.
  public var isRepeated: Bool {
    operation.isString && (prefixes.contains(.rep) || prefixes.contains(.repne))
  }

  /// Whether ModRM.mod selects a register.
  public var isRegisterForm: Bool { modRM >= 0xc0 }
}

extension Operation {
  /// The number of operations; raw values are 0 to `count` - 1.
  public static var count: Int { operationFlags.count }

  /// A dense number, usable as an index and stable only within one build.
  @inlinable
  public var rawValue: UInt16 { unsafeBitCast(self, to: UInt16.self) }

  /// The operation of a dense number, nil if there is none.
  public init?(rawValue: UInt16) {
    guard Int(rawValue) < Self.count else { return nil }
    self = unsafeBitCast(rawValue, to: Operation.self)
  }

  var flags: OperationFlags { OperationFlags(rawValue: operationFlags[Int(rawValue)]) }

  /// The instruction's name.
  public var mnemonic: Mnemonic { unsafeBitCast(operationMnemonics[Int(rawValue)], to: Mnemonic.self) }

  /// The CPUID feature that has the instruction.
  public var feature: Feature { Feature(rawValue: UInt8(operationFlags[Int(rawValue)] >> 24)) ?? .base }

  /// Whether CPL must be 0.
  public var isPrivileged: Bool { flags.contains(.privileged) }

  /// Whether CPL must not be above IOPL (IN, OUT, INS and OUTS: or the I/O permission bitmap allows the port).
  public var isIOPrivileged: Bool { flags.contains(.ioPrivileged) }

  /// Whether the instruction is #UD in real and virtual-8086 mode, as those with VEX are.
  public var isProtectedModeOnly: Bool { flags.contains(.protectedModeOnly) }

  /// Whether LOCK is allowed where the destination is memory.
  public var isLockable: Bool { flags.contains(.lockable) }

  /// Whether the instruction is a string operation that F3 or F2 repeats.
  public var isString: Bool { !flags.isDisjoint(with: [.repeatable, .repeatableByZF]) }

  /// Whether a repetition ends when ZF disagrees with the prefix: CMPS and SCAS.
  public var isRepeatedByZF: Bool { flags.contains(.repeatableByZF) }
}

extension Mnemonic {
  /// The text of the name, in lower case.
  public var text: String {
    let number = Int(unsafeBitCast(self, to: UInt16.self))
    let start = Int(mnemonicOffsets[number])
    let end = Int(mnemonicOffsets[number + 1])
    return mnemonicText.withUTF8Buffer { String(decoding: $0[start..<end], as: UTF8.self) }
  }
}
