import X86

/// Code: bytes of any kind, instructions of every row of the opcode table, and such with bits flipped.
struct RandomBytes: Sendable {
  private let mode: CodeMode
  /// Encodings found for each row.
  private let rows: [[[UInt8]]]

  /// By mode, made once.
  static let code16 = RandomBytes(.code16)
  static let code32 = RandomBytes(.code32)
  static let code64 = RandomBytes(.code64)

  static func of(_ mode: CodeMode) -> RandomBytes {
    switch mode {
    case .code16: code16
    case .code32: code32
    case .code64: code64
    }
  }

  private static let perRow = 12

  private init(_ mode: CodeMode) {
    self.mode = mode
    var random = RandomSource(seed: 0xc0de + UInt64(mode.rawValue))
    var found = [[[UInt8]]](repeating: [], count: X86.Operation.count)
    for _ in 0..<300_000 {
      let bytes = Self.encoding(mode, &random)
      guard let instruction = Self.decode(bytes, mode) else { continue }
      let row = Int(instruction.operation.rawValue)
      if found[row].count < Self.perRow { found[row].append(Array(bytes.prefix(Int(instruction.length)))) }
    }
    rows = found.filter { !$0.isEmpty }
  }

  /// Rows of the opcode table that there are encodings of.
  var rowCount: Int { rows.count }

  private static func decode(_ bytes: [UInt8], _ mode: CodeMode) -> Instruction? {
    bytes.withUnsafeBytes { try? Instruction(decoding: $0, mode: mode) }
  }

  /// Prefixes, an opcode of any map, and 15 bytes or more in all.
  private static func encoding(_ mode: CodeMode, _ random: inout RandomSource) -> [UInt8] {
    var bytes: [UInt8] = []
    if random.oneIn(4) { bytes.append(random.pick([0x66, 0x66, 0xf2, 0xf3, 0xf3])) }
    if random.oneIn(12) { bytes.append(random.pick([0x67, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0xf0])) }
    let isLong = mode == .code64
    switch random.below(8) {
    case 0:
      bytes += [0xc5, random.byte() | (isLong ? 0 : 0xc0)]
      if random.oneIn(2) { bytes[bytes.count - 1] |= 0x78 }
    case 1:
      let third = random.byte()
      bytes += [0xc4, random.byte() & 0xe0 | UInt8(1 + random.below(3)) | (isLong ? 0 : 0xc0)]
      bytes.append(random.oneIn(2) ? third | 0x78 : third)
    case let kind:
      if isLong, random.oneIn(3) { bytes.append(0x40 | random.byte() & 15) }
      if kind >= 4 { bytes.append(0x0f) }
      if kind == 6 { bytes.append(0x38) }
      if kind == 7 { bytes.append(random.oneIn(2) ? 0x3a : 0xae) }
    }
    for _ in 0..<15 { bytes.append(random.oneIn(3) && bytes.count > 4 ? 0 : random.byte()) }
    return bytes
  }

  /// About `count` bytes, mostly of one kind.
  func make(_ count: Int, _ random: inout RandomSource) -> [UInt8] {
    let kind = random.below(8)
    var bytes: [UInt8] = []
    while bytes.count < count {
      // 0 and 1: anything; 2 and 3: a mixture; then instructions, of which some have a bit flipped.
      if kind < 2 || kind < 4 && random.oneIn(4) || random.oneIn(64) {
        for _ in 0..<4 { bytes.append(random.byte()) }
        continue
      }
      var one = random.pick(random.pick(rows))
      if kind >= 6 ? random.oneIn(16) : random.oneIn(3) {
        let place = random.below(one.count)
        one[place] ^= 1 << UInt8(random.below(8))
      }
      bytes += one
    }
    return bytes
  }
}
