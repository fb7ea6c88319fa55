import CGuest

/// A virtio block device (virtio 1.2, 5.2) with several requests under way.
final class VirtioBlock {
  enum Kind: UInt32 {
    case read = 0
    case write = 1
    case flush = 4
    case identity = 8
  }

  struct Options {
    var isPacked: Bool
    var usesIndirect: Bool
    var usesEventIndex: Bool
    /// MSI-X messages arrive here; nil for polling.
    var vector: UInt8?
    var queues: UInt16
    /// Requests under way.
    var depth: UInt16
  }

  /// A request that is done.
  struct Completion {
    var slot: UInt16
    /// 0 for success (5.2.6).
    var status: UInt8
  }

  private enum Feature {
    static let readOnly: UInt64 = 1 << 5
    static let flush: UInt64 = 1 << 9
    static let multiqueue: UInt64 = 1 << 12
  }

  private static let deviceID: UInt32 = 0x1042_1af4
  private static let maximumQueues: UInt16 = 8

  /// 512-byte sectors.
  let sectors: UInt64
  let isPacked: Bool
  let isReadOnly: Bool
  let hasFlush: Bool
  let queueCount: UInt16
  /// How many slots there are.
  let depth: UInt16
  private var queues = InlineArray<8, Virtqueue?>(repeating: nil)
  /// 32 bytes a slot: a request's header, then its status.
  private let headers: UInt64
  private let transport: VirtioPCI

  /// Calls `body` with each block device's function, in the order of their places on bus 0.
  static func forEachFunction(_ body: (PCI.Function) -> Void) {
    PCI.forEachFunction { function, id in
      if id == deviceID { body(function) }
    }
  }

  init(_ function: PCI.Function, _ options: Options) {
    var wanted = Feature.readOnly | Feature.flush | Feature.multiqueue
    if options.isPacked { wanted |= VirtioPCI.Feature.packed }
    if options.usesIndirect { wanted |= VirtioPCI.Feature.indirect }
    if options.usesEventIndex { wanted |= VirtioPCI.Feature.eventIndex }
    transport = VirtioPCI(function, wanted: wanted)
    isPacked = transport.features & VirtioPCI.Feature.packed != 0
    expect("the queue's layout", isPacked == options.isPacked)
    isReadOnly = transport.features & Feature.readOnly != 0
    hasFlush = transport.features & Feature.flush != 0
    sectors = load64(transport.configuration)
    let offered = transport.features & Feature.multiqueue == 0 ? 1 : load16(transport.configuration + 34)
    queueCount = max(1, min(options.queues, offered, Self.maximumQueues))
    if options.vector != nil { transport.enableMessages() }
    var slots = UInt16.max
    for index in 0..<queueCount {
      let queue = transport.addQueue(index, maximumSize: 256, vector: options.vector)
      slots = min(slots, queue.slots)
      queues[Int(index)] = queue
    }
    depth = max(1, min(options.depth, slots * queueCount))
    headers = guest_allocate(UInt64(depth) * 32, 16)
    transport.start()
  }

  /// Makes a request of a slot that is free; slots take turns among the queues.
  func submit(_ kind: Kind, slot: UInt16, sector: UInt64 = 0, buffer: UInt64 = 0, length: UInt32 = 0) {
    let header = headers + UInt64(slot) * 32
    store32(header, kind.rawValue)
    store32(header + 4, 0)
    store64(header + 8, sector)
    store8(header + 16, 0xff)
    var chain = Virtqueue.Chain()
    chain.append(header, 16, isWrite: false)
    if length > 0 { chain.append(buffer, length, isWrite: kind != .write) }
    chain.append(header + 16, 1, isWrite: true)
    queues[Int(slot % queueCount)]?.add(slot / queueCount, chain)
  }

  /// Tells the device of what was submitted.
  func notify() {
    for index in 0..<Int(queueCount) { queues[index]?.notify() }
  }

  /// A request that is done, if there is one.
  func completion() -> Completion? {
    for index in 0..<queueCount {
      if let slot = queues[Int(index)]?.take() {
        let number = slot * queueCount + index
        expect("a slot", number < depth)
        return Completion(slot: number, status: load8(headers + UInt64(number) * 32 + 16))
      }
    }
    return nil
  }

  /// Asks for interrupts; true where a request is done already.
  func enableInterrupts() -> Bool {
    var isDone = false
    for index in 0..<Int(queueCount) where queues[index]?.enableInterrupts() == true { isDone = true }
    return isDone
  }

  /// No request is under way, and none comes any more.
  func stop() { transport.reset() }

  func disableInterrupts() {
    for index in 0..<Int(queueCount) { queues[index]?.disableInterrupts() }
  }
}
