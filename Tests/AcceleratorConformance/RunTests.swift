import Accelerator
import Glibc
import GuestMemory
import Host
import Synchronization
import Testing

/// Modes, ways to stop, and kicks.
@Suite struct Runs {
  @Test(arguments: AcceleratorUnderTest.catalogue)
  func everyMode(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.runToEnd("real", .real)
    #expect(try machine.read(0x1_0010, as: UInt16.self) == 0x1234)
    #expect(try machine.vcpu.readRegisters().rax & 0xffff == 0)
    try machine.runToEnd("protected", .protected)
    #expect(try machine.read(TestMachine.data, as: UInt32.self) == 0x1234_5678)
    #expect(try machine.vcpu.readRegisters().rax == 0x1234_5678)
    for mode in Accesses.rings {
      try machine.runToEnd("long", mode)
      #expect(try machine.vcpu.readRegisters().rax == 0x9abc_def0_1234_5678)
    }
    #expect(try machine.vcpu.readSystemRegisters().cs.selector == 0x2b)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func floatingPointInRing3(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.runToEnd("floating", .user) { $0.rdi = TestMachine.data }
    let registers = try machine.vcpu.readRegisters()
    #expect(registers.rbx == 36)
    #expect(registers.rax == 2)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func exceptionsInTheGuest(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    try machine.setHandler(6, "handler")
    try machine.start("undefined", mode)
    #expect(try machine.next() == .handled)
    #expect(try machine.vcpu.readSystemRegisters().cs.selector == 8)
    // The frame that the processor pushed (SDM vol. 3, 6.14.2): RIP and CS of the instruction.
    let stack = try machine.vcpu.readRegisters().rsp
    #expect(try machine.read(stack, as: UInt64.self) == TestMachine.entry)
    #expect(try machine.read(stack + 8, as: UInt64.self) == (mode == .user ? 0x2b : 8))
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func codeThatAnotherProcessorChanges(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject, vcpus: 2)
    let rounds: UInt64 = 2000
    try machine.start("callchangedcode", mode, processor: 1) {
      $0.rip = 0x9000
      $0.rsp = 0x7000
      $0.rdi = rounds
    }
    try machine.load("callchangedcode", at: 0x9000)
    try machine.start("changecode", mode) { $0.rdi = rounds }
    let caller = machine.vcpus[1]
    let events = Condition<[GuestEvent]>([])
    let thread = try HostThread(name: "processor 1") {
      let event = (try? caller.run()).map { GuestEvent($0, answer: []) } ?? .other("an error")
      events.withLock { $0.append(event) }
    }
    #expect(try machine.next() == .done)
    thread.join()
    #expect(events.withLock { $0 } == [.done])
    let state = try caller.readState()
    #expect(state.general.r9 == rounds)
    #expect(state.general.r8 == 0)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func tripleFaults(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.start("undefined")
    var system = try machine.vcpu.readSystemRegisters()
    system.idt.limit = 0
    try machine.vcpu.writeSystemRegisters(system)
    #expect(try machine.next() == .tripleFault)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func instructionsThatNotEveryRing0Has(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    let isNative = machine.accelerator.capabilities.contains(.nativeRing0)
    for (guest, code) in [
      ("popcount", [0xf3, 0x48, 0x0f, 0xb8, 0xca]), ("exchange16", [0xf0, 0x48, 0x0f, 0xc7, 0x0f]),
    ] as [(String, [UInt8])] {
      try machine.start(guest) {
        $0.rdi = TestMachine.data
        $0.rdx = 0xff
      }
      let before = try machine.vcpu.readRegisters()
      let event = try machine.next()
      if case .cannotExecute(let bytes) = event, !isNative {
        #expect(bytes.starts(with: code))
        #expect(try machine.vcpu.readRegisters() == before)
      } else {
        #expect(event == .done)
        if guest == "popcount" { #expect(try machine.vcpu.readRegisters().rcx == 8) }
      }
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func fetchesFromAnAbsentPage(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    try machine.start("jump", mode) { $0.rdi = TestMachine.hole }
    switch try machine.next() {
    case .cannotExecute, .memoryFault(TestMachine.hole): break
    case let event: Issue.record("\(event)")
    }
    #expect(try machine.vcpu.readRegisters().rip == TestMachine.hole)
    // With the page there it goes on.
    try machine.load("long", at: 0x2000_0000)
    try machine.machine.setMemorySlot(
      MemorySlot(number: 2, range: TestMachine.range(TestMachine.hole, 0x1000), hostBase: machine.spare))
    #expect(try machine.next() == .done)
    #expect(try machine.vcpu.readRegisters().rax == 0x9abc_def0_1234_5678)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func halts(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.start("halt")
    guard subject.interrupts != .userSpace else {
      #expect(try machine.next() == .halt)
      #expect(try machine.vcpu.readRegisters().rip == TestMachine.entry + 1)
      #expect(try machine.next() == .done)
      return
    }
    try #require(machine.kickOutOf(0) { try $0.readRegisters().rip == TestMachine.entry + 1 })
    #expect(try machine.vcpu.readState().activity == .halted)
  }

  // MARK: Kicks

  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func kicksBeforeARun(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    try machine.start("long", mode)
    machine.vcpu.kick()
    #expect(try machine.next() == .interrupted)
    #expect(try machine.vcpu.readRegisters().rip == TestMachine.entry)
    // A second kick is not lost in what completes the exit before it.
    machine.vcpu.kick()
    #expect(try machine.complete() == [])
    #expect(try machine.next() == .interrupted)
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func kicksAfterAnAccess(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.start("in4") { $0.rdx = 0x234 }
    #expect(try machine.next(answer: [1, 2, 3, 4]) == .input(port: 0x234, size: 4, count: 1))
    machine.vcpu.kick()
    #expect(try machine.next() == .interrupted)
    #expect(try machine.vcpu.readRegisters().rax == 0x0403_0201)
    #expect(try machine.next() == .done)
  }

  /// Ten thousand kicks from another thread at a guest that runs; the last thread gets half of them, as a machine that
  /// was paused may run its vCPU on another.
  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func noKickIsLost(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    try machine.start("spin", mode)
    let vcpu = machine.vcpu
    let answered = Condition(0)
    let rounds = 5000
    let kicker = try HostThread(name: "kicker") {
      for round in 0..<2 * rounds {
        answered.wait { $0 >= round ? () : nil }
        vcpu.kick()
      }
    }
    var others = 0
    for thread in 0..<2 {
      let unexpected = Mutex(0)
      let runner = try HostThread(name: "runner") {
        for round in 0..<rounds {
          guard case .interrupted? = try? vcpu.run() else {
            unexpected.withLock { $0 += 1 }
            answered.withLock { $0 = .max }
            return
          }
          answered.withLock { $0 = thread * rounds + round + 1 }
        }
      }
      runner.join()
      others += unexpected.withLock { $0 }
    }
    kicker.join()
    #expect(others == 0)
    #expect(answered.withLock { $0 } == 2 * rounds)
  }
}

extension TestMachine {
  /// Runs a processor until `reached` holds, which is asked whenever a kick has ended a run; false where another exit did.
  ///
  /// Another thread kicks all the time: nothing depends on when a kick comes.
  func kickOutOf(_ processor: Int, when reached: (any VirtualCPU) throws -> Bool) throws -> Bool {
    let vcpu = vcpus[processor]
    let isDone = Condition(false)
    let kicker = try HostThread(name: "kicker") {
      while !isDone.withLock({ $0 }) {
        vcpu.kick()
        usleep(100)
      }
    }
    defer {
      isDone.withLock { $0 = true }
      kicker.join()
    }
    while true {
      guard case .interrupted = try vcpu.run() else { return false }
      if try reached(vcpu) { return true }
    }
  }
}
