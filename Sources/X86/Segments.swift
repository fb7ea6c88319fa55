/// A segment selector (Intel SDM, volume 3, section 3.4.2).
public struct SegmentSelector: RawRepresentable, Equatable, Sendable {
  /// The 16 bits of a segment register.
  public var rawValue: UInt16
  /// A selector of 16 bits.
  public init(rawValue: UInt16) { self.rawValue = rawValue }

  /// The requested privilege level, 0 to 3.
  public var rpl: UInt8 { UInt8(rawValue & 3) }
  /// Whether it indexes the LDT rather than the GDT.
  public var isLocal: Bool { rawValue & 4 != 0 }
  /// The offset of the descriptor in its table.
  public var offset: UInt16 { rawValue & ~7 }
  /// Whether it is null: index 0 of the GDT, whatever the RPL.
  public var isNull: Bool { rawValue & ~3 == 0 }
}

/// An 8-byte segment descriptor (Intel SDM, volume 3, section 3.4.5), or the low half of a 16-byte system descriptor.
public struct SegmentDescriptor: RawRepresentable, Equatable, Sendable {
  /// The descriptor as a little-endian number.
  public var rawValue: UInt64
  /// The descriptor of 8 bytes.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// A descriptor from its parts.
  ///
  /// - Parameters:
  ///   - base: the segment's linear address.
  ///   - limit: the 20-bit limit field, in bytes or, with G in `attributes`, in units of 4 KiB.
  ///   - attributes: bits 55:52 and 47:40 of the descriptor, as VMX's access rights hold them: type, S, DPL and P in
  ///     bits 7:0, and AVL, L, D/B and G in bits 15:12.
  public init(base: UInt32, limit: UInt32, attributes: UInt16) {
    let low = UInt64(limit & 0xffff) | UInt64(base & 0xff_ffff) << 16 | UInt64(attributes & 0xff) << 40
    let high = UInt64(limit >> 16 & 15) << 48 | UInt64(attributes >> 12) << 52 | UInt64(base >> 24) << 56
    rawValue = low | high
  }

  /// The base address; a 16-byte descriptor's bits 63:32 are in its second half.
  public var base: UInt32 { UInt32(rawValue >> 16 & 0xff_ffff) | UInt32(rawValue >> 56) << 24 }
  /// The highest valid offset in bytes, the granularity counted in (for expand-down segments: the highest invalid one).
  public var limit: UInt32 {
    let field = UInt32(rawValue & 0xffff) | UInt32(rawValue >> 48 & 15) << 16
    return isPageGranular ? field << 12 | 0xfff : field
  }
  /// The type field: for code and data segments bit 3 code, bit 2 conforming or expand-down, bit 1 readable or
  /// writable, bit 0 accessed; for system segments see `SystemType`.
  public var type: UInt8 { UInt8(rawValue >> 40 & 15) }
  /// S: a code or data segment rather than a system segment or gate.
  public var isCodeOrData: Bool { rawValue >> 44 & 1 != 0 }
  /// The descriptor privilege level, 0 to 3.
  public var dpl: UInt8 { UInt8(rawValue >> 45 & 3) }
  /// P: present.
  public var isPresent: Bool { rawValue >> 47 & 1 != 0 }
  /// L: a 64-bit code segment.
  public var isLong: Bool { rawValue >> 53 & 1 != 0 }
  /// D/B: 32-bit operands, addresses and stack by default.
  public var isBig: Bool { rawValue >> 54 & 1 != 0 }
  /// G: the limit counts 4 KiB.
  public var isPageGranular: Bool { rawValue >> 55 & 1 != 0 }
  /// Whether it is a code segment.
  public var isCode: Bool { isCodeOrData && type & 8 != 0 }

  /// The types of system segments and gates (Intel SDM, volume 3, table 3-2); in long mode those named 32 are 64-bit.
  public enum SystemType: UInt8, Sendable {
    /// A 16-bit TSS, not running.
    case tss16Available = 1
    /// A local descriptor table.
    case ldt = 2
    /// A 16-bit TSS, running.
    case tss16Busy = 3
    /// A 16-bit call gate.
    case callGate16 = 4
    /// A task gate.
    case taskGate = 5
    /// A 16-bit interrupt gate.
    case interruptGate16 = 6
    /// A 16-bit trap gate.
    case trapGate16 = 7
    /// A 32-bit (64-bit) TSS, not running.
    case tss32Available = 9
    /// A 32-bit (64-bit) TSS, running.
    case tss32Busy = 11
    /// A 32-bit (64-bit) call gate.
    case callGate32 = 12
    /// A 32-bit (64-bit) interrupt gate.
    case interruptGate32 = 14
    /// A 32-bit (64-bit) trap gate.
    case trapGate32 = 15
  }

  /// The type of a system segment or gate, nil for code, data and reserved types.
  public var systemType: SystemType? { isCodeOrData ? nil : SystemType(rawValue: type) }
}
