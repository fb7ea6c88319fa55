/// An architectural register as an operand names it: a class and an index within the class, in one byte.
///
/// `rawValue` is `class << 4 | index`; the index is the number that instruction encodings use (Intel SDM, volume 2,
/// section 2.1.5 and tables 2-1 to 2-3), so an interpreter indexes its register file with it directly.
public struct Register: Equatable, Hashable, Sendable, BitwiseCopyable {
  /// The register files.
  public enum Class: UInt8, Sendable {
    /// `al, cl, dl, bl, spl, bpl, sil, dil, r8b`...
    case general8
    /// `ah, ch, dh, bh`, with the indices 4 to 7 that encodings without REX give them: bits 15:8 of register index - 4.
    case general8High
    /// `ax, cx, dx, bx, sp, bp, si, di, r8w`...
    case general16
    /// `eax`...
    case general32
    /// `rax`...
    case general64
    /// `es, cs, ss, ds, fs, gs`.
    case segment
    /// `cr0`...
    case control
    /// `dr0`...
    case debug
    /// `st(0)`...
    case x87
    /// `mm0`...
    case mmx
    /// `xmm0`...
    case xmm
    /// `ymm0`...
    case ymm
    /// `eip` (index 2) and `rip` (index 4): a base of memory operands in 64-bit mode.
    case instructionPointer
    /// No register.
    case none = 15
  }

  /// `class << 4 | index`.
  public let rawValue: UInt8

  /// The register with a raw value that the opcode table holds.
  @usableFromInline
  init(rawValue: UInt8) {
    self.rawValue = rawValue
  }

  /// Register `index` (0 to 15) of a class.
  @inlinable
  public init(_ class: Class, _ index: UInt8) {
    rawValue = `class`.rawValue << 4 | (index & 15)
  }

  /// The register file.
  @inlinable
  public var `class`: Class { Class(rawValue: rawValue >> 4) ?? .none }

  /// The number within the class that encodings use.
  @inlinable
  public var index: UInt8 { rawValue & 15 }

  /// A general register of 1, 2, 4 or 8 bytes (the low byte, for 1).
  @inlinable
  static func general(_ index: UInt8, bytes: UInt8) -> Register {
    switch bytes {
    case 1: Register(.general8, index)
    case 2: Register(.general16, index)
    case 4: Register(.general32, index)
    default: Register(.general64, index)
    }
  }

  /// No register: an absent base, index or segment override.
  public static let none = Register(rawValue: 0xff)
  /// Segment register ES.
  public static let es = Register(.segment, 0)
  /// Segment register CS.
  public static let cs = Register(.segment, 1)
  /// Segment register SS.
  public static let ss = Register(.segment, 2)
  /// Segment register DS.
  public static let ds = Register(.segment, 3)
  /// Segment register FS.
  public static let fs = Register(.segment, 4)
  /// Segment register GS.
  public static let gs = Register(.segment, 5)
}

extension Register: CustomStringConvertible {
  /// The name that assemblers use: `rax`, `r8d`, `st(1)`, `xmm0`.
  public var description: String {
    switch self.class {
    case .general8: index < 4 ? Self.legacyNames[Int(index)].prefix(1) + "l" : Self.extendedName(index, "l", "b")
    case .general8High: Self.legacyNames[Int(index & 3)].prefix(1) + "h"
    case .general16: Self.extendedName(index, "", "w")
    case .general32: index < 8 ? "e" + Self.legacyNames[Int(index)] : "r\(index)d"
    case .general64: index < 8 ? "r" + Self.legacyNames[Int(index)] : "r\(index)"
    case .segment: index < 6 ? ["es", "cs", "ss", "ds", "fs", "gs"][Int(index)] : "?"
    case .control: "cr\(index)"
    case .debug: "dr\(index)"
    case .x87: "st(\(index))"
    case .mmx: "mm\(index)"
    case .xmm: "xmm\(index)"
    case .ymm: "ymm\(index)"
    case .instructionPointer: index == 2 ? "eip" : "rip"
    case .none: "none"
    }
  }

  private static let legacyNames = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"]

  private static func extendedName(_ index: UInt8, _ legacySuffix: String, _ suffix: String) -> String {
    index < 8 ? legacyNames[Int(index)] + legacySuffix : "r\(index)\(suffix)"
  }
}
