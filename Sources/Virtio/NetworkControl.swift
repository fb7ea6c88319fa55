import BlockLayer
import NetLayer

/// Commands of the control queue (virtio 1.2, 5.1.6.5).
extension VirtioNetwork {
  private enum Class {
    static let receive: UInt8 = 0
    static let address: UInt8 = 1
    static let announce: UInt8 = 3
  }

  private enum Status {
    static let ok: UInt8 = 0
    static let error: UInt8 = 1
  }

  private static let headerSize = 2
  private static let addressSize = 6

  /// Carries out commands; true where more are left.
  func control(_ queue: Virtqueue) throws(VirtqueueError) -> Bool {
    var budget = 64
    repeat {
      queue.disableNotifications()
      while budget > 0, try queue.take(chain) {
        budget -= 1
        // Without room for an answer nothing is done: the driver would not know.
        guard chain.writable.byteCount > 0 else {
          queue.giveBack(chain, written: 0)
          continue
        }
        withUnsafeBytes(of: obey(chain) ? Status.ok : Status.error) { status in
          if let start = status.baseAddress { chain.writable.copyIn(start, from: 0, length: 1) }
        }
        markDirty(chain, count: 1)
        queue.giveBack(chain, written: 1)
      }
      if queue.needsInterrupt() { interrupt(Queue.control) }
    } while budget > 0 && queue.enableNotifications()
    return budget == 0
  }

  private func obey(_ chain: VirtqueueChain) -> Bool {
    guard let header = bytes(chain, at: 0, count: Self.headerSize) else { return false }
    let size = chain.readable.byteCount - Self.headerSize
    switch (header[0], header[1]) {
    case (Class.receive, 0...5):
      // The modes have the order of the commands: PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST.
      guard size == 1, let value = bytes(chain, at: Self.headerSize, count: 1)?.first, value <= 1 else { return false }
      let mode = NetworkReceiveFilter.Modes(rawValue: 1 << header[1])
      if value == 1 { filter.modes.insert(mode) } else { filter.modes.remove(mode) }
      return true
    case (Class.address, 0): return setTable(chain)
    case (Class.address, 1):
      guard size == Self.addressSize, let address = address(chain, at: Self.headerSize), !address.isMulticast else {
        return false
      }
      setStation(address)
      return true
    case (Class.announce, 0):
      acknowledgeAnnouncement()
      return true
    default: return false
    }
  }

  /// Two lists, each a number of addresses (32 bits) and the addresses: unicast, then multicast.
  private func setTable(_ chain: VirtqueueChain) -> Bool {
    var position = Self.headerSize
    var addresses: Set<MACAddress> = []
    var overflows: NetworkReceiveFilter.Modes = []
    for overflow in [NetworkReceiveFilter.Modes.everyUnicast, .everyMulticast] {
      guard let word = bytes(chain, at: position, count: 4) else { return false }
      let count = Int(word.reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) })
      position += 4
      let (length, isTooLong) = count.multipliedReportingOverflow(by: Self.addressSize)
      guard !isTooLong, length <= chain.readable.byteCount - position else { return false }
      if count > NetworkReceiveFilter.longestTable {
        overflows.insert(overflow)
      } else {
        for number in 0..<count {
          guard let address = address(chain, at: position + number * Self.addressSize) else { return false }
          addresses.insert(address)
        }
      }
      position += length
    }
    guard position == chain.readable.byteCount else { return false }
    filter.addresses = addresses
    filter.modes.subtract([.everyUnicast, .everyMulticast])
    filter.modes.formUnion(overflows)
    return true
  }

  private func address(_ chain: VirtqueueChain, at offset: Int) -> MACAddress? {
    bytes(chain, at: offset, count: Self.addressSize).map { bytes in
      MACAddress(rawValue: bytes.reduce(0) { $0 << 8 | UInt64($1) })
    }
  }

  /// A copy of what the driver has written, if there is so much.
  private func bytes(_ chain: VirtqueueChain, at offset: Int, count: Int) -> [UInt8]? {
    guard offset + count <= chain.readable.byteCount else { return nil }
    return [UInt8](unsafeUninitializedCapacity: count) { buffer, filled in
      if let start = buffer.baseAddress { chain.readable.copyOut(start, from: offset, length: count) }
      filled = count
    }
  }
}
