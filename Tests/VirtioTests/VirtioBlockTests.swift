import BlockLayer
import DeviceModel
import DeviceTesting
import Glibc
import GuestMemory
import Host
import PlatformDevices
import StateTree
import Synchronization
import Testing

@testable import Virtio

/// A device over a disk in memory, and its driver.
final class Bench {
  let fixture: Fixture
  let thread: IOThread
  let disk: MemoryDisk
  let block: VirtioBlock
  let pci: VirtioPCI
  let driver: Driver
  let faults = Faults()

  final class Faults: Sendable {
    private let texts = Mutex<[String]>([])
    func add(_ text: String) { texts.withLock { $0.append(text) } }
    var all: [String] { texts.withLock { $0 } }
  }

  init(
    _ way: Driver.Way = Driver.Way(), disk: MemoryDisk = MemoryDisk(size: 64 << 10), queues: Int = 1,
    fixture: Fixture? = nil, readErrors: DiskErrorPolicy = .report, writeErrors: DiskErrorPolicy = .enospc
  ) throws {
    let fixture = try fixture ?? Fixture()
    self.fixture = fixture
    thread = try IOThread()
    self.disk = disk
    block = VirtioBlock(
      name: "disk0", disk: disk, serial: "a serial number of a disk", memory: fixture.memory, thread: thread,
      queues: queues, readErrors: readErrors, writeErrors: writeErrors)
    pci = try VirtioPCI(
      block, host: fixture.pciHost(), line: fixture.line(17), interrupts: fixture.sink, memory: fixture.memory,
      loop: thread.loop, onFault: { [faults] in faults.add($0) })
    driver = Driver(pci, memory: fixture.memory, way: way)
    try thread.start()
  }

  deinit {
    pci.drain()
    thread.stop()
  }

  func onThread<Result>(_ body: @escaping () -> Result) -> Result { thread.perform(body) }

  /// Waits for what another thread does; false where it does not come.
  func wait(_ condition: () throws -> Bool) rethrows -> Bool {
    for _ in 0..<20_000 {
      if try condition() { return true }
      usleep(1000)
    }
    return false
  }
}

private let noSpace = BlockError.io(call: "write", path: "disk", errno: ENOSPC)
private let ioError = BlockError.io(call: "read", path: "disk", errno: EIO)

