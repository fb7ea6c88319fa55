import CLinux
import Glibc
import Host
import Synchronization

/// Why guest memory could not be made or touched.
public enum GuestMemoryError: Error, Equatable, CustomStringConvertible {
  /// Part of the access lies outside guest RAM.
  case outside(GuestPhysicalAddress, count: Int)
  /// Two regions share addresses.
  case overlap(GuestRange, GuestRange)
  /// A region is not made of whole 4 KiB pages.
  case unaligned(GuestRange)
  /// The guest asks for more than the host has.
  case exceedsHost(requested: UInt64, host: UInt64)
  /// The host refused the memory.
  case host(HostError)

  /// One line: what failed, with the addresses.
  public var description: String {
    switch self {
    case .outside(let address, let count): "\(count) bytes at guest-physical \(address) are not all in guest RAM"
    case .overlap(let a, let b): "memory regions \(a) and \(b) overlap"
    case .unaligned(let range): "memory region \(range) is not made of whole 4 KiB pages"
    case .exceedsHost(let requested, let host):
      "guest memory of \(requested >> 20) MiB exceeds the host's \(host >> 20) MiB: ask for less with --memory"
    case .host(let error): "guest memory: \(error)"
    }
  }
}

/// One run of guest RAM and where the host holds it.
public struct GuestRegion: Sendable {
  /// Guest-physical addresses of the region.
  public let range: GuestRange
  /// Offset of its first byte in the memory file.
  public let fileOffset: UInt64
  /// The host's address of its first byte.
  public nonisolated(unsafe) let hostBase: UnsafeMutableRawPointer
}

/// The guest's RAM: one memory file, mapped once, shown to the guest as regions with holes between them.
///
/// The guest changes it at any moment, so it is never a Swift reference or span: integers are read and written
/// volatile and singly, bulk data is copied out before it is looked at. Bounds are checked here and nowhere else.
public final class GuestMemory: Sendable {
  /// The regions, by rising address.
  public let regions: [GuestRegion]
  /// Pages written by the VMM itself, which no accelerator's log sees.
  public let dirty: DirtyBitmap
  /// The memory file behind every region, for peers that map it too.
  public let file: FileDescriptor

  private let mapping: MemoryMapping
  private let isCopy = Atomic(false)
  private let isObserved = Atomic(false)
  private let isGuarded = Atomic(false)
  private let arriving = Atomic(false)
  private let deviceGuard = Mutex(DeviceGuard())
  private let observer = Mutex(Observer())

  // In structs: a bare function in a Mutex gets another two layers of thunks with every `withLock`.
  private struct DeviceGuard {
    var check: (@Sendable (GuestPhysicalAddress, Int, Bool) -> Bool)?
  }
  private struct Observer {
    var call: (@Sendable (UnsafeMutableRawPointer, Int) -> Void)?
  }
  private nonisolated(unsafe) let table: UnsafeMutablePointer<GuestRegion>

