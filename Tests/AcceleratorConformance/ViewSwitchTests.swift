import Accelerator
import Glibc
import GuestMemory
import Host
import MemoryViews
import Synchronization
import Testing

/// Views on every accelerator that has them, by rights that all of them know: what may be executed may be read.
@Suite struct ViewSwitches {
  private static let page = TestMachine.range(TestMachine.data, 0x1000)
  private static let code = TestMachine.range(TestMachine.entry, 0x1000)

  private func make(_ subject: AcceleratorUnderTest, vcpus: Int = 1, logging: Bool = false) throws -> TestMachine {
    try TestMachine(subject, vcpus: vcpus, needs: .memoryViews, logging: logging)
  }

  private func violation(_ exit: VCPUExit) -> ViewViolation? {
    if case .viewViolation(let violation) = exit { violation } else { nil }
  }

  private func start(_ machine: TestMachine, _ guest: String, _ mode: TestMachine.Mode, count: UInt64 = 4) throws {
    try machine.start(guest, mode) {
      $0.rdi = TestMachine.data
      $0.rsi = 0x800
      $0.rcx = count
    }
  }

  @Test(arguments: AcceleratorUnderTest.withViews, Accesses.rings)
  func forbidWritesAndAllowThemAgain(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try make(subject)
    let view = try machine.machine.makeView(base: nil)
    try machine.machine.change([ViewChange(view, Self.page, [.read, .execute])])
    try machine.vcpu.selectView(view)
    try machine.write(UInt64(77), to: TestMachine.data)
    try start(machine, "stores", mode)
    let found = try #require(violation(try machine.vcpu.run()))
    #expect(found.view == view.number && found.missing == .write)
    #expect(found.address == GuestPhysicalAddress(TestMachine.data))
    try end(machine)
    #expect(try machine.read(TestMachine.data, as: UInt64.self) == 77)
    try machine.machine.change([ViewChange(view, Self.page, .all)])
    try start(machine, "stores", mode)
    #expect(try machine.next() == .done)
    #expect(try machine.read(TestMachine.data, as: UInt64.self) != 77)
  }

  @Test(arguments: AcceleratorUnderTest.withViews, Accesses.rings)
  func forbidFetches(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try make(subject)
    let view = try machine.machine.makeView(base: nil)
    try machine.machine.change([ViewChange(view, Self.code, [.read, .write])])
    try start(machine, "stores", mode)
    try machine.vcpu.selectView(view)
    let found = try #require(violation(try machine.vcpu.run()))
    #expect(found.missing == .execute && found.address == GuestPhysicalAddress(TestMachine.entry))
    #expect(found.linear == TestMachine.entry && found.rip == TestMachine.entry)
    // The same instruction goes on under another view, and under this one when it allows it.
    let registers = try machine.vcpu.readRegisters()
    #expect(registers.rip == TestMachine.entry && registers.rdi == TestMachine.data && registers.rcx == 4)
    try machine.vcpu.selectView(nil)
    #expect(try machine.next() == .done)
    try machine.machine.change([ViewChange(view, Self.code, [.read, .execute])])
    try start(machine, "stores", mode)
    try machine.vcpu.selectView(view)
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.withViews, Accesses.rings)
  func dataOfPagesThatMayNotBeExecuted(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try make(subject, logging: true)
    let view = try machine.machine.makeView(base: nil)
    try machine.machine.change([ViewChange(view, Self.page, [.read, .write])])
    try machine.vcpu.selectView(view)
    try start(machine, "stores", mode)
    _ = try machine.machine.takeDirtyLog(slot: 0)
    #expect(try machine.next() == .done)
    let page = Int(TestMachine.data >> 12)
    let log = try machine.machine.takeDirtyLog(slot: 0)
    #expect(log[page >> 6] >> UInt64(page & 63) & 1 == 1)
    try machine.machine.change([ViewChange(view, Self.page, [.read])])
    try start(machine, "loads", mode)
    #expect(try machine.next() == .done)
    try start(machine, "stores", mode)
    #expect(violation(try machine.vcpu.run())?.missing == .write)
    try machine.machine.change([ViewChange(view, Self.page, [])])
    try start(machine, "loads", mode)
    #expect(violation(try machine.vcpu.run())?.missing == .read)
  }

  @Test(arguments: AcceleratorUnderTest.withViews)
  func dirtyPagesOfEveryViewAreLogged(_ subject: AcceleratorUnderTest) throws {
    let machine = try make(subject, logging: true)
    let page = Int(TestMachine.data >> 12)
    func isDirty() throws -> Bool {
      let log = try machine.machine.takeDirtyLog(slot: 0)
      return log[page >> 6] >> UInt64(page & 63) & 1 == 1
    }
    let views = try (0..<2).map { _ in try machine.machine.makeView(base: nil) }
    for view in [nil, views[0], views[1], nil, views[0]] {
      _ = try isDirty()
      #expect(try !isDirty())
      try machine.vcpu.selectView(view)
      try start(machine, "stores", .long)
      #expect(try machine.next() == .done)
      // A slot of the view's is taken away and made again before the log is looked at.
      if let view { try machine.machine.change([ViewChange(view, Self.page, [.read, .execute])]) }
      if let view { try machine.machine.change([ViewChange(view, Self.page, .all)]) }
      #expect(try isDirty())
    }
  }

