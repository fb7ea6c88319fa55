import StateTree

/// One device of the machine. Its state lies behind its own lock, so any vCPU thread and any loop may call it.
public protocol Device: Stateful, Sendable {
  /// Unique in the machine; also the name of its saved state.
  var name: String { get }
  /// Back to the state after power-on.
  func reset()
}

/// A device that answers accesses on an address bus (ports or memory).
///
/// Accesses are of 1, 2, 4 or 8 bytes at any offset of the window, aligned or not, as the guest makes them: a device
/// answers the ones its hardware knows and ignores the rest (reads give all ones, or what its specification says).
public protocol BusDevice: Device {
  /// Reads `size` bytes at `offset` of the window; the result's unused high bits are ignored.
  func read(offset: UInt64, size: Int) -> UInt64
  /// Writes the low `size` bytes of `value` at `offset` of the window.
  func write(offset: UInt64, size: Int, value: UInt64)
}

/// A device that has work under way while vCPUs do not run: DMA.
public protocol DrainableDevice: Device {
  /// Returns once nothing is under way; nothing is begun until `undrain`. Guest memory and the device's state then rest.
  func drain()
  /// Goes on.
  func undrain()
}

/// A device that saved machines may lack, as they were saved before there was one.
public protocol LaterDevice: Device {
  /// The restored guest does not know the device.
  func restoreAbsent()
}

/// What a device asks of the whole machine.
public enum MachineRequest: Equatable, Sendable {
  /// Power off: the run ends with status 0.
  case powerOff
  /// Reset every device and vCPU.
  case reset
  /// Sleep in ACPI S3: RAM stays, vCPUs stop until `wake`.
  case suspend
  /// Something that wakes a sleeping machine happened; nothing where it does not sleep.
  case wake
  /// The guest wrote this value to the debug-exit port.
  case debugExit(UInt32)
  /// The host failed a device's I/O: all are told, and by its policy the machine stops.
  case ioError(IOErrorReport)
  /// The guest has given up the PCI device at this place on bus 0, which has left the bus.
  case ejected(slot: UInt8)
}

/// A request of the guest's to a disk that the host has failed.
public struct IOErrorReport: Equatable, Sendable {
  /// The disk's name.
  public var disk: String
  /// Whether it was to change the disk, or make a change durable.
  public var isWrite: Bool
  /// The host has no room left.
  public var isNoSpace: Bool
  /// The machine stops, and the request is tried again when it goes on; else the guest gets an I/O error.
  public var stops: Bool
  /// One line.
  public var reason: String

  /// A failed request.
  public init(disk: String, isWrite: Bool, isNoSpace: Bool, stops: Bool, reason: String) {
    self.disk = disk
    self.isWrite = isWrite
    self.isNoSpace = isNoSpace
    self.stops = stops
    self.reason = reason
  }
}

/// The machine as its devices see it.
public protocol MachineControl: AnyObject, Sendable {
  /// Asks for a change of the whole machine; it happens after the access that asks for it.
  func request(_ request: MachineRequest)
}
