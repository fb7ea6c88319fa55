import DeviceTesting
import Foundation
import GuestMemory
import PlatformDevices
import Testing

@testable import Virtio

/// Drivers that break the rules: the device says so and stops until it is reset; the VMM goes on.
@Suite struct HostileDriverTests {
  private func expect(_ error: VirtqueueError, _ way: Driver.Way, _ spoil: (Bench) throws -> Void) throws {
    let bench = try Bench(way)
    try bench.driver.start()
    #expect(try bench.driver.request(0, room: 512)?.status == 0)
    _ = bench.fixture.sink.takeMessages()
    try spoil(bench)
    bench.driver.notify()
    #expect(bench.wait { bench.driver.status & 64 != 0 }, "\(error)")
    #expect(
      bench.faults.all == [
        "disk0: queue 0: \(error); the device stops until the guest's driver resets it"
      ])
    if way.hasMessages {
      let message = RecordingSink.Message(address: 0xfee0_0000, data: 0x30)
      #expect(bench.wait { bench.fixture.sink.takeMessages().contains(message) })
    }
    // Said once, whatever the guest does meanwhile.
    for _ in 0..<5 { bench.driver.notify() }
    bench.onThread {}
    #expect(bench.faults.all.count == 1)
    try bench.driver.start()
    #expect(bench.driver.status == 0xf)
    #expect(try bench.driver.request(0, sector: 2, room: 512)?.status == 0)
  }

  private let split = Driver.Way(isIndirect: true)
  private let packed = Driver.Way(isPacked: true, isIndirect: true)

  /// Puts a split queue's descriptors in place and makes the first one available, as the second request.
  private func put(_ bench: Bench, _ descriptors: [(UInt64, UInt32, UInt16, UInt16)], index: UInt16 = 2) throws {
    let queue = bench.driver.queues[0]
    for (number, descriptor) in descriptors.enumerated() {
      let place = queue.descriptors + UInt64(number) * 16
      try bench.driver.store(descriptor.0, at: place)
      try bench.driver.store(descriptor.1, at: place + 8)
      try bench.driver.store(descriptor.2, at: place + 12)
      try bench.driver.store(descriptor.3, at: place + 14)
    }
    try bench.driver.store(UInt16(0), at: queue.driverArea + 4 + 2)
    try bench.driver.store(index, at: queue.driverArea + 2)
  }

  @Test func brokenSplitQueues() throws {
    try expect(.chainTooLong, split) { try put($0, [(0x1000, 16, 1, 1), (0x1000, 16, 1, 0)]) }
    try expect(.descriptor(16, count: 16), split) { try put($0, [(0x1000, 16, 1, 16)]) }
    try expect(.descriptor(700, count: 16), split) { bench in
      try put(bench, [])
      try bench.driver.store(UInt16(700), at: bench.driver.queues[0].driverArea + 4 + 2)
    }
    try expect(.availableIndex(40, next: 1), split) { try put($0, [], index: 40) }
    try expect(.buffer(address: 0xffff_f000, length: 8192), split) { try put($0, [(0xffff_f000, 8192, 0, 0)]) }
    try expect(.buffer(address: .max, length: .max), split) { try put($0, [(.max, .max, 2, 0)]) }
    try expect(.order, split) { try put($0, [(0x1000, 16, 3, 1), (0x1000, 16, 0, 0)]) }
    try expect(.indirect(length: 17), split) { try put($0, [(0x1000, 17, 4, 0)]) }
    try expect(.indirect(length: 0), split) { try put($0, [(0x1000, 0, 4, 0)]) }
    try expect(.buffer(address: 1 << 40, length: 32), split) { try put($0, [(1 << 40, 32, 4, 0)]) }
    // A table in a table, and one followed by another buffer.
    try expect(.indirect(length: 16), split) { bench in
      let table = try bench.driver.allocate(16)
      try bench.driver.store(UInt64(0x1000), at: table)
      try bench.driver.store(UInt32(16), at: table + 8)
      try bench.driver.store(UInt32(4), at: table + 12)
      try put(bench, [(table, 16, 4, 0)])
    }
    try expect(.indirect(length: 16), split) { try put($0, [(0x1000, 16, 5, 1)]) }
    try expect(.indirect(length: 16), Driver.Way()) { try put($0, [(0x1000, 16, 4, 0)]) }
  }

  /// Puts a packed queue's descriptors in place after the first request, which took one entry.
  private func putPacked(_ bench: Bench, _ descriptors: [(UInt64, UInt32, UInt16, UInt16)]) throws {
    let queue = bench.driver.queues[0]
    for (number, descriptor) in descriptors.enumerated().reversed() {
      let place = queue.descriptors + UInt64((number + 1) % 16) * 16
      try bench.driver.store(descriptor.0, at: place)
      try bench.driver.store(descriptor.1, at: place + 8)
      try bench.driver.store(descriptor.2, at: place + 12)
      try bench.driver.store(descriptor.3 | (number < 15 ? 1 << 7 : 1 << 15), at: place + 14)
    }
  }

  @Test func brokenPackedQueues() throws {
    try expect(.chainTooLong, packed) { try putPacked($0, Array(repeating: (0x1000, 16, 0, 1), count: 16)) }
    try expect(.buffer(address: 1 << 40, length: 16), packed) { try putPacked($0, [(1 << 40, 16, 0, 0)]) }
    try expect(.order, packed) { try putPacked($0, [(0x1000, 16, 0, 3), (0x1000, 16, 0, 0)]) }
    try expect(.indirect(length: 24), packed) { try putPacked($0, [(0x1000, 24, 0, 4)]) }
    try expect(.indirect(length: 16), packed) { try putPacked($0, [(0x1000, 16, 0, 1), (0x1000, 16, 0, 4)]) }
  }

  @Test func queuesThatAreNowhere() throws {
    for (offset, address, error) in [
      (Driver.Common.descriptors, UInt64(0x1008), VirtqueueError.area(name: "descriptor area", address: 0x1008)),
      (Driver.Common.driver, 0xffff_fff0, .area(name: "driver area", address: 0xffff_fff0)),
      (Driver.Common.device, ~0 - 3, .area(name: "device area", address: ~0 - 3)),
    ] {
      let bench = try Bench()
      let driver = bench.driver
      driver.command(6)
      driver.write(Driver.Common.status, 1, 3)
      driver.write(Driver.Common.driverFeatureSelect, 4, 1)
      driver.write(Driver.Common.driverFeatures, 4, 1)
      driver.write(Driver.Common.status, 1, 0xb)
      driver.write(Driver.Common.descriptors, 8, 0x1000)
      driver.write(Driver.Common.driver, 8, 0x3000)
      driver.write(Driver.Common.device, 8, 0x5000)
      driver.write(offset, 8, address)
      driver.write(Driver.Common.queueEnable, 2, 1)
      driver.write(Driver.Common.status, 1, 0xf)
      #expect(driver.status & 64 != 0)
      #expect(
        bench.faults.all == ["disk0: queue 0: \(error); the device stops until the guest's driver resets it"])
    }
  }

  private static let seeds: [UInt64] = {
    let more = ProcessInfo.processInfo.environment["VIRTIO_SEEDS"].flatMap { Int($0) } ?? 0
    return [1, 2, 3, 4] + (0..<more).map { _ in UInt64.random(in: 5..<1 << 32) }
  }()

  /// Memory and registers full of nonsense while the device runs: it never traps, and works after a reset.
  @Test(arguments: seeds) func nonsenseNeverTraps(seed: UInt64) throws {
    var random = SeededGenerator(seed: seed)
    var broken = 0
    for way in Driver.Way.all {
      let bench = try Bench(way, queues: 2)
      for _ in 0..<6 {
        bench.driver.releaseMemory(to: 0x1000)
        try bench.driver.start()
        for _ in 0..<40 {
          for queue in bench.driver.queues { try scribble(bench, queue, &random) }
          bench.driver.notify(Int.random(in: 0..<2, using: &random))
          if Int.random(in: 0..<10, using: &random) == 0 {
            bench.pci.write(
              offset: UInt64.random(in: 0..<60, using: &random), size: [1, 2, 4, 8].randomElement(using: &random) ?? 1,
              value: random.next() & 0xff)
          }
        }
        bench.onThread {}
        if bench.driver.status & 64 != 0 { broken += 1 }
      }
      bench.driver.releaseMemory(to: 0x1000)
      try bench.driver.start()
      #expect(try bench.driver.request(0, sector: 5, room: 512)?.status == 0, "seed \(seed), \(way)")
    }
    #expect(broken > 10, "seed \(seed): nonsense that broke nothing")
  }

  /// Writes descriptors and indices that are nearly right.
  private func scribble(_ bench: Bench, _ queue: DriverQueue, _ random: inout SeededGenerator) throws {
    let places = [queue.descriptors, queue.driverArea, queue.deviceArea, 0x1000, 0x8000]
    for _ in 0..<6 {
      let entry = queue.descriptors + UInt64.random(in: 0..<16, using: &random) * 16
      let addresses = places + [UInt64.random(in: 0..<1 << 20, using: &random), (4 << 30) + 0xfff0, random.next()]
      try bench.driver.store(addresses.randomElement(using: &random) ?? 0, at: entry)
      let lengths: [UInt32] = [0, 1, 15, 16, 48, 512, 4096, .max, UInt32.random(in: 0...(.max), using: &random)]
      try bench.driver.store(lengths.randomElement(using: &random) ?? 0, at: entry + 8)
      try bench.driver.store(UInt16.random(in: 0..<20, using: &random), at: entry + 12)
      try bench.driver.store(UInt16.random(in: 0...(.max), using: &random) & 0x8087, at: entry + 14)
    }
    if !bench.driver.way.isPacked {
      let entry = UInt64.random(in: 0..<16, using: &random)
      try bench.driver.store(UInt16.random(in: 0..<20, using: &random), at: queue.driverArea + 4 + entry * 2)
      let index: UInt16 = try bench.driver.load(queue.driverArea + 2)
      try bench.driver.store(index &+ UInt16.random(in: 0..<3, using: &random), at: queue.driverArea + 2)
    }
  }
}
