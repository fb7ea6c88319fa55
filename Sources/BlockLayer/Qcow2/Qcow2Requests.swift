import Glibc

/// What a request that is made of several transfers has in common: it completes when all of them have.
class Qcow2Request {
  let image: Qcow2Image
  let request: BlockRequest
  /// Bytes of the request that are done or under way.
  var done: UInt64 = 0
  private var outstanding = 1
  private var firstError: BlockError?

  init(_ image: Qcow2Image, _ request: BlockRequest) {
    self.image = image
    self.request = request
  }

  var position: UInt64 { request.offset + done }
  var rest: UInt64 { request.length - done }
  var hasFailed: Bool { firstError != nil }

  func begin() { outstanding += 1 }

  func end(_ error: BlockError?) {
    if firstError == nil { firstError = error }
    outstanding -= 1
    if outstanding == 0 { request.completion(firstError) }
  }

  /// A transfer of guest data, during which the clusters it touches are not given to anybody else.
  func transfer(
    _ operation: BlockRequest.Operation, host: UInt64, length: UInt64,
    memory: (inout IOVectors) -> Void, then: @escaping (BlockError?) -> Void
  ) {
    begin()
    let image = image
    let period = image.grace.begin()
    let child = BlockRequest(operation, offset: host, length: length) { [self] error in
      image.release(image.grace.end(period))
      then(error)
      end(error)
    }
    child.isBulk = request.isBulk
    memory(&child.memory)
    image.file.submit(child)
  }
}

/// One read, cut where the mapping changes.
final class Qcow2Read: Qcow2Request {
  func advance() {
    while rest > 0, !hasFailed {
      do throws(BlockError) {
        let (mapping, length) = try image.map(position, rest)
        read(mapping, length)
        done += length
      } catch {
        begin()
        end(error)
      }
    }
    end(nil)
  }

  private func read(_ mapping: Qcow2Mapping, _ length: UInt64) {
    let start = Int(done)
    switch mapping {
    case .zero: request.memory.zero(from: start, length: Int(length))
    case .unallocated: readBacking(start, length)
    case .data(let host, _):
      transfer(
        .read, host: host, length: length, memory: { $0.append(request.memory, from: start, length: Int(length)) },
        then: { _ in })
    case .compressed(let entry): readCompressed(entry, start, Int(length))
    }
  }

  private func readBacking(_ start: Int, _ length: UInt64) {
    let offset = request.offset + UInt64(start)
    let inBacking = image.backing.map { min(length, $0.size - min(offset, $0.size)) } ?? 0
    request.memory.zero(from: start + Int(inBacking), length: Int(length - inBacking))
    guard let backing = image.backing, inBacking > 0 else { return }
    begin()
    let child = BlockRequest(.read, offset: offset, length: inBacking) { [self] error in end(error) }
    child.isBulk = request.isBulk
    child.memory.append(request.memory, from: start, length: Int(inBacking))
    backing.submit(child)
  }

  private func readCompressed(_ entry: UInt64, _ start: Int, _ length: Int) {
    let within = Int((request.offset + UInt64(start)) & (image.clusterSize - 1))
    if image.decompressed.entry == entry, let buffer = image.decompressed.buffer {
      return request.memory.copyIn(buffer.start + within, from: start, length: length)
    }
    let (offset, count) = image.compressedRange(entry)
    let source = DiskBuffer(count: Int(count))
    transfer(.read, host: offset, length: count, memory: { $0.append(source.start, Int(count)) }) { [self] error in
      guard error == nil else { return }
      let buffer = DiskBuffer(count: Int(image.clusterSize))
      let type = CompressionType(rawValue: image.header.compressionType) ?? .zlib
      begin()
      guard type.decompress(UnsafeRawBufferPointer(source.bytes), into: buffer.bytes) else {
        return end(.malformed(path: image.file.path, .compressedData(offset: offset)))
      }
      image.decompressed = DecompressedCluster(entry: entry, buffer: buffer)
      request.memory.copyIn(buffer.start + within, from: start, length: length)
      end(nil)
    }
  }
}

