import Accelerator
import GuestMemory
import Testing

@Suite struct MemorySlots {
  private static let number: UInt32 = 7

  private static func slot(
    _ machine: TestMachine, at address: UInt64 = TestMachine.hole, offset: Int = 0, pages: UInt64 = 1,
    _ access: MemorySlot.Access = .readWriteExecute
  ) -> MemorySlot {
    MemorySlot(
      number: number, range: TestMachine.range(address, pages << 12), hostBase: machine.spare + offset, access: access)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func areAddedReplacedAndRemoved(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    machine.spare.storeBytes(of: 0x1111_1111, as: UInt32.self)
    (machine.spare + 0x1000).storeBytes(of: 0x2222_2222, as: UInt32.self)

    try machine.machine.setMemorySlot(Self.slot(machine))
    try machine.runToEnd("load4") { $0.rdi = TestMachine.hole }
    #expect(try machine.vcpu.readRegisters().rax == 0x1111_1111)

    try machine.machine.setMemorySlot(Self.slot(machine, offset: 0x1000))
    try machine.runToEnd("load4") { $0.rdi = TestMachine.hole }
    #expect(try machine.vcpu.readRegisters().rax == 0x2222_2222)

    // The same number elsewhere: the old range is empty.
    try machine.machine.setMemorySlot(Self.slot(machine, at: TestMachine.hole + 0x4000, pages: 2))
    try machine.runToEnd("load4") { $0.rdi = TestMachine.hole + 0x5000 }
    #expect(try machine.vcpu.readRegisters().rax == 0x2222_2222)
    try machine.start("load4") { $0.rdi = TestMachine.hole }
    #expect(try machine.next(answer: [1, 2, 3, 4]) == .load(TestMachine.hole, size: 4))
    #expect(try machine.next() == .done)

    try machine.machine.removeMemorySlot(Self.number)
    try machine.machine.removeMemorySlot(Self.number)
    try machine.start("load4") { $0.rdi = TestMachine.hole + 0x5000 }
    #expect(try machine.next() == .load(TestMachine.hole + 0x5000, size: 4))
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func reachAboveFourGibibytes(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    let address = TestMachine.high + 0x12_3458
    try machine.runToEnd("store8") {
      $0.rdi = address
      $0.rax = 0x0123_4567_89ab_cdef
    }
    #expect(try machine.read(address, as: UInt64.self) == 0x0123_4567_89ab_cdef)
    try machine.machine.removeMemorySlot(1)
    try machine.start("store8") { $0.rdi = address }
    #expect(try machine.next() == .store(address, [0, 0, 0, 0, 0, 0, 0, 0]))
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, [TestMachine.Mode.long, .user])
  func readOnlyOnesExitOnWrites(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject, needs: .readOnlyMemory)
    machine.spare.storeBytes(of: 0x1111_1111, as: UInt32.self)
    try machine.machine.setMemorySlot(Self.slot(machine, .readExecute))
    try machine.runToEnd("load4", mode) { $0.rdi = TestMachine.hole }
    #expect(try machine.vcpu.readRegisters().rax == 0x1111_1111)

    try machine.start("store4", mode) {
      $0.rdi = TestMachine.hole
      $0.rax = 0x4433_2211
    }
    #expect(try machine.next() == .store(TestMachine.hole, [0x11, 0x22, 0x33, 0x44]))
    #expect(try machine.next() == .done)
    #expect(machine.spare.load(as: UInt32.self) == 0x1111_1111)

    // Code runs from it, and it can be opened for writing.
    try machine.load("load4", at: 0x2000_0000)
    try machine.start("jump", mode) { $0.rdi = TestMachine.hole }
    #expect(try machine.next() == .done)
    try machine.machine.setMemorySlot(Self.slot(machine))
    try machine.runToEnd("store4", mode) {
      $0.rdi = TestMachine.hole
      $0.rax = 0x4433_2211
    }
    #expect(machine.spare.load(as: UInt32.self) == 0x4433_2211)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func thatAreWrongAreRefused(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    machine.spare.storeBytes(of: 0x1111_1111, as: UInt32.self)
    try machine.machine.setMemorySlot(Self.slot(machine))
    let wrong = [
      Self.slot(machine, at: TestMachine.hole + 0x800), Self.slot(machine, offset: 0x10),
      Self.slot(machine, pages: 0),
      MemorySlot(
        number: Self.number, range: TestMachine.range(TestMachine.hole, 0x1001), hostBase: machine.spare),
    ]
    for slot in wrong {
      #expect(throws: AcceleratorError.badSlot(number: slot.number, range: slot.range)) {
        try machine.machine.setMemorySlot(slot)
      }
    }
    var beyond = Self.slot(machine, at: TestMachine.hole + 0x8000)
    for number in [0x1_0000, UInt32.max] {
      beyond.number = number
      #expect(throws: AcceleratorError.self) { try machine.machine.setMemorySlot(beyond) }
    }
    // It would share addresses with slot 0; the slot that it was to replace stays.
    #expect(throws: AcceleratorError.self) { try machine.machine.setMemorySlot(Self.slot(machine, at: 0x1000)) }
    try machine.runToEnd("load4") { $0.rdi = TestMachine.hole }
    #expect(try machine.vcpu.readRegisters().rax == 0x1111_1111)
  }
}
