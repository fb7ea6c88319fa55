/// An address in the guest's physical address space: never a host pointer, never a guest-virtual address.
public struct GuestPhysicalAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
  /// Byte number in guest-physical space.
  public var rawValue: UInt64

  /// Byte number in guest-physical space.
  @inlinable
  public init(_ rawValue: UInt64) {
    self.rawValue = rawValue
  }

  /// By address.
  @inlinable
  public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }

  /// The address `offset` bytes on, wrapping at 2^64: bounds are checked where memory is touched.
  @inlinable
  public static func + (a: Self, offset: UInt64) -> Self { Self(a.rawValue &+ offset) }

  /// The first byte of the 4 KiB page that holds this address.
  @inlinable
  public var page: Self { Self(rawValue & ~0xfff) }

  /// Hexadecimal, as debuggers and kernels print it.
  public var description: String { "0x" + String(rawValue, radix: 16) }
}

/// A range of guest-physical addresses, end excluded; never wraps.
public struct GuestRange: Hashable, Sendable, CustomStringConvertible {
  /// First byte.
  public let start: GuestPhysicalAddress
  /// Length in bytes.
  public let size: UInt64

  /// A range of `size` bytes at `start`; nil where its end would pass 2^64.
  public init?(start: GuestPhysicalAddress, size: UInt64) {
    guard !start.rawValue.addingReportingOverflow(size).overflow else { return nil }
    self.start = start
    self.size = size
  }

  /// First byte after the range.
  public var end: GuestPhysicalAddress { start + size }

  /// Whether the address lies in the range.
  public func contains(_ address: GuestPhysicalAddress) -> Bool {
    address.rawValue &- start.rawValue < size
  }

  /// Whether the ranges share a byte.
  public func overlaps(_ other: GuestRange) -> Bool {
    start < other.end && other.start < end
  }

  /// `0x1000-0x1fff`, as /proc/iomem prints it.
  public var description: String {
    size == 0 ? "empty at \(start)" : "\(start)-\(GuestPhysicalAddress(end.rawValue - 1))"
  }
}
