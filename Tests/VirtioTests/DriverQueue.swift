import Glibc
import Synchronization
import Testing

/// The driver's side of one queue, split or packed.
final class DriverQueue {
  struct Used: Equatable {
    var id: UInt16
    var written: UInt32
  }

  private unowned let driver: Driver
  let index: Int
  let size: UInt16
  let descriptors: UInt64
  let driverArea: UInt64
  let deviceArea: UInt64
  private let indirectTables: UInt64
  private static let indirectLength: UInt64 = 16

  private var available: UInt16 = 0
  private var used: UInt16 = 0
  private var availableWrap = true
  private var usedWrap = true
  private var free: [UInt16]
  /// Descriptors that a chain in flight has, by its id.
  private var chains: [UInt16: [UInt16]] = [:]
  private var freeEntries: Int

  init(_ driver: Driver, _ index: Int, size: UInt16) throws {
    self.driver = driver
    self.index = index
    self.size = size
    descriptors = try driver.allocate(Int(size) * 16, alignment: 16)
    driverArea = try driver.allocate(driver.way.isPacked ? 4 : 6 + 2 * Int(size), alignment: 4)
    deviceArea = try driver.allocate(driver.way.isPacked ? 4 : 6 + 8 * Int(size), alignment: 4)
    indirectTables = try driver.allocate(Int(size) * Int(Self.indirectLength) * 16, alignment: 16)
    free = (0..<size).reversed()
    freeEntries = Int(size)
    try driver.store([UInt8](repeating: 0, count: Int(size) * 16), at: descriptors)
    let areas = driver.way.isPacked ? (4, 4) : (6 + 2 * Int(size), 6 + 8 * Int(size))
    try driver.store([UInt8](repeating: 0, count: areas.0), at: driverArea)
    try driver.store([UInt8](repeating: 0, count: areas.1), at: deviceArea)
  }

  func hasRoom(_ buffers: Int) -> Bool {
    let needed = driver.way.isIndirect ? 1 : buffers
    return driver.way.isPacked ? freeEntries >= needed && !free.isEmpty : free.count >= needed
  }

  /// Asks for an interrupt after so many more used entries. Without event indices there is one each time.
  func wantInterrupt(after count: UInt16) throws {
    guard driver.way.hasEventIndex else { return }
    if !driver.way.isPacked { return try driver.store(used &+ count &- 1, at: driverArea + 4 + 2 * UInt64(size)) }
    let place = UInt32(used) + UInt32(count) - 1
    let wrap = place >= UInt32(size) ? !usedWrap : usedWrap
    try driver.store(UInt16(place % UInt32(size)) | (wrap ? 1 << 15 : 0), at: driverArea)
    try driver.store(UInt16(2), at: driverArea + 2)
  }

  /// Makes a request available and returns the id that it comes back with.
  func add(_ buffers: [Driver.Buffer]) throws -> UInt16 {
    driver.way.isPacked ? try addPacked(buffers) : try addSplit(buffers)
  }

  private func indirect(_ id: UInt16, _ buffers: [Driver.Buffer]) throws -> Driver.Buffer {
    let table = indirectTables + UInt64(id) * Self.indirectLength * 16
    for (number, buffer) in buffers.enumerated() {
      let isLast = number == buffers.count - 1
      let write: UInt16 = buffer.isWritten ? 2 : 0
      let place = table + UInt64(number) * 16
      if driver.way.isPacked {
        try store(place, buffer, third: 0, fourth: write)
      } else {
        try store(place, buffer, third: write | (isLast ? 0 : 1), fourth: UInt16(number + 1))
      }
    }
    return Driver.Buffer(address: table, length: UInt32(buffers.count * 16), isWritten: false)
  }

  private func store(_ place: UInt64, _ buffer: Driver.Buffer, third: UInt16, fourth: UInt16?) throws {
    try driver.store(buffer.address, at: place)
    try driver.store(buffer.length, at: place + 8)
    try driver.store(third, at: place + 12)
    atomicMemoryFence(ordering: .releasing)
    if let fourth { try driver.store(fourth, at: place + 14) }
  }

