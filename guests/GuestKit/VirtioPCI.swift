import CGuest

/// A virtio device on PCI (virtio 1.2, 4.1), found by its vendor capabilities.
final class VirtioPCI {
  enum Feature {
    static let indirect: UInt64 = 1 << 28
    static let eventIndex: UInt64 = 1 << 29
    static let version1: UInt64 = 1 << 32
    static let packed: UInt64 = 1 << 34
  }

  private enum Status {
    static let acknowledge: UInt8 = 1
    static let driver: UInt8 = 2
    static let driverOK: UInt8 = 4
    static let featuresOK: UInt8 = 8
  }

  /// Offsets in the common configuration (4.1.4.3).
  private enum Common {
    static let deviceFeatureSelect: UInt64 = 0
    static let deviceFeatures: UInt64 = 4
    static let driverFeatureSelect: UInt64 = 8
    static let driverFeatures: UInt64 = 12
    static let configurationVector: UInt64 = 16
    static let status: UInt64 = 20
    static let queueSelect: UInt64 = 22
    static let queueSize: UInt64 = 24
    static let queueVector: UInt64 = 26
    static let queueEnable: UInt64 = 28
    static let queueNotify: UInt64 = 30
    static let descriptors: UInt64 = 32
    static let driverArea: UInt64 = 40
    static let deviceArea: UInt64 = 48
  }

  private static let noVector: UInt16 = 0xffff

  private let function: PCI.Function
  private var common: UInt64 = 0
  private var notifications: UInt64 = 0
  private var notifyMultiplier: UInt64 = 0
  private var messages: UInt64 = 0
  private var messageControl: UInt8 = 0
  /// The structure of the device's own kind.
  private(set) var configuration: UInt64 = 0
  /// What both sides agreed on.
  private(set) var features: UInt64 = 0

  /// Resets the device and agrees on those of `wanted` that it offers, and on version 1.
  init(_ function: PCI.Function, wanted: UInt64) {
    self.function = function
    findStructures()
    expect("a virtio device's structures", common != 0 && notifications != 0 && configuration != 0)
    PCI.enable(function)
    reset()
    setStatus(Status.acknowledge)
    setStatus(Status.driver)
    let offered = offeredFeatures()
    expect("version 1", offered & Feature.version1 != 0)
    features = offered & (wanted | Feature.version1)
    for half in 0..<UInt32(2) {
      store32(common + Common.driverFeatureSelect, half)
      store32(common + Common.driverFeatures, UInt32(truncatingIfNeeded: features >> UInt64(half * 32)))
    }
    setStatus(Status.featuresOK)
    expect("features accepted", load8(common + Common.status) & Status.featuresOK != 0)
  }

  private func findStructures() {
    PCI.forEachCapability(function) { id, offset in
      switch id {
      case 0x09:
        let type = UInt8(truncatingIfNeeded: PCI.read32(function, offset) >> 24)
        if !(1...4).contains(type) { return }
        let bar = UInt8(truncatingIfNeeded: PCI.read32(function, offset + 4))
        let address = PCI.memoryBAR(function, bar) + UInt64(PCI.read32(function, offset + 8))
        switch type {
        case 1: common = address
        case 2:
          notifications = address
          notifyMultiplier = UInt64(PCI.read32(function, offset + 16))
        case 4: configuration = address
        default: break
        }
      case 0x11:
        let table = PCI.read32(function, offset + 4)
        messages = PCI.memoryBAR(function, UInt8(table & 7)) + UInt64(table & ~7)
        messageControl = offset
      default: break
      }
    }
  }

  private func offeredFeatures() -> UInt64 {
    store32(common + Common.deviceFeatureSelect, 0)
    let low = load32(common + Common.deviceFeatures)
    store32(common + Common.deviceFeatureSelect, 1)
    return UInt64(low) | UInt64(load32(common + Common.deviceFeatures)) << 32
  }

  private func setStatus(_ bit: UInt8) {
    store8(common + Common.status, load8(common + Common.status) | bit)
  }

  /// Turns MSI-X on with every message masked but those that queues ask for.
  func enableMessages() {
    expect("MSI-X", messageControl != 0)
    PCI.write32(function, messageControl, 0x8000_0000)
  }

  /// Sets up queue `index`; with `vector`, MSI-X message `index` is that interrupt to this processor.
  func addQueue(_ index: UInt16, maximumSize: UInt16, vector: UInt8?) -> Virtqueue {
    store16(common + Common.queueSelect, index)
    let offered = load16(common + Common.queueSize)
    expect("entries of a queue", UInt64(offered), in: 4...32768)
    let size = min(offered, maximumSize)
    store16(common + Common.queueSize, size)
    let place = notifications + UInt64(load16(common + Common.queueNotify)) * notifyMultiplier
    let queue = Virtqueue(index, size: size, features: features, notification: place)
    store64(common + Common.descriptors, queue.descriptors)
    store64(common + Common.driverArea, queue.driverArea)
    store64(common + Common.deviceArea, queue.deviceArea)
    if let vector { setMessage(index, vector) }
    let message = vector == nil ? Self.noVector : index
    store16(common + Common.queueVector, message)
    expect("a queue's message", UInt64(load16(common + Common.queueVector)), equals: UInt64(message))
    store16(common + Common.queueEnable, 1)
    return queue
  }

  private func setMessage(_ index: UInt16, _ vector: UInt8) {
    let entry = messages + UInt64(index) * 16
    store32(entry, 0xfee0_0000 | LocalAPIC.id << 12)
    store32(entry + 4, 0)
    store32(entry + 8, UInt32(vector))
    store32(entry + 12, 0)
  }

  /// Has changes of the configuration told of by MSI-X message `index`, which no queue has, as interrupt `vector`.
  func tellOfConfiguration(_ index: UInt16, vector: UInt8) {
    setMessage(index, vector)
    store16(common + Common.configurationVector, index)
    expect("the configuration's message", UInt64(load16(common + Common.configurationVector)), equals: UInt64(index))
  }

  /// Resets the device: it lets go of the queues' memory.
  func reset() {
    store8(common + Common.status, 0)
    wait("the device's reset") { load8(common + Common.status) == 0 }
  }

  /// The queues may be used from now on.
  func start() { setStatus(Status.driverOK) }
}