/// Clusters that are being allocated: their data is on its way, and no table names them yet. Or parts of one cluster, of which
/// no table says yet that they have data.
final class Qcow2Allocation {
  /// The first cluster of the disk, and the host cluster for it.
  let guest: UInt64
  let host: UInt64
  let count: UInt64
  /// Subclusters that are being written, by bit; 0 for whole clusters.
  var parts: UInt64
  /// A table names the cluster.
  var isNamed = false
  /// Requests that go on when the tables name the clusters.
  private var waiters: [() -> Void] = []

  init(guest: UInt64, host: UInt64, count: UInt64, parts: UInt64 = 0) {
    self.guest = guest
    self.host = host
    self.count = count
    self.parts = parts
  }

  func wait(_ waiter: @escaping () -> Void) { waiters.append(waiter) }

  func wake() {
    let woken = waiters
    waiters = []
    for waiter in woken { waiter() }
  }
}

/// One write: in place where nothing else refers to a cluster, else into new clusters with what they had around it.
final class Qcow2Write: Qcow2Request {
  func advance() {
    while rest > 0, !hasFailed {
      do throws(BlockError) {
        let (mapping, length) = try image.map(position, rest)
        if case .data(let host, true) = mapping {
          try writeInPlace(host, length)
        } else if let other = image.allocations[position >> image.clusterBits], isInTheWay(other) {
          other.wait { [self] in advance() }
          return
        } else {
          try allocate()
        }
      } catch {
        begin()
        end(error)
      }
    }
    end(nil)
  }

  /// Whether an allocation under way is of what is to be written next.
  private func isInTheWay(_ other: Qcow2Allocation) -> Bool {
    let part = (position & (image.clusterSize - 1)) >> image.subclusterBits
    return other.parts == 0 || other.parts >> part & 1 != 0
  }

  private func writeInPlace(_ host: UInt64, _ length: UInt64) throws(BlockError) {
    guard !image.refcounts.isMetadata(cluster: host >> image.clusterBits) else {
      throw image.noteDamage(.overlap(what: "tables", offset: host))
    }
    let start = Int(done)
    transfer(
      .write, host: host, length: length, memory: { $0.append(request.memory, from: start, length: Int(length)) },
      then: { _ in })
    done += length
  }

  /// Room for the next bytes that have none of their own.
  private func allocate() throws(BlockError) {
    let bits = image.clusterBits
    let last = (request.offset + request.length - 1) >> bits
    guard image.hasExtendedL2 else { return try allocateClusters(upTo: last - position >> bits + 1) }
    let entry = try image.l2Entry(for: position)
    if let other = image.allocations[position >> bits] { return try allocateParts(of: other, entry) }
    if entry.isOwn {
      let allocation = Qcow2Allocation(guest: position >> bits, host: entry.host >> bits, count: 1)
      allocation.isNamed = true
      return try allocateParts(of: allocation, entry)
    }
    if entry.host != 0 || entry.isCompressed { return try allocateClusters(upTo: 1) }
    // As much as is written whole; parts for the rest.
    let whole = position & (image.clusterSize - 1) == 0 ? rest >> bits : 0
    if whole > 0 { return try allocateClusters(upTo: whole) }
    let host = try image.refcounts.allocate(upTo: 1).offset
    try allocateParts(of: Qcow2Allocation(guest: position >> bits, host: host >> bits, count: 1), entry)
  }

  /// New clusters for as much of the rest as can be had in a row, `most` of them.
  private func allocateClusters(upTo most: UInt64) throws(BlockError) {
    let bits = image.clusterBits
    let first = position >> bits
    var wanted: UInt64 = 1
    while wanted < min(most, 256) {
      if image.allocations[first + wanted] != nil { break }
      if try image.l2Entry(for: (first + wanted) << bits).isOwn { break }
      wanted += 1
    }
    let (host, count, isFresh) = try image.refcounts.allocate(upTo: wanted)
    let allocation = Qcow2Allocation(guest: first, host: host >> bits, count: count)
    for cluster in first..<(first + count) { image.allocations[cluster] = allocation }
    write(in: (first << bits)..<((first + count) << bits), host: host, isFresh: isFresh) { [self] error in
      name(allocation, error)
    }
  }

