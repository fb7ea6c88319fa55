import Foundation
import GuestMemory

@testable import Boot

/// One input is a byte of options (1 a command line, 2 an initial RAM disk, 4 a module, 8 a load address) and an image.
/// SWIFTVMM_FUZZ_LOADER names a loader by its kind, which then gets images it would not recognise too.
enum BootHarness {
  private static let machine = need { try TestMachine(size: 4 << 20, pattern: false) }
  private static let other = need { try BootImage(path: "other", bytes: [UInt8](repeating: 5, count: 3000)) }
  private static let loader = ProcessInfo.processInfo.environment["SWIFTVMM_FUZZ_LOADER"].map { name in
    guard let loader = BootCatalogue.loaders.first(where: { $0.kind.rawValue == name }) else {
      fatalError("no loader '\(name)'; there are \(BootKind.allCases.map(\.rawValue))")
    }
    return loader
  }

  private static func need<T>(_ make: () throws -> T) -> T {
    do { return try make() } catch { fatalError("\(error)") }
  }

  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    guard let options = input.first, let image = try? BootImage(path: "guest", bytes: Array(input.dropFirst())) else {
      return
    }
    var request = BootRequest(image: image, memoryMap: machine.map)
    request.memoryIsZero = true
    if options & 1 != 0 { request.commandLine = "console=ttyS0" }
    if options & 2 != 0 { request.initialRAMDisk = other }
    if options & 4 != 0 { request.modules = [BootModule(image: other, string: "x")] }
    if options & 8 != 0 { request.loadAddress = UInt64(options) << 16 }
    do throws(BootError) {
      if let loader {
        var placer = Placer(path: "guest", memory: machine.memory, map: machine.map, memoryIsZero: true)
        _ = try loader.load(image, request, &placer)
        check(placer.placements)
      } else {
        check(try BootCatalogue.boot(request, into: machine.memory).placements)
      }
    } catch {
      precondition(!error.description.contains("\n"))
    }
  }

  private static func check(_ placements: [BootPlacement]) {
    for (index, placement) in placements.enumerated() {
      precondition(!placements[..<index].contains { $0.range.overlaps(placement.range) })
    }
  }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    let images = [
      Images.linux(), Images.pvh(), Images.pvh(is64Bit: false), Images.multiboot(), Images.multiboot(is64Bit: true),
      Images.kludge(), Images.elf(), Images.bootSector(count: 1100),
    ]
    for (index, image) in images.enumerated() {
      for options in [0, 3, 7, 8] as [UInt8] {
        try Data([options] + image).write(to: URL(fileURLWithPath: "\(directory)/\(index)-\(options)"))
      }
    }
  }
}
