import Glibc

/// What the L2 tables say about a stretch of the disk.
enum Qcow2Mapping: Equatable {
  case unallocated
  /// Zeros, with a cluster set aside for what is written later; 0 where there is none.
  case zero(host: UInt64)
  /// Bytes at a host offset; in place means that nothing else refers to the cluster.
  case data(host: UInt64, inPlace: Bool)
  case compressed(entry: UInt64)
}

extension Qcow2Image {
  /// Where the L2 entry of a disk offset is; nil where there is no L2 table.
  private func l2Place(for offset: UInt64) throws(BlockError) -> (place: Int, index: Int)? {
    let index = offset / header.l2Coverage
    guard index < UInt64(l1.count) else { return nil }
    let entry = l1[Int(index)]
    let table = entry & Qcow2Entry.offsetMask
    guard table != 0 else { return nil }
    guard table % clusterSize == 0, entry & Qcow2Entry.l1Reserved == 0 else {
      throw noteDamage(.reservedBits(what: "L1 entry", value: entry))
    }
    return try l2Place(in: table, for: offset)
  }

  private func l2Place(in table: UInt64, for offset: UInt64) throws(BlockError) -> (place: Int, index: Int) {
    let byte = (offset >> clusterBits) % header.l2Entries * header.l2EntrySize
    let unit = UInt64(l2Cache.unit)
    return (try l2Load(table + byte.roundedDown(to: unit)), Int(byte % unit))
  }

  func l2Load(_ offset: UInt64) throws(BlockError) -> Int {
    if let place = l2Cache.find(offset) { return place }
    let place = try l2Room(offset)
    if l2LoadAround(offset, place) { return place }
    do {
      try file.read(at: offset, into: UnsafeMutableRawBufferPointer(start: l2Cache.bytes(place), count: l2Cache.unit))
    } catch {
      l2Cache.forget(place)
      throw error
    }
    return place
  }

  /// Reads a piece with those beside it in its table, as one transfer costs little more than another. false where that cannot be.
  private func l2LoadAround(_ offset: UInt64, _ place: Int) -> Bool {
    let window = min(clusterSize, 64 << 10)
    let unit = UInt64(l2Cache.unit)
    guard window > unit, l2Cache.hasRoom(for: Int(window / unit)) else { return false }
    let start = offset.roundedDown(to: window)
    let buffer = DiskBuffer(count: Int(window))
    do throws(BlockError) { try file.read(at: start, into: buffer.bytes) } catch { return false }
    for piece in stride(from: start, to: start + window, by: Int(unit)) {
      guard piece == offset || l2Cache.find(piece) == nil, let target = l2Cache.insert(piece) else { continue }
      memcpy(l2Cache.bytes(target), buffer.start + Int(piece - start), l2Cache.unit)
    }
    return true
  }

  private func l2Room(_ offset: UInt64) throws(BlockError) -> Int {
    if let place = l2Cache.insert(offset) { return place }
    try writeBackNow(withRefcounts: !header.usesLazyRefcounts)
    guard let place = l2Cache.insert(offset) else { throw .io(call: "cache a table of", path: file.path, errno: 12) }
    return place
  }

  /// The entry of one cluster; 0 where there is no L2 table.
  func l2Entry(for offset: UInt64) throws(BlockError) -> Qcow2L2Entry {
    guard let (place, index) = try l2Place(for: offset) else { return Qcow2L2Entry() }
    return l2Entry(place, index)
  }

  /// The entry at a byte of a piece of a table.
  func l2Entry(_ place: Int, _ index: Int) -> Qcow2L2Entry {
    let bytes = l2Cache.bytes(place)
    return Qcow2L2Entry(
      descriptor: bytes.bigEndian64(index), bits: hasExtendedL2 ? bytes.bigEndian64(index + 8) : 0)
  }

  private func store(_ entry: Qcow2L2Entry, _ place: Int, _ index: Int) {
    l2Cache.bytes(place).storeBigEndian(entry.descriptor, index)
    if hasExtendedL2 { l2Cache.bytes(place).storeBigEndian(entry.bits, index + 8) }
    l2Cache.markDirty(place)
  }

  /// The entry of a cluster that holds data all over and that nothing else refers to.
  func dataEntry(_ host: UInt64) -> Qcow2L2Entry {
    Qcow2L2Entry(descriptor: host | Qcow2Entry.copied, bits: hasExtendedL2 ? Qcow2L2Entry.allData : 0)
  }

