import CLinux
import GuestMemory
import Synchronization

/// Split queues (virtio 1.2, 2.7): a table of descriptors, a ring of heads from the driver, one of used chains back.
extension Virtqueue {
  private enum Area {
    static let flags = 0
    static let index = 2
    static let ring = 4
    /// In the driver's flags: no interrupts; in the device's: no notifications.
    static let suppress: UInt16 = 1
  }

  private var usedEvent: UnsafeMutableRawPointer { driver + Area.ring + Int(size) * 2 }
  private var availableEvent: UnsafeMutableRawPointer { device + Area.ring + Int(size) * 8 }

  var isAvailableSplit: Bool { clinux_load16(driver + Area.index) != progress.nextAvailable }

  func takeSplit(_ chain: VirtqueueChain) throws(VirtqueueError) -> Bool {
    let available = clinux_load16(driver + Area.index)
    let next = progress.nextAvailable
    if available == next { return false }
    atomicMemoryFence(ordering: .acquiring)
    guard available &- next <= size else { throw .availableIndex(available, next: next) }
    let head = clinux_load16(driver + Area.ring + Int(next & (size &- 1)) * 2)
    chain.id = head
    chain.entries = 1
    var table = descriptors
    var count = UInt32(size)
    var number = UInt32(head)
    var isIndirect = false
    var steps: UInt32 = 0
    while true {
      guard number < count else { throw .descriptor(number, count: count) }
      guard steps < count else { throw .chainTooLong }
      steps += 1
      let descriptor = Descriptor(table, Int(number))
      let flags = descriptor.third
      if flags & Flag.indirect != 0 {
        guard !isIndirect, flags & Flag.next == 0 else { throw .indirect(length: descriptor.length) }
        (table, count) = try indirectTable(descriptor.address, descriptor.length)
        isIndirect = true
        number = 0
        steps = 0
        continue
      }
      try add(descriptor.address, descriptor.length, isWrite: flags & Flag.write != 0, to: chain)
      if flags & Flag.next == 0 { break }
      number = UInt32(descriptor.fourth)
    }
    progress.nextAvailable = next &+ 1
    return true
  }

  func giveBackSplit(_ chains: some Collection<VirtqueueChain>) {
    for chain in chains {
      let entry = device + Area.ring + Int(progress.nextUsed & (size &- 1)) * 8
      clinux_store32(entry, UInt32(chain.id))
      clinux_store32(entry + 4, chain.written)
      memory.markDirty(entry, count: 8)
      progress.nextUsed &+= 1
    }
    // The driver may look as soon as the index has moved.
    atomicMemoryFence(ordering: .releasing)
    store16(progress.nextUsed, device + Area.index)
  }

  func needsInterruptSplit(_ count: UInt16) -> Bool {
    if hasEventIndex { return Self.passes(clinux_load16(usedEvent), new: progress.nextUsed, count: count) }
    return clinux_load16(driver + Area.flags) & Area.suppress == 0
  }

  func disableNotificationsSplit() {
    // With event indices the one that has passed does it.
    if !hasEventIndex { store16(Area.suppress, device + Area.flags) }
  }

  func enableNotificationsSplit() {
    if hasEventIndex { store16(progress.nextAvailable, availableEvent) } else { store16(0, device + Area.flags) }
  }
}
