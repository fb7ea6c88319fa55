import Accelerator
import GuestMemory
import Testing

@Suite struct Debugging {
  private static let step: UInt64 = 1 << 14

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func stepsOneInstruction(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .guestDebug)
    try machine.start("steps") { $0.rdi = TestMachine.data }
    var control = DebugControl()
    control.singleStep = true
    try machine.vcpu.setDebug(control)
    for offset in [1, 4, 7, 10] as [UInt64] {
      guard case .debug(let address, let status) = try machine.next() else {
        Issue.record("no step to \(offset)")
        return
      }
      #expect(address == TestMachine.entry + offset)
      #expect(status & Self.step != 0)
      #expect(try machine.vcpu.readRegisters().rip == TestMachine.entry + offset)
    }
    #expect(try machine.vcpu.readRegisters().rax == 1)
    try machine.vcpu.setDebug(DebugControl())
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func stepsUnseen(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .guestDebug)
    try machine.start("flags")
    var control = DebugControl()
    control.singleStep = true
    try machine.vcpu.setDebug(control)
    for _ in 0..<2 {
      guard case .debug = try machine.next() else {
        Issue.record("no step")
        return
      }
    }
    let registers = try machine.vcpu.readRegisters()
    #expect(registers.rax & 1 << 8 == 0)
    #expect(registers.rflags & 1 << 8 == 0)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func breaksAtFourAddresses(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .guestDebug)
    try machine.start("steps") { $0.rdi = TestMachine.data }
    let offsets: [UInt64] = [0, 1, 4, 7]
    var control = DebugControl()
    control.breakpoints = offsets.map { .init(address: TestMachine.entry + $0, kind: .execute, length: 1) }
    try machine.vcpu.setDebug(control)
    for (slot, offset) in offsets.enumerated() {
      guard case .debug(let address, let status) = try machine.next() else {
        Issue.record("no stop at \(offset)")
        return
      }
      #expect(address == TestMachine.entry + offset)
      #expect(status & 0xf == 1 << UInt64(slot))
      // A breakpoint stops before its instruction; over it goes as a debugger does.
      control.breakpoints.remove(at: slot)
      control.breakpoints.insert(.init(address: 0xffff_0000, kind: .execute, length: 1), at: slot)
      try machine.vcpu.setDebug(control)
    }
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func watchesData(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .watchpoints)
    try machine.start("steps") { $0.rdi = TestMachine.data }
    var control = DebugControl()
    control.breakpoints = [.init(address: TestMachine.data, kind: .write, length: 8)]
    try machine.vcpu.setDebug(control)
    guard case .debug(let address, let status) = try machine.next() else {
      Issue.record("the watchpoint did not fire")
      return
    }
    #expect(address == TestMachine.entry + 7)
    #expect(status & 0xf == 1)
    #expect(try machine.next() == .done)
  }

  /// `stores` writes to RDI and `loads` reads there: the seventh breakpoint is met by one of them alone.
  @Test(arguments: AcceleratorUnderTest.catalogue, [DebugControl.Breakpoint.Kind.read, .write, .access])
  func watchesReadsAlone(_ subject: AcceleratorUnderTest, _ kind: DebugControl.Breakpoint.Kind) throws {
    for (guest, meets) in [("loads", kind != .write), ("stores", kind != .read)] {
      let machine = try TestMachine(subject, needs: .readWatchpoints)
      var control = DebugControl()
      control.breakpoints = (0..<6).map { .init(address: 0xffff_0000 + $0, kind: .execute, length: 1) }
      control.breakpoints.append(.init(address: TestMachine.data, kind: kind, length: 8))
      try machine.start(guest) {
        $0.rdi = TestMachine.data
        $0.rsi = 0x800
        $0.rcx = 1
      }
      try machine.vcpu.setDebug(control)
      if meets {
        guard case .debug(let event) = try machine.vcpu.run() else {
          Issue.record("\(guest) met nothing")
          continue
        }
        #expect(event.breakpoint == 6)
        #expect(event.status & 15 == 0)
      }
      #expect(try machine.next() == .done)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func leavesTheGuestsRegistersAlone(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .guestDebug)
    try machine.start("debugregisters")
    var state = try machine.vcpu.readState()
    state.debug.addresses = [0x1111, 0x2222, 0x3333, 0x4444]
    try machine.vcpu.writeState(state)
    var control = DebugControl()
    control.breakpoints = [.init(address: TestMachine.entry + 6, kind: .execute, length: 1)]
    try machine.vcpu.setDebug(control)
    #expect(try machine.vcpu.readState().debug == state.debug)
    guard case .debug(TestMachine.entry + 6, _) = try machine.next() else {
      Issue.record("no stop")
      return
    }
    let registers = try machine.vcpu.readRegisters()
    #expect(registers.rax == 0x1111)
    #expect(registers.rbx == 0x400)
    #expect(try machine.vcpu.readState().debug.addresses == state.debug.addresses)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func refusesWhatTheProcessorLacks(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .guestDebug)
    var control = DebugControl()
    for (kind, length) in [(.write, 0), (.write, 3), (.access, 16), (.execute, 4)]
      as [(
        DebugControl.Breakpoint.Kind, UInt8
      )]
    {
      control.breakpoints = [.init(address: 0x1000, kind: kind, length: length)]
      #expect(throws: AcceleratorError.breakpointLength(address: 0x1000, length: length)) {
        try machine.vcpu.setDebug(control)
      }
    }
    let limit = machine.vcpu.breakpointLimit
    #expect(limit >= 4)
    control.breakpoints = (0...UInt64(limit)).map { .init(address: $0, kind: .execute, length: 1) }
    #expect(throws: AcceleratorError.breakpointCount(limit + 1, limit: limit)) { try machine.vcpu.setDebug(control) }
    guard !machine.accelerator.capabilities.contains(.readWatchpoints) else { return }
    control.breakpoints = [.init(address: 0x1000, kind: .read, length: 8)]
    #expect(throws: AcceleratorError.self) { try machine.vcpu.setDebug(control) }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func translatesAddresses(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    // 2 MiB of linear addresses at 1 GiB stand for the data.
    try machine.write(UInt64(0x9007), to: 0x2008)
    try machine.write(UInt64(0x00_0087), to: 0x9000)
    try machine.start("long")
    #expect(try machine.vcpu.translate(0x4010_0123)?.rawValue == TestMachine.data + 0x123)
    #expect(try machine.vcpu.translate(TestMachine.high + 5)?.rawValue == TestMachine.high + 5)
    #expect(try machine.vcpu.translate(0x4020_0000) == nil)
    #expect(try machine.vcpu.translate(1 << 46) == nil)
    try machine.start("real", .real)
    #expect(try machine.vcpu.translate(0x1234)?.rawValue == 0x1234)
  }
}
