import BlockLayer
import Glibc
import GuestMemory
import NetLayer

/// `struct virtio_net_hdr` (5.1.6), by its two words.
private struct FrameHeader {
  /// Flags, kind of segments, length of the headers, size of a segment, start of the checksum.
  var low: UInt64 = 0
  /// Offset of the checksum, number of buffers.
  var high: UInt32 = 0

  private static let needsChecksum: UInt8 = 1
  private static let isChecked: UInt8 = 2
  private static let ecn: UInt8 = 0x80

  var buffers: UInt16 {
    get { UInt16(truncatingIfNeeded: high >> 16) }
    set { high = high & 0xffff | UInt32(newValue) << 16 }
  }

  /// The header of a frame of somebody who has accepted these offloads; nil where the frame asks for others.
  func checked(_ offloads: NetworkOffloads, isReceived: Bool) -> FrameHeader? {
    let flags = UInt8(truncatingIfNeeded: low)
    let kind = UInt8(truncatingIfNeeded: low >> 8)
    let needsChecksum = flags & Self.needsChecksum != 0
    let needed: NetworkOffloads? =
      switch kind & ~Self.ecn {
      case 0: []
      case 1: .tcp4
      case 3: .udp
      case 4: .tcp6
      default: nil
      }
    guard var needed else { return nil }
    // Segments have checksums to be filled in.
    if needed != [], !needsChecksum { return nil }
    if kind & Self.ecn != 0 { needed.insert(.ecn) }
    if needsChecksum { needed.insert(.checksum) }
    guard needed.isSubset(of: offloads) else { return nil }
    guard offloads.contains(.checksum) else { return FrameHeader() }
    let known = UInt64(isReceived ? Self.needsChecksum | Self.isChecked : Self.needsChecksum)
    return FrameHeader(low: low & ~0xff | low & known, high: high & 0xffff)
  }

  init(low: UInt64 = 0, high: UInt32 = 0) {
    self.low = low
    self.high = high
  }

  init(_ bytes: UnsafeRawPointer) {
    low = UInt64(littleEndian: bytes.loadUnaligned(as: UInt64.self))
    high = UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: 8, as: UInt32.self))
  }

  func write(to bytes: UnsafeMutableRawPointer) {
    bytes.storeBytes(of: low.littleEndian, as: UInt64.self)
    bytes.storeBytes(of: high.littleEndian, toByteOffset: 8, as: UInt32.self)
  }
}

/// Frames between queues and backend (5.1.6).
extension VirtioNetwork {
  /// Frames that are moved before others have their turn.
  private static let mostAtOnce = 256

  // MARK: To the guest

  /// Fills buffers with what has come. Where they do not suffice, frames wait at the backend, and the driver tells of new ones.
  func receive(_ queue: Virtqueue) throws(VirtqueueError) {
    queue.disableNotifications()
    // The backend calls again for what is left.
    for _ in 0..<Self.mostAtOnce {
      guard let frame = backend.nextFrame() else { break }
      guard try put(frame, queue) else {
        setReceiving(false)
        break
      }
      backend.takeFrame()
    }
    if queue.needsInterrupt() { interrupt(Queue.receive) }
  }

  /// Puts a frame into buffers, or drops it; false where there are none for it now.
  private func put(_ frame: UnsafeRawBufferPointer, _ queue: Virtqueue) throws(VirtqueueError) -> Bool {
    guard let start = frame.baseAddress, frame.count >= NetworkHeader.size + NetworkFrame.shortest, isPlugged,
      filter.accepts(MACAddress(at: start + NetworkHeader.size), station: station),
      var header = FrameHeader(start).checked(acceptedOffloads(receiving: true), isReceived: true)
    else { return true }
    let most = isMergeable ? Int(queue.size) : 1
    var count = 0
    var room = 0
    while room < frame.count {
      if count == chains.count { chains.append(VirtqueueChain()) }
      // Buffers that are too small for it have no use for it.
      let isTooLong = count == most
      let isTaken = isTooLong ? false : try queue.take(chains[count])
      guard isTaken else {
        // Asked behind all that is there: those before are not enough.
        if !isTooLong, queue.enableNotifications() { continue }
        queue.untake(chains[..<count])
        return isTooLong
      }
      room += chains[count].writable.byteCount
      count += 1
    }
    header.buffers = UInt16(count)
    header.write(to: self.header.start)
    var position = 0
    for chain in chains[..<count] {
      let length = min(chain.writable.byteCount, frame.count - position)
      let before = max(0, min(NetworkHeader.size - position, length))
      chain.writable.copyIn(self.header.start + min(position, NetworkHeader.size), from: 0, length: before)
      chain.writable.copyIn(start + position + before, from: before, length: length - before)
      markDirty(chain, count: length)
      chain.written = UInt32(length)
      position += length
    }
    queue.giveBack(chains[..<count])
    return true
  }

  /// Notes what the device has written: the first `count` bytes.
  func markDirty(_ chain: VirtqueueChain, count: Int) {
    var rest = count
    chain.writable.forEachPiece { [memory] start, length in
      let part = min(rest, length)
      memory.markDirty(start, count: part)
      rest -= part
    }
  }

  // MARK: From the guest

  /// Sends what the driver has made ready; true where more is left.
  func transmit(_ queue: Virtqueue) throws(VirtqueueError) -> Bool {
    defer { backend.flush() }
    var budget = Self.mostAtOnce
    repeat {
      queue.disableNotifications()
      while budget > 0, try queue.take(chain) {
        budget -= 1
        send(chain)
        queue.giveBack(chain, written: 0)
      }
      if queue.needsInterrupt() { interrupt(Queue.transmit) }
    } while budget > 0 && queue.enableNotifications()
    return budget == 0
  }

  private func send(_ chain: VirtqueueChain) {
    let length = chain.readable.byteCount - NetworkHeader.size
    guard isPlugged, (NetworkFrame.shortest...NetworkFrame.longest).contains(length) else { return }
    chain.readable.copyOut(header.start, from: 0, length: NetworkHeader.size)
    guard let header = FrameHeader(header.start).checked(acceptedOffloads(receiving: false), isReceived: false) else {
      return
    }
    header.write(to: self.header.start)
    pieces.removeAll()
    pieces.append(self.header.start, NetworkHeader.size)
    pieces.append(chain.readable, from: NetworkHeader.size, length: length)
    pieces.withPieces { backend.send($0) }
  }

  /// Sends a frame of the device's own.
  func sendOwn(_ frame: [UInt8]) {
    FrameHeader().write(to: header.start)
    var frame = frame
    frame.withUnsafeMutableBytes { bytes in
      pieces.removeAll()
      pieces.append(header.start, NetworkHeader.size)
      pieces.append(bytes.baseAddress, bytes.count)
      pieces.withPieces { backend.send($0) }
    }
    backend.flush()
  }
}
