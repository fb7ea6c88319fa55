import BlockLayer
import DeviceTesting
import Glibc
import GuestMemory
import Host
import NetLayer
import StateTree
import Testing

@testable import Virtio

/// A network in memory: what comes is put there by the test, what goes is kept.
final class MemoryNetwork: NetworkBackend, @unchecked Sendable {
  let offloads: NetworkOffloads
  var isLinkUp = false
  var counters = NetworkCounters()
  let description = "memory"
  private(set) var receiveOffloads: NetworkOffloads?
  private(set) var sent: [[UInt8]] = []
  private(set) var flushes = 0
  /// How often the device was told of frames.
  private(set) var calls = 0
  private(set) var isReceiving = true
  private var waiting: [UnsafeMutableRawBufferPointer] = []
  private var arrived: () -> Void = {}
  private var changed: () -> Void = {}
  private var loop: EventLoop?

  init(offloads: NetworkOffloads = []) { self.offloads = offloads }
  deinit { for frame in waiting { frame.deallocate() } }

  func start(
    on loop: EventLoop, framesArrived: @escaping () -> Void, linkChanged: @escaping () -> Void
  ) throws(NetworkError) {
    self.loop = loop
    arrived = framesArrived
    changed = linkChanged
    isLinkUp = true
  }

  func setReceiveOffloads(_ offloads: NetworkOffloads) { receiveOffloads = offloads }
  func nextFrame() -> UnsafeRawBufferPointer? { waiting.first.map { UnsafeRawBufferPointer($0) } }
  func takeFrame() { if !waiting.isEmpty { waiting.removeFirst().deallocate() } }
  func send(_ frame: UnsafeBufferPointer<iovec>) {
    sent.append(frame.flatMap { Array(UnsafeRawBufferPointer(start: $0.iov_base, count: $0.iov_len)) })
  }
  func flush() { flushes += 1 }
  func close() { arrived = {} }

  func setReceiving(_ wanted: Bool) {
    isReceiving = wanted
    if wanted { tell() }
  }

  /// As an event loop does, again and again while there are frames.
  private func tell() {
    guard isReceiving, !waiting.isEmpty else { return }
    loop?.execute { [self] in
      guard isReceiving, !waiting.isEmpty else { return }
      calls += 1
      arrived()
      tell()
    }
  }

  var left: Int { waiting.count }

  func receive(_ frame: [UInt8]) {
    let copy = UnsafeMutableRawBufferPointer.allocate(byteCount: frame.count, alignment: 16)
    copy.copyBytes(from: frame)
    waiting.append(copy)
    tell()
  }

  func setLinkUp(_ isUp: Bool) {
    isLinkUp = isUp
    changed()
  }
}

/// A network card, its network and its driver.
final class NetworkBench {
  static let address = MACAddress(rawValue: 0x5254_0012_3456)
  static let other = MACAddress(rawValue: 0x5254_0012_3457)
  static let features: UInt64 = 1 << 3 | 1 << 5 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21 | 1 << 23
  static let queueSize: UInt16 = 16

  let fixture: Fixture
  let thread: IOThread
  let network: MemoryNetwork
  let card: VirtioNetwork
  let pci: VirtioPCI
  let driver: Driver
  let faults = Bench.Faults()

  init(
    _ way: Driver.Way = Driver.Way(), address: MACAddress = NetworkBench.address, offloads: NetworkOffloads = [],
    usesOffloads: Bool = true
  ) throws {
    fixture = try Fixture()
    thread = try IOThread()
    network = MemoryNetwork(offloads: offloads)
    card = VirtioNetwork(
      name: "net0", address: address, mtu: 9000, backend: network, usesOffloads: usesOffloads, memory: fixture.memory,
      loop: thread.loop)
    pci = try VirtioPCI(
      card, host: fixture.pciHost(), line: fixture.line(17), interrupts: fixture.sink, memory: fixture.memory,
      loop: thread.loop, onFault: { [faults] in faults.add($0) })
    driver = Driver(pci, memory: fixture.memory, way: way)
    try card.connect()
    try thread.start()
  }

  deinit {
    pci.drain()
    thread.stop()
  }

  func start(without: UInt64 = 0, with: UInt64 = 0) throws {
    try driver.start(size: Self.queueSize, features: Self.features & ~without | with, block: false)
  }

  func perform<Result>(_ body: @escaping () -> Result) -> Result { thread.perform(body) }

  func wait(_ condition: () throws -> Bool) rethrows -> Bool {
    for _ in 0..<20_000 {
      if try condition() { return true }
      usleep(1000)
    }
    return false
  }

  /// A frame of `count` bytes after a header of zeros, or of other bytes.
  static func frame(
    to destination: MACAddress = address, _ count: Int = 100, header: [UInt8] = [UInt8](repeating: 0, count: 12)
  ) -> [UInt8] {
    let body = (0..<count - 14).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ count) }
    return header + destination.bytes + other.bytes + [0x88, 0xb5] + body
  }

  func receive(_ frame: [UInt8]) { perform { [network] in network.receive(frame) } }

  /// Makes a buffer of these lengths for frames.
  func offer(_ lengths: Int...) throws -> [(address: UInt64, length: Int)] {
    var places: [(UInt64, Int)] = []
    for length in lengths {
      let place = try driver.allocate(length)
      try driver.store([UInt8](repeating: 0xee, count: length), at: place)
      places.append((place, length))
    }
    _ = try driver.queues[0].add(
      places.map { Driver.Buffer(address: $0.0, length: UInt32($0.1), isWritten: true) })
    driver.notify(0)
    return places
  }

  /// Sends what the buffers hold and waits until the device is done with them.
  func send(_ buffers: [[UInt8]], room: Int = 0) throws {
    var pieces: [Driver.Buffer] = []
    for bytes in buffers {
      let place = try driver.allocate(bytes.count)
      try driver.store(bytes, at: place)
      pieces.append(Driver.Buffer(address: place, length: UInt32(bytes.count), isWritten: false))
    }
    if room > 0 {
      pieces.append(Driver.Buffer(address: try driver.allocate(room), length: UInt32(room), isWritten: true))
    }
    _ = try driver.queues[1].add(pieces)
    driver.notify(1)
    #expect(try driver.queues[1].wait(1)?.count == 1)
  }

  /// A command's answer; nil where it has none.
  func control(_ command: [[UInt8]], room: Int = 1) throws -> UInt8? {
    var pieces: [Driver.Buffer] = []
    for bytes in command {
      let place = try driver.allocate(bytes.count)
      try driver.store(bytes, at: place)
      pieces.append(Driver.Buffer(address: place, length: UInt32(bytes.count), isWritten: false))
    }
    let answer = try driver.allocate(max(1, room))
    try driver.store(UInt8(0xee), at: answer)
    if room > 0 { pieces.append(Driver.Buffer(address: answer, length: UInt32(room), isWritten: true)) }
    _ = try driver.queues[2].add(pieces)
    driver.notify(2)
    let used = try driver.queues[2].wait(1)
    #expect(used?.map(\.written) == [room > 0 ? 1 : 0])
    return try room > 0 ? driver.load(answer) : nil
  }
}
