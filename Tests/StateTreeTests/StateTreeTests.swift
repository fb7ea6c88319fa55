import StateTree
import Testing

@Suite struct StateTrees {
  private static let tree: StateNode = {
    let serial = StateNode("serial", version: 2) { writer in
      writer.write(UInt8(0x60))
      writer.write(true)
      writer.write("out of the line")
    }
    let disk = StateNode("disk", version: 1, children: [StateNode("queue", version: 7) { $0.write([UInt8](0..<40)) }])
    return StateNode("machine", version: 1, children: [serial, disk]) { $0.write(UInt64(0x0123_4567_89ab_cdef)) }
  }()

  @Test func areReadAsTheyWereWritten() throws {
    #expect(try StateNode(decoding: Self.tree.encoded()) == Self.tree)
    #expect(try StateNode(decoding: StateNode("", version: 0).encoded()) == StateNode("", version: 0))
  }

  @Test func haveACheckValueThatOthersCompute() {
    // As zlib's crc32 gives it for the bytes before.
    let bytes = StateNode("a", version: 1).encoded()
    #expect(bytes.prefix(8) == ArraySlice("SWVMST01".utf8))
    #expect(Array(bytes.dropFirst(8).dropLast(4)) == [1, 0, 0, 0, 0x61, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    #expect(Array(bytes.suffix(4)) == [0x01, 0x0f, 0x9e, 0xbf])
  }

  @Test func areRefusedWhereTheyEndEarly() {
    let bytes = Self.tree.encoded()
    for length in 0..<bytes.count {
      #expect(throws: StateError.self) { try StateNode(decoding: Array(bytes.prefix(length))) }
    }
    #expect(throws: StateError.self) { try StateNode(decoding: bytes + [0]) }
  }

  @Test func areRefusedWithAnyBitFlipped() {
    let bytes = Self.tree.encoded()
    for bit in 0..<bytes.count * 8 {
      var flipped = bytes
      flipped[bit / 8] ^= 1 << UInt8(bit % 8)
      #expect(throws: StateError.notAState) { try StateNode(decoding: flipped) }
    }
  }

  private static let crcOfByte: [UInt32] = (0..<256).map { byte in
    (0..<8).reduce(UInt32(byte)) { crc, _ in crc & 1 == 1 ? crc >> 1 ^ 0xedb8_8320 : crc >> 1 }
  }

  /// Bytes with a right check value, so that the parser sees them.
  private static func sealed(_ body: [UInt8]) -> [UInt8] {
    let bytes = Array("SWVMST01".utf8) + body
    var crc: UInt32 = .max
    for byte in bytes { crc = crc >> 8 ^ crcOfByte[Int(UInt8(truncatingIfNeeded: crc) ^ byte)] }
    return bytes + (0..<4).map { UInt8(truncatingIfNeeded: ~crc >> ($0 * 8)) }
  }

  @Test func areRefusedWhenTooDeep() throws {
    var node = StateNode("leaf", version: 1)
    for _ in 0..<15 { node = StateNode("branch", version: 1, children: [node]) }
    #expect(try StateNode(decoding: node.encoded()) == node)
    node = StateNode("branch", version: 1, children: [node])
    #expect(throws: StateError.tooDeep) { try StateNode(decoding: node.encoded()) }
  }

  @Test func areRefusedWithHostileCounts() {
    let name: [UInt8] = [1, 0, 0, 0, 0x61]
    let version: [UInt8] = [1, 0, 0, 0]
    let none: [UInt8] = [0, 0, 0, 0]
    let huge: [UInt8] = [0xff, 0xff, 0xff, 0xff]
    let hostile: [[UInt8]] = [
      [], huge, huge + version, [0, 1, 0, 0] + [UInt8](repeating: 0x61, count: 300), name, name + version,
      name + version + huge, name + version + none, name + version + none + huge,
      name + version + none + none + [0], name + version + [5, 0, 0, 0] + none,
    ]
    for body in hostile {
      #expect(throws: StateError.self) { try StateNode(decoding: Self.sealed(body)) }
    }
    #expect(throws: Never.self) { try StateNode(decoding: Self.sealed(name + version + none + none)) }
  }

