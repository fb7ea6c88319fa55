/// Numbers of on-disk structures, which are big-endian and may lie anywhere in a buffer.
extension UnsafeRawPointer {
  package func bigEndian16(_ offset: Int) -> UInt16 {
    UInt16(bigEndian: loadUnaligned(fromByteOffset: offset, as: UInt16.self))
  }
  package func bigEndian32(_ offset: Int) -> UInt32 {
    UInt32(bigEndian: loadUnaligned(fromByteOffset: offset, as: UInt32.self))
  }
  package func bigEndian64(_ offset: Int) -> UInt64 {
    UInt64(bigEndian: loadUnaligned(fromByteOffset: offset, as: UInt64.self))
  }
}

extension UnsafeMutableRawPointer {
  package func bigEndian64(_ offset: Int) -> UInt64 { UnsafeRawPointer(self).bigEndian64(offset) }

  package func storeBigEndian(_ value: some FixedWidthInteger, _ offset: Int) {
    storeBytes(of: value.bigEndian, toByteOffset: offset, as: type(of: value))
  }
}

extension [UInt8] {
  package func bigEndian16(_ offset: Int) -> UInt16 {
    withUnsafeBytes { $0.baseAddress.map { $0.bigEndian16(offset) } ?? 0 }
  }
  package func bigEndian32(_ offset: Int) -> UInt32 {
    withUnsafeBytes { $0.baseAddress.map { $0.bigEndian32(offset) } ?? 0 }
  }
  package func bigEndian64(_ offset: Int) -> UInt64 {
    withUnsafeBytes { $0.baseAddress.map { $0.bigEndian64(offset) } ?? 0 }
  }

  package mutating func appendBigEndian(_ value: some FixedWidthInteger) {
    Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
  }
}

/// Powers of two and sizes.
extension UInt64 {
  func roundedUp(to alignment: UInt64) -> UInt64 { (self &+ (alignment &- 1)) & ~(alignment &- 1) }
  func roundedDown(to alignment: UInt64) -> UInt64 { self & ~(alignment &- 1) }
  func dividedUp(by divisor: UInt64) -> UInt64 { self / divisor + (self % divisor == 0 ? 0 : 1) }
}
