import CCompression

/// The first page of a saved machine; docs/state.md has the table.
struct SavedHeader: Equatable {
  static let magic: [UInt8] = Array("SWVMSAVE".utf8)
  static let versions: [UInt32] = [1, 2]
  static let pageSize = 4096
  /// Bytes of RAM that share a checksum.
  static let chunkSize = 1 << 20
  /// More than any state is.
  static let maximumState = 256 << 20

  /// 1: RAM is the last; 2: it is the first, so that it can be written while the state is still to come.
  var version: UInt32
  var stateOffset: UInt64
  var stateCount: UInt64
  var checksumsOffset: UInt64
  var checksumsCount: UInt64
  var memoryOffset: UInt64
  var memorySize: UInt64
  var checksumsChecksum: UInt32 = 0

  /// The places of a machine with so much RAM and state.
  init(state: Int, memory: UInt64, version: UInt32 = 2) {
    self.version = version
    let (first, page) = (UInt64(Self.pageSize), UInt64(Self.pageSize))
    stateOffset = version == 1 ? first : first + memory
    stateCount = UInt64(state)
    checksumsOffset = stateOffset + stateCount
    checksumsCount = (memory + UInt64(Self.chunkSize) - 1) / UInt64(Self.chunkSize)
    let end = checksumsOffset + checksumsCount * 4
    memoryOffset = version == 1 ? (end + page - 1) & ~(page - 1) : first
    memorySize = memory
  }

  /// Bytes of the file.
  var end: UInt64 { version == 1 ? memoryOffset + memorySize : checksumsOffset + checksumsCount * 4 }

  private static let checksumPlace = 12

  /// The page.
  var encoded: [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.pageSize)
    bytes.replaceSubrange(0..<8, with: Self.magic)
    put(version, 8, &bytes)
    let places = [stateOffset, stateCount, checksumsOffset, checksumsCount, memoryOffset, memorySize]
    for (index, place) in places.enumerated() { put(place, 16 + index * 8, &bytes) }
    put(checksumsChecksum, 64, &bytes)
    put(checksum(bytes), Self.checksumPlace, &bytes)
    return bytes
  }

  /// Reads a page; `fileSize` is that of the file. Whatever it says lies inside the file.
  init(_ page: [UInt8], path: String, fileSize: UInt64) throws(SavedMachineError) {
    guard page.count >= 12, page.starts(with: Self.magic) else { throw .notASavedMachine(path: path) }
    let version = get(UInt32.self, 8, page)
    guard Self.versions.contains(version) else {
      throw .version(path: path, found: version, known: Self.versions)
    }
    guard page.count == Self.pageSize else { throw .damaged(path: path, part: .header) }
    var zeroed = page
    put(UInt32(0), Self.checksumPlace, &zeroed)
    guard checksum(zeroed) == get(UInt32.self, Self.checksumPlace, page) else {
      throw .damaged(path: path, part: .header)
    }
    let places = (0..<6).map { get(UInt64.self, 16 + $0 * 8, page) }
    guard places[1] <= UInt64(Self.maximumState), places[5] <= fileSize else {
      throw .damaged(path: path, part: .bounds)
    }
    // The layout follows from two sizes, so that no place can be chosen.
    self.init(state: Int(places[1]), memory: places[5], version: version)
    guard places == [stateOffset, stateCount, checksumsOffset, checksumsCount, memoryOffset, memorySize],
      memorySize & UInt64(Self.pageSize - 1) == 0, end <= fileSize
    else { throw .damaged(path: path, part: .bounds) }
    checksumsChecksum = get(UInt32.self, 64, page)
  }
}

private func put<Value: FixedWidthInteger>(_ value: Value, _ place: Int, _ bytes: inout [UInt8]) {
  for index in 0..<MemoryLayout<Value>.size {
    bytes[place + index] = UInt8(truncatingIfNeeded: value >> Value(index * 8))
  }
}

private func get<Value: FixedWidthInteger>(_: Value.Type, _ place: Int, _ bytes: [UInt8]) -> Value {
  (0..<MemoryLayout<Value>.size).reversed().reduce(0) { $0 << 8 | Value(truncatingIfNeeded: bytes[place + $1]) }
}

/// CRC-32 (ISO 3309).
func checksum(_ bytes: [UInt8]) -> UInt32 {
  bytes.withUnsafeBytes {
    UInt32(truncatingIfNeeded: crc32_z(0, $0.baseAddress?.assumingMemoryBound(to: UInt8.self), $0.count))
  }
}

/// The checksum of one chunk of RAM, page by page; pages of zeros count as much as if they were not there.
struct ChunkChecksum {
  private(set) var value: UInt32 = 0

  /// Takes the page with this number of its chunk.
  mutating func add(_ number: Int, _ page: UnsafeRawPointer) {
    var mark = UInt32(number).littleEndian
    var crc = UInt(value)
    crc = withUnsafeBytes(of: &mark) { crc32_z(crc, $0.baseAddress?.assumingMemoryBound(to: UInt8.self), 4) }
    crc = crc32_z(crc, page.assumingMemoryBound(to: UInt8.self), SavedHeader.pageSize)
    value = UInt32(truncatingIfNeeded: crc)
  }
}