  /// Parts of a cluster that has its place: as many in a row as have no data and are not being written.
  private func allocateParts(of allocation: Qcow2Allocation, _ entry: Qcow2L2Entry) throws(BlockError) {
    let (bits, partBits) = (image.clusterBits, image.subclusterBits)
    let cluster = allocation.guest
    guard !image.refcounts.isMetadata(cluster: allocation.host) else {
      throw image.noteDamage(.overlap(what: "tables", offset: allocation.host << bits))
    }
    let first = (position & (image.clusterSize - 1)) >> partBits
    let end = min(position + rest, (cluster + 1) << bits) - cluster << bits
    var last = first
    while (last + 1) << partBits < end, (entry.bits | allocation.parts) >> (last + 1) & 1 == 0 { last += 1 }
    let parts = (1 << (last + 1)) - (1 << first) as UInt64
    allocation.parts |= parts
    image.allocations[cluster] = allocation
    let start = cluster << bits
    let range = (start + first << partBits)..<(start + (last + 1) << partBits)
    write(in: range, host: allocation.host << bits + first << partBits, isFresh: false) { [self] error in
      name(parts, of: allocation, error)
    }
  }

  /// Writes what the request has for a range of new room, with what was there around it.
  private func write(
    in range: Range<UInt64>, host: UInt64, isFresh: Bool, then finish: @escaping (BlockError?) -> Void
  ) {
    let length = min(rest, range.upperBound - position)
    let start = Int(done)
    let edges = CopiedEdges(image, around: position, length, in: range, isFresh: isFresh)
    done += length
    begin()
    edges.fill { [self] error in
      guard error == nil else { return finish(error) }
      let written = edges.written
      transfer(
        .write, host: host + written.lowerBound, length: UInt64(written.count),
        memory: { edges.append(to: &$0, around: request.memory, from: start, length: Int(length)) },
        // The host reads the edges' buffers until the transfer ends.
        then: { error in withExtendedLifetime(edges) { finish(error) } })
    }
  }

  /// The data is in the file: the tables may name it.
  private func name(_ allocation: Qcow2Allocation, _ error: BlockError?) {
    var error = error
    var linked: UInt64 = 0
    if error == nil {
      do throws(BlockError) {
        while linked < allocation.count {
          let host = (allocation.host + linked) << image.clusterBits
          try image.setL2Entry(for: (allocation.guest + linked) << image.clusterBits, image.dataEntry(host))
          linked += 1
        }
      } catch let failure {
        error = failure
      }
    }
    for cluster in linked..<allocation.count { image.free(allocation.host + cluster) }
    for cluster in 0..<allocation.count { image.allocations[allocation.guest + cluster] = nil }
    finish(allocation, error)
  }

  /// The parts' data is in the file: their bits may say so.
  private func name(_ parts: UInt64, of allocation: Qcow2Allocation, _ error: BlockError?) {
    var error = error
    if error == nil {
      do throws(BlockError) {
        let offset = allocation.guest << image.clusterBits
        var entry = try image.l2Entry(for: offset)
        entry.descriptor = allocation.host << image.clusterBits | Qcow2Entry.copied
        entry.bits = (entry.bits | parts) & ~(parts << 32)
        try image.setL2Entry(for: offset, entry)
      } catch let failure {
        error = failure
      }
    }
    allocation.parts &= ~parts
    if error == nil { allocation.isNamed = true }
    if allocation.parts == 0 {
      image.allocations[allocation.guest] = nil
      if !allocation.isNamed { image.free(allocation.host) }
    }
    finish(allocation, error)
  }

  private func finish(_ allocation: Qcow2Allocation, _ error: BlockError?) {
    image.limitDirtyTables()
    end(error)
    allocation.wake()
  }
}

/// What new clusters take over from before, in front of and behind the bytes that are written.
private final class CopiedEdges {
  private let image: Qcow2Image
  private let clusters: Range<UInt64>
  private let data: Range<UInt64>
  private let isFresh: Bool
  /// Nil where nothing has to be written: the host's bytes are zero, and so are the disk's.
  private var head: DiskBuffer?
  private var tail: DiskBuffer?
  /// Both edges and what is between them, where one read for all is cheaper than two.
  private var whole: DiskBuffer?

  /// The most bytes between two edges that are read in vain.
  private static let gap: UInt64 = 16 << 10

