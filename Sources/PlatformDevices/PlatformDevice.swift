import DeviceModel

/// A run of addresses at which a device answers, as the platform fixes it.
public struct BusWindow: Equatable, Sendable {
  /// The address space that the window lies in.
  public enum Space: Sendable {
    case ports
    case memory
  }
  /// The address space.
  public var space: Space
  /// First port or guest-physical address.
  public var start: UInt64
  /// Length in bytes.
  public var size: UInt64
  /// The offset that the device sees at `start`: what tells a device's windows apart.
  public var offset: UInt64

  /// A window of `size` ports at `start`.
  public static func ports(_ start: UInt64, size: UInt64, offset: UInt64 = 0) -> Self {
    Self(space: .ports, start: start, size: size, offset: offset)
  }

  /// A window of `size` bytes of guest-physical addresses at `start`.
  public static func memory(_ start: UInt64, size: UInt64, offset: UInt64 = 0) -> Self {
    Self(space: .memory, start: start, size: size, offset: offset)
  }
}

/// A device at addresses that the platform fixes.
public protocol PlatformDevice: BusDevice {
  /// Where it answers.
  var windows: [BusWindow] { get }
}

extension PlatformDevice {
  /// Places every window of the device; throws where another device has those addresses.
  public func attach(ports: AddressBus, memory: AddressBus) throws(DeviceModelError) {
    for window in windows {
      let bus = window.space == .ports ? ports : memory
      try bus.attach(self, at: window.start, size: window.size, offset: window.offset)
    }
  }
}

/// Splits a read into the byte reads that an 8-bit device sees; bytes from `end` on read as ones.
@inline(__always)
func readBytes(_ offset: UInt64, _ size: Int, end: UInt64, _ byte: (UInt64) -> UInt8) -> UInt64 {
  var value: UInt64 = 0
  for index in 0..<UInt64(clamping: min(size, 8)) {
    let register = offset &+ index
    value |= UInt64(register < end ? byte(register) : 0xff) << (index * 8)
  }
  return value
}

/// Splits a write into the byte writes that an 8-bit device sees; bytes from `end` on are lost.
@inline(__always)
func writeBytes(_ offset: UInt64, _ size: Int, _ value: UInt64, end: UInt64, _ byte: (UInt64, UInt8) -> Void) {
  for index in 0..<UInt64(clamping: min(size, 8)) where offset &+ index < end {
    byte(offset &+ index, UInt8(truncatingIfNeeded: value >> (index * 8)))
  }
}

/// Guest time counts nanoseconds.
let nanosecondsPerSecond: UInt64 = 1_000_000_000