@Suite struct VirtioBlockTests {
  @Test func identityAndCapabilitiesAreTheSpecifications() throws {
    let bench = try Bench(queues: 3)
    let function = bench.pci.function
    #expect(function.readConfiguration(offset: 0, size: 4) == 0x1042_1af4)
    #expect(function.readConfiguration(offset: 8, size: 4) == 0x0100_0001)
    var structures: [UInt32: (offset: UInt32, length: UInt32)] = [:]
    for capability in bench.driver.capabilities() where capability.id == 9 {
      let type = function.readConfiguration(offset: capability.offset + 3, size: 1)
      if type != 5 { #expect(function.readConfiguration(offset: capability.offset + 4, size: 1) == 0) }
      structures[type] = (
        function.readConfiguration(offset: capability.offset + 8, size: 4),
        function.readConfiguration(offset: capability.offset + 12, size: 4)
      )
    }
    #expect(structures.keys.sorted() == [1, 2, 3, 4, 5])
    #expect(structures[1]?.offset == 0 && structures[1]?.length == 60)
    #expect(structures[2]?.offset == 0x3000 && structures[2]?.length == 12)
    #expect(structures[3]?.offset == 0x1000 && structures[4]?.offset == 0x2000)
    // Capacity, segments, block size, queues.
    #expect(bench.driver.read(Driver.configuration, 8) == 128)
    #expect(bench.driver.read(Driver.configuration + 12, 4) == 254)
    #expect(bench.driver.read(Driver.configuration + 20, 4) == 512)
    #expect(bench.driver.read(Driver.configuration + 34, 2) == 3)
  }

  @Test func aDeviceStartsOnlyWithFeaturesThatItOffers() throws {
    let bench = try Bench()
    let driver = bench.driver
    let version1: UInt64 = 1 << 32
    let all: UInt64 = version1 | 1 << 34 | 1 << 29 | 1 << 28 | 1 << 13
    let cases: [(UInt64, Bool)] = [
      (version1, true), (0, false), (version1 | 1 << 40, false), (version1 | 1 << 5, false), (all, true),
    ]
    for (features, isAccepted) in cases {
      driver.write(Driver.Common.status, 1, 0)
      #expect(driver.status == 0)
      driver.write(Driver.Common.status, 1, 3)
      for half in UInt64(0)..<2 {
        driver.write(Driver.Common.driverFeatureSelect, 4, half)
        driver.write(Driver.Common.driverFeatures, 4, features >> (half * 32) & 0xffff_ffff)
      }
      driver.write(Driver.Common.status, 1, 0xb)
      #expect(driver.status == (isAccepted ? 0xb : 3))
      driver.write(Driver.Common.status, 1, 0xf)
      #expect(driver.status == (isAccepted ? 0xf : 3))
    }
    #expect(bench.faults.all == [])
  }

  @Test(arguments: Driver.Way.all) func requestsDoWhatTheySay(_ way: Driver.Way) throws {
    let bench = try Bench(way)
    try bench.driver.start()
    var model = bench.disk.bytes
    let mark = bench.driver.mark
    // Enough to go around the queue of 16 entries many times.
    for round in 0..<60 {
      bench.driver.releaseMemory(to: mark)
      let data = (0..<1024).map { UInt8(truncatingIfNeeded: $0 &+ round &* 7) }
      let sector = UInt64(round % 126)
      let written = try bench.driver.request(1, sector: sector, data: data)
      #expect(written?.status == 0 && written?.written == 1)
      model.replaceSubrange(Int(sector) * 512..<Int(sector) * 512 + 1024, with: data)
      let read = try bench.driver.request(0, sector: sector / 2, room: 2048)
      #expect(read?.status == 0 && read?.written == 2049)
      #expect(read?.data == Array(model[Int(sector / 2) * 512..<Int(sector / 2) * 512 + 2048]))
    }
    #expect(try bench.driver.request(4)?.status == 0)
    #expect(bench.onThread { bench.disk.flushes } == 1)
    let identity = try bench.driver.request(8, room: 20)
    #expect(identity?.status == 0)
    #expect(identity.map { String(decoding: $0.data, as: UTF8.self) } == "a serial number of a")
    // Zeroes, which may be unmapped; and a discard, which changes nothing here.
    func range(_ sector: UInt64, _ count: UInt32, _ flags: UInt32) -> [UInt8] {
      withUnsafeBytes(of: (sector, count, flags)) { Array($0) }
    }
    #expect(try bench.driver.request(13, data: range(4, 3, 1))?.status == 0)
    #expect(try bench.driver.request(11, data: range(20, 8, 0))?.status == 0)
    model.replaceSubrange(4 * 512..<7 * 512, with: [UInt8](repeating: 0, count: 3 * 512))
    #expect(bench.onThread { bench.disk.bytes } == model)
    #expect(bench.faults.all == [])
  }

  @Test func whatADriverMayNotAskForIsRefused() throws {
    let bench = try Bench()
    try bench.driver.start()
    let before = bench.disk.bytes
    func status(_ kind: UInt32, sector: UInt64 = 0, data: Int = 0, room: Int = 0) throws -> UInt8? {
      try bench.driver.request(kind, sector: sector, data: [UInt8](repeating: 9, count: data), room: room)?.status
    }
    #expect(try status(0, sector: 127, room: 1024) == 1)
    #expect(try status(0, sector: .max, room: 512) == 1)
    #expect(try status(0, sector: 1 << 55, room: 512) == 1)
    #expect(try status(0, room: 100) == 1)
    #expect(try status(1, sector: 128, data: 512) == 1)
    #expect(try status(1, data: 511) == 1)
    #expect(try status(8, room: 19) == 1)
    #expect(try status(99) == 2)
    #expect(try status(11, data: 15) == 1)
    #expect(try status(13, data: 32) == 1)
    func range(_ kind: UInt32, _ sector: UInt64, _ count: UInt32, _ flags: UInt32) throws -> UInt8? {
      try bench.driver.request(kind, data: withUnsafeBytes(of: (sector, count, flags)) { Array($0) })?.status
    }
    #expect(try range(11, 120, 9, 0) == 1)
    #expect(try range(13, .max, .max, 0) == 1)
    #expect(try range(11, 0, 1, 1) == 2)
    #expect(try range(13, 0, 1, 2) == 2)
    #expect(bench.onThread { bench.disk.bytes } == before)

    let readOnly = try Bench(disk: MemoryDisk(size: 4096, isReadOnly: true))
    try readOnly.driver.start(features: 1 << 5)
    #expect(try readOnly.driver.request(1, data: [UInt8](repeating: 1, count: 512))?.status == 1)
    #expect(try readOnly.driver.request(0, room: 512)?.data == Array(readOnly.disk.bytes[..<512]))
  }

  @Test func aRequestWithoutAHeaderOrRoomForAStatusComesBack() throws {
    let bench = try Bench()
    try bench.driver.start()
    let queue = bench.driver.queues[0]
    let place = try bench.driver.allocate(64)
    try bench.driver.store(UInt8(0xee), at: place + 32)
    _ = try queue.add([Driver.Buffer(address: place, length: 16, isWritten: false)])
    _ = try queue.add([
      Driver.Buffer(address: place, length: 15, isWritten: false),
      Driver.Buffer(address: place + 32, length: 1, isWritten: true),
    ])
    bench.driver.notify()
    #expect(try queue.wait(2)?.map(\.written) == [0, 1])
    #expect(try bench.driver.load(place + 32, as: UInt8.self) == 1)
  }

  /// Many requests at once, completed in the reverse order, on several queues, with pieces of odd sizes.
  @Test(arguments: Driver.Way.all) func manyRequestsAreUnderWay(_ way: Driver.Way) throws {
    let bench = try Bench(way, queues: 2)
    try bench.driver.start(size: 32)
    var model = bench.disk.bytes
    var random = SeededGenerator(seed: 7)
    let mark = bench.driver.mark
    for _ in 0..<20 {
      bench.driver.releaseMemory(to: mark)
      bench.onThread { bench.disk.holds = true }
      var reads: [(status: UInt64, room: UInt64, data: [UInt8])] = []
      var writes: [(sector: Int, data: [UInt8])] = []
      var counts = [0, 0]
      for sector in stride(from: 0, to: 120, by: 8) {
        let index = Int.random(in: 0..<2, using: &random)
        let queue = bench.driver.queues[index]
        guard queue.hasRoom(8) else { continue }
        let pieces = Int.random(in: 1...6, using: &random)
        let isWrite = Bool.random(using: &random)
        let data = isWrite ? (0..<4096).map { _ in UInt8.random(in: 0...255, using: &random) } : []
        let request = try bench.driver.makeRequest(
          isWrite ? 1 : 0, sector: UInt64(sector), data: data, room: isWrite ? 0 : 4096, pieces: pieces)
        _ = try queue.add(request.buffers)
        counts[index] += 1
        let range = sector * 512..<sector * 512 + 4096
        reads.append((request.status, request.room, isWrite ? [] : Array(model[range])))
        if isWrite { writes.append((sector, data)) }
      }
      for index in 0..<2 { bench.driver.notify(index) }
      bench.onThread { bench.disk.release() }
      for index in 0..<2 { #expect(try bench.driver.queues[index].wait(counts[index])?.count == counts[index]) }
      for read in reads {
        #expect(try bench.driver.load(read.status, as: UInt8.self) == 0)
        #expect(try bench.driver.bytes(read.room, read.data.count) == read.data)
      }
      for write in writes { model.replaceSubrange(write.sector * 512..<write.sector * 512 + 4096, with: write.data) }
    }
    #expect(bench.onThread { bench.disk.bytes } == model)
  }

  @Test(arguments: Driver.Way.all) func interruptsComeAsTheDriverWantsThem(_ way: Driver.Way) throws {
    let bench = try Bench(way)
    try bench.driver.start()
    let queue = bench.driver.queues[0]
    let mark = bench.driver.mark
    for round in 0..<40 {
      bench.driver.releaseMemory(to: mark)
      _ = bench.fixture.sink.takeMessages()
      bench.onThread { bench.disk.holds = true }
      try queue.wantInterrupt(after: 3)
      var added = 0
      while added < 3 {
        let request = try bench.driver.makeRequest(0, sector: UInt64(round), data: [], room: 512)
        _ = try queue.add(request.buffers)
        added += 1
      }
      bench.driver.notify()
      bench.onThread {}
      if way.hasMessages {
        bench.onThread { bench.disk.release() }
        let expected = RecordingSink.Message(address: 0xfee0_0000, data: 0x40)
        var messages: [RecordingSink.Message] = []
        #expect(
          bench.wait {
            messages += bench.fixture.sink.takeMessages()
            return !messages.isEmpty
          }, "round \(round)")
        #expect(messages == [expected], "round \(round)")
        #expect(!bench.fixture.sink.isHigh(17))
      } else {
        bench.onThread { bench.disk.release() }
        #expect(bench.wait { bench.fixture.sink.isHigh(17) })
        #expect(bench.driver.read(Driver.interruptStatus, 1) == 1)
        #expect(!bench.fixture.sink.isHigh(17))
        #expect(bench.driver.read(Driver.interruptStatus, 1) == 0)
      }
      #expect(try queue.wait(3)?.count == 3)
    }
  }

  @Test func anErrorIsReportedOrStopsTheMachineByPolicy() throws {
    let report = try Bench()
    try report.driver.start()
    report.onThread { report.disk.errors = [ioError, ioError, nil] }
    #expect(try report.driver.request(0, room: 512)?.status == 1)
    #expect(try report.driver.request(4)?.status == 1)
    #expect(try report.driver.request(0, room: 512)?.status == 0)

    let stop = try Bench()
    let stops = Bench.Faults()
    stop.block.onError = { report in
      #expect(report.disk == "disk0" && report.isNoSpace == report.stops)
      stops.add("\(report.isWrite) \(report.stops) \(report.reason)")
    }
    try stop.driver.start()
    stop.onThread { stop.disk.errors = [noSpace, nil] }
    let data = [UInt8](repeating: 0x5a, count: 512)
    let request = try stop.driver.makeRequest(1, sector: 3, data: data, room: 0)
    _ = try stop.driver.queues[0].add(request.buffers)
    stop.driver.notify()
    #expect(stop.wait { stops.all.count == 1 })
    #expect(stops.all == ["true true \(noSpace)"])
    // What is stopped waits, and the machine comes to rest with it.
    stop.pci.drain()
    #expect(try stop.driver.queues[0].reap() == [])
    stop.pci.undrain()
    #expect(try stop.driver.queues[0].wait(1)?.count == 1)
    #expect(try stop.driver.load(request.status, as: UInt8.self) == 0)
    #expect(Array(stop.disk.bytes[1536..<2048]) == data)
    // An error that is not about room goes to the guest.
    stop.onThread { stop.disk.errors = [ioError] }
    #expect(try stop.driver.request(1, data: data)?.status == 1)
    #expect(stops.all == ["true true \(noSpace)", "true false \(ioError)"])
  }

  @Test func aDrainedDeviceTakesNothing() throws {
    let bench = try Bench()
    try bench.driver.start()
    bench.onThread { bench.disk.holds = true }
    let first = try bench.driver.makeRequest(0, sector: 1, data: [], room: 512)
    _ = try bench.driver.queues[0].add(first.buffers)
    bench.driver.notify()
    bench.onThread {}
    bench.thread.loop.execute { [disk = bench.disk] in disk.release() }
    bench.pci.drain()
    // Drained means answered.
    #expect(try bench.driver.queues[0].reap().count == 1)
    let second = try bench.driver.makeRequest(0, sector: 2, data: [], room: 512)
    _ = try bench.driver.queues[0].add(second.buffers)
    bench.driver.notify()
    bench.onThread {}
    #expect(try bench.driver.queues[0].reap() == [])
    bench.pci.undrain()
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
  }

  @Test func withoutBusMasteringNothingReachesMemory() throws {
    let bench = try Bench()
    try bench.driver.start()
    bench.driver.command(2)
    let request = try bench.driver.makeRequest(0, sector: 1, data: [], room: 512)
    _ = try bench.driver.queues[0].add(request.buffers)
    bench.driver.notify()
    bench.onThread {}
    #expect(try bench.driver.load(request.status, as: UInt8.self) == 0xee)
    bench.driver.command(6)
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
    #expect(try bench.driver.load(request.status, as: UInt8.self) == 0)
  }

  @Test(arguments: Driver.Way.all) func aRestoredDeviceGoesOnWhereTheSavedOneWas(_ way: Driver.Way) throws {
    let bench = try Bench(way)
    try bench.driver.start()
    for sector in UInt64(0)..<21 { #expect(try bench.driver.request(0, sector: sector, room: 512)?.status == 0) }
    bench.pci.drain()
    let saved = bench.pci.save()
    #expect(try StateNode(decoding: saved.encoded()) == saved)
    // The same memory under another device.
    let other = try Bench(way, fixture: bench.fixture)
    other.pci.drain()
    try other.pci.restore(saved)
    #expect(other.pci.save() == saved)
    let request = try bench.driver.makeRequest(0, sector: 9, data: [], room: 512)
    _ = try bench.driver.queues[0].add(request.buffers)
    other.pci.undrain()
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
    #expect(try bench.driver.bytes(request.room, 512) == Array(other.disk.bytes[9 * 512..<10 * 512]))
  }

  @Test func aLargerDiskIsTold() throws {
    let bench = try Bench()
    try bench.driver.start()
    let generation = bench.driver.read(Driver.Common.generation, 1)
    bench.onThread {
      bench.disk.resize(128 << 10)
      bench.block.sizeChanged()
    }
    #expect(bench.driver.read(Driver.configuration, 8) == 256)
    #expect(bench.driver.read(Driver.Common.generation, 1) != generation)
    #expect(bench.fixture.sink.takeMessages() == [RecordingSink.Message(address: 0xfee0_0000, data: 0x30)])
    #expect(try bench.driver.request(0, sector: 255, room: 512)?.status == 0)
  }

  /// The window in configuration space, for those who cannot map the BAR.
  @Test func theWindowReachesTheRegisters() throws {
    let bench = try Bench()
    let driver = bench.driver
    driver.command(6)
    let window = try #require(
      driver.capabilities().first {
        $0.id == 9 && bench.pci.function.readConfiguration(offset: $0.offset + 3, size: 1) == 5
      }
    ).offset
    func set(_ offset: Int, _ size: Int, _ value: UInt32) {
      bench.pci.function.writeConfiguration(offset: offset, size: size, value: value, for: bench.pci)
    }
    func get(_ offset: Int, _ size: Int) -> UInt32 {
      bench.pci.willReadConfiguration(offset: offset, size: size)
      return bench.pci.function.readConfiguration(offset: offset, size: size)
    }
    set(window + 8, 4, UInt32(Driver.Common.status))
    set(window + 12, 4, 1)
    set(window + 16, 1, 3)
    #expect(driver.status == 3)
    #expect(get(window + 16, 1) == 3)
    set(window + 8, 4, UInt32(Driver.configuration))
    set(window + 12, 4, 4)
    #expect(get(window + 16, 4) == 128)
    // Beyond the BAR, and sizes that are none, change nothing.
    set(window + 8, 4, 0xffff_fffc)
    set(window + 16, 4, 0)
    set(window + 8, 4, UInt32(Driver.Common.status))
    set(window + 12, 4, 3)
    set(window + 16, 4, 0)
    #expect(driver.status == 3)
  }
}