  init(_ image: Qcow2Image, around start: UInt64, _ length: UInt64, in clusters: Range<UInt64>, isFresh: Bool) {
    self.image = image
    self.clusters = clusters
    data = start..<(start + length)
    self.isFresh = isFresh
  }

  private var headLength: Int { Int(data.lowerBound - clusters.lowerBound) }
  private var tailLength: Int { Int(clusters.upperBound - data.upperBound) }

  /// The bytes of the clusters that a transfer of all that is new writes.
  var written: Range<UInt64> {
    if whole != nil { return 0..<UInt64(clusters.count) }
    let start = head == nil ? data.lowerBound : clusters.lowerBound
    let end = tail == nil ? data.upperBound : clusters.upperBound
    return (start - clusters.lowerBound)..<(end - clusters.lowerBound)
  }

  /// The memory of that transfer: the edges, and `length` bytes of `memory` between them.
  func append(to target: inout IOVectors, around memory: borrowing IOVectors, from start: Int, length: Int) {
    if let whole {
      memory.copyOut(whole.start + headLength, from: start, length: length)
      return target.append(whole.start, clusters.count)
    }
    if let head { target.append(head.start, headLength) }
    target.append(memory, from: start, length: length)
    if let tail { target.append(tail.start, tailLength) }
  }

  /// Reads what the edges need.
  func fill(_ then: @escaping (BlockError?) -> Void) {
    do throws(BlockError) {
      let needs = (
        head: try need(clusters.lowerBound, headLength), tail: try need(data.upperBound, tailLength)
      )
      if needs.head == .data, needs.tail == .data, UInt64(data.count) <= Self.gap {
        let buffer = DiskBuffer(count: clusters.count, zeroed: true)
        whole = buffer
        return read(buffer, at: clusters.lowerBound, clusters.count, then)
      }
      if needs.head != .nothing { head = DiskBuffer(count: headLength, zeroed: true) }
      if needs.tail != .nothing { tail = DiskBuffer(count: tailLength, zeroed: true) }
      let readTail = { [self] (error: BlockError?) in
        guard error == nil, needs.tail == .data, let tail else { return then(error) }
        read(tail, at: data.upperBound, tailLength, then)
      }
      guard needs.head == .data, let head else { return readTail(nil) }
      read(head, at: clusters.lowerBound, headLength, readTail)
    } catch {
      then(error)
    }
  }

  private enum Need {
    case nothing, zeros, data
  }

  private func need(_ offset: UInt64, _ length: Int) throws(BlockError) -> Need {
    if length == 0 { return .nothing }
    guard try image.isZero(at: offset, length: onDisk(offset, length)) else { return .data }
    return isFresh ? .nothing : .zeros
  }

  /// How many of the bytes the disk has: its last cluster may reach past its end.
  private func onDisk(_ offset: UInt64, _ length: Int) -> UInt64 {
    min(UInt64(length), image.size - min(offset, image.size))
  }

  private func read(
    _ buffer: DiskBuffer, at offset: UInt64, _ length: Int, _ then: @escaping (BlockError?) -> Void
  ) {
    let length = onDisk(offset, length)
    let request = BlockRequest(.read, offset: offset, length: length, completion: then)
    request.memory.append(buffer.start, Int(length))
    Qcow2Read(image, request).advance()
  }
}

