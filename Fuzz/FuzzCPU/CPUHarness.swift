import Foundation
import RandomCode

/// One input is 8 bytes that choose the machine, and code.
enum CPUHarness {
  nonisolated(unsafe) private static let machine = need { try RandomRun() }

  private static func need<T>(_ make: () throws -> T) -> T {
    do { return try make() } catch { fatalError("\(error)") }
  }

  static func run(_ input: UnsafeBufferPointer<UInt8>) { need { try machine.run(input) } }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    for seed in 0..<192 as Range<UInt64> {
      try Data(RandomRun.input(seed: seed)).write(to: URL(fileURLWithPath: "\(directory)/\(seed)"))
    }
  }
}
