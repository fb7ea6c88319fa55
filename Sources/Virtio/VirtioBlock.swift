import BlockLayer
import CLinux
import DeviceModel
import GuestMemory
import Synchronization

/// What a disk does when the host fails a request of the guest's.
public enum DiskErrorPolicy: String, Sendable, CaseIterable {
  /// The guest gets an I/O error.
  case report
  /// The machine stops; the request is tried again when it goes on.
  case stop
  /// As `stop` where the host has no room left, else as `report`.
  case enospc
}

/// A virtio block device (virtio 1.2, 5.2) over a disk of the block layer.
///
/// It belongs to the thread of its disk, but for `readConfiguration`.
public final class VirtioBlock: VirtioDevice {
  /// Bytes of a sector, the unit of every offset in the interface.
  static let sectorSize: UInt64 = 512
  /// More than anybody's vCPUs need.
  public static let maximumQueues = 64
  /// The longest name that a driver can ask for.
  public static let maximumSerial = 20
  /// A request with more data than anybody sends is refused, since some of it may have to be copied.
  private static let maximumData = 1 << 30

  /// Unique in the machine.
  public let name: String
  /// A block device.
  public let type: UInt16 = 2
  /// Mass storage.
  public let classCode: UInt32 = 0x010000
  /// One queue a vCPU, as drivers like it.
  public let queueSizes: [UInt16]
  /// Told of every request that the host fails, on the disk's thread.
  public var onError: (IOErrorReport) -> Void = { _ in }

  /// Set by the transport.
  public var configurationChanged: () -> Void = {}

  private let serial: [UInt8]
  private let memory: GuestMemory
  private let thread: IOThread
  private let disk: any BlockNode
  private let isReadOnly: Bool
  private let errors: (read: DiskErrorPolicy, write: DiskErrorPolicy)
  /// Sectors.
  private let capacity: Atomic<UInt64>

  private var queues: [Virtqueue?] = []
  private var interrupt: (Int) -> Void = { _ in }
  private var underWay = 0
  /// Owns every request: those under way have no other owner.
  private var requests: [Request] = []
  private var idle: [Request] = []
  /// Requests that wait for the machine to go on.
  private var stopped: [Request] = []
  private var onDrained: [() -> Void] = []
  private var isDraining = false
  /// Queues with something given back that the driver has not been told of.
  private var untold: Set<Int> = []

  /// A device for `disk`, which belongs to `thread`.
  ///
  /// - Parameters:
  ///   - name: unique in the machine.
  ///   - disk: what the requests are for.
  ///   - serial: what the driver calls the disk; at most 20 bytes count.
  ///   - memory: the guest's.
  ///   - thread: where the device and the disk work.
  ///   - queues: how many; 1 or more.
  ///   - readErrors: what becomes of a read that the host fails.
  ///   - writeErrors: what becomes of any other request that the host fails.
  public init(
    name: String, disk: any BlockNode, serial: String, memory: GuestMemory, thread: IOThread, queues: Int = 1,
    readErrors: DiskErrorPolicy = .report, writeErrors: DiskErrorPolicy = .enospc
  ) {
    self.name = name
    self.disk = disk
    self.serial = Array(serial.utf8.prefix(Self.maximumSerial))
    self.memory = memory
    self.thread = thread
    isReadOnly = disk.isReadOnly
    errors = (readErrors, writeErrors)
    capacity = Atomic(disk.size / Self.sectorSize)
    queueSizes = Array(repeating: 256, count: max(1, queues))
    (disk as? LiveDisk)?.onResize = { [weak self] in self?.sizeChanged() }
    thread.addObserver(self) { [weak self] in self?.tellDriver() }
  }

  // MARK: Identity

  private enum Feature {
    static let segments = VirtioFeatures(rawValue: 1 << 2)
    static let readOnly = VirtioFeatures(rawValue: 1 << 5)
    static let blockSize = VirtioFeatures(rawValue: 1 << 6)
    static let flush = VirtioFeatures(rawValue: 1 << 9)
    static let topology = VirtioFeatures(rawValue: 1 << 10)
    static let multiqueue = VirtioFeatures(rawValue: 1 << 12)
    static let discard = VirtioFeatures(rawValue: 1 << 13)
    static let writeZeroes = VirtioFeatures(rawValue: 1 << 14)
  }

  /// Everything that a driver can use here.
  public var features: VirtioFeatures {
    var features: VirtioFeatures = [Feature.segments, Feature.blockSize, Feature.flush, Feature.topology]
    features.insert(isReadOnly ? Feature.readOnly : [Feature.discard, Feature.writeZeroes])
    if queueSizes.count > 1 { features.insert(Feature.multiqueue) }
    return features
  }

