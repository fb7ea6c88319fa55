import CLinux
import Glibc

/// An eventfd(2): a counter that one thread adds to and another waits on. KVM's irqfd and ioeventfd speak it.
public struct EventNotifier: ~Copyable, Sendable {
  /// The eventfd itself, non-blocking.
  public let descriptor: FileDescriptor

  /// Makes an eventfd whose count is zero.
  public init() throws(HostError) {
    descriptor = FileDescriptor(
      owning: try check("eventfd", eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))))
  }

  /// Adds one to the count. A full counter is already a pending event, so its EAGAIN is no failure.
  public borrowing func signal() {
    Self.signal(descriptor.rawValue)
  }

  /// Adds one to the count of an eventfd that somebody else owns.
  public static func signal(_ descriptor: Int32) {
    _ = eventfd_write(descriptor, 1)
  }

  /// Takes the count and sets it to zero; 0 when nothing was pending.
  @discardableResult
  public borrowing func drain() -> UInt64 {
    var count: eventfd_t = 0
    return eventfd_read(descriptor.rawValue, &count) == 0 ? count : 0
  }
}
