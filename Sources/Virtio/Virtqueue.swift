import BlockLayer
import CLinux
import GuestMemory
import Synchronization

/// What is wrong with a queue that a driver set up or filled (virtio 1.2, 2.6): the device needs a reset.
public enum VirtqueueError: Error, Equatable, CustomStringConvertible {
  /// A part of the queue is not in guest RAM, or not aligned.
  case area(name: String, address: UInt64)
  /// The size is 0, above the maximum, or for a split queue no power of two.
  case size(UInt16)
  /// The driver's index runs ahead of the queue's size.
  case availableIndex(UInt16, next: UInt16)
  /// A descriptor's number is outside its table.
  case descriptor(UInt32, count: UInt32)
  /// A chain has more descriptors than its table.
  case chainTooLong
  /// A buffer is not in guest RAM.
  case buffer(address: UInt64, length: UInt32)
  /// A buffer that the device reads follows one that it writes.
  case order
  /// An indirect table where none may be, or of a size that is none.
  case indirect(length: UInt32)

  /// One line.
  public var description: String {
    func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
    return switch self {
    case .area(let name, let address): "the \(name) at \(hex(address)) is not aligned or not in guest memory"
    case .size(let size): "a queue cannot have \(size) entries"
    case .availableIndex(let index, let next): "available index \(index) is too far ahead of \(next)"
    case .descriptor(let number, let count): "descriptor \(number) is outside a table of \(count)"
    case .chainTooLong: "a descriptor chain is longer than its table, or loops"
    case .buffer(let address, let length): "a buffer of \(length) bytes at \(hex(address)) is not in guest memory"
    case .order: "a buffer to read follows one to write"
    case .indirect(let length): "an indirect table of \(length) bytes is not allowed here"
    }
  }
}

/// Where a driver has put a queue, and how it is laid out.
public struct VirtqueueConfiguration: Equatable, Sendable {
  /// Entries; for a split queue a power of two.
  public var size: UInt16
  /// Guest-physical addresses of the descriptors, the driver's and the device's area.
  public var descriptors: UInt64 = 0
  /// See `descriptors`.
  public var driver: UInt64 = 0
  /// See `descriptors`.
  public var device: UInt64 = 0

  /// A queue that is nowhere yet.
  public init(size: UInt16) { self.size = size }
}

/// One request of a driver: what the device reads, then what it writes. Used again and again.
public final class VirtqueueChain {
  /// What the device reads.
  public internal(set) var readable = IOVectors()
  /// What the device writes.
  public internal(set) var writable = IOVectors()
  /// The number that tells the driver which chain is done.
  var id: UInt16 = 0
  /// Entries of the ring that it takes; 1 in a split queue.
  var entries: UInt16 = 1
  /// Bytes that the device has written, for `giveBack` of several.
  public var written: UInt32 = 0

  /// An empty chain.
  public init() {}
}

/// How far the device is in a queue: what is saved of it, when nothing is under way.
public struct VirtqueueProgress: Equatable, Sendable {
  /// The next entry to take, and the next to give back.
  public var nextAvailable: UInt16 = 0
  /// See `nextAvailable`.
  public var nextUsed: UInt16 = 0
  /// A packed queue's wrap counters.
  public var availableWrap = true
  /// See `availableWrap`.
  public var usedWrap = true

  /// A queue that nobody has used.
  public init() {}
}

/// The device's side of a virtqueue, split (virtio 1.2, 2.7) or packed (2.8). It belongs to one thread.
///
/// The guest changes all of it at any moment: every number is read once and then checked.
public final class Virtqueue {
  let memory: GuestMemory
  let size: UInt16
  let descriptors: UnsafeMutableRawPointer
  let driver: UnsafeMutableRawPointer
  let device: UnsafeMutableRawPointer
  let isPacked: Bool
  let hasIndirect: Bool
  let hasEventIndex: Bool
  /// How far the device is.
  public internal(set) var progress: VirtqueueProgress
  /// Entries given back since the driver was last told, or found to want no telling.
  var untold: UInt16 = 0

  /// The queue where the driver has put it, with the features that it has accepted.
  public init(
    _ configuration: VirtqueueConfiguration, features: VirtioFeatures, memory: GuestMemory,
    progress: VirtqueueProgress = VirtqueueProgress()
  ) throws(VirtqueueError) {
    let size = Int(configuration.size)
    isPacked = features.contains(.packedRing)
    guard size > 0, size <= 32768, isPacked || size.nonzeroBitCount == 1 else { throw .size(configuration.size) }
    func area(_ name: String, _ address: UInt64, count: Int, alignment: UInt64) throws(VirtqueueError)
      -> UnsafeMutableRawPointer
    {
      guard address % alignment == 0,
        let start = memory.devicePointer(GuestPhysicalAddress(address), count: count, isWrite: true)
      else {
        throw .area(name: name, address: address)
      }
      return start
    }
    self.memory = memory
    self.size = configuration.size
    self.progress = progress
    hasIndirect = features.contains(.indirectDescriptors)
    hasEventIndex = features.contains(.eventIndex)
    descriptors = try area("descriptor area", configuration.descriptors, count: size * 16, alignment: 16)
    let counts = isPacked ? (driver: 4, device: 4) : (driver: 6 + 2 * size, device: 6 + 8 * size)
    driver = try area("driver area", configuration.driver, count: counts.driver, alignment: isPacked ? 4 : 2)
    device = try area("device area", configuration.device, count: counts.device, alignment: 4)
    // A saved state is no more to be trusted than a guest.
    if isPacked {
      self.progress.nextAvailable %= configuration.size
      self.progress.nextUsed %= configuration.size
    }
  }

