import Accelerator
import Glibc
import GuestMemory
import Host
import StateTree
import TestGuests
import Testing

/// Whole states, moved into fresh machines.
@Suite struct States {
  /// MSRs that go on by themselves: the time-stamp counter, its offset from it, and the deadline against it.
  private static let running: Set<UInt32> = [0x10, 0x3b, 0x6e0]
  /// The local APIC's current count, likewise.
  private static let currentCount = 0x390..<0x394

  /// The state without what goes on by itself.
  private static func still(_ state: VCPUState) -> VCPUState {
    var state = state
    state.modelSpecific.removeAll { running.contains($0.index) }
    if !state.localAPIC.isEmpty { for byte in currentCount { state.localAPIC[byte] = 0 } }
    return state
  }

  /// A fresh machine with the RAM, controllers and processors of `machine`, by way of encoded nodes.
  private func moved(_ machine: TestMachine, _ subject: AcceleratorUnderTest) throws -> TestMachine {
    let other = try TestMachine(subject, vcpus: machine.vcpus.count)
    for (from, to) in zip(machine.memory.regions, other.memory.regions) {
      to.hostBase.copyMemory(from: from.hostBase, byteCount: Int(from.range.size))
    }
    let saved = try StateNode(decoding: machine.machine.save().encoded())
    try other.machine.restore(saved)
    for (index, vcpu) in machine.vcpus.enumerated() {
      let state = try vcpu.readState()
      let node = try StateNode(decoding: state.node(index: index).encoded())
      try other.vcpus[index].writeState(VCPUState(node, index: index))
    }
    return other
  }

  private struct Result: Equatable {
    var registers: GeneralRegisters
    var memory: [UInt8]
    /// XMM, and the upper halves of YMM in the standard layout (SDM vol. 1, 13.4).
    var vectors: [UInt8]
    var stops = 0
  }

