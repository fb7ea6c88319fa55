/// An EUI-48 address.
public struct MACAddress: Hashable, Sendable, CustomStringConvertible {
  /// The first byte on the wire is bits 47 to 40; bits 63 to 48 are zero.
  public let rawValue: UInt64

  /// The address of the lower 48 bits.
  public init(rawValue: UInt64) { self.rawValue = rawValue & 0xffff_ffff_ffff }

  /// Reads six bytes, which need not be aligned.
  @inline(__always)
  public init(at start: UnsafeRawPointer) {
    let high = UInt32(bigEndian: start.loadUnaligned(as: UInt32.self))
    let low = UInt16(bigEndian: start.loadUnaligned(fromByteOffset: 4, as: UInt16.self))
    rawValue = UInt64(high) << 16 | UInt64(low)
  }

  /// Reads `52:54:00:12:34:56`, with `:` or `-`; nil for anything else.
  public init?(_ text: String) {
    let parts = text.split(omittingEmptySubsequences: false) { $0 == ":" || $0 == "-" }
    guard parts.count == 6 else { return nil }
    var value: UInt64 = 0
    for part in parts {
      // Two digits, not the sign that `UInt8` would take.
      guard part.utf8.count == 2, part.utf8.first != UInt8(ascii: "+"), let byte = UInt8(part, radix: 16) else {
        return nil
      }
      value = value << 8 | UInt64(byte)
    }
    rawValue = value
  }

  /// Every station.
  public static let broadcast = MACAddress(rawValue: 0xffff_ffff_ffff)

  /// Whether it means several stations: no frame comes from such an address.
  public var isMulticast: Bool { rawValue >> 40 & 1 != 0 }

  /// As on the wire.
  public var bytes: [UInt8] { (0..<6).map { UInt8(truncatingIfNeeded: rawValue >> UInt64(40 - 8 * $0)) } }

  /// Lower-case hexadecimal with colons.
  public var description: String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined(separator: ":")
  }
}