  /// The state `within` bytes into a cluster, and how many bytes of the cluster from there on share it.
  private func state(
    _ entry: Qcow2L2Entry, _ within: UInt64
  ) throws(BlockError) -> (mapping: Qcow2Mapping, length: UInt64) {
    guard hasExtendedL2 else { return (try interpret(entry.descriptor).advanced(by: within), clusterSize - within) }
    guard entry.isSound else { throw noteDamage(.reservedBits(what: "extended L2 entry's bitmap", value: entry.bits)) }
    let whole = try interpret(entry.descriptor)
    if entry.isCompressed { return (whole, clusterSize - within) }
    let first = within >> subclusterBits
    let data = entry.bits >> first
    let zero = entry.bits >> (32 + first)
    let changes = data & 1 != 0 ? ~data : zero & 1 != 0 ? ~zero : data | zero
    let last = min(first + UInt64(changes.trailingZeroBitCount), Qcow2L2Entry.subclusters)
    let length = last << subclusterBits - within
    if data & 1 != 0 { return (whole.advanced(by: within), length) }
    if zero & 1 != 0 { return (.zero(host: entry.host == 0 ? 0 : entry.host + within), length) }
    return (.unallocated, length)
  }

  private func interpret(_ entry: UInt64) throws(BlockError) -> Qcow2Mapping {
    if entry & Qcow2Entry.compressed != 0 { return .compressed(entry: entry) }
    if entry & Qcow2Entry.zero != 0, header.version >= 3 { return .zero(host: entry & Qcow2Entry.offsetMask) }
    let host = entry & Qcow2Entry.offsetMask
    guard entry & Qcow2Entry.l2Reserved == 0, host % clusterSize == 0 else {
      throw noteDamage(.reservedBits(what: "L2 entry", value: entry))
    }
    return host == 0 ? .unallocated : .data(host: host, inPlace: entry & Qcow2Entry.copied != 0)
  }

  /// The state at `offset` and how many bytes from there on share it, in a row in the file too; `length` at most.
  func map(_ offset: UInt64, _ length: UInt64) throws(BlockError) -> (mapping: Qcow2Mapping, length: UInt64) {
    let within = offset & (clusterSize - 1)
    guard let (place, index) = try l2Place(for: offset) else {
      let toNextTable = header.l2Coverage - offset % header.l2Coverage
      return (.unallocated, min(length, toNextTable))
    }
    let (mapping, first) = try state(l2Entry(place, index), within)
    if case .compressed = mapping { return (mapping, min(length, first)) }
    var covered = first
    var next = index + Int(header.l2EntrySize)
    if !hasExtendedL2 {
      // Entries in a row differ by a cluster, or not at all.
      let bytes = UnsafeRawPointer(l2Cache.bytes(place))
      let step = bytes.bigEndian64(index) & Qcow2Entry.offsetMask == 0 ? 0 : clusterSize
      var expected = bytes.bigEndian64(index) &+ step
      while next < l2Cache.unit, covered < length, bytes.bigEndian64(next) == expected,
        expected & Qcow2Entry.l2Reserved == 0
      {
        covered += clusterSize
        next += 8
        expected &+= step
      }
      return (mapping, min(length, covered))
    }
    while next < l2Cache.unit, covered < length, (within + covered) & (clusterSize - 1) == 0 {
      let (more, count) = try state(l2Entry(place, next), 0)
      guard more == mapping.advanced(by: covered) else { break }
      covered += count
      next += Int(header.l2EntrySize)
    }
    return (mapping, min(length, covered))
  }

  /// Where a compressed cluster's bytes are: whole sectors that may begin within one.
  func compressedRange(_ entry: UInt64) -> (offset: UInt64, length: UInt64) {
    let shift = 62 - (clusterBits - 8)
    let offset = entry & ((1 << shift) - 1)
    let sectors = (entry & ~(Qcow2Entry.compressed | Qcow2Entry.copied)) >> shift
    return (offset, (sectors + 1) * 512 - offset % 512)
  }

  /// The host clusters that an entry refers to.
  func hostClusters(_ entry: UInt64) -> Range<UInt64> {
    if entry & Qcow2Entry.compressed != 0 {
      let (offset, length) = compressedRange(entry)
      return (offset >> clusterBits)..<(((offset + length - 1) >> clusterBits) + 1)
    }
    let cluster = (entry & Qcow2Entry.offsetMask) >> clusterBits
    return cluster == 0 ? 0..<0 : cluster..<(cluster + 1)
  }

