import Accelerator
import DeviceModel
import DeviceTesting
import PlatformDevices
import StateTree
import Synchronization
import Testing

/// Four local APICs on a bus with a PIC and an IOAPIC, as a PC has them.
struct LocalAPICFixture {
  let clock = ManualClock()
  let bus: LocalAPICBus
  let pic: PIC
  let ioapic: IOAPIC
  let wakes = Wakes()

  final class Wakes: Sendable {
    private let counts = Mutex([Int](repeating: 0, count: 256))
    func add(_ vcpu: Int) { counts.withLock { $0[vcpu] += 1 } }
    subscript(vcpu: Int) -> Int { counts.withLock { $0[vcpu] } }
  }

  /// The time-stamp counter runs at 2 GHz.
  init(count: Int = 4, features: LocalAPIC.Features = [.x2APIC, .timestampDeadline]) {
    bus = LocalAPICBus(
      count: count, features: features, clock: clock,
      untilTimestamp: { [clock] in $1 / 2 > clock.now() ? $1 / 2 - clock.now() : 0 },
      wake: { [wakes] in wakes.add($0) })
    pic = PIC(pin: bus)
    ioapic = IOAPIC(output: bus)
    bus.connect(pic: pic, ioapic: ioapic)
  }

  subscript(index: Int) -> LocalAPIC { bus.locals[index] }

  /// Sets a local APIC's enable bit, as every kernel does first.
  func enable() {
    for local in bus.locals { local.write(register: 0xf0, value: 0x1ff) }
  }

