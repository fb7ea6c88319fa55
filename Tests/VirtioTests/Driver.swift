import BlockLayer
import DeviceTesting
import Glibc
import GuestMemory
import PlatformDevices
import Testing
import Virtio

/// A virtio-blk driver on the other side of the registers, in guest memory: it follows virtio 1.2 and nothing of ours.
final class Driver {
  /// How the driver uses its queues.
  struct Way: CustomTestStringConvertible, Sendable {
    var isPacked = false
    var isIndirect = false
    var hasEventIndex = false
    var hasMessages = true

    var testDescription: String {
      (isPacked ? "packed" : "split") + (isIndirect ? " indirect" : "") + (hasEventIndex ? " events" : "")
        + (hasMessages ? " MSI-X" : " INTx")
    }
    static let all = (0..<16).map { bits in
      Way(isPacked: bits & 1 != 0, isIndirect: bits & 2 != 0, hasEventIndex: bits & 4 != 0, hasMessages: bits & 8 != 0)
    }
  }

  struct Buffer {
    var address: UInt64
    var length: UInt32
    var isWritten: Bool
  }

  enum Common {
    static let featureSelect: UInt64 = 0
    static let features: UInt64 = 4
    static let driverFeatureSelect: UInt64 = 8
    static let driverFeatures: UInt64 = 12
    static let configurationVector: UInt64 = 16
    static let queueCount: UInt64 = 18
    static let status: UInt64 = 20
    static let generation: UInt64 = 21
    static let queueSelect: UInt64 = 22
    static let queueSize: UInt64 = 24
    static let queueVector: UInt64 = 26
    static let queueEnable: UInt64 = 28
    static let descriptors: UInt64 = 32
    static let driver: UInt64 = 40
    static let device: UInt64 = 48
  }

  static let interruptStatus: UInt64 = 0x1000
  static let configuration: UInt64 = 0x2000
  static let notify: UInt64 = 0x3000
  static let table: UInt64 = 0x8000

  let memory: GuestMemory
  let pci: VirtioPCI
  let way: Way
  private(set) var queues: [DriverQueue] = []
  private var next: UInt64 = 0x1000

  init(_ pci: VirtioPCI, memory: GuestMemory, way: Way = Way()) {
    self.pci = pci
    self.memory = memory
    self.way = way
  }

  func read(_ offset: UInt64, _ size: Int) -> UInt64 { pci.read(offset: offset, size: size) }
  func write(_ offset: UInt64, _ size: Int, _ value: UInt64) { pci.write(offset: offset, size: size, value: value) }
  var status: UInt8 { UInt8(read(Common.status, 1)) }

  func command(_ value: UInt32) { pci.function.writeConfiguration(offset: 4, size: 2, value: value, for: pci) }

  func allocate(_ count: Int, alignment: UInt64 = 64) throws -> UInt64 {
    next = (next + alignment - 1) & ~(alignment - 1)
    defer { next += UInt64(count) }
    try #require(memory.hostPointer(GuestPhysicalAddress(next), count: count) != nil, "the driver needs more memory")
    return next
  }

  /// Negotiates, makes the queues, and says that it is ready; `block` with the features of a disk.
  func start(size: UInt16 = 16, features more: UInt64 = 0, block: Bool = true) throws {
    command(6)
    if way.hasMessages {
      let capability = try #require(capabilities().first { $0.id == 0x11 })
      pci.function.writeConfiguration(offset: capability.offset + 2, size: 2, value: 0x8000, for: pci)
    }
    write(Common.status, 1, 0)
    write(Common.status, 1, 1)
    write(Common.status, 1, 3)
    var offered: UInt64 = 0
    for half in UInt64(0)..<2 {
      write(Common.featureSelect, 4, half)
      offered |= read(Common.features, 4) << (half * 32)
    }
    var wanted: UInt64 = 1 << 32 | more
    if block { wanted |= 1 << 9 | offered & (1 << 5 | 1 << 12 | 1 << 13 | 1 << 14) }
    if way.isPacked { wanted |= 1 << 34 }
    if way.isIndirect { wanted |= 1 << 28 }
    if way.hasEventIndex { wanted |= 1 << 29 }
    try #require(wanted & ~offered == 0)
    for half in UInt64(0)..<2 {
      write(Common.driverFeatureSelect, 4, half)
      write(Common.driverFeatures, 4, wanted >> (half * 32) & 0xffff_ffff)
    }
    write(Common.status, 1, 0xb)
    try #require(status == 0xb)
    write(Common.configurationVector, 2, 0)
    queues = []
    for index in 0..<Int(read(Common.queueCount, 2)) {
      let queue = try DriverQueue(self, index, size: size)
      queues.append(queue)
      write(Common.queueSelect, 2, UInt64(index))
      write(Common.queueSize, 2, UInt64(size))
      write(Common.queueVector, 2, UInt64(index + 1))
      write(Common.descriptors, 8, queue.descriptors)
      write(Common.driver, 8, queue.driverArea)
      // 64-bit registers may be written as two halves.
      write(Common.device, 4, queue.deviceArea & 0xffff_ffff)
      write(Common.device + 4, 4, queue.deviceArea >> 32)
      write(Common.queueEnable, 2, 1)
      let entry = Self.table + UInt64(index + 1) * 16
      write(entry, 8, 0xfee0_0000)
      write(entry + 8, 8, 0x40 + UInt64(index))
    }
    write(Self.table, 8, 0xfee0_0000)
    write(Self.table + 8, 8, 0x30)
    write(Common.status, 1, 0xf)
  }

