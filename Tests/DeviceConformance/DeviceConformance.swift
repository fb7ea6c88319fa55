import DeviceModel
import DeviceTesting
import Foundation
import PlatformDevices
import StateTree
import Testing

/// Fixed seeds; for a long run DEVICE_SEEDS random ones too. A failure names its seed.
private let seeds: [UInt64] = {
  let count = ProcessInfo.processInfo.environment["DEVICE_SEEDS"].flatMap { Int($0) } ?? 0
  return [1, 2, 3, 4] + (0..<count).map { _ in UInt64.random(in: 5..<1 << 32) }
}()

/// A guest that accesses a device without sense; the same seed makes the same accesses.
private struct WildGuest {
  var random: SeededGenerator

  init(seed: UInt64) {
    random = SeededGenerator(seed: seed)
  }

  /// Accesses, and time in between; the values read.
  @discardableResult
  mutating func disturb(_ subject: Subject, _ clock: ManualClock, accesses: Int) -> [UInt64] {
    var reads: [UInt64] = []
    for _ in 0..<accesses {
      guard let door = subject.doors.randomElement(using: &random) else { return [] }
      // Registers crowd at the start of a large window; the last bytes are where an access can run over the end.
      let reach = min(door.size, Bool.random(using: &random) ? 64 : door.size)
      var start = UInt64.random(in: 0..<reach, using: &random)
      if UInt64.random(in: 0..<8, using: &random) == 0 { start = door.size - 1 - min(start, door.size - 1) }
      let size = [1, 2, 4, 8][Int.random(in: 0..<4, using: &random)]
      switch UInt64.random(in: 0..<20, using: &random) {
      case 0: clock.advance(by: UInt64.random(in: 0..<3_000_000, using: &random))
      case 1...10: door.target.write(offset: door.offset + start, size: size, value: value(size))
      default: reads.append(door.target.read(offset: door.offset + start, size: size) & mask(size))
      }
    }
    return reads
  }

  private func mask(_ size: Int) -> UInt64 { size == 8 ? ~0 : (1 << UInt64(size * 8)) - 1 }

  private mutating func value(_ size: Int) -> UInt64 {
    let value =
      switch UInt64.random(in: 0..<4, using: &random) {
      case 0: UInt64.random(in: 0..<256, using: &random)
      case 1: UInt64(1) << UInt64.random(in: 0..<64, using: &random)
      case 2: ~UInt64(0)
      default: random.next()
      }
    return value & mask(size)
  }
}

@Suite struct DeviceConformance {
  @Test(arguments: catalogue, seeds)
  func restoreUndoesADisturbance(_ entry: CatalogueEntry, seed: UInt64) throws {
    var guest = WildGuest(seed: seed)
    let fixture = try Fixture()
    let subject = try entry.subject(fixture)
    let device = subject.device
    guest.disturb(subject, fixture.clock, accesses: 500)
    let saved = device.save()
    guest.disturb(subject, fixture.clock, accesses: 500)
    try device.restore(saved)
    #expect(device.save() == saved, "seed \(seed)")
    #expect(saved.name == device.name)
    #expect(try StateNode(decoding: saved.encoded()) == saved)
  }

  @Test(arguments: catalogue, seeds)
  func aRestoredTwinBehavesTheSame(_ entry: CatalogueEntry, seed: UInt64) throws {
    var guest = WildGuest(seed: seed)
    let fixture = try Fixture()
    let subject = try entry.subject(fixture)
    let device = subject.device
    guest.disturb(subject, fixture.clock, accesses: 500)
    let twinFixture = try Fixture(now: fixture.clock.now())
    let twinSubject = try entry.subject(twinFixture)
    let twin = twinSubject.device
    try twin.restore(device.save())
    // DMA may have changed one RAM and not the other, and the devices' requests and output only come after.
    _ = fixture.machine.take()
    _ = fixture.sink.takeMessages()
    var again = guest
    let reads = guest.disturb(subject, fixture.clock, accesses: 500)
    let twinReads = again.disturb(twinSubject, twinFixture.clock, accesses: 500)
    #expect(reads == twinReads, "seed \(seed)")
    #expect(device.save() == twin.save(), "seed \(seed)")
    #expect(fixture.machine.take() == twinFixture.machine.take(), "seed \(seed)")
    #expect(fixture.sink.takeMessages() == twinFixture.sink.takeMessages(), "seed \(seed)")
    for gsi in UInt32(0)..<24 { #expect(fixture.sink.isHigh(gsi) == twinFixture.sink.isHigh(gsi), "seed \(seed)") }
  }

  @Test(arguments: catalogue, seeds)
  func resetEqualsFresh(_ entry: CatalogueEntry, seed: UInt64) throws {
    var guest = WildGuest(seed: seed)
    let fixture = try Fixture()
    let subject = try entry.subject(fixture)
    let device = subject.device
    guest.disturb(subject, fixture.clock, accesses: 500)
    device.reset()
    let saved = device.save()
    for gsi in UInt32(0)..<24 { #expect(!fixture.sink.isHigh(gsi), "seed \(seed)") }
    if entry.survivesReset {
      device.reset()
      #expect(device.save() == saved, "seed \(seed)")
    } else {
      let fresh = try entry.subject(Fixture(now: fixture.clock.now())).device
      #expect(saved == fresh.save(), "seed \(seed)")
    }
  }

  @Test(arguments: catalogue, seeds)
  func aWrongNodeIsRefusedAndChangesNothing(_ entry: CatalogueEntry, seed: UInt64) throws {
    var guest = WildGuest(seed: seed)
    let fixture = try Fixture()
    let subject = try entry.subject(fixture)
    let device = subject.device
    guest.disturb(subject, fixture.clock, accesses: 500)
    let good = device.save()
    guest.disturb(subject, fixture.clock, accesses: 500)
    let present = device.save()
    var wrong = [StateNode("another", version: good.version, children: good.children)]
    wrong.append(good)
    wrong[1].version = .max
    wrong.append(good)
    wrong[2].payload.append(0)
    let length = good.payload.count
    for count in Set((0..<length).filter { $0 < 64 || $0 > length - 64 || $0 % 61 == 0 }) {
      var node = good
      node.payload.removeLast(length - count)
      wrong.append(node)
    }
    for node in wrong {
      #expect(throws: StateError.self, "seed \(seed), \(node.payload.count) bytes") { try device.restore(node) }
      #expect(device.save() == present, "seed \(seed)")
    }
  }

  @Test(arguments: catalogue, seeds)
  func garbageIsRefusedOrHarmless(_ entry: CatalogueEntry, seed: UInt64) throws {
    var guest = WildGuest(seed: seed)
    let fixture = try Fixture()
    let subject = try entry.subject(fixture)
    let device = subject.device
    for _ in 0..<50 {
      guest.disturb(subject, fixture.clock, accesses: 20)
      var node = device.save()
      garble(&node, &guest.random)
      let present = device.save()
      do throws(StateError) {
        try device.restore(node)
      } catch {
        #expect(device.save() == present, "seed \(seed)")
      }
      guest.disturb(subject, fixture.clock, accesses: 100)
      #expect(device.save().name == device.name)
    }
  }

  private func garble(_ node: inout StateNode, _ random: inout SeededGenerator) {
    for index in node.payload.indices where UInt64.random(in: 0..<8, using: &random) == 0 {
      node.payload[index] = UInt8.random(in: 0...255, using: &random)
    }
    for index in node.children.indices { garble(&node.children[index], &random) }
  }
}