  func enableX2APIC() {
    for local in bus.locals { #expect(local.writeMSR(0x1b, value: local.readMSR(0x1b)! | 0x400)) }
    for local in bus.locals { #expect(local.writeMSR(0x80f, value: 0x1ff)) }
  }

  /// The vectors that each vCPU would take now, one after another with their ends.
  func take() -> [[UInt8]] {
    bus.locals.map { local in
      var vectors: [UInt8] = []
      while local.hasInterrupt, let vector = local.acknowledgeInterrupt() {
        vectors.append(vector)
        local.write(register: 0xb0, value: 0)
      }
      return vectors
    }
  }

  /// The bits of a 256-bit register.
  func vectors(_ register: UInt16, of index: Int = 0) -> [UInt8] {
    (0..<256).filter { vector in
      self[index].read(register: register + UInt16(vector / 32) * 16) >> UInt32(vector % 32) & 1 == 1
    }.map { UInt8($0) }
  }
}

@Suite struct LocalAPICTests {
  private let fixture = LocalAPICFixture()
  private var local: LocalAPIC { fixture[0] }

  private func send(_ low: UInt32, to destination: UInt32 = 0, from index: Int = 0) {
    fixture[index].write(register: 0x310, value: destination << 24)
    fixture[index].write(register: 0x300, value: low)
  }

  @Test func stateAfterReset() {
    #expect(local.readMSR(0x1b) == 0xfee0_0900 && fixture[1].readMSR(0x1b) == 0xfee0_0800)
    #expect(local.registerPage == 0xfee0_0000)
    #expect(fixture[3].read(register: 0x20) == 3 << 24)
    #expect(local.read(register: 0x30) == 0x0105_0014)
    #expect(local.read(register: 0xe0) == 0xffff_ffff)
    #expect(local.read(register: 0xf0) == 0xff)
    // Virtual wire on the boot processor alone.
    #expect(local.read(register: 0x350) == 0x700 && fixture[1].read(register: 0x350) == 0x1_0000)
    for offset: UInt16 in [0x320, 0x330, 0x340, 0x360, 0x370] { #expect(local.read(register: offset) == 0x1_0000) }
    #expect(!local.hasInterrupt && local.acknowledgeInterrupt() == nil)
  }

  @Test func onlyWholeRegistersAreWritten() {
    local.write(offset: 0x80, size: 4, value: 0x50)
    local.write(offset: 0x80, size: 1, value: 0x60)
    local.write(offset: 0x82, size: 4, value: 0x60)
    local.write(offset: 0x80, size: 8, value: 0x60)
    #expect(local.read(offset: 0x80, size: 4) == 0x50)
    #expect(local.read(offset: 0x80, size: 1) & 0xff == 0x50)
    #expect(fixture[2].read(offset: 0x23, size: 1) & 0xff == 2)
    #expect(local.read(offset: 0x82, size: 4) == ~0 && local.read(offset: 0x400, size: 4) == ~0)
  }

  @Test func theTaskPriorityHoldsInterruptsBack() {
    fixture.enable()
    local.taskPriority = 5
    #expect(local.read(register: 0x80) == 0x50 && local.read(register: 0xa0) == 0x50)
    send(0x4_0051)
    #expect(!local.hasInterrupt && fixture.vectors(0x200) == [0x51])
    send(0x4_0061)
    #expect(local.hasInterrupt && local.acknowledgeInterrupt() == 0x61)
    #expect(fixture.vectors(0x200) == [0x51] && fixture.vectors(0x100) == [0x61])
    #expect(local.read(register: 0xa0) == 0x60)
    // The one in service has the higher class now.
    local.write(register: 0x80, value: 0)
    #expect(local.read(register: 0xa0) == 0x60 && !local.hasInterrupt)
    send(0x4_006f)
    #expect(!local.hasInterrupt)
    local.write(register: 0xb0, value: 0)
    #expect(local.read(register: 0xa0) == 0)
    #expect(fixture.take()[0] == [0x6f, 0x51])
    local.write(register: 0x80, value: 0x2f)
    #expect(local.taskPriority == 2 && local.read(register: 0xa0) == 0x2f)
  }

  @Test func becomingDeliverableWakes() {
    fixture.enable()
    local.taskPriority = 15
    let before = fixture.wakes[0]
    send(0x4_0051)
    #expect(fixture.wakes[0] == before)
    local.taskPriority = 0
    #expect(fixture.wakes[0] == before + 1)
    // One that is already on its way is not told again.
    send(0x4_0061)
    #expect(fixture.wakes[0] == before + 1)
    #expect(fixture.take()[0] == [0x61, 0x51])
    send(0x31, to: 2)
    #expect(fixture.wakes[2] == 1)
  }

  @Test func vectorsBelow16AreErrors() {
    fixture.enable()
    local.write(register: 0x370, value: 0xfe)
    send(0x4_000f)
    #expect(local.read(register: 0x280) == 0)
    local.write(register: 0x280, value: 0)
    #expect(local.read(register: 0x280) == 0x20)
    #expect(fixture.take()[0] == [0xfe])
    fixture.bus.deliver(InterruptMessage(address: 0xfee0_0000, data: 0x0e))
    _ = local.read(register: 0x2c0)
    local.write(register: 0x280, value: 0)
    #expect(local.read(register: 0x280) == 0x40 | 0x80)
    local.write(register: 0x280, value: 0)
    #expect(local.read(register: 0x280) == 0)
  }

  @Test func anErrorsOwnIllegalVectorEndsThere() {
    fixture.enable()
    local.write(register: 0x370, value: 3)
    send(0x4_0001)
    local.write(register: 0x280, value: 0)
    #expect(local.read(register: 0x280) == 0x20)
  }

  @Test func softwareDisableMasksTheLocalVectors() {
    fixture.enable()
    local.write(register: 0x320, value: 0x41)
    local.write(register: 0x360, value: 0x400)
    local.write(register: 0xf0, value: 0xff)
    #expect(local.read(register: 0x320) == 0x1_0041 && local.read(register: 0x360) == 0x1_0400)
    local.write(register: 0x320, value: 0x41)
    #expect(local.read(register: 0x320) == 0x1_0041)
    // No fixed interrupts, but NMI, INIT and SIPI.
    send(0x31, to: 0, from: 1)
    #expect(!local.hasInterrupt && fixture.vectors(0x200).isEmpty)
    send(0x400, to: 0, from: 1)
    #expect(local.takeEvents() == .init(nonMaskable: true, initialize: false, startUp: nil))
  }

  @Test func twoNMIsAreKept() {
    fixture.enable()
    for _ in 0..<3 { send(0x400, to: 0, from: 1) }
    #expect(local.takeEvents() == .init(nonMaskable: true, secondNonMaskable: true))
    #expect(local.takeEvents() == .init())
    send(0x400, to: 0, from: 1)
    #expect(local.takeEvents() == .init(nonMaskable: true))
  }

  // MARK: Destinations

  @Test(
    arguments: [
      (0x31, 1, [1]), (0x31, 0xff, [0, 1, 2, 3]), (0x31, 7, []), (0x4_0031, 3, [0]), (0x8_0031, 3, [0, 1, 2, 3]),
      (0xc_0031, 3, [1, 2, 3]),
    ] as [(UInt32, UInt32, [Int])])
  func physicalDestinationsAndShorthands(_ low: UInt32, _ destination: UInt32, _ expected: [Int]) {
    fixture.enable()
    send(low, to: destination)
    #expect(fixture.take() == (0..<4).map { expected.contains($0) ? [0x31] : [] })
  }

  @Test func logicalDestinations() {
    fixture.enable()
    for index in 0..<4 { fixture[index].write(register: 0xd0, value: 1 << UInt32(24 + index)) }
    send(0x831, to: 0b1010)
    #expect(fixture.take() == [[], [0x31], [], [0x31]])
    send(0x831, to: 0xff)
    #expect(fixture.take() == [[0x31], [0x31], [0x31], [0x31]])
    // Clusters 1 and 2, two members each.
    for index in 0..<4 {
      fixture[index].write(register: 0xe0, value: 0)
      fixture[index].write(register: 0xd0, value: UInt32(index / 2 + 1) << 28 | 1 << UInt32(24 + index % 2))
    }
    #expect(local.read(register: 0xe0) == 0x0fff_ffff)
    send(0x831, to: 0x23)
    #expect(fixture.take() == [[], [], [0x31], [0x31]])
    send(0x831, to: 0x12)
    #expect(fixture.take() == [[], [0x31], [], []])
    send(0x831, to: 0xff)
    #expect(fixture.take() == [[0x31], [0x31], [0x31], [0x31]])
  }

  @Test func theLeastBusyTakesLowestPriority() {
    fixture.enable()
    for index in 0..<4 { fixture[index].write(register: 0xd0, value: 1 << UInt32(24 + index)) }
    for (index, priority) in [6, 3, 2, 9].enumerated() { fixture[index].taskPriority = UInt8(priority) }
    send(0x951 | 0x800, to: 0b1011)
    #expect(fixture.vectors(0x200, of: 1) == [0x51])
    fixture[1].write(register: 0xf0, value: 0xff)
    send(0x9a1 | 0x800, to: 0b1011)
    #expect(fixture.take() == [[0xa1], [0x51], [], []])
    // A message with the redirection hint, logical.
    fixture.bus.deliver(InterruptMessage(address: 0xfee0_f00c, data: 0x41))
    #expect(fixture.take() == [[], [], [0x41], []])
  }

  @Test func messagesToTheProcessor() {
    fixture.enable()
    send(0xc_0400)
    #expect(!local.hasEvents && fixture[1].hasEvents && !fixture[1].hasInterrupt)
    #expect(fixture[1].takeEvents() == .init(nonMaskable: true, initialize: false, startUp: nil))
    #expect(!fixture[1].hasEvents && fixture[2].takeEvents().nonMaskable)
    send(0xc500, to: 1)
    send(0x8500, to: 1)
    send(0x0699, to: 1)
    #expect(fixture[1].takeEvents() == .init(nonMaskable: false, initialize: true, startUp: 0x99))
    // INIT makes an earlier SIPI void.
    send(0x0612, to: 1)
    send(0x4500, to: 1)
    #expect(fixture[1].takeEvents() == .init(nonMaskable: false, initialize: true, startUp: nil))
    #expect(fixture.wakes[1] > 0)
    // SMI has no effect; a reserved mode neither.
    send(0x0200, to: 2)
    send(0x0331, to: 2)
    #expect(!fixture[2].hasEvents && !fixture[2].hasInterrupt)
  }

  // MARK: PIC and IOAPIC

  private func initializePIC() {
    for (port, value): (UInt64, UInt64) in [
      (0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0), (2, 0x11), (3, 0x28), (3, 2), (3, 1), (3, 0),
    ] { fixture.pic.write(offset: port, size: 1, value: value) }
  }

  @Test func thePICReachesTheBootProcessor() {
    initializePIC()
    fixture.pic.setInput(4, level: true)
    // Virtual wire works before any local APIC is enabled.
    #expect(local.hasInterrupt && !fixture[1].hasInterrupt)
    #expect(local.acknowledgeInterrupt() == 0x24)
    #expect(!local.hasInterrupt)
    fixture.pic.write(offset: 0, size: 1, value: 0x20)
    fixture.enable()
    local.write(register: 0x350, value: 0x1_0700)
    fixture.pic.setInput(5, level: true)
    #expect(!local.hasInterrupt)
    local.write(register: 0x350, value: 0x700)
    #expect(local.hasInterrupt)
    // It passes whatever the task priority is.
    local.taskPriority = 15
    #expect(local.hasInterrupt && local.acknowledgeInterrupt() == 0x25)
    fixture.pic.write(offset: 0, size: 1, value: 0x20)
    // A request that has gone gives the spurious vector, as the 8259A does.
    fixture.pic.setInput(6, level: true)
    fixture.pic.write(offset: 1, size: 1, value: 0xff)
    #expect(local.acknowledgeInterrupt() == nil && !local.hasInterrupt)
  }

  @Test func localPinWithAFixedVector() {
    initializePIC()
    fixture.enable()
    local.write(register: 0x350, value: 0x61)
    fixture.pic.setInput(3, level: true)
    #expect(fixture.take()[0] == [0x61])
    fixture.pic.write(offset: 0, size: 1, value: 0x20)
    local.write(register: 0x350, value: 0x400)
    fixture.pic.setInput(3, level: false)
    #expect(fixture.pic.acknowledge() == 0x23)
    fixture.pic.write(offset: 0, size: 1, value: 0x20)
    fixture.pic.setInput(3, level: true)
    #expect(local.takeEvents().nonMaskable)
  }

  @Test func anExternalInterruptByMessage() {
    initializePIC()
    fixture.pic.write(offset: 1, size: 1, value: 0)
    fixture.enable()
    local.write(register: 0x350, value: 0x1_0700)
    fixture.pic.setInput(7, level: true)
    send(0x700, to: 2)
    #expect(fixture[2].hasInterrupt && fixture[2].acknowledgeInterrupt() == 0x27)
    #expect(!fixture[2].hasInterrupt)
  }

  @Test func theEndOfALevelReachesTheIOAPIC() {
    fixture.enable()
    fixture.ioapic.write(offset: 0, size: 4, value: 0x23)
    fixture.ioapic.write(offset: 0x10, size: 4, value: 1 << 24)
    fixture.ioapic.write(offset: 0, size: 4, value: 0x22)
    fixture.ioapic.write(offset: 0x10, size: 4, value: 0x8051)
    fixture.ioapic.setInput(9, level: true)
    #expect(fixture.vectors(0x180, of: 1) == [0x51])
    #expect(fixture[1].acknowledgeInterrupt() == 0x51 && !fixture[1].hasInterrupt)
    fixture[1].write(register: 0xb0, value: 0)
    // Still up: it comes again.
    #expect(fixture[1].acknowledgeInterrupt() == 0x51)
    fixture.ioapic.setInput(9, level: false)
    // With broadcasts suppressed, the end takes the IOAPIC's own register.
    fixture[1].write(register: 0xf0, value: 0x11ff)
    fixture[1].write(register: 0xb0, value: 0)
    fixture.ioapic.setInput(9, level: true)
    #expect(!fixture[1].hasInterrupt)
    fixture.ioapic.write(offset: 0x40, size: 4, value: 0x51)
    #expect(fixture[1].hasInterrupt)
    // The same vector as an edge has no end.
    _ = fixture[1].acknowledgeInterrupt()
    fixture.bus.deliver(InterruptMessage(address: 0xfee0_1000, data: 0x51))
    #expect(fixture.vectors(0x180, of: 1).isEmpty)
  }

  @Test func threadsPostWhileTheProcessorTakes() async {
    fixture.enable()
    let (fixture, rounds) = (fixture, 20_000)
    let taken = await withTaskGroup(of: Int.self) { group in
      for thread in 0..<2 {
        group.addTask {
          for round in 0..<rounds {
            let vector = UInt32(0x20 + thread * 0x60 + round % 0x60)
            fixture.bus.deliver(InterruptMessage(address: 0xfee0_0000, data: vector))
          }
          return 0
        }
      }
      group.addTask {
        var count = 0
        for round in 0..<rounds {
          fixture[0].taskPriority = round % 3 == 0 ? 8 : 0
          if fixture[0].hasInterrupt, fixture[0].acknowledgeInterrupt() != nil {
            count += 1
            fixture[0].write(register: 0xb0, value: 0)
          }
        }
        return count
      }
      return await group.reduce(0, +)
    }
    fixture[0].taskPriority = 0
    let last = fixture.take()[0]
    #expect(taken + last.count <= 2 * rounds && taken + last.count > 0)
    // Nothing is left that nobody was told of.
    #expect(fixture.vectors(0x200).isEmpty && fixture.vectors(0x100).isEmpty && !fixture[0].hasInterrupt)
  }
}
