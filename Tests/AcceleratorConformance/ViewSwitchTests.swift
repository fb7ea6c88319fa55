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

  /// A guest whose two pages are in a view each looks for what the other has left in debug and control registers, MSRs,
  /// vectors and segment bases.
  @Test(arguments: AcceleratorUnderTest.withViews)
  func whatAGuestChangesIsThereInTheOtherView(_ subject: AcceleratorUnderTest) throws {
    let machine = try make(subject)
    let second = TestMachine.range(TestMachine.entry + 0x1000, 0x1000)
    let views = try (0..<2).map { _ in try machine.machine.makeView(base: nil) }
    try machine.machine.change([
      ViewChange(views[0], second, [.read, .write]), ViewChange(views[1], Self.code, [.read, .write]),
    ])
    try machine.start("halves") {
      $0.rdi = TestMachine.data
      $0.r8 = 0
      $0.r9 = 102
    }
    try machine.vcpu.selectView(views[0])
    var hops = 0
    loop: while hops < 1000 {
      switch try machine.vcpu.run() {
      case .viewViolation(let violation):
        #expect(violation.missing == .execute)
        try machine.vcpu.selectView(views[violation.view == views[0].number ? 1 : 0])
        hops += 1
      case let exit:
        #expect(GuestEvent(exit, answer: []) == .done)
        break loop
      }
    }
    #expect(hops == 101)
    let state = try machine.vcpu.readState()
    #expect(state.xcr0 == 3 && state.general.r8 == 101 && state.debug.addresses[0] == 101)
    try machine.vcpu.selectView(nil)
    let moved = try machine.vcpu.readState()
    #expect(moved.xcr0 == 3 && moved.system == state.system && moved.extended == state.extended)
  }

  /// What the VMM changes goes along also where the vCPU does not run between two switches.
  @Test(arguments: AcceleratorUnderTest.withViews)
  func whatTheVMMChangesIsThereInTheOtherView(_ subject: AcceleratorUnderTest) throws {
    let machine = try make(subject)
    let views = try (0..<2).map { _ in try machine.machine.makeView(base: nil) }
    for view in views { try machine.vcpu.selectView(view) }
    let ways: [[MemoryView?]] = [
      [nil], [views[0], nil, views[0]], [views[1], views[0]], [views[1]], [nil, views[1], nil],
    ]
    for (round, way) in ways.enumerated() {
      try start(machine, "stores", .long)
      var state = try machine.vcpu.readState()
      state.system.fs.base = 0x1000 + UInt64(round)
      state.system.cr2 = 0x2000 + UInt64(round)
      state.debug.addresses[1] = 0x3000 + UInt64(round)
      let index = try #require(state.modelSpecific.firstIndex { $0.index == 0xc000_0102 })
      state.modelSpecific[index].value = 0x4000 + UInt64(round)
      // XMM0, and that it is not in its initial state (SDM vol. 1, 13.4).
      state.extended[160] = 0x50 + UInt8(round)
      state.extended[512] |= 2
      try machine.vcpu.writeState(state)
      for view in way { try machine.vcpu.selectView(view) }
      #expect(try machine.next() == .done)
      let after = try machine.vcpu.readState()
      #expect(after.system == state.system, "\(way.count)")
      #expect(after.debug.addresses == state.debug.addresses)
      #expect(after.modelSpecific[index] == state.modelSpecific[index])
      #expect(after.extended[160] == state.extended[160])
    }
  }

  /// What a guest does to its translations in one view it has done in the other.
  @Test(arguments: AcceleratorUnderTest.withViews, ["cr3", "invlpg", "table", "directory"])
  func invalidationsHoldInEveryView(_ subject: AcceleratorUnderTest, _ way: String) throws {
    let machine = try make(subject)
    let views = try (0..<2).map { _ in try machine.machine.makeView(base: nil) }
    // A page at 1 GiB, in two sets of tables that are the same elsewhere.
    for (address, entry) in [
      (0x2008, 0x9007), (0x9000, 0xa007), (0xa000, 0x10_0007), (0x11000, 0x12007), (0x12000, 0x3007),
      (0x12008, 0x13007),
      (0x13000, 0x14007), (0x14000, 0x10_1007),
    ] {
      try machine.write(UInt64(entry), to: UInt64(address))
    }
    try machine.write(UInt64(1), to: TestMachine.data)
    try machine.write(UInt64(2), to: TestMachine.data + 0x1000)
    try machine.start("long") {
      $0.rdi = 0x4000_0000
      $0.rax = 0x11000
      // The page's entry, that of its table, or that of the table's directory.
      $0.rsi = way == "directory" ? 0x2008 : way == "table" ? 0x9000 : 0xa000
      $0.rdx = way == "directory" ? 0x13007 : way == "table" ? 0x14007 : 0x10_1007
    }
    // mov cr3, rax; or mov [rsi], rdx; invlpg [rdi]
    let change: [UInt8] = way == "cr3" ? [0x0f, 0x22, 0xd8] : [0x48, 0x89, 0x16, 0x0f, 0x01, 0x3f]
    // mov rbx, [rdi]; out 0x90, al
    let look: [UInt8] = [0x48, 0x8b, 0x1f, 0xe6, 0x90]
    try machine.memory.write(look + change + [0xe6, 0x90] + look, to: GuestPhysicalAddress(TestMachine.entry))
    var found: [UInt64] = []
    for view in [views[0], views[1], views[0]] {
      try machine.vcpu.selectView(view)
      #expect(try machine.next() == .ready)
      #expect(try machine.complete() == [])
      found.append(try machine.vcpu.readRegisters().rbx)
    }
    #expect(found == [1, 1, 2])
  }

  @Test(arguments: AcceleratorUnderTest.withViews)
  func addressesAreTranslatedInAView(_ subject: AcceleratorUnderTest) throws {
    let machine = try make(subject)
    // 4 KiB of linear addresses at 1 GiB stand for the data, 2 MiB after 2 MiB for memory from 4 GiB on.
    for (address, entry) in [
      (0x2008, 0x9007), (0x9000, 0xa007), (0xa000, TestMachine.data | 7), (0x9008, 0x1_0000_0087),
    ] {
      try machine.write(UInt64(entry), to: UInt64(address))
    }
    let view = try machine.machine.makeView(base: nil)
    try machine.vcpu.selectView(view)
    let known: [UInt64: UInt64?] = [
      0x4000_0123: TestMachine.data + 0x123, 0x4020_0005: TestMachine.high + 5, 0x4000_1000: nil, 1 << 46: nil,
      1 << 63: nil, 0x1234: 0x1234,
    ]
    for mode in [TestMachine.Mode.long, .user] {
      try start(machine, "stores", mode)
      #expect(try machine.next() == .done)
      for (linear, physical) in known {
        #expect(try machine.vcpu.translate(linear)?.rawValue == physical, "\(linear)")
      }
    }
    try machine.start("protected", .protected)
    #expect(try machine.next() == .done)
    #expect(try machine.vcpu.translate(0x1234)?.rawValue == 0x1234)
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