  private func addSplit(_ buffers: [Driver.Buffer]) throws -> UInt16 {
    var taken: [UInt16] = []
    if driver.way.isIndirect {
      let id = free.removeLast()
      taken = [id]
      try store(descriptors + UInt64(id) * 16, indirect(id, buffers), third: 4, fourth: 0)
    } else {
      for _ in buffers { taken.append(free.removeLast()) }
      for (number, buffer) in buffers.enumerated() {
        let isLast = number == buffers.count - 1
        try store(
          descriptors + UInt64(taken[number]) * 16, buffer, third: (buffer.isWritten ? 2 : 0) | (isLast ? 0 : 1),
          fourth: isLast ? 0 : taken[number + 1])
      }
    }
    chains[taken[0]] = taken
    try driver.store(taken[0], at: driverArea + 4 + UInt64(available % size) * 2)
    available &+= 1
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    try driver.store(available, at: driverArea + 2)
    return taken[0]
  }

  private func addPacked(_ buffers: [Driver.Buffer]) throws -> UInt16 {
    let id = free.removeLast()
    let entries = driver.way.isIndirect ? [try indirect(id, buffers)] : buffers
    chains[id] = [UInt16](repeating: 0, count: entries.count)
    freeEntries -= entries.count
    var first: (place: UInt64, flags: UInt16)?
    for (number, buffer) in entries.enumerated() {
      var flags: UInt16 = availableWrap ? 1 << 7 : 1 << 15
      if driver.way.isIndirect { flags |= 4 } else if buffer.isWritten { flags |= 2 }
      if number < entries.count - 1 { flags |= 1 }
      let place = descriptors + UInt64(available) * 16
      // Handed over last, with all that follows it.
      try store(place, buffer, third: id, fourth: number == 0 ? nil : flags)
      if number == 0 { first = (place, flags) }
      available += 1
      if available == size {
        available = 0
        availableWrap.toggle()
      }
    }
    atomicMemoryFence(ordering: .sequentiallyConsistent)
    if let first { try driver.store(first.flags, at: first.place + 14) }
    return id
  }

  /// What the device has given back since the last call.
  func reap() throws -> [Used] {
    var result: [Used] = []
    while let next = driver.way.isPacked ? try reapPacked() : try reapSplit() { result.append(next) }
    return result
  }

  private func reapSplit() throws -> Used? {
    guard try driver.load(deviceArea + 2, as: UInt16.self) != used else { return nil }
    atomicMemoryFence(ordering: .acquiring)
    let entry = deviceArea + 4 + UInt64(used % size) * 8
    let id = UInt16(truncatingIfNeeded: try driver.load(entry, as: UInt32.self))
    used &+= 1
    let chain = chains.removeValue(forKey: id)
    free += try #require(chain, "the device gives back \(id), which it does not have")
    return Used(id: id, written: try driver.load(entry + 4))
  }

  private func reapPacked() throws -> Used? {
    let entry = descriptors + UInt64(used) * 16
    let flags: UInt16 = try driver.load(entry + 14)
    guard (flags & 1 << 7 != 0) == usedWrap, (flags & 1 << 15 != 0) == usedWrap else { return nil }
    atomicMemoryFence(ordering: .acquiring)
    let id: UInt16 = try driver.load(entry + 12)
    let chain = chains.removeValue(forKey: id)
    let count = try #require(chain, "the device gives back \(id), which it does not have").count
    free.append(id)
    freeEntries += count
    let next = Int(used) + count
    if next >= Int(size) { usedWrap.toggle() }
    used = UInt16(next % Int(size))
    return Used(id: id, written: try driver.load(entry + 8))
  }

  /// Waits for so many; nil where they do not come.
  func wait(_ count: Int) throws -> [Used]? {
    var result: [Used] = []
    // Twenty seconds: longer than any machine needs.
    for _ in 0..<200_000 {
      result += try reap()
      if result.count >= count { return result }
      usleep(100)
    }
    return nil
  }
}
