/// Guest time, in nanoseconds since the machine was made. It stands still while the machine is paused;
/// on the software accelerator it may come from the instruction count instead of the host's clock.
public protocol DeviceClock: AnyObject, Sendable {
  /// Nanoseconds of guest time.
  func now() -> UInt64
  /// A disarmed one-shot timer; `fire` is called on the loop that runs devices.
  func makeTimer(_ fire: @escaping @Sendable () -> Void) -> any DeviceTimer
}

/// A one-shot timer on guest time.
public protocol DeviceTimer: AnyObject, Sendable {
  /// Fires once at `deadline` nanoseconds of guest time, replacing an earlier deadline; at once when it has passed.
  func arm(at deadline: UInt64)
  /// Fires no more, but for a call that is already under way.
  func cancel()
}
