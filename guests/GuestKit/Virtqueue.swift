import CGuest

/// The driver's side of a virtqueue, split (virtio 1.2, 2.7) or packed (2.8).
///
/// A request is a slot: a number below `slots` of the caller's choosing, with places of its own in the queue.
final class Virtqueue {
  /// Up to three buffers: those that the device reads, then those that it writes.
  struct Chain {
    struct Buffer {
      var address: UInt64
      var length: UInt32
      var isWrite: Bool
    }

    private(set) var buffers = InlineArray<3, Buffer>(repeating: Buffer(address: 0, length: 0, isWrite: false))
    private(set) var count: UInt16 = 0

    mutating func append(_ address: UInt64, _ length: UInt32, isWrite: Bool) {
      buffers[Int(count)] = Buffer(address: address, length: length, isWrite: isWrite)
      count += 1
    }
  }

  private enum Flag {
    static let next: UInt16 = 1
    static let write: UInt16 = 2
    static let indirect: UInt16 = 4
    static let available: UInt16 = 1 << 7
    static let used: UInt16 = 1 << 15
  }

  /// Event suppression of packed queues (2.8.10).
  private enum Event {
    static let enable: UInt16 = 0
    static let disable: UInt16 = 1
    static let atEntry: UInt16 = 2
    static let wrap: UInt16 = 1 << 15
  }

  /// Bytes that the device wrote into the request that was taken last.
  private(set) var takenLength: UInt32 = 0
  let index: UInt16
  let size: UInt16
  let isPacked: Bool
  let descriptors: UInt64
  let driverArea: UInt64
  let deviceArea: UInt64
  /// How many requests may be under way.
  let slots: UInt16
  private let notification: UInt64
  private let hasEventIndex: Bool
  private let hasIndirect: Bool
  /// Tables of three descriptors, one a slot.
  private let tables: UInt64
  /// Entries that each slot takes in a packed queue.
  private let lengths: UInt64
  private var nextAvailable: UInt16 = 0
  private var nextUsed: UInt16 = 0
  private var availableWrap = true
  private var usedWrap = true
  /// Entries made available that the device has not been told of.
  private var untold: UInt16 = 0

  /// A queue in memory of its own; `notification` is where the device is told of new requests.
  init(_ index: UInt16, size: UInt16, features: UInt64, notification: UInt64) {
    self.index = index
    self.size = size
    self.notification = notification
    isPacked = features & VirtioPCI.Feature.packed != 0
    hasEventIndex = features & VirtioPCI.Feature.eventIndex != 0
    hasIndirect = features & VirtioPCI.Feature.indirect != 0
    slots = hasIndirect ? size : size / 3
    descriptors = guest_allocate(UInt64(size) * 16, 4096)
    driverArea = guest_allocate(8 + 2 * UInt64(size), 4096)
    deviceArea = guest_allocate(8 + 8 * UInt64(size), 4096)
    tables = guest_allocate(UInt64(size) * 48, 16)
    lengths = guest_allocate(UInt64(size) * 2, 2)
    // After a reset, memory holds what it held before, and a device takes what it finds there for requests.
    fill64(descriptors, 0, UInt64(size) * 2)
    fill64(driverArea, 0, 1 + UInt64(size) / 4)
    fill64(deviceArea, 0, 1 + UInt64(size))
    disableInterrupts()
  }

  // MARK: Requests

  /// Makes a request available; the device is told by `notify`.
  func add(_ slot: UInt16, _ chain: Chain) {
    if hasIndirect {
      let table = tables + UInt64(slot) * 48
      fill(table, first: 0, chain)
      var one = Chain()
      one.append(table, UInt32(chain.count) * 16, isWrite: false)
      if isPacked { publishPacked(slot, one, Flag.indirect) } else { publishIndirect(slot, one) }
    } else if isPacked {
      publishPacked(slot, chain, 0)
    } else {
      fill(descriptors, first: slot * 3, chain)
      publishSplit(slot * 3)
    }
  }

  /// The number of a request that is done, if there is one.
  func take() -> UInt16? { isPacked ? takePacked() : takeSplit() }

  /// A chain in a table of descriptors, in the layout of the split ring; of an indirect table in a packed queue, the
  /// device reads no flag but the one for writing (2.8.7), which has another place there.
  private func fill(_ table: UInt64, first: UInt16, _ chain: Chain) {
    for number in 0..<chain.count {
      let buffer = chain.buffers[Int(number)]
      let place = table + UInt64(first + number) * 16
      store64(place, buffer.address)
      store32(place + 8, buffer.length)
      let write = buffer.isWrite ? Flag.write : 0
      if isPacked {
        store16(place + 14, write)
      } else {
        let isLast = number + 1 == chain.count
        store16(place + 12, write | (isLast ? 0 : Flag.next))
        store16(place + 14, isLast ? 0 : first + number + 1)
      }
    }
  }