  /// Sets one cluster's entry and gives up what the old one referred to.
  func setL2Entry(for offset: UInt64, _ entry: Qcow2L2Entry) throws(BlockError) {
    try makeL2Writable(for: offset)
    guard let (place, index) = try l2Place(for: offset) else { return }
    let old = l2Entry(place, index)
    guard old != entry else { return }
    store(entry, place, index)
    let named = hostClusters(entry.descriptor)
    for cluster in hostClusters(old.descriptor) where !named.contains(cluster) { free(cluster) }
  }

  /// Begins a write-back when tables have become dirty in numbers, so that no request has to wait for all of them.
  func limitDirtyTables() {
    guard writeBack == nil, l2Cache.wantsWriteBack || refcounts.cache.wantsWriteBack else { return }
    // An empty flush is a write-back that nobody waits for.
    submitFlush(BlockRequest(.flush) { _ in })
  }

  /// Makes sure that the active L1 table alone refers to an L2 table for `offset`.
  private func makeL2Writable(for offset: UInt64) throws(BlockError) {
    let index = Int(offset / header.l2Coverage)
    guard index < l1.count else {
      throw noteDamage(
        .tableTooSmall(what: "L1 table", entries: UInt64(l1.count), need: header.l1EntriesNeeded(for: size)))
    }
    let entry = l1[index]
    if entry & Qcow2Entry.copied != 0 {
      guard entry & Qcow2Entry.l1Reserved == 0, entry & Qcow2Entry.offsetMask % clusterSize == 0 else {
        throw noteDamage(.reservedBits(what: "L1 entry", value: entry))
      }
      return
    }
    let old = entry & Qcow2Entry.offsetMask
    let contents = DiskBuffer(count: Int(clusterSize), zeroed: true)
    if old != 0 {
      guard old % clusterSize == 0 else { throw noteDamage(.misaligned(what: "L2 table", offset: old)) }
      for part in stride(from: 0, to: Int(clusterSize), by: l2Cache.unit) {
        let place = try l2Load(old + UInt64(part))
        (contents.start + part).copyMemory(from: l2Cache.bytes(place), byteCount: l2Cache.unit)
      }
    }
    let new = try refcounts.allocate(upTo: 1).offset
    l2Cache.forget(from: new, length: clusterSize)
    // On disk in full before the L1 table can name it.
    try file.write(at: new, from: UnsafeRawBufferPointer(contents.bytes))
    refcounts.protect(new, 1)
    l1[index] = new | Qcow2Entry.copied
    dirtyL1.mark(entry: index)
    if old != 0 { free(old >> clusterBits) }
  }

  /// What a range holds, for `map`, jobs and NBD.
  public func extent(at offset: UInt64, length: UInt64) throws(BlockError) -> BlockExtent {
    guard offset < size, length > 0 else {
      return BlockExtent(offset: offset, length: 0, isAllocated: false, isData: false, isZero: true)
    }
    let wanted = min(length, size - offset)
    var (mapping, covered) = try map(offset, wanted)
    // Runs end where a piece of a table ends; the next may go on.
    while covered < wanted {
      let (next, more) = try map(offset + covered, wanted - covered)
      guard next == mapping.advanced(by: covered), !next.isCompressed else { break }
      covered += more
    }
    var extent = BlockExtent(offset: offset, length: covered, isAllocated: true, isData: true, isZero: false)
    switch mapping {
    case .unallocated:
      extent.isAllocated = false
      extent.isData = false
      extent.isZero = backing == nil
    case .zero(let host):
      extent.isData = false
      extent.isZero = true
      if host != 0 { extent.hostOffset = host }
    case .data(let host, _): extent.hostOffset = host
    case .compressed: extent.isCompressed = true
    }
    return extent
  }
}

extension Qcow2Mapping {
  /// The same state, so many bytes on.
  func advanced(by distance: UInt64) -> Qcow2Mapping {
    switch self {
    case .data(let host, let inPlace): .data(host: host + distance, inPlace: inPlace)
    case .zero(let host) where host != 0: .zero(host: host + distance)
    default: self
    }
  }

  var isCompressed: Bool { if case .compressed = self { true } else { false } }
}
