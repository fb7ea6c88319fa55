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
}

/// The machine as its devices see it.
public protocol MachineControl: AnyObject, Sendable {
  /// Asks for a change of the whole machine; it happens after the access that asks for it.
  func request(_ request: MachineRequest)
}