extension Qcow2Image {
  /// Whether this image alone, without those below, says that a range reads as zeros.
  fileprivate func saysZero(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool {
    var done: UInt64 = 0
    while done < length {
      let (mapping, covered) = try map(offset + done, length - done)
      switch mapping {
      case .zero: break
      case .unallocated where backing == nil: break
      default: return false
      }
      done += covered
    }
    return true
  }

  /// Whether metadata alone says that a range reads as zeros.
  public func isZero(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool {
    var done: UInt64 = 0
    while done < length {
      let (mapping, covered) = try map(offset + done, length - done)
      switch mapping {
      case .zero: break
      case .unallocated:
        if let backing, !(try backing.readsAsZero(at: offset + done, length: covered)) { return false }
      case .data, .compressed: return false
      }
      done += covered
    }
    return true
  }
}

extension BlockNode {
  /// Whether metadata alone says that a range reads as zeros; what lies past the end does.
  public func readsAsZero(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool {
    guard offset < size else { return true }
    let length = min(length, size - offset)
    if let image = self as? Qcow2Image { return try image.isZero(at: offset, length: length) }
    var done: UInt64 = 0
    while done < length {
      let extent = try extent(at: offset + done, length: length - done)
      guard extent.isZero, extent.length > 0 else { return false }
      done += extent.length
    }
    return true
  }
}

/// One discard, or one write of zeroes: whole clusters by their entries, edges as data.
final class Qcow2Zero: Qcow2Request {
  func advance() {
    let size = image.clusterSize
    while rest > 0, !hasFailed {
      do throws(BlockError) {
        let within = position & (size - 1)
        // The disk's last cluster is whole where the disk ends.
        let toEnd = position + rest == image.size ? rest.roundedUp(to: size) : rest
        let isEdge = within != 0 || toEnd < size
        let waits = !isEdge || image.hasExtendedL2
        if waits, let other = image.allocations[position >> image.clusterBits] {
          other.wait { [self] in advance() }
          return
        }
        if isEdge { try zeroEdge(min(rest, size - within)) } else { try zeroClusters() }
      } catch {
        begin()
        end(error)
      }
    }
    image.limitDirtyTables()
    end(nil)
  }

  /// Bytes of one cluster: whole parts by their bits, others as data.
  private func zeroEdge(_ most: UInt64) throws(BlockError) {
    let offset = position
    guard request.operation == .writeZeroes else { return done += most }
    var length = most
    if image.hasExtendedL2 {
      let part = 1 << image.subclusterBits as UInt64
      let within = offset & (part - 1)
      if within == 0, most >= part, try zeroParts(most >> image.subclusterBits) {
        return done += most.roundedDown(to: part)
      }
      length = min(most, part - within)
    }
    done += length
    // What only a layer below says must not be relied on: that layer may go.
    guard !(try image.saysZero(at: offset, length: length)) else { return }
    writeZeros(offset, length)
  }

  /// Sets the bits of so many subclusters from the position on; false where the cluster has to be written anew.
  private func zeroParts(_ count: UInt64) throws(BlockError) -> Bool {
    var entry = try image.l2Entry(for: position)
    guard !entry.isCompressed, entry.host == 0 || entry.isOwn else { return false }
    let first = (position & (image.clusterSize - 1)) >> image.subclusterBits
    let parts = ((1 << count) - 1 as UInt64) << first
    entry.bits = entry.bits & ~parts | parts << 32
    try image.setL2Entry(for: position, entry)
    return true
  }

  private func writeZeros(_ offset: UInt64, _ length: UInt64) {
    let zeros = DiskBuffer(count: Int(length), zeroed: true)
    begin()
    let child = BlockRequest(.write, offset: offset, length: length) { [self, zeros] error in
      withExtendedLifetime(zeros) { end(error) }
    }
    child.memory.append(zeros.start, Int(length))
    Qcow2Write(image, child).advance()
  }

  /// A stretch of whole clusters with one state.
  private func zeroClusters() throws(BlockError) {
    let size = image.clusterSize
    let whole = position + rest == image.size ? rest : rest.roundedDown(to: size)
    let (mapping, length) = try image.map(position, whole)
    let hasZeroFlag = image.header.version >= 3
    // What lies below must not show through.
    let entry =
      image.backing == nil
      ? Qcow2L2Entry()
      : image.hasExtendedL2 ? Qcow2L2Entry(bits: Qcow2L2Entry.allZeros) : Qcow2L2Entry(descriptor: Qcow2Entry.zero)
    // Of a cluster in several states all is set at once.
    let alike = length < whole ? length.roundedDown(to: size) : length
    switch mapping {
    case .zero where alike > 0: done += alike
    case .unallocated where alike > 0 && image.backing == nil: done += alike
    case .unallocated where alike > 0 && request.operation == .discard: done += alike
    default:
      let part = min(whole, size)
      if image.backing != nil, !hasZeroFlag {
        let offset = position
        done += part
        if request.operation == .writeZeroes { writeZeros(offset, part) }
        return
      }
      try image.setL2Entry(for: position, entry)
      done += part
    }
  }
}
