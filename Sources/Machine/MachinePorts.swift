import BlockLayer
import Synchronization
import Virtio

/// Byte streams between the guest and the host: the ports of a virtio console.
public final class MachinePorts: Sendable {
  /// What the device belongs to.
  public let thread: IOThread
  /// The ports' names, by which the guest finds them.
  public let names: [String]
  let deviceName = "ports"
  private let made = Mutex<Device?>(nil)

  private struct Device: @unchecked Sendable {
    let console: VirtioConsole
  }

  /// Ports of one device.
  public init(thread: IOThread, names: [String]) {
    self.thread = thread
    self.names = names
  }

  /// The device, once the machine is built. It belongs to the thread.
  public internal(set) var device: VirtioConsole? {
    get { made.withLock { $0 }?.console }
    set {
      let device = newValue.map { Device(console: $0) }
      made.withLock { $0 = device }
    }
  }
}
