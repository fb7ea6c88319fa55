import StateTree

/// The common configuration structure (virtio 1.2, 4.1.4.3) and the interrupt status: what the driver programs.
struct VirtioPCIRegisters {
  /// Bits of the device status (2.1).
  enum Status {
    static let featuresOK: UInt8 = 8
    static let driverOK: UInt8 = 4
    static let needsReset: UInt8 = 64
    /// What a driver may set: acknowledge, driver, driver OK, features OK, failed.
    static let writable: UInt8 = 0x8f
  }

  /// Bits of the interrupt status (4.1.4.5).
  enum InterruptStatus {
    static let queue: UInt8 = 1
    static let configuration: UInt8 = 2
  }

  /// What a write asks the device to do.
  enum Action {
    case none, reset, start
  }

  struct Queue {
    var configuration: VirtqueueConfiguration
    var vector = VirtioPCIRegisters.noVector
    var isEnabled = false
    /// For a saved device alone.
    var progress = VirtqueueProgress()
  }

  /// No MSI-X vector.
  static let noVector: UInt16 = 0xffff
  /// Bytes of the structure.
  static let byteCount = 60

  private let maximumSizes: [UInt16]
  private var featureSelect: UInt32 = 0
  private var driverFeatureSelect: UInt32 = 0
  private(set) var driverFeatures: VirtioFeatures = []
  private(set) var configurationVector = noVector
  var status: UInt8 = 0
  var generation: UInt8 = 0
  private var queueSelect: UInt16 = 0
  var queues: [Queue]
  var interruptStatus: UInt8 = 0

  /// The state after a reset.
  init(queueSizes: [UInt16]) {
    maximumSizes = queueSizes
    queues = queueSizes.map { Queue(configuration: VirtqueueConfiguration(size: $0)) }
  }

  // MARK: Accesses

  private enum Offset {
    static let featureSelect = 0
    static let features = 4
    static let driverFeatureSelect = 8
    static let driverFeatures = 12
    static let configurationVector = 16
    static let queueCount = 18
    static let status = 20
    static let generation = 21
    static let queueSelect = 22
    static let queueSize = 24
    static let queueVector = 26
    static let queueEnable = 28
    static let queueNotify = 30
    static let descriptors = 32
    static let driver = 40
    static let device = 48
  }

