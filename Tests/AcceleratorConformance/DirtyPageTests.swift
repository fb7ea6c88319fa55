import Accelerator
import GuestMemory
import Testing

/// What the guest wrote, exactly.
@Suite struct DirtyPages {
  private static let stride: UInt64 = 16 << 12

  /// Runs a guest over 32 pages at `stride` from the start of the high memory, slot 1.
  private func run(_ machine: TestMachine, _ guest: String, _ mode: TestMachine.Mode) throws {
    try machine.runToEnd(guest, mode) {
      $0.rdi = TestMachine.high
      $0.rsi = Self.stride
      $0.rcx = 32
    }
  }

  /// The bitmap of slot 1 with those pages set.
  private static let written = [UInt64](repeating: 0x0001_0001_0001_0001, count: 8)
  private static let clean = [UInt64](repeating: 0, count: 8)

  @Test(arguments: AcceleratorUnderTest.withDirtyLog, Accesses.rings)
  func areLogged(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject, needs: .dirtyLog, logging: true)
    _ = try machine.machine.takeDirtyLog(slot: 1)
    for _ in 0..<2 {
      try run(machine, "stores", mode)
      #expect(try machine.machine.takeDirtyLog(slot: 1) == Self.written)
      #expect(try machine.machine.takeDirtyLog(slot: 1) == Self.clean)
    }
    try run(machine, "loads", mode)
    #expect(try machine.machine.takeDirtyLog(slot: 1) == Self.clean)
    // The VMM's own writes are in its own bitmap.
    machine.memory.dirty.setTracking(true)
    try machine.write(UInt8(1), to: TestMachine.high + 0x5000)
    #expect(try machine.machine.takeDirtyLog(slot: 1) == Self.clean)
    let page = 1024 + 16 + 5
    #expect(machine.memory.dirty.take()[page / 64] == 1 << UInt64(page % 64))
  }

  @Test(arguments: AcceleratorUnderTest.withDirtyLog)
  func areLoggedOnlyWhereAsked(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .dirtyLog)
    #expect(throws: AcceleratorError.self) { try machine.machine.takeDirtyLog(slot: 1) }
    #expect(throws: AcceleratorError.unknownSlot(9)) { try machine.machine.takeDirtyLog(slot: 9) }
    #expect(throws: AcceleratorError.self) { try machine.machine.collectDirtyRings() }
    // Logging can be turned on for a slot that is there.
    let region = machine.memory.regions[2]
    try run(machine, "stores", .long)
    try machine.machine.setMemorySlot(
      MemorySlot(number: 1, range: region.range, hostBase: region.hostBase, logsDirtyPages: true))
    _ = try machine.machine.takeDirtyLog(slot: 1)
    try run(machine, "stores", .long)
    #expect(try machine.machine.takeDirtyLog(slot: 1) == Self.written)
  }

  @Test(arguments: AcceleratorUnderTest.withDirtyRing, Accesses.rings)
  func areInTheRing(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject, logging: true)
    _ = try machine.machine.collectDirtyRings()
    for _ in 0..<2 {
      try run(machine, "stores", mode)
      let pages = try machine.machine.collectDirtyRings().filter { $0.slot == 1 }.map(\.page)
      #expect(pages == (0..<32).map { $0 * 16 })
      #expect(try machine.machine.collectDirtyRings().filter { $0.slot == 1 }.isEmpty)
    }
  }

  @Test(arguments: AcceleratorUnderTest.withDirtyRing, Accesses.rings)
  func fillTheRing(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    // Where ring 0 is emulated, only ring 3 stops in time.
    let machine = try TestMachine(subject, needs: mode == .user ? [] : .dirtyRing, logging: true)
    _ = try machine.machine.collectDirtyRings()
    // More pages than the ring has entries: the low memory's from the data on, then all of the high ones.
    var pages: Set<UInt64> = []
    var fills = 0
    for (start, count) in [(TestMachine.data, 768), (TestMachine.high, 512)] as [(UInt64, UInt64)] {
      try machine.start("stores", mode) {
        $0.rdi = start
        $0.rsi = 0x1000
        $0.rcx = count
      }
      var event = try machine.next()
      while event == .dirtyRingFull {
        fills += 1
        for page in try machine.machine.collectDirtyRings() { pages.insert(UInt64(page.slot) << 32 | page.page) }
        event = try machine.next()
      }
      #expect(event == .done)
    }
    for page in try machine.machine.collectDirtyRings() { pages.insert(UInt64(page.slot) << 32 | page.page) }
    #expect(fills >= 1)
    let expected = Set((256..<1024).map { UInt64($0) } + (0..<512).map { 1 << 32 | UInt64($0) })
    #expect(expected.subtracting(pages).sorted() == [])
  }
}