  /// Offsets of the PCI capabilities, in their order.
  func capabilities() -> [(id: UInt8, offset: Int)] {
    var found: [(UInt8, Int)] = []
    var offset = Int(pci.function.readConfiguration(offset: 0x34, size: 1))
    while offset != 0, found.count < 48 {
      found.append((UInt8(pci.function.readConfiguration(offset: offset, size: 1)), offset))
      offset = Int(pci.function.readConfiguration(offset: offset + 1, size: 1))
    }
    return found
  }

  func notify(_ queue: Int = 0) { write(Self.notify + UInt64(queue) * 4, 2, UInt64(queue)) }

  // MARK: Memory

  func load<T: FixedWidthInteger>(_ address: UInt64, as type: T.Type = T.self) throws -> T {
    try memory.read(GuestPhysicalAddress(address))
  }
  func store<T: FixedWidthInteger>(_ value: T, at address: UInt64) throws {
    try memory.write(value, to: GuestPhysicalAddress(address))
  }
  func bytes(_ address: UInt64, _ count: Int) throws -> [UInt8] {
    try memory.bytes(GuestPhysicalAddress(address), count: count)
  }
  func store(_ bytes: [UInt8], at address: UInt64) throws { try memory.write(bytes, to: GuestPhysicalAddress(address)) }

  // MARK: Requests

  /// Does a request and waits; nil where the device has no answer in time.
  func request(
    _ kind: UInt32, sector: UInt64 = 0, data: [UInt8] = [], room: Int = 0, queue: Int = 0
  ) throws -> (status: UInt8, data: [UInt8], written: UInt32)? {
    let request = try makeRequest(kind, sector: sector, data: data, room: room)
    let id = try queues[queue].add(request.buffers)
    notify(queue)
    guard let used = try queues[queue].wait(1) else { return nil }
    #expect(used[0].id == id)
    return (try load(request.status), try bytes(request.room, room), used[0].written)
  }

  struct Request {
    var buffers: [Buffer]
    /// Where the answer comes to be.
    var status: UInt64
    var room: UInt64
  }

  func makeRequest(_ kind: UInt32, sector: UInt64, data: [UInt8], room: Int, pieces: Int = 1) throws -> Request {
    let header = try allocate(16)
    try store(kind, at: header)
    try store(UInt32(0), at: header + 4)
    try store(sector, at: header + 8)
    var buffers = [Buffer(address: header, length: 16, isWritten: false)]
    let dataAddress = try allocate(data.count)
    try store(data, at: dataAddress)
    let roomAddress = try allocate(room)
    try store([UInt8](repeating: 0xee, count: room), at: roomAddress)
    func split(_ address: UInt64, _ count: Int, _ isWritten: Bool) {
      var rest = count
      for piece in 0..<pieces where rest > 0 {
        let length = piece == pieces - 1 ? rest : max(1, rest / 3)
        buffers.append(
          Buffer(address: address + UInt64(count - rest), length: UInt32(length), isWritten: isWritten))
        rest -= length
      }
    }
    split(dataAddress, data.count, false)
    split(roomAddress, room, true)
    let status = try allocate(1)
    try store(UInt8(0xee), at: status)
    buffers.append(Buffer(address: status, length: 1, isWritten: true))
    return Request(buffers: buffers, status: status, room: roomAddress)
  }

  /// Gives back all memory of requests before.
  func releaseMemory(to mark: UInt64) { next = mark }
  var mark: UInt64 { next }
}