  /// Reads registers as bytes: a driver may look at parts of one.
  func read(_ offset: Int, _ size: Int, offered: VirtioFeatures) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<min(size, 8) { value |= UInt64(byte(offset + index, offered)) << UInt64(index * 8) }
    return value
  }

  private func byte(_ offset: Int, _ offered: VirtioFeatures) -> UInt8 {
    let queue = queues.indices.contains(Int(queueSelect)) ? queues[Int(queueSelect)] : nil
    let (start, value): (Int, UInt64) =
      switch offset {
      case 0..<4: (0, UInt64(featureSelect))
      case 4..<8: (4, featureSelect < 2 ? offered.rawValue >> (UInt64(featureSelect) * 32) : 0)
      case 8..<12: (8, UInt64(driverFeatureSelect))
      case 12..<16: (12, driverFeatureSelect < 2 ? driverFeatures.rawValue >> (UInt64(driverFeatureSelect) * 32) : 0)
      case 16..<18: (16, UInt64(configurationVector))
      case 18..<20: (18, UInt64(queues.count))
      case 20: (20, UInt64(status))
      case 21: (21, UInt64(generation))
      case 22..<24: (22, UInt64(queueSelect))
      // A queue that does not exist has the size 0.
      case 24..<26: (24, UInt64(queue?.configuration.size ?? 0))
      case 26..<28: (26, UInt64(queue?.vector ?? Self.noVector))
      case 28..<30: (28, queue?.isEnabled == true ? 1 : 0)
      case 30..<32: (30, UInt64(queueSelect))
      case 32..<40: (32, queue?.configuration.descriptors ?? 0)
      case 40..<48: (40, queue?.configuration.driver ?? 0)
      case 48..<56: (48, queue?.configuration.device ?? 0)
      default: (offset, 0)
      }
    return UInt8(truncatingIfNeeded: value >> UInt64((offset - start) * 8))
  }

  /// Writes one register; of its own size, or a half of a queue's address.
  mutating func write(_ offset: Int, _ size: Int, _ value: UInt64, offered: VirtioFeatures) -> Action {
    let word = UInt32(truncatingIfNeeded: value)
    let half = UInt16(truncatingIfNeeded: value)
    switch (offset, size) {
    case (Offset.featureSelect, 4): featureSelect = word
    case (Offset.driverFeatureSelect, 4): driverFeatureSelect = word
    case (Offset.driverFeatures, 4):
      guard driverFeatureSelect < 2, status & Status.featuresOK == 0 else { break }
      let shift = UInt64(driverFeatureSelect) * 32
      driverFeatures = VirtioFeatures(
        rawValue: driverFeatures.rawValue & ~(0xffff_ffff << shift) | UInt64(word) << shift)
    case (Offset.configurationVector, 2): configurationVector = vector(half)
    case (Offset.status, 1): return setStatus(UInt8(truncatingIfNeeded: value), offered)
    case (Offset.queueSelect, 2): queueSelect = half
    default: writeQueue(offset, size, value)
    }
    return .none
  }

  private func vector(_ value: UInt16) -> UInt16 { Int(value) <= queues.count ? value : Self.noVector }

  private mutating func writeQueue(_ offset: Int, _ size: Int, _ value: UInt64) {
    let index = Int(queueSelect)
    guard queues.indices.contains(index) else { return }
    let half = UInt16(truncatingIfNeeded: value)
    if (offset, size) == (Offset.queueVector, 2) { queues[index].vector = vector(half) }
    // An enabled queue stays where it is until the device is reset.
    guard !queues[index].isEnabled else { return }
    switch (offset, size) {
    case (Offset.queueSize, 2):
      if (1...maximumSizes[index]).contains(half) { queues[index].configuration.size = half }
    case (Offset.queueEnable, 2): queues[index].isEnabled = half == 1
    case (Offset.descriptors..<Offset.driver, 4...8):
      Self.set(&queues[index].configuration.descriptors, offset - Offset.descriptors, size, value)
    case (Offset.driver..<Offset.device, 4...8):
      Self.set(&queues[index].configuration.driver, offset - Offset.driver, size, value)
    case (Offset.device..<56, 4...8):
      Self.set(&queues[index].configuration.device, offset - Offset.device, size, value)
    default: break
    }
  }

  private static func set(_ address: inout UInt64, _ offset: Int, _ size: Int, _ value: UInt64) {
    switch (offset, size) {
    case (0, 8): address = value
    case (0, 4): address = address & ~0xffff_ffff | value & 0xffff_ffff
    case (4, 4): address = address & 0xffff_ffff | value << 32
    default: break
    }
  }

  private mutating func setStatus(_ value: UInt8, _ offered: VirtioFeatures) -> Action {
    if value == 0 { return .reset }
    var added = value & Status.writable & ~status
    if added & Status.featuresOK != 0, !isAcceptable(offered) { added &= ~Status.featuresOK }
    // Nothing starts before features are agreed on (3.1.1).
    let isStart = added & Status.driverOK != 0 && (status | added) & Status.featuresOK != 0
    if added & Status.driverOK != 0, !isStart { added &= ~Status.driverOK }
    status |= added
    return isStart ? .start : .none
  }

  private func isAcceptable(_ offered: VirtioFeatures) -> Bool {
    driverFeatures.isSubset(of: offered) && driverFeatures.contains(.version1)
  }

  // MARK: Saved state

  func write(to writer: inout StateWriter) {
    writer.write(featureSelect)
    writer.write(driverFeatureSelect)
    writer.write(driverFeatures.rawValue)
    writer.write(configurationVector)
    writer.write(status)
    writer.write(generation)
    writer.write(queueSelect)
    writer.write(interruptStatus)
    writer.write(UInt32(queues.count))
    for queue in queues {
      writer.write(queue.configuration.size)
      writer.write(queue.configuration.descriptors)
      writer.write(queue.configuration.driver)
      writer.write(queue.configuration.device)
      writer.write(queue.vector)
      writer.write(queue.isEnabled)
      writer.write(queue.progress.nextAvailable)
      writer.write(queue.progress.nextUsed)
      writer.write(queue.progress.availableWrap)
      writer.write(queue.progress.usedWrap)
    }
  }

  /// What `write` wrote, for a device with the same queues that offers what its driver uses.
  init(from reader: inout StateReader, queueSizes: [UInt16], offered: VirtioFeatures) throws(StateError) {
    self.init(queueSizes: queueSizes)
    featureSelect = try reader.read()
    driverFeatureSelect = try reader.read()
    driverFeatures = VirtioFeatures(rawValue: try reader.read())
    configurationVector = vector(try reader.read())
    status = try reader.read()
    generation = try reader.read()
    queueSelect = try reader.read()
    interruptStatus = try reader.read()
    if status & Status.featuresOK != 0, !isAcceptable(offered) {
      throw reader.invalid("features", driverFeatures.rawValue)
    }
    let count = try reader.read(UInt32.self)
    guard count == UInt32(queues.count) else { throw reader.invalid("queues", UInt64(count)) }
    for index in queues.indices {
      let size = try reader.read(UInt16.self)
      guard (1...queueSizes[index]).contains(size) else { throw reader.invalid("queue size", UInt64(size)) }
      queues[index].configuration.size = size
      queues[index].configuration.descriptors = try reader.read()
      queues[index].configuration.driver = try reader.read()
      queues[index].configuration.device = try reader.read()
      queues[index].vector = vector(try reader.read())
      queues[index].isEnabled = try reader.read()
      queues[index].progress.nextAvailable = try reader.read()
      queues[index].progress.nextUsed = try reader.read()
      queues[index].progress.availableWrap = try reader.read()
      queues[index].progress.usedWrap = try reader.read()
    }
  }
}
