import GuestMemory
import Testing

@testable import Boot

/// Valid images, changed at random but the same in every run: whatever comes out boots or is an error, and never traps.
@Suite struct MutationTests {
  private static let rounds = 20_000

  /// SplitMix64.
  struct Generator: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
      state &+= 0x9e37_79b9_7f4a_7c15
      var z = state
      z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
      z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
      return z ^ (z >> 31)
    }
  }

  static let seeds: [(name: String, bytes: [UInt8])] = [
    ("linux", Images.linux()), ("pvh", Images.pvh()), ("pvh32", Images.pvh(is64Bit: false)),
    ("multiboot", Images.multiboot()), ("multiboot64", Images.multiboot(is64Bit: true)), ("kludge", Images.kludge()),
    ("elf64", Images.elf()), ("bootSector", Images.bootSector(count: 1100)),
  ]

  /// Sets one of an image's numbers to something on the edge of what is valid, or flips, cuts or extends.
  static func mutate(_ bytes: [UInt8], _ random: inout Generator) -> [UInt8] {
    var bytes = bytes
    let edges: [UInt64] = [
      0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x1_0000_0000, 1 << 63, .max, .max - 0xfff, 0x10_0000,
      0x400_0000, 0x3ff_ffff, 0x9fc00,
    ]
    for _ in 0..<Int.random(in: 1...4, using: &random) {
      // Headers come first, and are where the decisions are.
      let bound = Bool.random(using: &random) ? min(bytes.count, 0x280) : bytes.count
      guard bound > 0 else { return [0] }
      let offset = Int.random(in: 0..<bound, using: &random)
      switch Int.random(in: 0..<6, using: &random) {
      case 0: bytes[offset] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 1: bytes[offset] = UInt8.random(in: 0...255, using: &random)
      case 2, 3:
        let value = edges[Int.random(in: 0..<edges.count, using: &random)]
        let width = [2, 4, 8][Int.random(in: 0..<3, using: &random)]
        let start = offset & ~(width - 1)
        for index in 0..<width where start + index < bytes.count {
          bytes[start + index] = UInt8(truncatingIfNeeded: value >> (8 * UInt64(index)))
        }
      case 4: bytes.removeLast(Int.random(in: 0..<bytes.count, using: &random))
      default: bytes += [UInt8](repeating: 0x41, count: Int.random(in: 0..<64, using: &random))
      }
    }
    return bytes
  }

  @Test(arguments: seeds.map(\.name)) func changedImagesBootOrAreErrors(name: String) throws {
    let seed = try #require(Self.seeds.first { $0.name == name }).bytes
    let machine = try TestMachine(size: 4 << 20)
    var random = Generator(state: UInt64(seed.count) &* 0x1234_5678_9abc_def1)
    let disk = try BootImage(path: "disk", bytes: [UInt8](repeating: 5, count: 3000))
    var booted = 0
    var refused = 0
    for _ in 0..<Self.rounds {
      let bytes = Self.mutate(seed, &random)
      var request = BootRequest(image: try BootImage(path: "guest", bytes: bytes), memoryMap: machine.map)
      request.memoryIsZero = true
      if UInt8.random(in: 0..<4, using: &random) == 0 { request.initialRAMDisk = disk }
      do {
        let entry = try BootCatalogue.boot(request, into: machine.memory)
        booted += 1
        guard !entry.partsOverlap else {
          Issue.record("parts overlap: \(entry.placements)")
          return
        }
      } catch {
        refused += 1
        guard !error.description.contains("\n") else {
          Issue.record("an error of several lines: \(error)")
          return
        }
      }
    }
    // Both happen often, or the changes test nothing.
    #expect(booted > Self.rounds / 100 && refused > Self.rounds / 100, "\(booted) booted, \(refused) refused")
  }
}