  /// Takes the next request of the driver; false where there is none.
  public func take(_ chain: VirtqueueChain) throws(VirtqueueError) -> Bool {
    chain.readable.removeAll()
    chain.writable.removeAll()
    return isPacked ? try takePacked(chain) : try takeSplit(chain)
  }

  /// Gives a request back, `written` bytes of which the device wrote.
  public func giveBack(_ chain: VirtqueueChain, written: UInt32) {
    chain.written = written
    giveBack(CollectionOfOne(chain))
  }

  /// Gives requests back at once, each with what the device wrote: the driver sees all of them or none.
  public func giveBack(_ chains: some Collection<VirtqueueChain>) {
    if isPacked { giveBackPacked(chains) } else { giveBackSplit(chains) }
    for chain in chains { untold &+= chain.entries }
  }

  /// Leaves requests that were taken last, and nothing was done with, to be taken again.
  public func untake(_ chains: some Collection<VirtqueueChain>) {
    for chain in chains {
      if isPacked, chain.entries > progress.nextAvailable {
        progress.nextAvailable += size
        progress.availableWrap.toggle()
      }
      progress.nextAvailable &-= chain.entries
    }
  }

  /// Whether the driver wants to be told of what was given back since the last call.
  public func needsInterrupt() -> Bool {
    guard untold != 0 else { return false }
    // What was given back must be seen before the driver's wish is read.
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    let count = untold
    untold = 0
    return isPacked ? needsInterruptPacked(count) : needsInterruptSplit(count)
  }

  /// Asks the driver not to tell of new requests.
  public func disableNotifications() {
    if isPacked { disableNotificationsPacked() } else { disableNotificationsSplit() }
  }

  /// Asks the driver to tell of new requests; true where some came meanwhile, which it has told nobody of.
  public func enableNotifications() -> Bool {
    if isPacked { enableNotificationsPacked() } else { enableNotificationsSplit() }
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    return isPacked ? isAvailablePacked : isAvailableSplit
  }

  // MARK: Descriptors, which both layouts share

  enum Flag {
    static let next: UInt16 = 1
    static let write: UInt16 = 2
    static let indirect: UInt16 = 4
  }

  struct Descriptor {
    var address: UInt64
    var length: UInt32
    /// The flags of a split queue's descriptor, a packed one's buffer id.
    var third: UInt16
    /// The next descriptor of a split queue, a packed one's flags.
    var fourth: UInt16

    init(_ start: UnsafeMutableRawPointer, _ number: Int) {
      let place = start + number * 16
      address = clinux_load64(place)
      length = clinux_load32(place + 8)
      third = clinux_load16(place + 12)
      fourth = clinux_load16(place + 14)
    }
  }

  func add(_ address: UInt64, _ length: UInt32, isWrite: Bool, to chain: VirtqueueChain) throws(VirtqueueError) {
    guard
      let start = memory.devicePointer(GuestPhysicalAddress(address), count: Int(length), isWrite: isWrite)
    else { throw .buffer(address: address, length: length) }
    if isWrite {
      chain.writable.append(start, Int(length))
    } else {
      guard chain.writable.count == 0 else { throw .order }
      chain.readable.append(start, Int(length))
    }
  }

  /// Entries of an indirect table. Drivers use as many as other devices take; more would be a driver that keeps us busy.
  static let longestTable: UInt32 = 1024

  /// An indirect table and its entries.
  func indirectTable(
    _ address: UInt64, _ length: UInt32
  ) throws(VirtqueueError) -> (start: UnsafeMutableRawPointer, count: UInt32) {
    guard hasIndirect, length > 0, length % 16 == 0, length <= Self.longestTable * 16 else {
      throw .indirect(length: length)
    }
    guard let start = memory.devicePointer(GuestPhysicalAddress(address), count: Int(length), isWrite: false)
    else { throw .buffer(address: address, length: length) }
    return (start, length / 16)
  }

  func store16(_ value: UInt16, _ place: UnsafeMutableRawPointer) {
    clinux_store16(place, value)
    memory.markDirty(place, count: 2)
  }

  /// Whether an event index asks for a message after `count` entries up to `new` (virtio 1.2, 2.7.7.2 and 2.8.10).
  static func passes(_ event: UInt16, new: UInt16, count: UInt16) -> Bool {
    new &- event &- 1 < count
  }
}
