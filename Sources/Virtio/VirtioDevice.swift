import StateTree

/// What kind of virtio device sits behind a transport: one new file a device. All calls come from the device's I/O thread,
/// but for the identity and `readConfiguration`, which vCPUs ask.
public protocol VirtioDevice: AnyObject {
  /// Unique in the machine.
  var name: String { get }
  /// The device type of virtio 1.2, chapter 5.
  var type: UInt16 { get }
  /// The PCI class code, 24 bits.
  var classCode: UInt32 { get }
  /// What the device offers beside the transport's own features.
  var features: VirtioFeatures { get }
  /// The largest size of each queue; a power of two.
  var queueSizes: [UInt16] { get }
  /// The device's configuration has changed: set by the transport, which tells the driver.
  var configurationChanged: () -> Void { get set }
  /// Has `process` called for a queue that the device itself has something for: set by the transport, called on its loop.
  /// Nothing happens where the device may not reach memory now; the queue is processed when it may.
  var serve: (Int) -> Void { get set }
  /// Reads `size` bytes of the device's configuration; what lies outside is 0.
  func readConfiguration(offset: Int, size: Int) -> UInt64
  /// The driver is ready: these queues, nil where it enabled none. `interrupt` tells the driver of used entries of a queue.
  func start(_ queues: [Virtqueue?], features: VirtioFeatures, interrupt: @escaping (Int) -> Void)
  /// The driver says that a queue has requests; true where some are left, to be asked for again.
  ///
  /// - Throws: what is wrong with the queue; the device then needs a reset.
  func process(queue: Int) throws(VirtqueueError) -> Bool
  /// Starts nothing new and calls `done` once nothing is under way any more.
  func drain(_ done: @escaping () -> Void)
  /// Whether requests wait, drained or not, for an error of the host's to be mended.
  var hasStoppedRequests: Bool { get }
  /// Goes on after `drain`; every queue is processed next.
  func undrain()
  /// The queues are gone. Called when drained.
  func stop()
  /// The machine has lost the device, which has stopped.
  func disconnect()
  /// What the device has beside its queues; nil for nothing. Called when drained.
  func save() -> StateNode?
  /// Puts back what `save` returned, nil for nothing. The device is stopped, and starts next.
  func restore(_ node: StateNode?) throws(StateError)
}

extension VirtioDevice {
  /// Not needed.
  public var serve: (Int) -> Void {
    get { { _ in } }
    set {}
  }
  /// Nothing.
  public func save() -> StateNode? { nil }
  /// Nothing.
  public func restore(_ node: StateNode?) throws(StateError) {}
}
