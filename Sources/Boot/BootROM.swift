import CFirmware
import GuestMemory
import Host

/// A ROM that ends at 4 GiB, so that it holds the reset vector.
public final class BootROM: Sendable {
  /// The greatest ROM.
  public static let sizeLimit = 16 << 20

  private let mapping: MemoryMapping

  /// The ROM that is part of the executable; nil in a build without one.
  ///
  /// Errors: `.memory` where the host has no memory for it.
  public static func builtIn() throws(BootError) -> BootROM? {
    let size = swiftvmm_boot_rom_size()
    guard size > 0, let start = swiftvmm_boot_rom_start_address() else { return nil }
    return try BootROM(path: "the built-in boot ROM", size: UInt64(size)) { buffer throws(BootError) in
      buffer.copyMemory(from: UnsafeRawBufferPointer(start: start, count: size))
    }
  }

  /// The ROM in a file: a multiple of 4 KiB, at most 16 MiB.
  ///
  /// Errors: those of `BootImage.init(path:)`, `.firmwareSize`, `.memory`.
  public convenience init(path: String) throws(BootError) {
    let image = try BootImage(path: path)
    try self.init(path: path, size: image.size) { buffer throws(BootError) in
      let bytes = try image.bytes(.firmware, at: 0, count: buffer.count)
      bytes.withUnsafeBytes { buffer.copyMemory(from: $0) }
    }
  }

  private init(
    path: String, size: UInt64, fill: (UnsafeMutableRawBufferPointer) throws(BootError) -> Void
  ) throws(BootError) {
    guard size > 0, size <= Self.sizeLimit, size & 0xfff == 0 else {
      throw .firmwareSize(path: path, size: size)
    }
    do { mapping = try MemoryMapping(anonymous: Int(size)) } catch { throw .memory(.host(error)) }
    try fill(UnsafeMutableRawBufferPointer(start: mapping.base, count: mapping.count))
  }

  /// The host's address of the ROM, for a memory slot; it is valid while this object lives.
  public var hostBase: UnsafeMutableRawPointer { mapping.base }

  /// Where the guest finds all of it.
  public var range: GuestRange {
    GuestRange(start: GuestPhysicalAddress(Platform.fourGiB - UInt64(mapping.count)), size: UInt64(mapping.count))!
  }

  /// Where the guest finds its end again, at most 128 KiB, for real mode.
  public var alias: GuestRange {
    let size = min(UInt64(mapping.count), Platform.biosArea.size)
    return GuestRange(start: GuestPhysicalAddress(Platform.oneMiB - size), size: size)!
  }

  /// Copies the alias into the RAM behind it, which the machine then maps read-only where it can.
  public func copyAlias(into memory: GuestMemory) throws(BootError) {
    let source = UnsafeRawBufferPointer(
      start: mapping.base + mapping.count - Int(alias.size), count: Int(alias.size))
    do { try memory.write(source, to: alias.start) } catch { throw .memory(error) }
  }
}
