import Accelerator
import GuestMemory
import Testing

/// Pinned registers: an instruction that would weaken one is an exit, and goes through once the pin is lifted.
@Suite struct Pins {
  private struct Change: Sendable {
    var code: [UInt8]
    /// RAX at the instruction, from the system registers.
    var value: @Sendable (SystemRegisters) -> UInt64
  }

  private static let changes: [PinnedRegister: Change] = [
    // mov cr0, rax; mov cr4, rax; wrmsr; lidt [rdi]; lgdt [rdi]
    .writeProtect: Change(code: [0x0f, 0x22, 0xc0]) { $0.cr0 & ~(1 << 16) },
    .smep: Change(code: [0x0f, 0x22, 0xe0]) { $0.cr4 & ~(1 << 20) },
    .smap: Change(code: [0x0f, 0x22, 0xe0]) { $0.cr4 & ~(1 << 21) },
    .noExecute: Change(code: [0x0f, 0x30]) { $0.efer & ~(1 << 11) },
    .idtr: Change(code: [0x0f, 0x01, 0x1f]) { _ in 0 },
    .gdtr: Change(code: [0x0f, 0x01, 0x17]) { _ in 0 },
  ]

  @Test(arguments: AcceleratorUnderTest.catalogue, PinnedRegister.allCases)
  func keepWhatIsPinned(_ subject: AcceleratorUnderTest, _ register: PinnedRegister) throws {
    let machine = try TestMachine(subject, needs: .registerPinning)
    let change = try #require(Self.changes[register])
    // The supervisor's own pages, where SMEP and SMAP let it live.
    try machine.write(UInt64(0x2003), to: 0x1000)
    // Another table.
    try machine.write(UInt16(0xff), to: TestMachine.data)
    try machine.write(UInt64(0x7000), to: TestMachine.data + 2)
    for isPinned in [true, false] {
      try machine.start("long")
      var system = try machine.vcpu.readSystemRegisters()
      system.cr4 |= 3 << 20
      try machine.vcpu.writeSystemRegisters(system)
      var general = try machine.vcpu.readRegisters()
      general.rax = change.value(system)
      general.rcx = 0xc000_0080
      general.rdi = TestMachine.data
      try machine.vcpu.writeRegisters(general)
      try machine.memory.write(change.code + [0xe6, 0x99], to: GuestPhysicalAddress(TestMachine.entry))
      // The other registers' pins do not matter.
      try machine.vcpu.pin(
        isPinned ? Set(PinnedRegister.allCases) : Set(PinnedRegister.allCases).subtracting([register]))
      if isPinned {
        guard case .pinnedRegister(register, _) = try machine.vcpu.run() else {
          Issue.record("the register was changed")
          return
        }
        #expect(try machine.vcpu.readRegisters().rip == TestMachine.entry)
        #expect(try machine.vcpu.readSystemRegisters() == system)
        try machine.vcpu.pin([])
      }
      #expect(try machine.next() == .done)
      #expect(try machine.vcpu.readSystemRegisters() != system)
    }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func letThroughWhatWeakensNothing(_ subject: AcceleratorUnderTest) throws {
    let machine = try TestMachine(subject, needs: .registerPinning)
    try machine.vcpu.pin(Set(PinnedRegister.allCases))
    // mov rax, cr0; mov cr0, rax; mov rax, cr4; mov cr4, rax; mov rax, cr3; mov cr3, rax
    try machine.start("long")
    let code: [UInt8] = [0x20, 0xc0, 0x22, 0xc0, 0x20, 0xe0, 0x22, 0xe0, 0x20, 0xd8, 0x22, 0xd8]
    let bytes: [UInt8] = stride(from: 0, to: code.count, by: 2).flatMap { [0x0f, code[$0], code[$0 + 1]] }
    try machine.memory.write(bytes + [0xe6, 0x99], to: GuestPhysicalAddress(TestMachine.entry))
    #expect(try machine.next() == .done)
  }
}
