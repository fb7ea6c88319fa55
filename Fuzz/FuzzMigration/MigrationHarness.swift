import Foundation
import GuestMemory
import Host

@testable import Migration
@testable import StateTree

/// Feeds streams to a migration's destination: each ends in one error, and no machine runs.
enum MigrationHarness {
  private static let pages = 70
  private static let session = SIMD2<UInt64>(1, 2)
  private static let place = NSTemporaryDirectory() + "fuzz-migration-\(getpid())"

  /// A machine of memory alone, which never gets as far as to have its disks.
  private final class Machine: ArrivingMachine {
    let memory: GuestMemory

    init(_ memory: GuestMemory) { self.memory = memory }
    func check(_ description: StateNode) throws(MigrationError) { walk(description, depth: 0) }
    func arrive(_ state: StateNode) throws(MigrationError) { walk(state, depth: 0) }
    func takeDisks() throws(MigrationError) { throw .machine("it has no disks") }
    func goOn(_ ran: Bool) { fatalError("a machine without disks runs") }

    private func walk(_ node: StateNode, depth: Int) {
      guard depth < 1000 else { fatalError("a tree deeper than 1000") }
      for child in node.children { walk(child, depth: depth + 1) }
    }
  }

  /// Takes the bytes as they are, as what one link brings after its greeting, and with their trees' checksums put right, so
  /// that what is behind them is reached; and as a greeting.
  static func run(_ bytes: UnsafeBufferPointer<UInt8>) {
    var bytes = Array(bytes)
    do throws(MigrationError) {
      let greeting = try MigrationGreeting(Array(bytes.prefix(MigrationGreeting.size)))
      guard greeting.link < greeting.links else { fatalError("link \(greeting.link) of \(greeting.links)") }
    } catch {
      check(error)
    }
    take(bytes)
    let before = bytes
    repair(&bytes)
    if bytes != before { take(bytes) }
  }

  private static func check(_ error: MigrationError) {
    // One line, whatever is in the stream.
    guard !error.description.contains("\n") else { fatalError("an error of several lines: \(error)") }
  }

  private static func take(_ bytes: [UInt8]) {
    do {
      let memory = try memory()
      let destination = MigrationDestination(Machine(memory), on: try StreamListener(.unix(path: place)))
      let pair = try socketPair()
      let there = FileDescriptor(owning: pair.1)
      let greeting = MigrationGreeting(.move, session: session)
      let link = MigrationLink(FileDescriptor(owning: pair.0))
      destination.join(link, greeting)
      try bytes.withUnsafeBytes { try there.sendAll($0) }
      shutdown(there.rawValue, Int32(SHUT_WR))
      try destination.take([link])
      fatalError("a machine has come that has no disks")
    } catch let error as MigrationError {
      check(error)
    } catch {
      fatalError("the harness: \(error)")
    }
  }

