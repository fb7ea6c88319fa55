import Accelerator
import Glibc
import GuestMemory
import Host
import MemoryViews
import Synchronization
import Testing

/// Memory views: what they forbid is an exit, and the instruction runs again when they allow it.
@Suite struct Views {
  private static let page = TestMachine.range(TestMachine.data, 0x1000)

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

  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func forbidWrites(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject, needs: .executePermission)
    // The page is in the TLB for writes before the view is there.
    try start(machine, "stores", mode)
    #expect(try machine.next() == .done)
    let view = MemoryView(number: 1)
    view.set([.read, .execute], for: Self.page)
    try machine.vcpu.selectView(view)
    try machine.write(UInt64(0), to: TestMachine.data + 0x1000)
    try start(machine, "stores", mode)
    let exit = try machine.vcpu.run()
    #expect(
      violation(exit)
        == ViewViolation(
          view: 1, address: GuestPhysicalAddress(TestMachine.data), linear: TestMachine.data, missing: .write,
          rip: TestMachine.entry))
    let registers = try machine.vcpu.readRegisters()
    #expect(registers.rip == TestMachine.entry)
    #expect(registers.rcx == 4)
    // Reads go through; a page beside it takes writes.
    try machine.vcpu.selectView(nil)
    #expect(try machine.next() == .done)
    #expect(try machine.read(TestMachine.data + 0x1000, as: UInt64.self) == 2)
    try machine.vcpu.selectView(view)
    try start(machine, "loads", mode)
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, Accesses.rings)
  func forbidReadsAndFetches(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject, needs: .executePermission)
    let view = MemoryView(number: 7)
    view.set([.write], for: Self.page)
    try machine.vcpu.selectView(view)
    try start(machine, "loads", mode)
    #expect(violation(try machine.vcpu.run())?.missing == .read)
    view.set([.read, .write], for: TestMachine.range(TestMachine.entry, 0x1000))
    try start(machine, "stores", mode)
    try machine.vcpu.selectView(view)
    let fetch = violation(try machine.vcpu.run())
    #expect(fetch?.missing == .execute)
    #expect(fetch?.address == GuestPhysicalAddress(TestMachine.entry))
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func forbidPageWalks(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .executePermission)
    try start(machine, "loads", .long)
    let view = MemoryView(number: 2)
    view.set([.write, .execute], for: TestMachine.range(0x1000, 0x1000))
    try machine.vcpu.selectView(view)
    let found = violation(try machine.vcpu.run())
    #expect(found?.missing == .read)
    #expect(found?.address == GuestPhysicalAddress(0x1000))
    #expect(found?.linear == TestMachine.entry)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func putOtherMemoryInAPagesPlace(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .executePermission)
    let view = MemoryView(number: 3)
    view.replace(GuestPhysicalAddress(TestMachine.data), by: machine.spare, rights: .all)
    try machine.write(UInt64(0), to: TestMachine.data)
    try machine.vcpu.selectView(view)
    try start(machine, "stores", .long, count: 1)
    #expect(try machine.next() == .done)
    #expect(try machine.read(TestMachine.data, as: UInt64.self) == 0)
    #expect(machine.spare.load(as: UInt64.self) == 1)
    // And back, without the machine's own page having changed.
    try machine.vcpu.selectView(nil)
    try start(machine, "stores", .long, count: 1)
    #expect(try machine.next() == .done)
    #expect(try machine.read(TestMachine.data, as: UInt64.self) == 1)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func changeForEveryProcessorBeforeTheCallReturns(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, vcpus: 2, needs: .executePermission)
    let view = try machine.machine.makeView(base: nil)
    let copy = try machine.machine.makeView(base: view)
    #expect(view.number != copy.number)
    for vcpu in machine.vcpus {
      // A store and a count, again and again.
      try machine.start("stores", .long, processor: vcpu.index) {
        $0.rdi = TestMachine.data + UInt64(vcpu.index) * 0x800
        $0.rsi = 0
        $0.rcx = .max
      }
    }
    try machine.vcpus[0].selectView(view)
    try machine.vcpus[1].selectView(copy)
    let exits = Mutex<[Int: ViewViolation]>([:])
    let vcpus = machine.vcpus
    var threads: [HostThread] = []
    for vcpu in vcpus {
      threads.append(
        try HostThread(name: "vcpu") {
          while case .some(let exit) = try? vcpu.run() {
            if case .viewViolation(let found) = exit { return exits.withLock { $0[vcpu.index] = found } }
          }
        })
    }
    func value(_ index: Int) throws -> UInt64 { try machine.read(TestMachine.data + UInt64(index) * 0x800) }
    while try value(0) == 0 || value(1) == 0 { sched_yield() }
    try machine.machine.change([ViewChange(view, Self.page, .read), ViewChange(copy, Self.page, [.read, .execute])])
    let seen = try (value(0), value(1))
    for thread in threads { thread.join() }
    #expect(try (value(0), value(1)) == seen)
    #expect(exits.withLock { $0[0]?.missing } == .write)
    #expect(exits.withLock { $0[1]?.view } == copy.number)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func areRefusedWhereThereAreNone(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    if machine.accelerator.capabilities.contains(.executePermission) {
      let view = MemoryView(number: 9)
      try machine.vcpu.selectView(view)
      #expect(machine.vcpu.activeView === view)
      try machine.vcpu.selectView(nil)
      #expect(machine.vcpu.activeView == nil)
    } else {
      #expect(throws: AcceleratorError.self) { try machine.vcpu.selectView(MemoryView(number: 1)) }
    }
  }
}
