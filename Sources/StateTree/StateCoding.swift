/// Writes little-endian fields.
public struct StateWriter {
  /// What was written so far.
  public private(set) var bytes: [UInt8] = []

  /// An empty writer.
  public init() {}

  /// One integer, in its own size.
  public mutating func write<T: FixedWidthInteger>(_ value: T) {
    withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
  }

  /// One byte, 0 or 1.
  public mutating func write(_ value: Bool) {
    bytes.append(value ? 1 : 0)
  }

  /// A 32-bit count, then the bytes.
  public mutating func write(_ value: [UInt8]) {
    write(UInt32(value.count))
    bytes.append(contentsOf: value)
  }

  /// A 32-bit count, then the UTF-8 bytes.
  public mutating func write(_ value: String) {
    write(Array(value.utf8))
  }
}

/// Reads the fields of a payload in the order in which they were written; never past its end.
public struct StateReader {
  private let node: String
  private let bytes: [UInt8]
  private var position = 0

  init(node: String, bytes: [UInt8]) {
    self.node = node
    self.bytes = bytes
  }

  /// Bytes that were not read yet.
  public var remaining: Int { bytes.count - position }

  /// One integer in its own size.
  public mutating func read<T: FixedWidthInteger>(_ type: T.Type = T.self) throws(StateError) -> T {
    let count = MemoryLayout<T>.size
    guard remaining >= count else { throw .truncated(node: node) }
    var value: T = 0
    for index in (0..<count).reversed() { value = value << 8 | T(truncatingIfNeeded: bytes[position + index]) }
    position += count
    return value
  }

  /// A byte that is 0 or 1.
  public mutating func read(_ type: Bool.Type = Bool.self) throws(StateError) -> Bool {
    let value = try read(UInt8.self)
    guard value <= 1 else { throw invalid("a truth value", UInt64(value)) }
    return value == 1
  }

  /// A counted run of bytes, at most `limit` of them.
  public mutating func read(limit: Int) throws(StateError) -> [UInt8] {
    let count = Int(try read(UInt32.self))
    guard count <= limit else { throw invalid("a length", UInt64(count)) }
    guard remaining >= count else { throw .truncated(node: node) }
    defer { position += count }
    return Array(bytes[position..<position + count])
  }

  /// A counted run of UTF-8, at most `limit` bytes of it.
  public mutating func readString(limit: Int) throws(StateError) -> String {
    String(decoding: try read(limit: limit), as: UTF8.self)
  }

  /// The error of a value that the caller cannot accept, in this node.
  public func invalid(_ field: String, _ value: UInt64) -> StateError {
    .invalid(node: node, field: field, value: value)
  }
}

extension StateNode {
  private static let magic: [UInt8] = Array("SWVMST01".utf8)
  private static let maximumDepth = 16

  /// The tree as bytes: magic, node, and a CRC-32 of both. A node is name, version, payload, child count, children.
  public func encoded() -> [UInt8] {
    var writer = StateWriter()
    encode(into: &writer)
    let body = Self.magic + writer.bytes
    var checksum = StateWriter()
    checksum.write(crc32(body))
    return body + checksum.bytes
  }

  /// Reads what `encoded` wrote. Any other bytes are an error, never a trap.
  public init(decoding bytes: [UInt8]) throws(StateError) {
    guard bytes.count >= Self.magic.count + 4, bytes.starts(with: Self.magic) else { throw .notAState }
    let body = Array(bytes.dropLast(4))
    var tail = StateReader(node: "checksum", bytes: Array(bytes.suffix(4)))
    guard try tail.read(UInt32.self) == crc32(body) else { throw .notAState }
    var reader = StateReader(node: "tree", bytes: Array(body.dropFirst(Self.magic.count)))
    self = try Self.decode(&reader, depth: 0)
    guard reader.remaining == 0 else { throw .trailing(node: "tree", bytes: reader.remaining) }
  }

  private func encode(into writer: inout StateWriter) {
    writer.write(name)
    writer.write(version)
    writer.write(payload)
    writer.write(UInt32(children.count))
    for child in children { child.encode(into: &writer) }
  }

  private static func decode(_ reader: inout StateReader, depth: Int) throws(StateError) -> StateNode {
    guard depth < maximumDepth else { throw .tooDeep }
    var node = StateNode(try reader.readString(limit: 255), version: try reader.read())
    node.payload = try reader.read(limit: reader.remaining)
    // Every child takes bytes of the input, so a hostile count runs out of input before it runs out of memory.
    for _ in 0..<(try reader.read(UInt32.self)) { node.children.append(try decode(&reader, depth: depth + 1)) }
    return node
  }
}

/// CRC-32 (ISO 3309), as zlib computes it.
func crc32(_ bytes: [UInt8]) -> UInt32 {
  var crc: UInt32 = 0xffff_ffff
  for byte in bytes { crc = crc >> 8 ^ crcOfByte[Int(UInt8(truncatingIfNeeded: crc) ^ byte)] }
  return ~crc
}

private let crcOfByte: [UInt32] = (0..<256).map { byte in
  (0..<8).reduce(UInt32(byte)) { crc, _ in crc & 1 == 1 ? crc >> 1 ^ 0xedb8_8320 : crc >> 1 }
}