  private static func socketPair() throws(HostError) -> (Int32, Int32) {
    var pair: (Int32, Int32) = (0, 0)
    let result = withUnsafeMutableBytes(of: &pair) {
      socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, $0.bindMemory(to: Int32.self).baseAddress)
    }
    guard result == 0 else { throw .systemCall("socketpair", errno: errno) }
    var size: Int32 = 1 << 20
    setsockopt(pair.1, SOL_SOCKET, SO_SNDBUF, &size, socklen_t(MemoryLayout<Int32>.size))
    return pair
  }

  private static func memory() throws -> GuestMemory {
    guard let range = GuestRange(start: GuestPhysicalAddress(0), size: UInt64(pages) << 12) else {
      fatalError("no range of \(pages) pages")
    }
    return try GuestMemory([range])
  }

  /// The checksums of the trees, where the records before them are whole.
  private static func repair(_ bytes: inout [UInt8]) {
    var place = 0
    while bytes.count - place >= 8 {
      let kind = word(place, bytes)
      let count = Int(word(place + 4, bytes))
      place += 8
      guard count <= bytes.count - place else { return }
      // The state has a byte before its tree.
      let start = kind == MigrationRecord.Kind.state.rawValue ? place + 1 : place
      let end = place + count - 4
      let hasTree = [MigrationRecord.Kind.machine, .state].contains { $0.rawValue == kind }
      if hasTree, end > start {
        let sum = crc32(Array(bytes[start..<end]))
        for index in 0..<4 { bytes[end + index] = UInt8(truncatingIfNeeded: sum >> UInt32(index * 8)) }
      }
      place += count
    }
  }

  private static func word(_ place: Int, _ bytes: [UInt8]) -> UInt32 {
    (0..<4).reversed().reduce(0) { $0 << 8 | UInt32(bytes[place + $1]) }
  }

  // MARK: Inputs

  /// Writes valid streams.
  static func writeSeeds(to folder: String) throws {
    for (index, seed) in try seeds().enumerated() {
      try Data(seed).write(to: URL(fileURLWithPath: "\(folder)/stream-\(index)"))
    }
  }

  /// Changes bytes of valid streams, half of them where records begin.
  static func mutate(count: Int, seed: UInt64) throws {
    let seeds = try seeds().map { (bytes: $0, starts: starts($0)) }
    var generator = Mixer(state: seed)
    let values: [UInt8] = [0, 1, 2, 5, 7, 8, 16, 0x3f, 0x40, 0x7f, 0x80, 0xff]
    for round in 0..<count {
      let seed = seeds[round % seeds.count]
      var bytes = seed.bytes
      for _ in 0..<Int.random(in: 1...4, using: &generator) {
        let start = Bool.random(using: &generator) ? seed.starts.randomElement(using: &generator) : nil
        let place =
          start.map { $0 + Int.random(in: 0..<24, using: &generator) }
          ?? .random(in: 0..<bytes.count, using: &generator)
        guard place < bytes.count else { continue }
        switch Int.random(in: 0..<12, using: &generator) {
        case 0: bytes.removeLast(min(bytes.count - 1, Int.random(in: 0..<5000, using: &generator)))
        case 1: bytes.insert(values.randomElement(using: &generator) ?? 0, at: place)
        case 2...6: bytes[place] = .random(in: 0...255, using: &generator)
        default: bytes[place] = values.randomElement(using: &generator) ?? 0
        }
      }
      bytes.withUnsafeBufferPointer { run($0) }
      if (round + 1) % 100_000 == 0 { print("\(round + 1) streams") }
    }
  }

  private static func starts(_ bytes: [UInt8]) -> [Int] {
    var starts: [Int] = []
    var place = 0
    while bytes.count - place >= 8 {
      starts.append(place)
      place += 8 + Int(word(place + 4, bytes))
    }
    return starts
  }

  /// Streams with and without compression, whole and with pages that are missing.
  private static func seeds() throws -> [[UInt8]] {
    var seeds: [[UInt8]] = []
    for (compression, isPostCopy) in [(0, false), (3, false), (0, true)] {
      let pair = try socketPair()
      let there = FileDescriptor(owning: pair.1)
      let link = MigrationLink(FileDescriptor(owning: pair.0))
      let tree = StateNode("machine", version: 1) { $0.write(UInt64(7)) }
      try link.send(.machine, tree.encoded())
      if isPostCopy { try link.send(.postCopy) }
      let encoder = try PageEncoder(link, pages: pages, copies: 8 << 12, compression: compression)
      let memory = try memory()
      try memory.write([UInt8](repeating: 0x5a, count: 4096), to: GuestPhysicalAddress(0x3000))
      try memory.write(UInt32(0x5a5a_5a5a), to: GuestPhysicalAddress(0x5010))
      for (iteration, again) in [(1, false), (2, true)] {
        try encoder.begin(iteration: iteration, class: UInt8(iteration))
        for page in [3, 5] { try encoder.add(page, memory.regions[0].hostBase + page << 12, isAgain: again) }
        try encoder.addZeros(6..<40)
        try memory.write(UInt32(0x1234_5678), to: GuestPhysicalAddress(0x3100))
      }
      try encoder.end()
      if isPostCopy {
        var missing = PageSet(pages: pages)
        missing.insert(3..<9)
        try link.send(.missing, missing.bytes)
      }
      try link.send(.state, [1] + tree.encoded())
      try link.send(.go)
      link.shut()
      var bytes = [UInt8](repeating: 0, count: 1 << 18)
      var count = 0
      while case let got = recv(there.rawValue, &bytes[count], bytes.count - count, 0), got > 0 { count += got }
      seeds.append(Array(bytes[..<count]))
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
