/// Little-endian tables: what firmware and boot protocols hand over, field by field.
struct TableBytes {
  private(set) var bytes: [UInt8] = []

  init() {}

  /// `count` zero bytes, to be filled by `store`.
  init(zeros count: Int) {
    bytes = [UInt8](repeating: 0, count: count)
  }

  var count: Int { bytes.count }

  mutating func append<T: FixedWidthInteger>(_ value: T) {
    withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
  }

  mutating func append(_ more: some Sequence<UInt8>) {
    bytes.append(contentsOf: more)
  }

  /// The text's UTF-8 and a NUL.
  mutating func append(cString text: String) {
    bytes.append(contentsOf: text.utf8)
    bytes.append(0)
  }

  /// Zero bytes up to a multiple of `alignment`.
  mutating func pad(to alignment: Int) {
    while bytes.count % alignment != 0 { bytes.append(0) }
  }

  mutating func store<T: FixedWidthInteger>(_ value: T, at offset: Int) {
    withUnsafeBytes(of: value.littleEndian) { source in
      for index in 0..<source.count { bytes[offset + index] = source[index] }
    }
  }

  mutating func store(_ more: [UInt8], at offset: Int) {
    for index in 0..<more.count { bytes[offset + index] = more[index] }
  }
}

extension Array where Element == UInt8 {
  /// The little-endian number at `offset`; nil where it is not all inside.
  func number<T: FixedWidthInteger>(at offset: Int, as type: T.Type = T.self) -> T? {
    let size = Swift.MemoryLayout<T>.size
    guard offset >= 0, count >= size, offset <= count - size else { return nil }
    var value: T = 0
    for index in (0..<size).reversed() { value = value << 8 | T(truncatingIfNeeded: self[offset + index]) }
    return value
  }
}
