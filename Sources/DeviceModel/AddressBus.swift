import Synchronization

/// Why a window cannot be placed.
public enum DeviceModelError: Error, Equatable, CustomStringConvertible {
  /// Two devices claim the same addresses.
  case overlap(device: String, other: String, start: UInt64, size: UInt64)
  /// The window is empty or passes the end of the address space.
  case window(device: String, start: UInt64, size: UInt64)
  /// Another function has the place on the PCI bus.
  case slotTaken(device: String, address: String)
  /// No room is left for a resource of that size.
  case exhausted(resource: String, size: UInt64)

  /// One line: the device, the addresses, the conflict.
  public var description: String {
    switch self {
    case .overlap(let device, let other, let start, let size):
      "device \(device): window of \(size) bytes at 0x\(String(start, radix: 16)) overlaps that of \(other)"
    case .window(let device, let start, let size):
      "device \(device): a window of \(size) bytes at 0x\(String(start, radix: 16)) does not exist"
    case .slotTaken(let device, let address): "device \(device): another function is at \(address) already"
    case .exhausted(let resource, let size): "no room left for \(size) bytes of \(resource)"
    }
  }
}

/// One address space (ports, or memory outside RAM) and the devices in it.
public final class AddressBus: Sendable {
  private struct Window {
    let start: UInt64
    let size: UInt64
    let offset: UInt64
    let device: any BusDevice
  }

  /// `ports` or `memory`, for traces and errors.
  public let name: String
  private let windows = Mutex<[Window]>([])

  /// An empty bus.
  public init(name: String) {
    self.name = name
  }

  /// Places a window of a device at `start`; a device with several tells them apart by the offset each begins at.
  public func attach(
    _ device: any BusDevice, at start: UInt64, size: UInt64, offset: UInt64 = 0
  ) throws(DeviceModelError) {
    let (last, overflow) = start.addingReportingOverflow(size &- 1)
    guard size > 0, !overflow else { throw .window(device: device.name, start: start, size: size) }
    let result = windows.withLock { windows -> Result<Void, DeviceModelError> in
      if let other = windows.first(where: { start <= $0.start &+ ($0.size - 1) && $0.start <= last }) {
        return .failure(.overlap(device: device.name, other: other.device.name, start: start, size: size))
      }
      windows.insert(
        Window(start: start, size: size, offset: offset, device: device),
        at: windows.firstIndex { $0.start > start } ?? windows.count)
      return .success(())
    }
    try result.get()
  }

  /// Takes every window of the device off the bus that starts at `start`, or all of them.
  public func detach(_ device: any BusDevice, at start: UInt64? = nil) {
    windows.withLock { $0.removeAll { $0.device === device && (start == nil || $0.start == start) } }
  }

  /// Reads `size` bytes; all ones where no device answers.
  public func read(_ address: UInt64, size: Int) -> UInt64 {
    guard let (device, offset) = find(address) else { return ~0 }
    return device.read(offset: offset, size: size)
  }

  /// Writes the low `size` bytes of `value`; lost where no device answers.
  public func write(_ address: UInt64, size: Int, value: UInt64) {
    guard let (device, offset) = find(address) else { return }
    device.write(offset: offset, size: size, value: value & (size >= 8 ? ~0 : (1 << (UInt64(size) * 8)) - 1))
  }

  /// The device at an address and the offset in its window.
  public func find(_ address: UInt64) -> (device: any BusDevice, offset: UInt64)? {
    windows.withLock { windows in
      var low = 0
      var high = windows.count
      while low < high {
        let middle = (low + high) / 2
        if windows[middle].start <= address { low = middle + 1 } else { high = middle }
      }
      guard low > 0, address - windows[low - 1].start < windows[low - 1].size else { return nil }
      return (windows[low - 1].device, address - windows[low - 1].start + windows[low - 1].offset)
    }
  }
}
