import Accelerator
import GuestMemory
import Host
import Testing

/// Interrupts on their ways into the guest, and doorbells on theirs out.
@Suite struct Interrupts {
  /// A message for processor 0, vector 0x31, edge (SDM vol. 3, 11.11).
  static let messageAddress: UInt64 = 0xfee0_0000
  static let messageData: UInt32 = 0x31

  /// Runs `guest` to the point where it waits for the interrupt.
  private func wait(
    _ subject: AcceleratorUnderTest, _ guest: String, vector: Int, handler: String,
    needs capabilities: AcceleratorCapabilities = [], _ change: (inout GeneralRegisters) -> Void = { _ in }
  ) throws -> TestMachine {
    let machine = try TestMachine(subject, needs: capabilities)
    try machine.setHandler(vector, handler)
    try machine.start(guest, .long, change)
    try #require(try machine.next() == .ready)
    return machine
  }

  @Test(arguments: AcceleratorUnderTest.withController)
  func comeThroughThePIC(_ subject: AcceleratorUnderTest) throws {
    let machine = try wait(subject, "pic", vector: 0x24, handler: "handler_pic")
    for _ in 0..<3 {
      try machine.machine.setInterruptLine(4, level: true)
      try machine.machine.setInterruptLine(4, level: false)
      #expect(try machine.next() == .handled)
    }
  }

  @Test(arguments: AcceleratorUnderTest.withController)
  func comeThroughTheIOAPIC(_ subject: AcceleratorUnderTest) throws {
    let machine = try wait(subject, "ioapic", vector: 0x31, handler: "handler_apic") { $0.rdi = 0x31 }
    for _ in 0..<3 {
      try machine.machine.setInterruptLine(20, level: true)
      try machine.machine.setInterruptLine(20, level: false)
      #expect(try machine.next() == .handled)
    }
  }

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func comeAsMessages(_ subject: AcceleratorUnderTest) throws {
    let machine = try wait(subject, "apic", vector: 0x31, handler: "handler_apic")
    for _ in 0..<3 {
      try machine.machine.signalMSI(address: Self.messageAddress, data: Self.messageData)
      #expect(try machine.next() == .handled)
    }
    // To a processor that is not there: lost, as on the bus.
    try machine.machine.signalMSI(address: Self.messageAddress | 7 << 12, data: Self.messageData)
  }

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func comeFromADescriptor(_ subject: AcceleratorUnderTest) throws {
    let machine = try wait(subject, "apic", vector: 0x31, handler: "handler_apic", needs: .eventNotifiers)
    let route = InterruptRoute(gsi: 30, target: .message(address: Self.messageAddress, data: Self.messageData))
    try machine.machine.setInterruptRoutes(
      InterruptRoute.legacy.filter { _ in subject.interrupts == .inKernel } + [route])
    let event = try EventNotifier()
    try machine.machine.attachInterrupt(30, eventDescriptor: event.descriptor.rawValue, resample: nil)
    for _ in 0..<3 {
      event.signal()
      #expect(try machine.next() == .handled)
    }
    #expect(event.drain() == 0)
    try machine.machine.detachInterrupt(30, eventDescriptor: event.descriptor.rawValue)
    // Nobody takes it any more.
    event.signal()
    #expect(event.drain() == 1)
  }

  @Test(arguments: AcceleratorUnderTest.withController)
  func comeFromADescriptorByLevel(_ subject: AcceleratorUnderTest) throws {
    // Bit 15 of the redirection entry: level-triggered.
    let machine = try wait(subject, "ioapic", vector: 0x31, handler: "handler_apic", needs: .eventNotifiers) {
      $0.rdi = 0x8031
    }
    let event = try EventNotifier()
    let resample = try EventNotifier()
    try machine.machine.attachInterrupt(
      20, eventDescriptor: event.descriptor.rawValue, resample: resample.descriptor.rawValue)
    for _ in 0..<3 {
      #expect(resample.drain() == 0)
      event.signal()
      #expect(try machine.next() == .handled)
      // The guest's end of interrupt took the level away and says so.
      #expect(resample.drain() == 1)
    }
    // The line is low again: the guest just sleeps.
    #expect(try machine.kickOutOf(0) { try $0.readState().activity == .halted })
    try machine.machine.detachInterrupt(20, eventDescriptor: event.descriptor.rawValue)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue.filter { $0.interrupts == .split })
  func endForAnIOAPICInTheVMM(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    // Bits 14 and 15: asserted, level-triggered. Its end is the IOAPIC's business, so it exits.
    let route = InterruptRoute(
      gsi: 20, target: .message(address: Self.messageAddress, data: Self.messageData | 0xc000))
    try machine.machine.setInterruptRoutes([route])
    try machine.setHandler(0x31, "handler_apic")
    try machine.start("apic")
    try #require(try machine.next() == .ready)
    try machine.machine.setInterruptLine(20, level: true)
    // Which comes first is the accelerator's affair: the handler speaks right after its end of interrupt.
    let events = [try machine.next(), try machine.next()]
    #expect(events.contains(.endOfInterrupt(0x31)))
    #expect(events.contains(.handled))
  }

