import DeviceTesting
import Foundation
import GuestMemory
import NetLayer
import PlatformDevices
import StateTree
import Testing

@testable import Virtio

@Suite struct VirtioNetworkTests {
  private typealias Bench = NetworkBench

  @Test func theIdentityIsTheSpecifications() throws {
    let bench = try Bench()
    #expect(bench.pci.function.readConfiguration(offset: 0, size: 4) == 0x1041_1af4)
    #expect(bench.pci.function.readConfiguration(offset: 8, size: 4) == 0x0200_0001)
    #expect(bench.pci.offeredFeatures.rawValue == Bench.features | VirtioFeatures.transport.rawValue)
    try bench.start()
    #expect(bench.driver.queues.count == 3)
    #expect(bench.driver.read(Driver.configuration, 4) == 0x1200_5452)
    #expect(bench.driver.read(Driver.configuration + 4, 2) == 0x5634)
    // The link is up; one pair of queues; the MTU; nothing behind.
    #expect(bench.driver.read(Driver.configuration + 6, 2) == 1)
    #expect(bench.driver.read(Driver.configuration + 8, 8) == 9000 << 16 | 1)
    #expect(bench.driver.read(Driver.configuration + 0xff8, 8) == 0)
  }

  @Test(arguments: Driver.Way.all) func framesGoBothWays(_ way: Driver.Way) throws {
    let bench = try Bench(way)
    try bench.start()
    for count in [60, 1514, 9014] {
      bench.driver.releaseMemory(to: 0x8000)
      let frame = Bench.frame(to: Bench.other, count)
      try bench.send([Array(frame[..<12]), Array(frame[12..<40]), Array(frame[40...])])
      try bench.send([frame])
      #expect(bench.perform { bench.network.sent.suffix(2) } == [frame, frame])
    }
    #expect(bench.perform { bench.network.flushes } >= 6)
    // One buffer, and one that is the rest of the last.
    var expected = Bench.frame(700)
    bench.driver.releaseMemory(to: 0x8000)
    let one = try bench.offer(1000)
    bench.receive(expected)
    #expect(try bench.driver.queues[0].wait(1)?.map(\.written) == [712])
    expected[10] = 1
    #expect(try bench.driver.bytes(one[0].address, 712) == expected)
    #expect(try bench.driver.load(one[0].address + 712) == UInt8(0xee))
    // Three, which are there at once.
    bench.receive(expected)
    let places = try bench.offer(5, 95) + bench.offer(400) + bench.offer(400)
    let used = try #require(try bench.driver.queues[0].wait(3))
    #expect(used.map(\.written) == [100, 400, 212])
    expected[10] = 3
    var bytes: [UInt8] = []
    for place in places { bytes += try bench.driver.bytes(place.address, place.length) }
    #expect(Array(bytes.prefix(712)) == expected)
    #expect(bench.faults.all == [])
  }

  /// Frames wait where they are while the driver has too few buffers, and nobody is busy meanwhile.
  @Test(arguments: Driver.Way.all) func aDriverWithoutBuffersIsWaitedFor(_ way: Driver.Way) throws {
    let bench = try Bench(way)
    try bench.start()
    for _ in 0..<3 { bench.receive(Bench.frame(500)) }
    #expect(bench.wait { bench.perform { !bench.network.isReceiving } })
    _ = try bench.offer(100)
    _ = try bench.offer(100)
    #expect(bench.wait { bench.perform { !bench.network.isReceiving } })
    let calls = bench.perform { bench.network.calls }
    #expect(calls < 10, "\(calls) calls")
    #expect(bench.perform { bench.network.left } == 3)
    if way.hasEventIndex, !way.isPacked {
      // The driver is to tell of what comes after the two that did not suffice.
      let queue = bench.driver.queues[0]
      #expect(try bench.driver.load(queue.deviceArea + 4 + 8 * UInt64(queue.size), as: UInt16.self) == 2)
    }
    _ = try bench.offer(400)
    #expect(try bench.driver.queues[0].wait(3)?.map(\.written) == [100, 100, 312])
    _ = try bench.offer(1000)
    _ = try bench.offer(1000)
    #expect(try bench.driver.queues[0].wait(2)?.map(\.written) == [512, 512])
    #expect(bench.faults.all == [])
  }

