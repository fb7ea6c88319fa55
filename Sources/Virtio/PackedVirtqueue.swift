import CLinux
import GuestMemory
import Synchronization

/// Packed queues (virtio 1.2, 2.8): one ring of descriptors, which the device overwrites with what it has used.
extension Virtqueue {
  private enum Bit {
    static let available: UInt16 = 1 << 7
    static let used: UInt16 = 1 << 15
  }

  /// Event suppression structures (2.8.10): an entry with its wrap counter, then what is wanted.
  private enum Event {
    static let flags = 2
    static let enable: UInt16 = 0
    static let disable: UInt16 = 1
    static let atEntry: UInt16 = 2
    static let wrap: UInt16 = 1 << 15
  }

  private func isAvailable(_ flags: UInt16, _ wrap: Bool) -> Bool {
    (flags & Bit.available != 0) == wrap && (flags & Bit.used != 0) != wrap
  }

  var isAvailablePacked: Bool {
    isAvailable(clinux_load16(descriptors + Int(progress.nextAvailable) * 16 + 14), progress.availableWrap)
  }

  func takePacked(_ chain: VirtqueueChain) throws(VirtqueueError) -> Bool {
    // The flags say whether the rest has been written: it is read after them.
    guard isAvailablePacked else { return false }
    atomicMemoryFence(ordering: .acquiring)
    var next = progress.nextAvailable
    var wrap = progress.availableWrap
    var entries: UInt16 = 0
    while true {
      guard entries < size else { throw .chainTooLong }
      let descriptor = Descriptor(descriptors, Int(next))
      let flags = descriptor.fourth
      entries += 1
      next += 1
      if next == size {
        next = 0
        wrap.toggle()
      }
      chain.id = descriptor.third
      if flags & Flag.indirect != 0 {
        guard entries == 1, flags & Flag.next == 0 else { throw .indirect(length: descriptor.length) }
        let (table, count) = try indirectTable(descriptor.address, descriptor.length)
        for number in 0..<Int(count) {
          let descriptor = Descriptor(table, number)
          try add(descriptor.address, descriptor.length, isWrite: descriptor.fourth & Flag.write != 0, to: chain)
        }
      } else {
        try add(descriptor.address, descriptor.length, isWrite: flags & Flag.write != 0, to: chain)
      }
      if flags & Flag.next == 0 { break }
    }
    chain.entries = entries
    progress.nextAvailable = next
    progress.availableWrap = wrap
    return true
  }

  func giveBackPacked(_ chains: some Collection<VirtqueueChain>) {
    var first: (flags: UInt16, entry: UnsafeMutableRawPointer)?
    for chain in chains {
      let entry = descriptors + Int(progress.nextUsed) * 16
      let flags = (progress.usedWrap ? Bit.available | Bit.used : 0) | (chain.written > 0 ? Flag.write : 0)
      clinux_store32(entry + 8, chain.written)
      clinux_store16(entry + 12, chain.id)
      if first == nil { first = (flags, entry) } else { clinux_store16(entry + 14, flags) }
      memory.markDirty(entry, count: 16)
      let next = UInt32(progress.nextUsed) + UInt32(chain.entries)
      if next >= UInt32(size) { progress.usedWrap.toggle() }
      progress.nextUsed = UInt16(next % UInt32(size))
    }
    guard let first else { return }
    // Last: they hand the entries over.
    atomicMemoryFence(ordering: .releasing)
    clinux_store16(first.entry + 14, first.flags)
    memory.markDirty(first.entry, count: 16)
  }

  func needsInterruptPacked(_ count: UInt16) -> Bool {
    let flags = clinux_load16(driver + Event.flags)
    guard flags == Event.atEntry, hasEventIndex else { return flags != Event.disable }
    let event = clinux_load16(driver)
    let entry = event & ~Event.wrap
    let isSameRound = (event & Event.wrap != 0) == progress.usedWrap
    return Self.passes(isSameRound ? entry : entry &- size, new: progress.nextUsed, count: count)
  }

  func disableNotificationsPacked() {
    store16(Event.disable, device + Event.flags)
  }

  func enableNotificationsPacked() {
    guard hasEventIndex else { return store16(Event.enable, device + Event.flags) }
    store16(progress.nextAvailable | (progress.availableWrap ? Event.wrap : 0), device)
    store16(Event.atEntry, device + Event.flags)
  }
}