  @Test(arguments: AcceleratorUnderTest.withoutController)
  func areInjectedThroughTheWindow(_ subject: AcceleratorUnderTest) throws {
    let machine = try wait(subject, "window", vector: 0x31, handler: "handler")
    #expect(!machine.vcpu.isInterruptible)
    machine.vcpu.requestInterruptWindow(true)
    #expect(try machine.next() == .interruptWindow)
    #expect(machine.vcpu.isInterruptible)
    machine.vcpu.requestInterruptWindow(false)
    try machine.vcpu.injectInterrupt(vector: 0x31)
    #expect(!machine.vcpu.isInterruptible)
    #expect(try machine.next() == .handled)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func thatAreNotMaskable(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.setHandler(2, "handler")
    try machine.start("spin")
    try machine.vcpu.injectNMI()
    #expect(try machine.next() == .handled)
  }

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func comeFromTheLocalTimer(_ subject: AcceleratorUnderTest) throws {
    let machine = try wait(subject, "timer", vector: 0x30, handler: "handler_apic") { $0.rdi = 1000 }
    #expect(try machine.next() == .handled)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue.filter { $0.interrupts == .userSpace })
  func haveNoWayWithoutAController(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    #expect(throws: AcceleratorError.self) { try machine.machine.setInterruptLine(4, level: true) }
    #expect(throws: AcceleratorError.self) {
      try machine.machine.signalMSI(address: Self.messageAddress, data: Self.messageData)
    }
  }

  // MARK: Processors

  @Test(arguments: AcceleratorUnderTest.withLocalAPIC)
  func startASecondProcessor(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, vcpus: 2)
    try machine.load("secondprocessor", at: 0x9000)
    try machine.start("startprocessor")
    let second = machine.vcpus[1]
    #expect(try second.readState().activity == .uninitialized)
    let events = Condition<[GuestEvent]>([])
    let thread = try HostThread(name: "processor 1") {
      let event = (try? second.run()).map { GuestEvent($0, answer: []) } ?? .other("an error")
      events.withLock { $0.append(event) }
    }
    #expect(try machine.next() == .done)
    #expect(try machine.read(0xf000, as: UInt32.self) == 2000)
    second.kick()
    thread.join()
    #expect(events.withLock { $0 } == [.interrupted])
  }
}

@Suite struct Doorbells {
  /// Rings every size of store and output at once and returns what exits all the same.
  private func exits(_ machine: TestMachine, _ mode: TestMachine.Mode) throws -> [GuestEvent] {
    try machine.start("doorbells", mode) {
      $0.rdx = 0x234
      $0.rdi = TestMachine.hole
      $0.rax = 0x0807_0605_0403_0201
    }
    var events: [GuestEvent] = []
    while events.count < 16 {
      let event = try machine.next()
      if event == .done { return events }
      events.append(event)
    }
    return events
  }

  private static let bytes: [UInt8] = [1, 2, 3, 4, 5, 6, 7, 8]
  private static let all: [GuestEvent] =
    [1, 2, 4].map { .output(port: 0x234, size: UInt8($0), Array(bytes.prefix($0))) }
    + [1, 2, 4, 8].map { .store(TestMachine.hole, Array(bytes.prefix($0))) }

  @Test(
    arguments: AcceleratorUnderTest.catalogue,
    [
      (Doorbell(space: .port, address: 0x234, size: 2), [1]),
      (Doorbell(space: .port, address: 0x234, size: 1, match: 1), [0]),
      (Doorbell(space: .port, address: 0x234, size: 1, match: 2), []),
      (Doorbell(space: .memory, address: TestMachine.hole, size: 4), [5]),
      (Doorbell(space: .memory, address: TestMachine.hole, size: 8, match: 0x0807_0605_0403_0201), [6]),
      (Doorbell(space: .memory, address: TestMachine.hole, size: 4, match: 7), []),
      (Doorbell(space: .memory, address: TestMachine.hole, size: 0), [3, 4, 5, 6]),
    ] as [(Doorbell, [Int])])
  func ringWithoutAnExit(_ subject: AcceleratorUnderTest, _ bell: (Doorbell, [Int])) throws {
    let machine = try TestMachine(subject, needs: .eventNotifiers)
    let (doorbell, silent) = bell
    let event = try EventNotifier()
    for mode in Accesses.rings {
      try machine.machine.attachDoorbell(doorbell, eventDescriptor: event.descriptor.rawValue)
      let expected = Self.all.enumerated().filter { !silent.contains($0.offset) }.map(\.element)
      #expect(try exits(machine, mode) == expected)
      #expect(event.drain() == UInt64(silent.count))
      try machine.machine.detachDoorbell(doorbell, eventDescriptor: event.descriptor.rawValue)
      #expect(try exits(machine, mode) == Self.all)
      #expect(event.drain() == 0)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func thatAreWrongAreRefused(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .eventNotifiers)
    let event = try EventNotifier()
    let descriptor = event.descriptor.rawValue
    let doorbell = Doorbell(space: .memory, address: TestMachine.hole, size: 4)
    #expect(throws: AcceleratorError.self) {
      try machine.machine.attachDoorbell(
        Doorbell(space: .memory, address: TestMachine.hole, size: 3), eventDescriptor: descriptor)
    }
    #expect(throws: AcceleratorError.self) { try machine.machine.attachDoorbell(doorbell, eventDescriptor: -1) }
    #expect(throws: AcceleratorError.self) {
      try machine.machine.detachDoorbell(doorbell, eventDescriptor: descriptor)
    }
  }
}
