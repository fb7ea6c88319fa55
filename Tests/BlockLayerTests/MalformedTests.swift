import BlockLayer
import Testing

/// Images whose bytes lie. Each is refused or answers with an error; nothing traps or goes on for ever.
struct MalformedTests {
  private static func image(_ change: (inout Qcow2CreateOptions) -> Void = { _ in }) throws -> [UInt8] {
    var options = Qcow2CreateOptions(size: 256 << 10)
    options.clusterSize = 512
    change(&options)
    let file = RecordingFile()
    try Qcow2Image.create(options, in: file)
    let image = try Qcow2Image(file)
    let queue = ManualQueue()
    try image.fill(1, at: 0, 64 << 10, on: queue)
    try image.createSnapshot("s", seconds: 0, nanoseconds: 0)
    try image.fill(2, at: 4096, 4096, on: queue)
    try image.addBitmap("b", granularity: 512)
    try image.close()
    return file.bytes
  }

  private static func put(_ bytes: inout [UInt8], _ offset: Int, _ value: UInt64, width: Int) {
    for index in 0..<width {
      bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64((width - 1 - index) * 8))
    }
  }

  struct Lie: CustomTestStringConvertible {
    var offset: Int
    var value: UInt64
    var width: Int
    var text: String
    var testDescription: String { text }
  }

  @Test(arguments: [
    Lie(offset: 0, value: 0, width: 4, text: "magic number"),
    Lie(offset: 4, value: 4, width: 4, text: "version 4"),
    Lie(offset: 20, value: 8, width: 4, text: "2^8 bytes"),
    Lie(offset: 20, value: 22, width: 4, text: "2^22 bytes"),
    Lie(offset: 24, value: UInt64.max, width: 8, text: "size is 18446744073709551615"),
    Lie(offset: 24, value: 1 << 40, width: 8, text: "L1 table has"),
    Lie(offset: 32, value: 1, width: 4, text: "encrypted"),
    Lie(offset: 36, value: 0xffff_ffff, width: 4, text: "L1 table's size"),
    Lie(offset: 40, value: 513, width: 8, text: "L1 table at 513 is not aligned"),
    Lie(offset: 40, value: 0, width: 8, text: "L1 table"),
    Lie(offset: 48, value: 1 << 62, width: 8, text: "refcount table"),
    Lie(offset: 56, value: 0xffff_ffff, width: 4, text: "refcount table's size"),
    Lie(offset: 60, value: 70000, width: 4, text: "number of snapshots is 70000"),
    Lie(offset: 72, value: 1 << 60, width: 8, text: "incompatible features"),
    Lie(offset: 72, value: 1 << 3, width: 8, text: "compression type 0"),
    Lie(offset: 96, value: 7, width: 4, text: "2^7 bits"),
    Lie(offset: 100, value: 8, width: 4, text: "header has 8 bytes"),
    Lie(offset: 116, value: 0xffff_fff0, width: 4, text: "header extension"),
  ])
  func liesInTheHeaderAreNamed(_ lie: Lie) throws {
    var bytes = try Self.image()
    Self.put(&bytes, lie.offset, lie.value, width: lie.width)
    do {
      _ = try Qcow2Image(RecordingFile(bytes))
      Issue.record("it was opened")
    } catch {
      #expect("\(error)".contains(lie.text), "\(error)")
      #expect(!"\(error)".contains("\n"))
    }
  }

  @Test func unknownFeaturesAreKeptOrCleared() throws {
    var bytes = try Self.image()
    Self.put(&bytes, 80, 1 << 40, width: 8)
    Self.put(&bytes, 88, 1 << 41 | 1, width: 8)
    let file = RecordingFile(bytes)
    try Qcow2Image(file).close()
    #expect(file.bytes[82] == 1, "an unknown compatible feature is kept")
    #expect(file.bytes[90] == 0 && file.bytes[95] == 1, "an unknown autoclear feature is cleared by a writer")
  }

  @Test func aTableThatNamesTheHeaderIsNotWrittenThrough() throws {
    var bytes = try Self.image()
    let l1 = Int(bytes[40..<48].reduce(UInt64(0)) { $0 << 8 | UInt64($1) })
    let l2 = Int(bytes[l1..<(l1 + 8)].reduce(UInt64(0)) { $0 << 8 | UInt64($1) } & 0x00ff_ffff_ffff_fe00)
    // Says: the first cluster of the disk is the L1 table, and may be written in place.
    Self.put(&bytes, l2, 1 << 63 | UInt64(l1), width: 8)
    Self.put(&bytes, l1, 1 << 63 | UInt64(l2), width: 8)
    let file = RecordingFile(bytes)
    let image = try Qcow2Image(file)
    let queue = ManualQueue()
    #expect(throws: BlockError.self) { try image.fill(9, at: 0, 512, on: queue) }
    #expect(image.isReadOnly)
    #expect(Array(file.bytes[l1..<(l1 + 512)]) == Array(bytes[l1..<(l1 + 512)]))
  }

  /// Random bytes of the tables changed: everything that can be asked of an image is asked.
  @Test func nothingTrapsOnChangedBytes() throws {
    let images = try [
      Self.image(), Self.image { $0.refcountBits = 1 << 6 }, Self.image { $0.lazyRefcounts = true },
      Self.image {
        $0.clusterSize = 16384
        $0.extendedL2 = true
      },
    ]
    var generator = SeededGenerator(77)
    var opened = 0
    for round in 0..<800 {
      var bytes = images[round % images.count]
      for _ in 0..<Int.random(in: 1...6, using: &generator) {
        let area = Bool.random(using: &generator) ? 128 : bytes.count
        bytes[Int.random(in: 0..<area, using: &generator)] = .random(in: 0...255, using: &generator)
      }
      if exercise(bytes) { opened += 1 }
    }
    #expect(opened > 100, "most of the images were refused at once, so little was tried")
  }

  private func exercise(_ bytes: [UInt8]) -> Bool {
    var options = Qcow2Image.Options()
    options.forCheck = true
    if let image = try? Qcow2Image(RecordingFile(bytes), options: options) { _ = try? image.check() }
    guard let image = try? Qcow2Image(RecordingFile(bytes)) else { return false }
    let queue = ManualQueue()
    let length = Int(min(image.size, 64 << 10))
    _ = try? image.contents(at: 0, length, on: queue)
    try? image.fill(3, at: 0, min(length, 8192), on: queue)
    try? image.perform(.writeZeroes, at: 0, length: UInt64(length), on: queue)
    try? image.perform(.flush, on: queue)
    try? image.createSnapshot("n", seconds: 0, nanoseconds: 0)
    try? image.applySnapshot("s")
    try? image.deleteSnapshot("s")
    try? image.close()
    return true
  }

  @Test func errorsOfTheFileReachTheRequest() throws {
    let file = RecordingFile()
    try Qcow2Image.create(Qcow2CreateOptions(size: 1 << 20), in: file)
    let image = try Qcow2Image(file)
    let queue = ManualQueue()
    try image.fill(1, at: 0, 4096, on: queue)
    file.isRecording = true
    file.failsFrom = 0
    #expect(throws: BlockError.self) { try image.fill(1, at: 1 << 19, 4096, on: queue) }
    #expect(throws: BlockError.self) { try image.perform(.flush, on: queue) }
    // The host has room again: nothing that was acknowledged is lost.
    file.failsFrom = Int.max
    try image.perform(.flush, on: queue)
    try image.close()
    let again = try Qcow2Image(RecordingFile(file.bytes))
    #expect(try again.check().corruptions == 0)
    #expect(try again.contents(at: 0, 4096, on: queue).allSatisfy { $0 == 1 })
  }
}
