import Foundation
import GuestMemory
import StateTree

@testable import SavedMachine

/// Feeds files to the reader of saved machines: each is a machine or one error.
enum SaveHarness {
  private static let pages = 4
  /// Always the same file, so that none is made for each input.
  private static let file: Int32 = {
    var name = Array((NSTemporaryDirectory() + "fuzz-save-XXXXXX").utf8CString)
    let file = mkstemp(&name)
    guard file >= 0, unlink(name) == 0 else { fatalError("no temporary file: errno \(errno)") }
    return file
  }()
  private static let path = "/proc/self/fd/\(file)"

  /// Reads the bytes as they are, and with their checksums put right, so that what is behind them is reached.
  static func run(_ bytes: UnsafeBufferPointer<UInt8>) {
    var bytes = Array(bytes)
    read(bytes)
    repair(&bytes)
    read(bytes)
  }

  private static func read(_ bytes: [UInt8]) {
    guard ftruncate(file, 0) == 0, ftruncate(file, off_t(bytes.count)) == 0,
      bytes.withUnsafeBytes({ pwrite(file, $0.baseAddress, $0.count, 0) }) == bytes.count
    else { fatalError("the harness's file cannot be written") }
    do throws(SavedMachineError) {
      let saved = try SavedMachine(path: path)
      walk(saved.state, depth: 0)
      guard saved.state.encoded().count > 0 else { fatalError("a tree that was read cannot be written") }
      try saved.verifyMemory()
      if let memory = memory(saved.memorySize) { try saved.map(into: memory) }
    } catch {
      // One line, whatever is in the file.
      guard !error.description.contains("\n") else { fatalError("an error of several lines: \(error)") }
    }
  }

  private static func walk(_ node: StateNode, depth: Int) {
    guard depth < 1000 else { fatalError("a tree deeper than 1000") }
    for child in node.children { walk(child, depth: depth + 1) }
  }

  private static func memory(_ size: UInt64) -> GuestMemory? {
    guard size > 0, size <= 1 << 20, let range = GuestRange(start: GuestPhysicalAddress(0), size: size) else {
      return nil
    }
    return try? GuestMemory([range])
  }

  /// The checksums of the state, of RAM's table and of the first page, where these lie in the file.
  private static func repair(_ bytes: inout [UInt8]) {
    guard bytes.count >= SavedHeader.pageSize else { return }
    let state = part(at: 16, bytes)
    if let state, state.count >= 4 {
      put(checksum(Array(bytes[state.dropLast(4)])), state.upperBound - 4, &bytes)
    }
    if let table = part(at: 32, bytes, size: 4) { put(checksum(Array(bytes[table])), 64, &bytes) }
    put(0, 12, &bytes)
    put(checksum(Array(bytes.prefix(SavedHeader.pageSize))), 12, &bytes)
  }

  private static func part(at place: Int, _ bytes: [UInt8], size: UInt64 = 1) -> Range<Int>? {
    func word(_ place: Int) -> UInt64 { (0..<8).reversed().reduce(0) { $0 << 8 | UInt64(bytes[place + $1]) } }
    let (start, count) = (word(place), word(place + 8).multipliedReportingOverflow(by: size))
    guard !count.overflow, start <= UInt64(bytes.count), count.partialValue <= UInt64(bytes.count) - start else {
      return nil
    }
    return Int(start)..<Int(start + count.partialValue)
  }

  private static func put(_ value: UInt32, _ place: Int, _ bytes: inout [UInt8]) {
    for index in 0..<4 { bytes[place + index] = UInt8(truncatingIfNeeded: value >> UInt32(index * 8)) }
  }

  // MARK: Inputs

  /// Writes valid files.
  static func writeSeeds(to folder: String) throws {
    for (index, seed) in try seeds().enumerated() {
      try Data(seed).write(to: URL(fileURLWithPath: "\(folder)/saved-\(index)"))
    }
  }

  /// Changes bytes of valid files, most of them where everything else depends on them.
  static func mutate(count: Int, seed: UInt64) throws {
    let seeds = try seeds()
    var generator = Mixer(state: seed)
    let values: [UInt8] = [0, 1, 2, 0x3f, 0x40, 0x7f, 0x80, 0xff]
    for round in 0..<count {
      var bytes = seeds[round % seeds.count]
      for _ in 0..<Int.random(in: 1...6, using: &generator) {
        // The first words, the state or anything.
        let area = [0..<72, 4096..<max(4096, min(bytes.count, 4096 + 256)), 0..<bytes.count].randomElement(
          using: &generator)
        guard let area, let place = area.randomElement(using: &generator), place < bytes.count else { continue }
        switch Int.random(in: 0..<12, using: &generator) {
        case 0: bytes.removeLast(min(bytes.count - 1, Int.random(in: 0..<5000, using: &generator)))
        case 1: bytes.insert(values.randomElement(using: &generator) ?? 0, at: place)
        case 2...6: bytes[place] = .random(in: 0...255, using: &generator)
        default: bytes[place] = values.randomElement(using: &generator) ?? 0
        }
      }
      bytes.withUnsafeBufferPointer { run($0) }
      if (round + 1) % 1_000_000 == 0 { print("\(round + 1) files") }
    }
  }

  private static func seeds() throws -> [[UInt8]] {
    let leaf = StateNode("leaf", version: 1) { $0.write(UInt64(0x1122_3344_5566_7788)) }
    let trees = [
      leaf, StateNode("saved", version: 1, children: [leaf, StateNode("text", version: 2) { $0.write("a text") }]),
      (0..<8).reduce(leaf) { node, level in StateNode("level\(level)", version: 3, children: [node]) },
    ]
    var seeds: [[UInt8]] = []
    for (index, tree) in trees.enumerated() {
      guard let memory = memory(UInt64(pages * index + 1) << 12) else { continue }
      try memory.write(UInt32(0x5a5a_5a5a), to: GuestPhysicalAddress(16))
      let path = NSTemporaryDirectory() + "fuzz-save-\(getpid())"
      defer { unlink(path) }
      _ = try SavedMachine.write(tree, memory, to: path)
      seeds.append(Array(try Data(contentsOf: URL(fileURLWithPath: path))))
    }
    return seeds
  }
}

/// splitmix64.
private struct Mixer: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var value = state
    value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
    value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
    return value ^ value >> 31
  }
}