  /// The structure of 5.2.4.
  public func readConfiguration(offset: Int, size: Int) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<min(size, 8) { value |= UInt64(configurationByte(offset + index)) << UInt64(index * 8) }
    return value
  }

  private func configurationByte(_ offset: Int) -> UInt8 {
    let sectors: UInt64 = 0x7fff_ffff / Self.sectorSize
    let (start, value): (Int, UInt64) =
      switch offset {
      case 0..<8: (0, capacity.load(ordering: .relaxed))
      // Segments: what a queue holds beside header and status.
      case 12..<16: (12, 254)
      case 20..<24: (20, Self.sectorSize)
      // The host's blocks: 8 sectors, which is also the best size.
      case 24: (24, 3)
      case 26..<28: (26, 8)
      case 28..<32: (28, 8)
      case 34..<36: (34, UInt64(queueSizes.count))
      // Discard, then write zeroes: sectors and ranges a request.
      case 36..<40: (36, sectors)
      case 40..<44: (40, 1)
      case 44..<48: (44, 8)
      case 48..<52: (48, sectors)
      case 52..<56: (52, 1)
      case 56: (56, 1)
      default: (offset, 0)
      }
    return UInt8(truncatingIfNeeded: value >> UInt64((offset - start) * 8))
  }

  /// The disk has another size: the driver is to be told. On the disk's thread.
  public func sizeChanged() {
    capacity.store(disk.size / Self.sectorSize, ordering: .relaxed)
    configurationChanged()
  }

  // MARK: Requests

  /// One request of the guest, from its chain to its status.
  private final class Request {
    let chain = VirtqueueChain()
    let block = BlockRequest(.read) { _ in }
    var queue = 0
    var kind: UInt32 = 0
    /// The bytes that the device writes before the status.
    var written = 0
  }

  private enum Kind {
    static let read: UInt32 = 0
    static let write: UInt32 = 1
    static let flush: UInt32 = 4
    static let identity: UInt32 = 8
    static let discard: UInt32 = 11
    static let writeZeroes: UInt32 = 13
  }

  private enum Status {
    static let ok: UInt8 = 0
    static let ioError: UInt8 = 1
    static let unsupported: UInt8 = 2
  }

  private static let headerSize = 16

  /// Takes the queues.
  public func start(_ queues: [Virtqueue?], features: VirtioFeatures, interrupt: @escaping (Int) -> Void) {
    self.queues = queues
    self.interrupt = interrupt
  }

  /// Begins what is in the queue; true where more is left, so that one guest cannot keep the thread.
  public func process(queue index: Int) throws(VirtqueueError) -> Bool {
    guard !isDraining, queues.indices.contains(index), let queue = queues[index] else { return false }
    defer { thread.poll() }
    var budget = 1024
    repeat {
      queue.disableNotifications()
      while budget > 0 {
        let request = idle.popLast() ?? newRequest()
        request.queue = index
        var isTaken = false
        defer { if !isTaken { idle.append(request) } }
        isTaken = try queue.take(request.chain)
        guard isTaken else { break }
        budget -= 1
        underWay += 1
        begin(request)
      }
      if budget == 0 { return true }
    } while queue.enableNotifications()
    return false
  }

  private func newRequest() -> Request {
    let request = Request()
    requests.append(request)
    return request
  }

  /// Tells the driver of what was given back, a queue at a time.
  private func tellDriver() {
    guard !untold.isEmpty else { return }
    for index in untold where queues.indices.contains(index) {
      if queues[index]?.needsInterrupt() == true { interrupt(index) }
    }
    untold.removeAll(keepingCapacity: true)
  }

  private func begin(_ request: Request) {
    let chain = request.chain
    request.written = 0
    // Without room for a status there is no way to answer.
    guard chain.writable.byteCount > 0 else { return finish(request, nil) }
    guard chain.readable.byteCount >= Self.headerSize else { return finish(request, Status.ioError) }
    var header: (kind: UInt32, priority: UInt32, sector: UInt64) = (0, 0, 0)
    withUnsafeMutableBytes(of: &header) { bytes in
      if let start = bytes.baseAddress { chain.readable.copyOut(start, from: 0, length: Self.headerSize) }
    }
    request.kind = header.kind
    let room = chain.writable.byteCount - 1
    let data = chain.readable.byteCount - Self.headerSize
    switch header.kind {
    case Kind.read: transfer(request, .read, sector: header.sector, length: room)
    case Kind.write: transfer(request, .write, sector: header.sector, length: data)
    case Kind.flush: submit(request, .flush, offset: 0, length: 0)
    case Kind.identity: identify(request, room: room)
    case Kind.discard, Kind.writeZeroes: changeRange(request, data: data)
    default: finish(request, Status.unsupported)
    }
  }

  private func transfer(_ request: Request, _ operation: BlockRequest.Operation, sector: UInt64, length: Int) {
    guard length <= Self.maximumData, isInside(sector, UInt64(length)), operation == .read || !isReadOnly else {
      return finish(request, Status.ioError)
    }
    request.block.memory.removeAll()
    if operation == .read {
      request.block.memory.append(request.chain.writable, from: 0, length: length)
      request.written = length
    } else {
      request.block.memory.append(request.chain.readable, from: Self.headerSize, length: length)
    }
    submit(request, operation, offset: sector * Self.sectorSize, length: UInt64(length))
  }

  /// Whether whole sectors from one on are on the disk.
  private func isInside(_ sector: UInt64, _ length: UInt64) -> Bool {
    let capacity = capacity.load(ordering: .relaxed)
    return length % Self.sectorSize == 0 && sector <= capacity && length / Self.sectorSize <= capacity - sector
  }

  private func identify(_ request: Request, room: Int) {
    guard room >= Self.maximumSerial else { return finish(request, Status.ioError) }
    var bytes = serial
    bytes += [UInt8](repeating: 0, count: Self.maximumSerial - bytes.count)
    bytes.withUnsafeBytes { bytes in
      if let start = bytes.baseAddress { request.chain.writable.copyIn(start, from: 0, length: bytes.count) }
    }
    request.written = Self.maximumSerial
    finish(request, Status.ok)
  }

  /// Discard and write zeroes (5.2.6.2): one range of sectors.
  private func changeRange(_ request: Request, data: Int) {
    guard !isReadOnly, data == 16 else { return finish(request, Status.ioError) }
    var range: (sector: UInt64, count: UInt32, flags: UInt32) = (0, 0, 0)
    withUnsafeMutableBytes(of: &range) { bytes in
      if let start = bytes.baseAddress { request.chain.readable.copyOut(start, from: Self.headerSize, length: 16) }
    }
    let isDiscard = request.kind == Kind.discard
    guard range.flags & (isDiscard ? ~0 : ~1) == 0 else { return finish(request, Status.unsupported) }
    guard isInside(range.sector, UInt64(range.count) * Self.sectorSize) else {
      return finish(request, Status.ioError)
    }
    request.block.memory.removeAll()
    request.block.mayUnmap = range.flags & 1 != 0
    submit(
      request, isDiscard ? .discard : .writeZeroes, offset: range.sector * Self.sectorSize,
      length: UInt64(range.count) * Self.sectorSize)
  }

  private func submit(_ request: Request, _ operation: BlockRequest.Operation, offset: UInt64, length: UInt64) {
    request.block.operation = operation
    request.block.offset = offset
    request.block.length = length
    request.block.completion = { [unowned self, unowned request] error in complete(request, error) }
    disk.submit(request.block)
  }

  private func complete(_ request: Request, _ error: BlockError?) {
    guard let error else { return finish(request, Status.ok) }
    let isWrite = request.kind != Kind.read
    let stops =
      switch isWrite ? errors.write : errors.read {
      case .report: false
      case .stop: true
      case .enospc: error.isNoSpace
      }
    onError(
      IOErrorReport(disk: name, isWrite: isWrite, isNoSpace: error.isNoSpace, stops: stops, reason: "\(error)"))
    guard stops else { return finish(request, Status.ioError) }
    stopped.append(request)
    checkDrained()
  }

  /// Answers a request; nil where it has no room for an answer.
  private func finish(_ request: Request, _ status: UInt8?) {
    let chain = request.chain
    var written = 0
    if let status {
      withUnsafeBytes(of: status) { bytes in
        if let start = bytes.baseAddress { chain.writable.copyIn(start, from: chain.writable.byteCount - 1, length: 1) }
      }
      written = (status == Status.ok ? request.written : 0) + 1
      chain.writable.forEachPiece { [memory] start, count in memory.markDirty(start, count: count) }
    }
    queues[request.queue]?.giveBack(chain, written: UInt32(clamping: written))
    untold.insert(request.queue)
    underWay -= 1
    idle.append(request)
    checkDrained()
  }

  // MARK: Rest

  /// Starts nothing more; `done` once the host has answered all that is under way.
  public func drain(_ done: @escaping () -> Void) {
    isDraining = true
    onDrained.append(done)
    checkDrained()
  }

  private func checkDrained() {
    guard isDraining, underWay == stopped.count, !onDrained.isEmpty else { return }
    tellDriver()
    let waiting = onDrained
    onDrained = []
    for done in waiting { done() }
  }

  /// Requests that are tried again when the machine goes on.
  public var hasStoppedRequests: Bool { !stopped.isEmpty }

  /// Tries again what was stopped, and takes new requests from now on.
  public func undrain() {
    isDraining = false
    let again = stopped
    stopped = []
    for request in again { begin(request) }
    thread.poll()
  }

  /// The driver has gone: nothing of what it asked for is answered.
  public func stop() {
    underWay -= stopped.count
    idle += stopped
    stopped = []
    queues = []
    untold = []
    isDraining = false
  }

  /// Lets go of the disks' thread.
  public func disconnect() { thread.removeObserver(self) }
}