  @Test func neverTrap() {
    var random = SplitMix(state: 1)
    let body = Array(Self.tree.encoded().dropFirst(8).dropLast(4))
    var read = 0
    for round in 0..<100_000 {
      var bytes = body
      if round % 2 == 0 {
        for _ in 0..<Int.random(in: 1...4, using: &random) {
          bytes[Int.random(in: 0..<bytes.count, using: &random)] = UInt8.random(in: 0...255, using: &random)
        }
      } else {
        // Small numbers make lengths and counts that fit now and then.
        bytes = (0..<Int.random(in: 0..<64, using: &random)).map { _ in UInt8.random(in: 0...3, using: &random) }
      }
      if (try? StateNode(decoding: Self.sealed(bytes))) != nil { read += 1 }
    }
    #expect(read > 0 && read < 100_000)
  }
}

@Suite struct StateNodes {
  private let node = StateNode("part", version: 3) { writer in
    writer.write(UInt16(0x1234))
    writer.write(Int32(-5))
    writer.write(false)
    writer.write([1, 2, 3])
    writer.write("naïve")
  }

  @Test func readTheirFields() throws {
    try node.read("part", versions: 1...3) { reader, version throws(StateError) in
      #expect(version == 3)
      #expect(try reader.read(UInt16.self) == 0x1234)
      #expect(try reader.read(Int32.self) == -5)
      #expect(try reader.read(Bool.self) == false)
      #expect(try reader.read(limit: 3) == [1, 2, 3])
      #expect(try reader.readString(limit: 6) == "naïve")
      #expect(reader.remaining == 0)
    }
  }

  @Test func refuseOtherReaders() {
    func attempt(
      _ name: String, _ versions: ClosedRange<UInt32>,
      _ body: @escaping (inout StateReader) throws(StateError) -> Void
    ) -> StateError? {
      do throws(StateError) {
        try node.read(name, versions: versions) { reader, _ throws(StateError) in try body(&reader) }
        return nil
      } catch {
        return error
      }
    }
    let all: (inout StateReader) throws(StateError) -> Void = { reader throws(StateError) in
      _ = try reader.read(UInt64.self)
    }
    #expect(attempt("other", 3...3, all) == .unexpected(node: "part", wanted: "other"))
    #expect(attempt("part", 1...2, all) == .version(node: "part", found: 3, known: 1...2))
    #expect(attempt("part", 3...3, all) == .trailing(node: "part", bytes: node.payload.count - 8))
    #expect(
      attempt("part", 3...3) { reader throws(StateError) in while true { _ = try reader.read(UInt8.self) } }
        == .truncated(node: "part"))
    #expect(
      attempt("part", 3...3) { reader throws(StateError) in _ = try reader.read(Bool.self) }
        == .invalid(node: "part", field: "a truth value", value: 0x34))
    #expect(
      attempt("part", 3...3) { reader throws(StateError) in
        _ = try reader.read(UInt16.self)
        _ = try reader.read(UInt32.self)
        _ = try reader.read(Bool.self)
        _ = try reader.read(limit: 2)
      } == .invalid(node: "part", field: "a length", value: 3))
  }

  @Test func findTheirChildren() throws {
    let parent = StateNode("parent", version: 1, children: [node])
    #expect(try parent.child("part") == node)
    #expect(throws: StateError.missing(node: "parent", child: "other")) { try parent.child("other") }
  }
}

/// Steele, Lea and Flood's generator: the same inputs in every run.
private struct SplitMix: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var mixed = (state ^ state >> 30) &* 0xbf58_476d_1ce4_e5b9
    mixed = (mixed ^ mixed >> 27) &* 0x94d0_49bb_1331_11eb
    return mixed ^ mixed >> 31
  }
}