  /// Runs a loop of `iterations` to its end. It stops 16 times by itself; with `moves` it is moved to a fresh machine
  /// each time, and also wherever a kick from another thread catches it: where that is must not matter.
  private func compute(
    _ subject: AcceleratorUnderTest, _ guest: String, _ mode: TestMachine.Mode, iterations: UInt64, moves: Bool
  ) throws -> Result {
    var machine = try TestMachine(subject)
    try machine.start(guest, mode) {
      $0.rdi = TestMachine.data
      $0.rcx = iterations
      $0.r8 = iterations / 16 - 1
      $0.rax = 12345
    }
    var stops = 0
    var kicks: UInt32 = 0
    while true {
      let vcpu = machine.vcpu
      let delay = kicks % 20 * 100
      let kicker =
        try moves
        ? HostThread(name: "kicker") {
          usleep(delay)
          vcpu.kick()
        } : nil
      let event = try machine.next()
      kicker?.join()
      switch event {
      case .ready: stops += 1
      case .interrupted where moves: kicks += 1
      default:
        #expect(event == .done)
        let extended = try machine.vcpu.readState().extended
        return Result(
          registers: try machine.vcpu.readRegisters(),
          memory: try machine.memory.bytes(.init(TestMachine.data), count: 0x3000),
          vectors: Array(extended[160..<416] + extended[576..<832]), stops: stops)
      }
      guard moves, kicks < 20 || event == .ready else { continue }
      #expect(try machine.complete() == [])
      machine = try moved(machine, subject)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func moveSixteenTimesInALoop(_ subject: AcceleratorUnderTest) throws {
    let reference = try compute(subject, "compute", .long, iterations: 8192, moves: false)
    #expect(reference.stops == 16)
    #expect(try compute(subject, "compute", .long, iterations: 8192, moves: true) == reference)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func moveSixteenTimesInAVectorLoop(_ subject: AcceleratorUnderTest) throws {
    let accelerator = try subject.accelerator([])
    let leaves = try accelerator.supportedCPUID()
    // Where ring 0 is emulated, the leaves leave out what ring 3 has of the processor itself.
    let hasOwn = !accelerator.capabilities.contains(.nativeRing0) && test_processor_has_avx2() != 0
    guard
      leaves.contains(where: { $0.function == 0xd && $0.index == 0 && $0.eax & 4 != 0 }),
      hasOwn || leaves.contains(where: { $0.function == 7 && $0.index == 0 && $0.ebx & 1 << 5 != 0 })
    else { try subject.skip("the processor has no AVX2") }
    let iterations: UInt64 = 1 << 18
    let reference = try compute(subject, "computevectors", .user, iterations: iterations, moves: false)
    #expect(reference.stops == 16)
    #expect(try compute(subject, "computevectors", .user, iterations: iterations, moves: true) == reference)
    // x87 counted the iterations.
    #expect(reference.memory[0x2040..<0x2048].reversed().reduce(0) { $0 << 8 | UInt64($1) } == iterations)
  }

  /// A program's breakpoint comes exactly once, wherever the machine is moved.
  @Test(arguments: AcceleratorUnderTest.catalogue)
  func moveWithBreakpoints(_ subject: AcceleratorUnderTest) throws {
    var machine = try TestMachine(subject)
    let count: UInt64 = 20_000
    try machine.setHandler(3, "handler_breakpoint", isForUsers: true)
    try machine.start("breakpoints", .user) {
      $0.rdi = TestMachine.data
      $0.rax = 0
      $0.rcx = count
    }
    var moves: UInt32 = 0
    // The first comes before the run, so that there is one.
    machine.vcpu.kick()
    while true {
      let vcpu = machine.vcpu
      let delay = moves % 50
      let kicker =
        (1..<200).contains(moves)
        ? try HostThread(name: "kicker") {
          usleep(delay)
          vcpu.kick()
        } : nil
      let event = try machine.next()
      kicker?.join()
      guard event == .interrupted else {
        #expect(event == .done)
        break
      }
      moves += 1
      machine = try moved(machine, subject)
    }
    #expect(moves > 0)
    #expect(try machine.vcpu.readRegisters().rax == count)
    let handled = try machine.read(TestMachine.data, as: UInt64.self)
    #expect(handled == count, "after \(moves) moves")
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func areReadAsTheyWereWritten(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.start("spin") { general in
      for (number, path) in GeneralRegisters.fields.prefix(16).enumerated() {
        general[keyPath: path] = 0x0101_0101_0101_0101 &* UInt64(number + 1)
      }
    }
    var state = try machine.vcpu.readState()
    let values: [UInt32: UInt64] = [
      0xc000_0081: 0x0023_0010_0000_0000, 0xc000_0082: 0xffff_ffff_8000_1000, 0xc000_0084: 0x4_7700,
      0xc000_0102: 0x1234_5678_9abc, 0x174: 8, 0x175: 0x7ff0, 0x176: 0x9000, 0x277: 0x0007_0406_0007_0406,
    ]
    for index in state.modelSpecific.indices {
      if let value = values[state.modelSpecific[index].index] { state.modelSpecific[index].value = value }
    }
    #expect(state.modelSpecific.count { values.keys.contains($0.index) } >= 7)
    state.system.fs.base = 0x1111_2000
    state.system.gs.base = 0x3333_4000
    state.system.cr2 = 0xdead_b000
    state.system.cr8 = 5
    // The same register as the local APIC shows it (SDM vol. 3, 11.8.3.1).
    if !state.localAPIC.isEmpty { state.localAPIC[0x80] = 5 << 4 }
    state.debug.addresses = [0x1000, 0x2000, 0x3000, 0x4000]
    state.debug.dr6 = 0xffff_4ff1
    for byte in 160..<416 { state.extended[byte] = UInt8(truncatingIfNeeded: byte &* 7) }
    for byte in 576..<832 where state.xcr0 & 4 != 0 { state.extended[byte] = UInt8(truncatingIfNeeded: byte &* 5) }
    state.extended[512] = UInt8(state.xcr0)
    try machine.vcpu.writeState(state)
    let first = try machine.vcpu.readState()
    #expect(first.general == state.general)
    #expect(first.system == state.system)
    #expect(first.debug == state.debug)
    #expect(first.extended == state.extended)
    #expect(first.xcr0 == state.xcr0)
    #expect(Self.still(first).modelSpecific == Self.still(state).modelSpecific)
    // And again in a fresh machine: nothing hangs on what the first went through.
    let other = try moved(machine, subject)
    #expect(try Self.still(other.vcpu.readState()) == Self.still(first))
  }

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func keepATimerThatRuns(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.setHandler(0x30, "handler_apic")
    try machine.start("timer") { $0.rdi = 20_000_000 }
    #expect(try machine.next() == .ready)
    #expect(try machine.complete() == [])
    let other = try moved(machine, subject)
    #expect(try other.next() == .handled)
  }

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func keepAnInterruptThatIsPending(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.setHandler(0x31, "handler_apic")
    try machine.start("apic")
    #expect(try machine.next() == .ready)
    try machine.machine.signalMSI(address: Interrupts.messageAddress, data: Interrupts.messageData)
    #expect(try machine.complete() == [])
    let other = try moved(machine, subject)
    #expect(try other.next() == .handled)
  }

  @Test(arguments: AcceleratorUnderTest.withoutController)
  func keepAnInterruptThatWasInjected(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.setHandler(0x31, "handler")
    try machine.start("window")
    #expect(try machine.next() == .ready)
    machine.vcpu.requestInterruptWindow(true)
    #expect(try machine.next() == .interruptWindow)
    machine.vcpu.requestInterruptWindow(false)
    // Delivered to no one yet: the state has it.
    if subject.interrupts == .userSpace {
      try machine.vcpu.injectInterrupt(vector: 0x31)
      #expect(try machine.vcpu.readState().events.interruptInjected)
      let other = try moved(machine, subject)
      #expect(try other.next() == .handled)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func keepAnNMI(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.setHandler(2, "handler")
    try machine.start("spin")
    try machine.vcpu.injectNMI()
    let other = try moved(machine, subject)
    #expect(try other.next() == .handled)
  }

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func keepASecondProcessorThatSleeps(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, vcpus: 2)
    try machine.setHandler(0x31, "handler_apic")
    try machine.start("apic", processor: 1)
    #expect(try machine.next(1) == .ready)
    try #require(machine.kickOutOf(1) { try $0.readState().activity == .halted })
    let other = try moved(machine, subject)
    #expect(try other.vcpus[1].readState().activity == .halted)
    #expect(try other.vcpus[0].readState().activity == .runnable)
    try other.machine.signalMSI(address: Interrupts.messageAddress | 1 << 12, data: Interrupts.messageData)
    #expect(try other.next(1) == .handled)
  }

  // MARK: The machine's part

  @Test(arguments: AcceleratorUnderTest.withController)
  func keepTheControllers(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    // The guest has programmed the PIC, the IOAPIC and the PIT; what is restored works as they were.
    try machine.runToEnd("pit")
    try machine.start("pic")
    #expect(try machine.next() == .ready)
    try machine.start("ioapic") { $0.rdi = 0x31 }
    #expect(try machine.next() == .ready)
    #expect(try machine.complete() == [])

    let other = try moved(machine, subject)
    try other.setHandler(0x24, "handler_pic")
    try other.setHandler(0x31, "handler_apic")
    try other.start("wait")
    #expect(try other.next() == .ready)
    for line in [4, 20] as [UInt32] {
      try other.machine.setInterruptLine(line, level: true)
      try other.machine.setInterruptLine(line, level: false)
      #expect(try other.next() == .handled)
    }
    try other.runToEnd("pitstatus")
    // Counter 0: loaded, both bytes, mode 2 (8254 data sheet, read-back command); OUT is in bit 7.
    #expect(try other.vcpu.readRegisters().rax & 0x7f == 0x34)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func keepTheClock(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    let hour: UInt64 = 3_600_000_000_000
    try machine.machine.writeClock(hour)
    #expect(try machine.machine.readClock() >= hour)
    let other = try moved(machine, subject)
    #expect(try other.machine.readClock() >= hour)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func refuseOtherBytes(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    let node = try machine.machine.save()
    for length in 0..<node.payload.count {
      var short = node
      short.payload = Array(node.payload.prefix(length))
      #expect(throws: AcceleratorError.self) { try machine.machine.restore(short) }
    }
    var other = node
    other.version = 99
    #expect(throws: AcceleratorError.self) { try machine.machine.restore(other) }
    other = node
    other.name = "other"
    #expect(throws: AcceleratorError.self) { try machine.machine.restore(other) }
    other = node
    other.payload.append(0)
    #expect(throws: AcceleratorError.self) { try machine.machine.restore(other) }
    try machine.machine.restore(node)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func refusePartsOfOtherSizes(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    let state = try machine.vcpu.readState()
    var other = state
    other.extended += [UInt8](repeating: 0, count: 64)
    #expect(throws: AcceleratorError.self) { try machine.vcpu.writeState(other) }
    other = state
    other.extended[520] = 0xff
    #expect(throws: AcceleratorError.self) { try machine.vcpu.writeState(other) }
    if !state.localAPIC.isEmpty {
      other = state
      other.localAPIC.removeLast()
      #expect(throws: AcceleratorError.self) { try machine.vcpu.writeState(other) }
    }
    other = state
    other.system.cr0 = .max
    #expect(throws: AcceleratorError.self) { try machine.vcpu.writeState(other) }
    other = state
    other.modelSpecific = [ModelSpecificRegister(index: 0xdead, value: 1)]
    #expect(throws: AcceleratorError.modelSpecificRegister(index: 0xdead, write: true)) {
      try machine.vcpu.writeState(other)
    }
    // One that is 0 says as much as one that is not there.
    other.modelSpecific[0].value = 0
    try machine.vcpu.writeState(other)
    try machine.vcpu.writeState(state)
  }
}