  /// Makes RAM for `ranges`, which are whole pages and do not overlap; nothing is touched, so nothing is used yet.
  public init(_ ranges: [GuestRange]) throws(GuestMemoryError) {
    let ranges = ranges.sorted { $0.start < $1.start }
    for range in ranges where (range.start.rawValue | range.size) & 0xfff != 0 || range.size == 0 {
      throw .unaligned(range)
    }
    for (a, b) in zip(ranges, ranges.dropFirst()) where a.overlaps(b) { throw .overlap(a, b) }
    var total: UInt64 = 0
    for range in ranges { total = total.addingReportingOverflow(range.size).partialValue }
    let host = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE)))
    guard total <= host else { throw .exceedsHost(requested: total, host: host) }
    do {
      file = try makeMemoryFile(name: "guest-ram", size: Int(total))
      mapping = try MemoryMapping(file, count: Int(total))
      dirty = try DirtyBitmap(pages: Int(total >> 12))
    } catch {
      throw .host(error)
    }
    mapping.adviseHugePages()
    var offset: UInt64 = 0
    var regions: [GuestRegion] = []
    for range in ranges {
      regions.append(GuestRegion(range: range, fileOffset: offset, hostBase: mapping.base + Int(offset)))
      offset += range.size
    }
    self.regions = regions
    table = .allocate(capacity: regions.count)
    table.initialize(from: regions, count: regions.count)
  }

  deinit {
    table.deinitialize(count: regions.count)
    table.deallocate()
  }

  /// Bytes of RAM in all regions.
  public var size: UInt64 { UInt64(mapping.count) }

  /// The host's address of `count` bytes that lie in one region; nil where they do not.
  ///
  /// Whoever writes through it calls `markDirty`. The bytes change under the reader's feet: copy, then look.
  @inline(__always)
  public func hostPointer(_ address: GuestPhysicalAddress, count: Int) -> UnsafeMutableRawPointer? {
    for index in 0..<regions.count {
      let range = table[index].range
      let offset = address.rawValue &- range.start.rawValue
      if offset < range.size, count >= 0, UInt64(count) <= range.size &- offset {
        return table[index].hostBase + Int(offset)
      }
    }
    return nil
  }

  /// `hostPointer` on behalf of a device; nil also where `setDeviceGuard`'s says no.
  @inline(__always)
  public func devicePointer(
    _ address: GuestPhysicalAddress, count: Int, isWrite: Bool
  ) -> UnsafeMutableRawPointer? {
    guard allowsDevice(address, count: count, isWrite: isWrite) else { return nil }
    let pointer = hostPointer(address, count: count)
    if let pointer, isArriving { waitFor(pointer, count) }
    return pointer
  }

  /// Whether pages are still to come from another process. Whoever touches one of them waits for it; looking for holes in the
  /// file finds pages that are not holes.
  @inline(__always)
  public var isArriving: Bool {
    get { arriving.load(ordering: .acquiring) }
    set { arriving.store(newValue, ordering: .releasing) }
  }

  /// Has the calling thread wait for pages that are still to come: asynchronous requests may fail there instead.
  private func waitFor(_ pointer: UnsafeMutableRawPointer, _ count: Int) {
    guard count > 0 else { return }
    for offset in stride(from: 0, to: count, by: 4096) { _ = clinux_load8(pointer + offset) }
    _ = clinux_load8(pointer + count - 1)
  }

  /// Gives up what pages of the memory file hold: they are not there any more.
  public func discard(pages: Range<Int>) throws(GuestMemoryError) {
    guard clinux_punch_hole(file.rawValue, Int64(pages.lowerBound) << 12, Int64(pages.count) << 12) == 0 else {
      throw .host(.systemCall("fallocate", errno: errno))
    }
  }

  /// Whether a device may read or write these bytes, wherever they are.
  @inline(__always)
  public func allowsDevice(_ address: GuestPhysicalAddress, count: Int, isWrite: Bool) -> Bool {
    guard isGuarded.load(ordering: .acquiring) else { return true }
    return deviceGuard.withLock { $0 }.check?(address, count, isWrite) ?? true
  }

  /// Has `check` decide, on the device's thread, which accesses of devices go through: address, bytes, whether it writes.
  public func setDeviceGuard(_ check: (@Sendable (GuestPhysicalAddress, Int, Bool) -> Bool)?) {
    deviceGuard.withLock { $0.check = check }
    isGuarded.store(check != nil, ordering: .releasing)
  }

  /// Reads one little-endian integer, with a single access where it is naturally aligned and no wider than 64 bits.
  public func read<T: FixedWidthInteger>(
    _ address: GuestPhysicalAddress, as type: T.Type = T.self
  ) throws(GuestMemoryError) -> T {
    let count = MemoryLayout<T>.size
    guard let pointer = hostPointer(address, count: count) else { throw .outside(address, count: count) }
    return switch count {
    case 1: T(truncatingIfNeeded: clinux_load8(pointer))
    case 2: T(truncatingIfNeeded: clinux_load16(pointer))
    case 4: T(truncatingIfNeeded: clinux_load32(pointer))
    case 8: T(truncatingIfNeeded: clinux_load64(pointer))
    default: T(littleEndian: pointer.loadUnaligned(as: T.self))
    }
  }

  /// Writes one little-endian integer, with a single access where it is naturally aligned and no wider than 64 bits.
  public func write<T: FixedWidthInteger>(
    _ value: T, to address: GuestPhysicalAddress
  ) throws(GuestMemoryError) {
    let count = MemoryLayout<T>.size
    guard let pointer = hostPointer(address, count: count) else { throw .outside(address, count: count) }
    switch count {
    case 1: clinux_store8(pointer, UInt8(truncatingIfNeeded: value))
    case 2: clinux_store16(pointer, UInt16(truncatingIfNeeded: value))
    case 4: clinux_store32(pointer, UInt32(truncatingIfNeeded: value))
    case 8: clinux_store64(pointer, UInt64(truncatingIfNeeded: value))
    default: pointer.storeBytes(of: value.littleEndian, as: T.self)
    }
    markDirty(pointer, count: count)
  }

  /// Copies guest bytes into `buffer`; the range may cross adjoining regions.
  public func read(
    _ address: GuestPhysicalAddress, into buffer: UnsafeMutableRawBufferPointer
  ) throws(GuestMemoryError) {
    try forEachRun(address, count: buffer.count) { pointer, offset, count in
      memcpy(buffer.baseAddress! + offset, pointer, count)
    }
  }

  /// A copy of `count` guest bytes.
  public func bytes(_ address: GuestPhysicalAddress, count: Int) throws(GuestMemoryError) -> [UInt8] {
    // Before anything is allocated: the count may be a guest's.
    try forEachRun(address, count: count) { _, _, _ in }
    var bytes = [UInt8](repeating: 0, count: count)
    // A typed throw does not pass through withUnsafe…'s rethrows unchanged, so the error travels in a Result.
    let result = bytes.withUnsafeMutableBytes { buffer in
      Result { () throws(GuestMemoryError) in try read(address, into: buffer) }
    }
    try result.get()
    return bytes
  }

  /// Copies `buffer` into guest RAM; the range may cross adjoining regions. Nothing is written on an error.
  public func write(
    _ buffer: UnsafeRawBufferPointer, to address: GuestPhysicalAddress
  ) throws(GuestMemoryError) {
    try forEachRun(address, count: buffer.count) { pointer, offset, count in
      memcpy(pointer, buffer.baseAddress! + offset, count)
      markDirty(pointer, count: count)
    }
  }

  /// Copies `bytes` into guest RAM. Nothing is written on an error.
  public func write(_ bytes: [UInt8], to address: GuestPhysicalAddress) throws(GuestMemoryError) {
    let result = bytes.withUnsafeBytes { buffer in
      Result { () throws(GuestMemoryError) in try write(buffer, to: address) }
    }
    try result.get()
  }

  /// Sets `count` bytes to `value`. Nothing is written on an error.
  public func fill(
    _ address: GuestPhysicalAddress, count: Int, with value: UInt8
  ) throws(GuestMemoryError) {
    try forEachRun(address, count: count) { pointer, _, count in
      memset(pointer, Int32(value), count)
      markDirty(pointer, count: count)
    }
  }

  /// Has `observer` called after every write of the VMM's, with its host address and length; nil: nobody any more. An
  /// accelerator that caches decoded code needs to know.
  public func setWriteObserver(_ observer: (@Sendable (UnsafeMutableRawPointer, Int) -> Void)?) {
    self.observer.withLock { $0.call = observer }
    isObserved.store(observer != nil, ordering: .releasing)
  }

  /// Records that the VMM wrote `count` bytes at a host address of this memory.
  @inline(__always)
  public func markDirty(_ pointer: UnsafeMutableRawPointer, count: Int) {
    if isObserved.load(ordering: .acquiring), count > 0 { observer.withLock { $0 }.call?(pointer, count) }
    guard dirty.isTracking, count > 0 else { return }
    let offset = pointer - mapping.base
    dirty.mark(firstPage: offset >> 12, lastPage: (offset + count - 1) >> 12)
  }

  /// Puts the bytes of a file in place of all regions: each page is read when it is first touched, and what is written
  /// stays in this process. Before anything runs; `file` is the RAM no longer.
  public func mapCopy(of file: borrowing FileDescriptor, offset: UInt64) throws(HostError) {
    try mapping.replace(withCopyOf: file, offset: offset)
    isCopy.store(true, ordering: .relaxed)
  }

  /// Calls `body` with offset in the region and length of each run of whole pages that may hold anything but zeros.
  public func forEachUsedRun<Failure: Error>(
    of region: GuestRegion, _ body: (Int, Int) throws(Failure) -> Void
  ) throws(Failure) {
    let size = Int(region.range.size)
    // Looking at a page that nobody has touched would take memory for it.
    guard !isCopy.load(ordering: .relaxed) else { return try body(0, size) }
    let base = Int64(region.fileOffset)
    let end = base + Int64(size)
    var position = base
    while position < end {
      let start = clinux_seek_data(file.rawValue, position)
      if start < 0, errno == ENXIO { return }
      guard start >= position else { return try body(Int(position - base), Int(end - position)) }
      guard start < end else { return }
      let hole = clinux_seek_hole(file.rawValue, start)
      let stop = hole > start ? min(hole, end) : end
      try body(Int(start - base), Int(stop - start))
      position = stop
    }
  }

  /// Calls `body` with host address, offset in the access and length of each run, after all bounds are checked.
  private func forEachRun(
    _ address: GuestPhysicalAddress, count: Int, _ body: (UnsafeMutableRawPointer, Int, Int) -> Void
  ) throws(GuestMemoryError) {
    guard count > 0 else {
      guard count == 0 else { throw .outside(address, count: count) }
      return
    }
    if let pointer = hostPointer(address, count: count) {
      body(pointer, 0, count)
      return
    }
    var runs: [(UnsafeMutableRawPointer, Int, Int)] = []
    var done = 0
    while done < count {
      let (position, overflow) = address.rawValue.addingReportingOverflow(UInt64(done))
      let region = regions.first { $0.range.contains(GuestPhysicalAddress(position)) }
      guard !overflow, let region else { throw .outside(address, count: count) }
      let offset = position - region.range.start.rawValue
      let run = min(count - done, Int(region.range.size - offset))
      runs.append((region.hostBase + Int(offset), done, run))
      done += run
    }
    for (pointer, offset, count) in runs { body(pointer, offset, count) }
  }
}
