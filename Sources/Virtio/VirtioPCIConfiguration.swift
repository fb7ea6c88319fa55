import PlatformDevices

/// Where the parts of BAR 0 are, as capabilities tell the driver (virtio 1.2, 4.1.4).
extension VirtioPCI {
  private enum Structure {
    static let common: UInt8 = 1
    static let notify: UInt8 = 2
    static let interruptStatus: UInt8 = 3
    static let device: UInt8 = 4
    static let window: UInt8 = 5
  }

  /// Configuration space, and where in it the window on the BAR is.
  static func configuration(of device: any VirtioDevice) -> (PCIConfiguration, window: Int) {
    var configuration = PCIConfiguration(
      vendor: 0x1af4, device: 0x1040 + device.type, subsystemVendor: 0x1af4, subsystem: 0x1100,
      classCode: device.classCode, revision: 1, interruptPin: 1)
    configuration.addBAR(0, .memory64(size: Layout.size, prefetchable: true))
    let queues = device.queueSizes.count
    configuration.addMSIX(
      vectors: queues + 1, bar: 0, tableOffset: Layout.messages, pendingOffset: Layout.pending)
    configuration.addCapability(
      id: 9, body: capability(Structure.common, Layout.common, UInt64(VirtioPCIRegisters.byteCount)))
    configuration.addCapability(id: 9, body: capability(Structure.interruptStatus, Layout.interruptStatus, 1))
    configuration.addCapability(id: 9, body: capability(Structure.device, Layout.device, 0x1000))
    configuration.addCapability(
      id: 9,
      body: capability(
        Structure.notify, Layout.notify, UInt64(queues) * Layout.notifyStep, [UInt8(Layout.notifyStep), 0, 0, 0]))
    // A window on the BAR for those who cannot map it: its place is the driver's to choose.
    var writable = [UInt8](repeating: 0, count: windowData + 4 - 2)
    writable.replaceSubrange(2..<3, with: [0xff])
    writable.replaceSubrange(6..., with: [UInt8](repeating: 0xff, count: writable.count - 6))
    let window = configuration.addCapability(
      id: 9, body: capability(Structure.window, 0, 0, [0, 0, 0, 0]), writable: writable)
    return (configuration, window)
  }

  /// Offset of the window's data in its capability.
  static let windowData = 16

  private static func capability(_ type: UInt8, _ offset: UInt64, _ length: UInt64, _ more: [UInt8] = []) -> [UInt8] {
    func bytes(_ value: UInt64) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) } }
    return [UInt8(16 + more.count), type, 0, 0, 0, 0] + bytes(offset) + bytes(length) + more
  }
}
