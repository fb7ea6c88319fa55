import Accelerator
import GuestMemory
import Testing

/// Port and memory accesses that leave the guest, in ring 0 and in ring 3.
@Suite struct Accesses {
  static let rings = [TestMachine.Mode.long, .user]
  /// The I/O permission bitmap, which is the rest of the task-state segment, allows ring 3 the lowest ports; a
  /// paravirtual KVM asks it even where RFLAGS.IOPL would do.
  private static let port: UInt16 = 0x234
  private static let value: UInt64 = 0x8877_6655_4433_2211
  private static let bytes: [UInt8] = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func carryPortOutput(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    for size in [1, 2, 4] {
      try machine.start("out\(size)", mode) {
        $0.rdx = UInt64(Self.port)
        $0.rax = Self.value
      }
      #expect(try machine.next() == .output(port: Self.port, size: UInt8(size), Array(Self.bytes.prefix(size))))
      #expect(try machine.next() == .done)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func carryPortInput(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    // A 32-bit result clears the register's upper half, a smaller one keeps the rest (SDM vol. 1, 3.4.1.1).
    let expected: [Int: UInt64] = [1: 0xffff_ffff_ffff_ff11, 2: 0xffff_ffff_ffff_2211, 4: 0x4433_2211]
    for (size, result) in expected {
      try machine.start("in\(size)", mode) {
        $0.rdx = UInt64(Self.port)
        $0.rax = .max
      }
      #expect(try machine.next(answer: Self.bytes) == .input(port: Self.port, size: UInt8(size), count: 1))
      #expect(try machine.next() == .done)
      #expect(try machine.vcpu.readRegisters().rax == result)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func carryStringOutput(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    let text = Array(UInt8(0)..<200)
    try machine.memory.write(text, to: .init(TestMachine.data + 0xf80))
    for size in [1, 2, 4] {
      try machine.start("outs\(size)", mode) {
        $0.rdx = UInt64(Self.port)
        $0.rsi = TestMachine.data + 0xf80
        $0.rcx = UInt64(text.count / size)
      }
      var sent: [UInt8] = []
      while case .output(port: Self.port, UInt8(size), let bytes) = try machine.next() { sent += bytes }
      #expect(sent == text)
      let registers = try machine.vcpu.readRegisters()
      #expect(registers.rcx == 0)
      #expect(registers.rsi == TestMachine.data + 0xf80 + 200)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func carryStringInput(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    let address = TestMachine.data + 0xff8
    for size in [1, 2, 4] {
      try machine.memory.fill(.init(TestMachine.data), count: 0x2000, with: 0)
      try machine.start("ins\(size)", mode) {
        $0.rdx = UInt64(Self.port)
        $0.rdi = address
        $0.rcx = 40
      }
      var left: UInt32 = 40
      var next: UInt8 = 1
      var expected: [UInt8] = []
      while left > 0 {
        let exit = try machine.vcpu.run()
        guard case .portIO(let access) = exit, access.size == size, !access.isWrite, access.count <= left else {
          Issue.record("\(exit)")
          break
        }
        for byte in 0..<Int(access.count) * size {
          access.data.storeBytes(of: next, toByteOffset: byte, as: UInt8.self)
          expected.append(next)
          next &+= 1
        }
        left -= access.count
      }
      #expect(try machine.next() == .done)
      #expect(try machine.memory.bytes(.init(address), count: 40 * size) == expected)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func carryStores(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    for size in [1, 2, 4, 8] {
      try machine.start("store\(size)", mode) {
        $0.rdi = TestMachine.hole + 0x123
        $0.rax = Self.value
      }
      #expect(try machine.next() == .store(TestMachine.hole + 0x123, Array(Self.bytes.prefix(size))))
      #expect(try machine.next() == .done)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func carryLoads(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    let expected: [String: (UInt8, UInt64)] = [
      "load1": (1, 0xffff_ffff_ffff_ff88), "load2": (2, 0xffff_ffff_ffff_7788), "load4": (4, 0x5566_7788),
      "load8": (8, 0x1122_3344_5566_7788), "loadsigned": (1, 0xffff_ffff_ffff_ff88),
    ]
    for (guest, (size, result)) in expected {
      try machine.start(guest, mode) {
        $0.rdi = TestMachine.hole + 0x123
        $0.rax = .max
      }
      #expect(try machine.next(answer: Self.bytes.reversed()) == .load(TestMachine.hole + 0x123, size: size))
      #expect(try machine.next() == .done)
      #expect(try machine.vcpu.readRegisters().rax == result)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue, rings)
  func areCompletedWithoutGoingOn(_ subject: AcceleratorUnderTest, _ mode: TestMachine.Mode) throws {
    let machine = try TestMachine(subject)
    try machine.start("in4", mode) { $0.rdx = UInt64(Self.port) }
    #expect(try machine.next(answer: Self.bytes) == .input(port: Self.port, size: 4, count: 1))
    #expect(try machine.complete() == [])
    let registers = try machine.vcpu.readRegisters()
    #expect(registers.rax == 0x4433_2211)
    #expect(registers.rip == TestMachine.entry + 1)
    #expect(try machine.complete() == [])
    #expect(try machine.vcpu.readRegisters() == registers)
    #expect(try machine.next() == .done)
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func areCompletedInAllTheirParts(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject)
    try machine.start("load16") { $0.rdi = TestMachine.hole }
    #expect(try machine.next(answer: Self.bytes) == .load(TestMachine.hole, size: 8))
    #expect(try machine.complete(answer: Self.bytes.reversed()) == [.load(TestMachine.hole + 8, size: 8)])
    let state = try machine.vcpu.readState()
    #expect(state.general.rip == TestMachine.entry + 3)
    // XMM0 in the XSAVE area (SDM vol. 1, 13.4.1).
    #expect(Array(state.extended[160..<176]) == Self.bytes + Self.bytes.reversed())
    #expect(try machine.next() == .done)
  }
}