  @Test func withoutMergingAFrameNeedsOneBuffer() throws {
    let bench = try Bench()
    try bench.start(without: 1 << 15)
    _ = try bench.offer(200)
    let place = try bench.offer(1000)
    bench.receive(Bench.frame(500))
    bench.receive(Bench.frame(100))
    // The first does not fit and is lost, the second takes the small buffer.
    #expect(try bench.driver.queues[0].wait(1)?.map(\.written) == [112])
    bench.receive(Bench.frame(500))
    #expect(try bench.driver.queues[0].wait(1)?.map(\.written) == [512])
    #expect(try bench.driver.load(place[0].address + 10) == UInt16(1))
  }

  // MARK: Filter and commands

  /// Which of some frames reach the guest.
  private func reach(_ bench: NetworkBench) throws -> [Int] {
    let stations: [MACAddress] = [
      Bench.address, Bench.other, .broadcast, MACAddress(rawValue: 0x3333_0000_0001),
      MACAddress(rawValue: 0x0100_5e00_0001),
    ]
    bench.driver.releaseMemory(to: 0x10000)
    for _ in stations { _ = try bench.offer(200) }
    for (number, station) in stations.enumerated() { bench.receive(Bench.frame(to: station, 60 + number)) }
    #expect(bench.wait { bench.perform { bench.network.left == 0 } })
    let seen = try bench.driver.queues[0].reap().map { Int($0.written) - 72 }
    // What is left of the buffers takes frames that are seen anyway.
    let one = stations[try #require(seen.first)]
    for _ in seen.count..<stations.count { bench.receive(Bench.frame(to: one, 60)) }
    if seen.count < stations.count { _ = try bench.driver.queues[0].wait(stations.count - seen.count) }
    return seen
  }

  @Test func framesAreFiltered() throws {
    let bench = try Bench()
    try bench.start()
    func set(_ mode: UInt8, _ value: UInt8) throws { #expect(try bench.control([[0, mode], [value]]) == 0) }
    // As long as the driver has said nothing.
    #expect(try reach(bench) == [0, 2, 3, 4])
    try set(1, 0)
    #expect(try reach(bench) == [0, 2])
    try set(0, 1)
    #expect(try reach(bench) == [0, 1, 2, 3, 4])
    try set(0, 0)
    try set(2, 1)
    #expect(try reach(bench) == [0, 1, 2])
    try set(2, 0)
    try set(5, 1)
    #expect(try reach(bench) == [0])
    try set(5, 0)
    let group = MACAddress(rawValue: 0x3333_0000_0001).bytes
    #expect(try bench.control([[1, 0], [1, 0, 0, 0] + Bench.other.bytes, [1, 0, 0, 0] + group]) == 0)
    #expect(try reach(bench) == [0, 1, 2, 3])
    // More than the table holds: all of that kind.
    let many = (0..<65).flatMap { MACAddress(rawValue: 0x3333_ff00_0000 + UInt64($0)).bytes }
    #expect(try bench.control([[1, 0], [0, 0, 0, 0], [65, 0, 0, 0], many]) == 0)
    #expect(try reach(bench) == [0, 2, 3, 4])
    #expect(try bench.control([[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]) == 0)
    #expect(try reach(bench) == [0, 2])
    // Another address, until the reset.
    #expect(try bench.control([[1, 1], Bench.other.bytes]) == 0)
    #expect(try reach(bench) == [1, 2])
    #expect(bench.driver.read(Driver.configuration + 4, 2) == 0x5734)
    bench.driver.releaseMemory(to: 0x1000)
    try bench.start()
    #expect(bench.driver.read(Driver.configuration + 4, 2) == 0x5634)
    #expect(try reach(bench) == [0, 2, 3, 4])
    #expect(bench.faults.all == [])
  }

  @Test func commandsThatMeanNothingAreRefused() throws {
    let bench = try Bench()
    try bench.start()
    let tables: [[[UInt8]]] = [
      [], [[1]], [[0, 0]], [[0, 0], [2]], [[0, 0], [1, 1]], [[0, 6], [1]], [[2, 0], [0, 0]], [[9, 9]],
      [[1, 0]], [[1, 0], [1, 0, 0, 0]], [[1, 0], [255, 255, 255, 255], [0, 0, 0, 0]],
      [[1, 0], [0, 0, 0, 0], [255, 255, 255, 255]], [[1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1]],
      [[1, 0], [0, 0, 0, 0]], [[1, 0], [171, 170, 170, 42], [UInt8](repeating: 1, count: 60)],
      [[1, 1], [1, 2, 3, 4, 5]], [[1, 1], [1, 0, 0, 0, 0, 0]], [[1, 1], [0, 0, 0, 0, 0, 0, 0]], [[4, 0], [1, 0]],
    ]
    let before = bench.perform { bench.card.save() }
    for command in tables { #expect(try bench.control(command) == 1, "\(command)") }
    // Without room for an answer nothing is done.
    #expect(try bench.control([[0, 0], [1]], room: 0) == nil)
    #expect(bench.perform { bench.card.save() } == before)
    #expect(try bench.control([[0, 0], [0]], room: 100) == 0)
    #expect(bench.faults.all == [])
  }

  @Test func whatIsNoFrameIsNotSent() throws {
    let bench = try Bench()
    try bench.start()
    try bench.send([[]], room: 8)
    for count in [1, 11, 12, 13, 25] { try bench.send([[UInt8](repeating: 0, count: count)]) }
    try bench.send([[UInt8](repeating: 0, count: 65536 + 18 + 13)])
    // Checksums and segments that nobody has agreed on.
    try bench.send([Bench.frame(header: [1] + [UInt8](repeating: 0, count: 11))])
    try bench.send([Bench.frame(header: [0, 1] + [UInt8](repeating: 0, count: 10))])
    #expect(bench.perform { bench.network.sent } == [])
    try bench.send([Bench.frame()], room: 8)
    #expect(bench.perform { bench.network.sent.count } == 1)
    // A driver's other words are nobody's.
    try bench.send([Bench.frame(header: [2, 0] + [UInt8](repeating: 7, count: 10))])
    #expect(bench.perform { bench.network.sent[1] } == Bench.frame())
  }

  @Test func headersAreThoseThatWereAgreedOn() throws {
    let bench = try Bench(offloads: [.checksum, .tcp4])
    #expect(bench.pci.offeredFeatures.rawValue & 0x7fff == 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 11)
    try bench.start(with: 1 << 0 | 1 << 1 | 1 << 7 | 1 << 11)
    #expect(bench.perform { bench.network.receiveOffloads } == [.checksum, .tcp4])
    #expect(bench.card.neededOffloads == [.checksum, .tcp4])
    func header(_ flags: UInt8, _ kind: UInt8) -> [UInt8] { [flags, kind, 54, 0, 160, 5, 34, 0, 16, 0, 0, 0] }
    let good = [header(1, 0), header(1, 1), header(0, 0)]
    let bad = [header(0, 1), header(1, 4), header(1, 3), header(1, 5), header(1, 0x81), header(1, 0xff)]
    for header in good + bad { try bench.send([Bench.frame(header: header)]) }
    #expect(bench.perform { bench.network.sent } == good.map { Bench.frame(header: $0) })
    for header in bad + good {
      _ = try bench.offer(200)
      bench.receive(Bench.frame(header: header))
    }
    #expect(try bench.driver.queues[0].wait(3)?.count == 3)
    #expect(bench.wait { bench.perform { bench.network.left == 0 } })
    // Without its driver, and for one that takes less, there is less.
    bench.driver.write(Driver.Common.status, 1, 0)
    #expect(bench.perform { bench.network.receiveOffloads } == [])
    #expect(bench.card.neededOffloads == [])
    bench.driver.releaseMemory(to: 0x1000)
    // Segments without checksums are none.
    try bench.start(with: 1 << 0 | 1 << 7)
    #expect(bench.perform { bench.network.receiveOffloads } == [])
    let place = try bench.offer(200)
    bench.receive(Bench.frame(header: header(1, 0)))
    bench.receive(Bench.frame(header: header(2, 0)))
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
    #expect(try bench.driver.bytes(place[0].address, 12) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    #expect(try Bench(offloads: .checksum, usesOffloads: false).pci.offeredFeatures.rawValue & 3 == 0)
  }

  // MARK: Link, announcements, memory

  @Test func theLinkGoesAndComes() throws {
    let bench = try Bench()
    try bench.start()
    _ = try bench.offer(200)
    let message = RecordingSink.Message(address: 0xfee0_0000, data: 0x30)
    for isPlug in [true, false] {
      _ = bench.fixture.sink.takeMessages()
      bench.perform { isPlug ? bench.card.setPlugged(false) : bench.network.setLinkUp(false) }
      #expect(bench.fixture.sink.takeMessages().filter { $0 == message }.count == 1)
      #expect(bench.driver.read(Driver.configuration + 6, 2) == 0)
      if isPlug {
        bench.receive(Bench.frame())
        try bench.send([Bench.frame()])
        #expect(bench.perform { (bench.network.left, bench.network.sent.count) } == (0, 0))
      }
      bench.perform { isPlug ? bench.card.setPlugged(true) : bench.network.setLinkUp(true) }
      bench.perform { bench.card.setPlugged(true) }
      #expect(bench.fixture.sink.takeMessages().filter { $0 == message }.count == 1)
      #expect(bench.driver.read(Driver.configuration + 6, 2) == 1)
    }
    #expect(try bench.driver.queues[0].reap() == [])
    bench.receive(Bench.frame())
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
  }

  private static let atOnce: NetworkAnnouncement = {
    var announcement = NetworkAnnouncement()
    (announcement.initial, announcement.step, announcement.rounds) = (1, 0, 3)
    return announcement
  }()

  @Test func theDriverAnnouncesWhereItCan() throws {
    let bench = try Bench()
    try bench.start()
    _ = bench.fixture.sink.takeMessages()
    bench.perform { bench.card.announce(Self.atOnce) }
    #expect(bench.driver.read(Driver.configuration + 6, 2) == 3)
    #expect(bench.fixture.sink.takeMessages().first == .init(address: 0xfee0_0000, data: 0x30))
    #expect(try bench.control([[3, 0]]) == 0)
    // Three times, the first by the device, too.
    #expect(bench.wait { bench.fixture.sink.takeMessages().contains(.init(address: 0xfee0_0000, data: 0x30)) })
    #expect(bench.wait { bench.driver.read(Driver.configuration + 6, 2) == 3 })
    #expect(bench.perform { bench.network.sent.map { Array($0[12...]) } } == [Announcement.frame(for: Bench.address)])
  }

  @Test func theDeviceAnnouncesWhereTheDriverCannot() throws {
    let bench = try Bench()
    try bench.start(without: 1 << 21)
    bench.perform { bench.card.announce(Self.atOnce) }
    #expect(bench.wait { bench.perform { bench.network.sent.count } == 3 })
    #expect(bench.perform { bench.network.sent.allSatisfy { $0.count == 72 } })
    #expect(bench.driver.read(Driver.configuration + 6, 2) == 1)
    #expect((0..<4).map { NetworkAnnouncement().wait(after: $0) } == [50, 150, 250, 350])
    #expect(NetworkAnnouncement().wait(after: .max) == 550)
  }

  @Test func whatIsWrittenIsDirtyAndGuarded() throws {
    let bench = try Bench()
    try bench.start()
    let memory = bench.fixture.memory
    bench.driver.releaseMemory(to: 0x20000)
    let place = try bench.offer(0x5000)[0].address
    memory.dirty.setTracking(true)
    _ = memory.dirty.take()
    bench.receive(Bench.frame(0x1800))
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
    let dirty = memory.dirty.take()
    let pages = (0..<16).map { place >> 12 + $0 }.filter { dirty[Int($0 / 64)] & 1 << ($0 % 64) != 0 }
    // The pages of the frame, and no others of the buffer.
    #expect(pages == [place >> 12, place >> 12 + 1])
    memory.setDeviceGuard { address, _, isWrite in !isWrite || address.rawValue < 0x40000 }
    bench.driver.releaseMemory(to: 0x50000)
    let guarded = try bench.offer(0x1000)[0].address
    bench.receive(Bench.frame())
    #expect(bench.wait { bench.driver.status & 64 != 0 })
    #expect(bench.faults.all.count == 1)
    #expect(try bench.driver.load(guarded) == UInt8(0xee))
    // One that is broken does not keep its network busy.
    let calls = bench.perform { bench.network.calls }
    #expect(bench.perform { !bench.network.isReceiving } && calls < 10)
    memory.setDeviceGuard(nil)
    bench.driver.releaseMemory(to: 0x1000)
    try bench.start()
    _ = try bench.offer(0x1000)
    bench.receive(Bench.frame())
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
  }

  @Test func aDeviceWithoutAccessToMemoryWaits() throws {
    let bench = try Bench()
    try bench.start()
    _ = try bench.offer(1000)
    bench.driver.command(2)
    bench.receive(Bench.frame())
    #expect(bench.wait { bench.perform { !bench.network.isReceiving } })
    #expect(bench.perform { (bench.network.left, bench.network.calls) } == (1, 1))
    bench.driver.command(6)
    #expect(try bench.driver.queues[0].wait(1)?.count == 1)
  }

  // MARK: Moves

  @Test(arguments: [false, true]) func aCardGoesOnElsewhere(isPacked: Bool) throws {
    let bench = try Bench(Driver.Way(isPacked: isPacked))
    try bench.start()
    for _ in 0..<5 { _ = try bench.offer(300) }
    bench.receive(Bench.frame(700))
    #expect(try bench.driver.queues[0].wait(3)?.count == 3)
    #expect(try bench.control([[0, 0], [1]]) == 0)
    #expect(try bench.control([[1, 1], Bench.other.bytes]) == 0)
    bench.pci.drain()
    // A paused card takes nothing, and loses nothing.
    bench.receive(Bench.frame())
    #expect(bench.perform { (bench.network.left, bench.network.isReceiving) } == (1, false))
    let saved = bench.pci.save()
    let there = try Bench(Driver.Way(isPacked: isPacked), address: MACAddress(rawValue: 0x0200_0000_0001))
    // What came before the machine has been seen elsewhere.
    there.receive(Bench.frame(to: .broadcast))
    #expect(there.wait { there.perform { there.network.left == 0 } })
    let bytes = try bench.driver.bytes(0, 1 << 20)
    try there.fixture.memory.write(bytes, to: GuestPhysicalAddress(0))
    there.pci.drain()
    try there.pci.restore(saved)
    there.receive(Bench.frame(to: .broadcast))
    #expect(there.perform { there.network.sent } == [])
    #expect(there.pci.save() == saved)
    there.pci.undrain()
    #expect(there.card.station == Bench.other)
    #expect(there.card.permanentAddress == Bench.address)
    #expect(there.wait { there.perform { there.network.left == 0 && !there.network.sent.isEmpty } })
    #expect(there.perform { there.network.sent.first.map { Array($0[12...]) } } == Announcement.frame(for: Bench.other))
    let index: UInt16 = try there.driver.load(bench.driver.queues[0].deviceArea + 2)
    if !isPacked { #expect(index == 3) }
    there.receive(Bench.frame(to: MACAddress(rawValue: 0x0600_0000_0000), 500))
    let place = bench.driver.queues[0].descriptors
    #expect(
      try there.wait {
        // Used: the index of a split queue, or the flags of the packed queue's fifth entry.
        try isPacked
          ? there.driver.load(place + 4 * 16 + 14, as: UInt16.self) & 0x8080 == 0x8080
          : there.driver.load(bench.driver.queues[0].deviceArea + 2, as: UInt16.self) == 5
      })
    bench.pci.undrain()
    #expect(bench.wait { bench.perform { bench.network.left == 0 } })
    #expect(bench.faults.all + there.faults.all == [])
  }

  @Test func aStateOfAnotherShapeIsRefused() throws {
    let bench = try Bench()
    let node = try #require(bench.perform { bench.card.save() })
    func refusal(_ node: StateNode?) -> StateError? {
      bench.perform {
        do throws(StateError) { try bench.card.restore(node) } catch { return error }
        return nil
      }
    }
    #expect(refusal(nil) != nil)
    for count in 0..<node.payload.count {
      #expect(
        refusal(StateNode(node.name, version: 1) { for byte in node.payload[..<count] { $0.write(byte) } }) != nil)
    }
    for (place, byte) in [(5, UInt8(1)), (6, 1), (7, 255), (13, 1), (16, 2), (18, 255), (19, 1)] {
      var changed = node
      changed.payload[place] = byte
      #expect(refusal(changed) != nil, "byte \(place)")
    }
    #expect(bench.perform { bench.card.save() } == node)
    #expect(refusal(node) == nil)
  }

  // MARK: Nonsense

  private static let seeds: [UInt64] = {
    let more = ProcessInfo.processInfo.environment["VIRTIO_SEEDS"].flatMap { Int($0) } ?? 0
    return [1, 2, 3, 4] + (0..<more).map { _ in UInt64.random(in: 5..<1 << 32) }
  }()

  /// Queues full of nonsense while frames come and go: it never traps, and works after a reset. Some 4000 chains a seed.
  @Test(arguments: seeds) func nonsenseNeverTraps(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    var broken = 0
    for way in Driver.Way.all {
      let bench = try Bench(way)
      for _ in 0..<4 {
        bench.driver.releaseMemory(to: 0x1000)
        try bench.start(without: Bool.random(using: &random) ? 1 << 15 : 0)
        for _ in 0..<20 {
          for queue in bench.driver.queues { try scribble(bench, queue, &random) }
          for _ in 0..<3 {
            let count = [14, 60, 1514, 9014].randomElement(using: &random) ?? 60
            bench.receive(Bench.frame(to: .broadcast, count))
          }
          for queue in 0..<3 { bench.driver.notify(queue) }
          if Int.random(in: 0..<10, using: &random) == 0 {
            bench.pci.write(
              offset: UInt64.random(in: 0..<60, using: &random), size: [1, 2, 4, 8].randomElement(using: &random) ?? 1,
              value: random.next() & 0xff)
          }
        }
        bench.perform {}
        if bench.driver.status & 64 != 0 { broken += 1 }
      }
      bench.driver.releaseMemory(to: 0x1000)
      try bench.start()
      try bench.send([Bench.frame()])
      #expect(bench.perform { bench.network.sent.last } == Bench.frame(), "seed \(seed), \(way)")
      // Frames that waited come first; the driver gives room for all.
      let left = bench.perform { bench.network.left }
      bench.receive(Bench.frame())
      for _ in 0...left {
        bench.driver.releaseMemory(to: 0x10000)
        _ = try bench.offer(10000)
        #expect(try bench.driver.queues[0].wait(1)?.count == 1, "seed \(seed), \(way)")
      }
      #expect(bench.perform { bench.network.left } == 0)
    }
    #expect(broken > 5, "seed \(seed): nonsense that broke nothing")
  }

  /// Writes descriptors and indices that are nearly right.
  private func scribble(_ bench: NetworkBench, _ queue: DriverQueue, _ random: inout SeededGenerator) throws {
    let places = [queue.descriptors, queue.driverArea, queue.deviceArea, 0x1000, 0x8000]
    for _ in 0..<6 {
      let entry = queue.descriptors + UInt64.random(in: 0..<16, using: &random) * 16
      let addresses = places + [UInt64.random(in: 0..<1 << 20, using: &random), (4 << 30) + 0xfff0, random.next()]
      try bench.driver.store(addresses.randomElement(using: &random) ?? 0, at: entry)
      let lengths: [UInt32] = [0, 1, 12, 16, 48, 72, 2048, 10000, .max, UInt32.random(in: 0...(.max), using: &random)]
      try bench.driver.store(lengths.randomElement(using: &random) ?? 0, at: entry + 8)
      try bench.driver.store(UInt16.random(in: 0..<20, using: &random), at: entry + 12)
      try bench.driver.store(UInt16.random(in: 0...(.max), using: &random) & 0x8087, at: entry + 14)
    }
    if !bench.driver.way.isPacked {
      let entry = UInt64.random(in: 0..<16, using: &random)
      try bench.driver.store(UInt16.random(in: 0..<20, using: &random), at: queue.driverArea + 4 + entry * 2)
      let index: UInt16 = try bench.driver.load(queue.driverArea + 2)
      try bench.driver.store(index &+ UInt16.random(in: 0..<4, using: &random), at: queue.driverArea + 2)
    }
  }
}