  @Test(arguments: AcceleratorUnderTest.withViews, Accesses.rings)
  func theStateSurvivesAnyNumberOfSwitches(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try make(subject)
    let views = try (0..<3).map { _ in try machine.machine.makeView(base: nil) }
    try start(machine, "stores", mode)
    var before = try machine.vcpu.readState()
    for round in 0..<60 {
      try machine.vcpu.selectView(round % 4 == 3 ? nil : views[round % 4])
      if round % 7 == 0 {
        before.general.r8 = UInt64(round)
        try machine.vcpu.writeRegisters(before.general)
      }
    }
    let after = try machine.vcpu.readState()
    #expect(after.general == before.general)
    #expect(after.system == before.system)
    #expect(after.extended == before.extended)
    #expect(after.debug == before.debug)
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.withViews)
  func aViewStartsAsItsBaseAndGoesItsOwnWay(_ subject: AcceleratorUnderTest) throws {
    let machine = try make(subject)
    let base = try machine.machine.makeView(base: nil)
    try machine.machine.change([ViewChange(base, Self.page, [.read, .execute])])
    let view = try machine.machine.makeView(base: base)
    for chosen in [base, view] {
      try machine.vcpu.selectView(chosen)
      try start(machine, "stores", .long)
      #expect(violation(try machine.vcpu.run())?.view == chosen.number)
    }
    try machine.machine.change([ViewChange(base, Self.page, .all)])
    try machine.vcpu.selectView(view)
    try start(machine, "stores", .long)
    #expect(violation(try machine.vcpu.run())?.view == view.number)
    try machine.vcpu.selectView(base)
    try start(machine, "stores", .long)
    #expect(try machine.next() == .done)
  }

  /// What the VMM opens after a violation is open for the very access: that is what logging instead of forbidding needs.
  @Test(arguments: AcceleratorUnderTest.withViews, Accesses.rings)
  func anAccessIsMadeAfterAllWhereThePageIsOpened(
    _ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode
  ) throws {
    let machine = try make(subject)
    let view = try machine.machine.makeView(base: nil)
    try machine.machine.change([ViewChange(view, Self.page, [.read, .execute])])
    try machine.vcpu.selectView(view)
    try start(machine, "stores", mode)
    #expect(violation(try machine.vcpu.run())?.missing == .write)
    try machine.machine.change([ViewChange(view, Self.page, .all)])
    #expect(try machine.next() == .done)
    let opened = try machine.memory.bytes(GuestPhysicalAddress(TestMachine.data), count: 0x1000)
    let free = try make(subject)
    try start(free, "stores", mode)
    #expect(try free.next() == .done)
    #expect(try free.memory.bytes(GuestPhysicalAddress(TestMachine.data), count: 0x1000) == opened)
  }

  /// One vCPU stores to a page without end while another thread takes the right away and gives it back: when `change` has
  /// returned, the page stands still.
  @Test(arguments: AcceleratorUnderTest.withViews)
  func aChangeHoldsWhenItReturns(_ subject: AcceleratorUnderTest) throws {
    let machine = try make(subject)
    let view = try machine.machine.makeView(base: nil)
    try machine.vcpu.selectView(view)
    // incq (%rdi); jmp back
    try start(machine, "stores", .long)
    try machine.memory.write([0x48, 0xff, 0x07, 0xeb, 0xfb], to: GuestPhysicalAddress(TestMachine.entry))
    try machine.write(UInt64(0), to: TestMachine.data)
    let isOver = Atomic(false)
    let refused = Atomic(0)
    let vcpu = machine.vcpu
    try withThread {
      while !isOver.load(ordering: .acquiring) {
        guard let exit = try? vcpu.run() else { return }
        if case .viewViolation = exit {
          refused.add(1, ordering: .relaxed)
          sched_yield()
        }
      }
    } whileRunning: {
      defer {
        isOver.store(true, ordering: .releasing)
        vcpu.kick()
      }
      var last: UInt64 = 0
      for _ in 0..<50 {
        try machine.machine.change([ViewChange(view, Self.page, [.read, .execute])])
        let value = try machine.read(TestMachine.data, as: UInt64.self)
        usleep(200)
        #expect(try machine.read(TestMachine.data, as: UInt64.self) == value)
        #expect(value >= last)
        last = value
        try machine.machine.change([ViewChange(view, Self.page, .all)])
        usleep(200)
      }
    }
    #expect(try machine.read(TestMachine.data, as: UInt64.self) > 0)
    #expect(refused.load(ordering: .relaxed) > 0)
  }

  private func withThread(
    _ body: @escaping @Sendable () -> Void, whileRunning: () throws -> Void
  ) throws {
    let thread = try HostThread(name: "vcpu", body)
    let result = Result { try whileRunning() }
    thread.join()
    try result.get()
  }

  /// Gives up the instruction of a violation, whichever way the accelerator tells of it.
  private func end(_ machine: TestMachine) throws {
    var registers = try machine.vcpu.readRegisters()
    registers.rip = TestMachine.entry
    try machine.vcpu.writeRegisters(registers)
  }
}