  private func publishIndirect(_ slot: UInt16, _ table: Chain) {
    let place = descriptors + UInt64(slot) * 16
    store64(place, table.buffers[0].address)
    store32(place + 8, table.buffers[0].length)
    store16(place + 12, Flag.indirect)
    publishSplit(slot)
  }

  private func publishSplit(_ head: UInt16) {
    store16(driverArea + 4 + UInt64(nextAvailable & (size - 1)) * 2, head)
    nextAvailable &+= 1
    untold &+= 1
    // x86 keeps stores in order.
    store16(driverArea + 2, nextAvailable)
  }

  private func publishPacked(_ slot: UInt16, _ chain: Chain, _ flags: UInt16) {
    let first = descriptors + UInt64(nextAvailable) * 16 + 14
    var firstFlags: UInt16 = 0
    for number in 0..<chain.count {
      let buffer = chain.buffers[Int(number)]
      let place = descriptors + UInt64(nextAvailable) * 16
      store64(place, buffer.address)
      store32(place + 8, buffer.length)
      store16(place + 12, slot)
      let all =
        flags | (availableWrap ? Flag.available : Flag.used) | (buffer.isWrite ? Flag.write : 0)
        | (number + 1 == chain.count ? 0 : Flag.next)
      if number == 0 { firstFlags = all } else { store16(place + 14, all) }
      nextAvailable += 1
      if nextAvailable == size {
        nextAvailable = 0
        availableWrap.toggle()
      }
    }
    store16(lengths + UInt64(slot) * 2, chain.count)
    untold += chain.count
    // The first hands all of them over.
    store16(first, firstFlags)
  }

  private func takeSplit() -> UInt16? {
    if load16(deviceArea + 2) == nextUsed { return nil }
    let id = load32(deviceArea + 4 + UInt64(nextUsed & (size - 1)) * 8)
    takenLength = load32(deviceArea + 8 + UInt64(nextUsed & (size - 1)) * 8)
    nextUsed &+= 1
    expect("a used head", UInt64(id) < UInt64(size) && (hasIndirect || id % 3 == 0))
    return UInt16(truncatingIfNeeded: hasIndirect ? id : id / 3)
  }

  private var isUsedPacked: Bool {
    let flags = load16(descriptors + UInt64(nextUsed) * 16 + 14)
    return (flags & Flag.available != 0) == usedWrap && (flags & Flag.used != 0) == usedWrap
  }

  private func takePacked() -> UInt16? {
    if !isUsedPacked { return nil }
    let slot = load16(descriptors + UInt64(nextUsed) * 16 + 12)
    takenLength = load32(descriptors + UInt64(nextUsed) * 16 + 8)
    expect("a used buffer's id", slot < slots)
    nextUsed += load16(lengths + UInt64(slot) * 2)
    if nextUsed >= size {
      nextUsed -= size
      usedWrap.toggle()
    }
    return slot
  }

  // MARK: Notifications

  /// Tells the device of what was added, where it wants to be told.
  func notify() {
    if untold == 0 { return }
    let count = untold
    untold = 0
    // What was added must be seen before the device's wish is read.
    full_fence()
    if isPacked ? wantsNotificationPacked(count) : wantsNotificationSplit(count) { store16(notification, index) }
  }

  private func wantsNotificationSplit(_ count: UInt16) -> Bool {
    if !hasEventIndex { return load16(deviceArea) & 1 == 0 }
    let event = load16(deviceArea + 4 + UInt64(size) * 8)
    return nextAvailable &- event &- 1 < count
  }

  private func wantsNotificationPacked(_ count: UInt16) -> Bool {
    let flags = load16(deviceArea + 2)
    if flags != Event.atEntry || !hasEventIndex { return flags != Event.disable }
    let event = load16(deviceArea)
    let isSameRound = (event & Event.wrap != 0) == availableWrap
    let entry = event & ~Event.wrap &- (isSameRound ? 0 : size)
    return nextAvailable &- entry &- 1 < count
  }

  /// Asks the device for an interrupt at the next request that is done; true where one is done already.
  func enableInterrupts() -> Bool {
    if isPacked {
      if hasEventIndex { store16(driverArea, nextUsed | (usedWrap ? Event.wrap : 0)) }
      store16(driverArea + 2, hasEventIndex ? Event.atEntry : Event.enable)
    } else if hasEventIndex {
      store16(driverArea + 4 + UInt64(size) * 2, nextUsed)
    } else {
      store16(driverArea, 0)
    }
    full_fence()
    return isPacked ? isUsedPacked : load16(deviceArea + 2) != nextUsed
  }

  /// With event indices in a split queue, the one that has passed does it.
  func disableInterrupts() {
    if isPacked { store16(driverArea + 2, Event.disable) } else if !hasEventIndex { store16(driverArea, 1) }
  }
}
