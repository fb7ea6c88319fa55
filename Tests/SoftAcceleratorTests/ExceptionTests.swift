import CSoftCPU
import Testing
import X86

@testable import SoftAccelerator

@Suite struct ExceptionTests {
  @Test func realModeInterruptAndReturn() {
    // sti; int 0x21; (handler: iret) hlt
    let cpu = SystemCPU(.real, code: [0xfb, 0xcd, 0x21, 0xf4])
    cpu.put([0x9c, 0x58, 0xcf], at: 0x4210)  // pushf; pop ax; iret
    #expect(cpu.runToHalt())
    #expect(cpu.cpu.pointee.rip == 0x1004)
    #expect(cpu.processor.general[4] == 0x8000)
    #expect(cpu.processor.general[0] & 0x200 == 0)
    #expect(cpu.processor.rflags & 0x200 != 0)
    // The frame is still below the stack pointer: IP, CS, FLAGS with IF.
    #expect(cpu.get(0x7ffa, as: UInt16.self) == 0x1003)
    #expect(cpu.get(0x7ffc, as: UInt16.self) == 0)
    #expect(cpu.get(0x7ffe, as: UInt16.self) & 0x200 != 0)
  }

  @Test func ring3FaultSwitchesStacks() {
    let cpu = SystemCPU(.protected, code: [0xf4], ring: 3)
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 13)
    #expect(cpu.cpu.pointee.cpl == 0)
    // Error code, EIP, CS, EFLAGS with RF, ESP, SS.
    #expect(cpu.stack(6, as: UInt32.self) == [0, 0x1000, 0x1b, 0x1_0002, 0x8000, 0x23])
    #expect(cpu.processor.general[4] == SystemCPU.stack0 - 24)
    #expect(cpu.processor.segments[SegmentIndex.ss].selector == SystemCPU.data0)
  }

  @Test func sameLevelTrapGateKeepsIF() {
    let cpu = SystemCPU(.protected, code: [0xcc])
    cpu.setGate(3, isLong: false, attributes: 0x8f)
    cpu.processor.rflags = 0x202
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 3)
    #expect(cpu.stack(3, as: UInt32.self) == [0x1001, 8, 0x202])
    #expect(cpu.processor.rflags & 0x200 != 0)
  }

  @Test func softwareInterruptNeedsGatePrivilege() {
    let cpu = SystemCPU(.protected, code: [0xcd, 0x80], ring: 3)
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 13)
    #expect(cpu.stack(2, as: UInt32.self) == [0x80 * 8 + 2, 0x1000])
  }

  @Test func gateBeyondTheTableIsReportedWithItsVector() {
    let cpu = SystemCPU(.protected, code: [0x0f, 0x0b])
    cpu.cpu.pointee.idt_limit = 14 * 8 + 7
    cpu.setGate(6, isLong: false, attributes: 0x0e)
    #expect(cpu.runToHalt())
    // #UD's gate is not present: #NP with EXT and IDT.
    #expect(cpu.vector == 11)
    #expect(cpu.stack(2, as: UInt32.self) == [6 * 8 + 3, 0x1000])
  }

  @Test func contributoryFaultsAreDouble() {
    let cpu = SystemCPU(.protected, code: [0xf4], ring: 3)
    cpu.setGate(13, isLong: false, attributes: 0x0e)
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 8)
    #expect(cpu.stack(2, as: UInt32.self) == [0, 0x1000])
  }

  @Test func noTableIsATripleFault() {
    let cpu = SystemCPU(.long, code: [0x0f, 0x0b])
    cpu.cpu.pointee.idt_limit = 0
    let exit = cpu.processor.run()
    guard case .tripleFault = exit else {
      Issue.record("\(exit)")
      return
    }
    #expect(cpu.cpu.pointee.rip == 0x1000)
    #expect(cpu.processor.general[4] == SystemCPU.stack0)
  }

  @Test func virtual8086MonitorGetsAllSegments() {
    // In virtual-8086 mode CLI without IOPL 3 is the monitor's.
    let cpu = SystemCPU(.protected, code: [0xfa, 0xf4])
    cpu.processor.rflags = 0x2_0002
    for index in 0..<6 { cpu.processor.segments[index] = soft_segment(virtual8086: UInt16(0x10 * index)) }
    cpu.processor.segments[SegmentIndex.cs] = soft_segment(virtual8086: 0)
    cpu.processor.general[4] = 0x7000
    cpu.processor.updateMode()
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 13)
    #expect(cpu.cpu.pointee.cpl == 0)
    #expect(cpu.stack(10, as: UInt32.self) == [0, 0x1000, 0, 0x3_0002, 0x7000, 0x20, 0, 0x30, 0x40, 0x50])
    #expect(!cpu.processor.segments[SegmentIndex.ds].isUsable)
    #expect(cpu.processor.segments[SegmentIndex.gs].selector == 0)
    #expect(cpu.processor.rflags & 0x2_0000 == 0)

    // add esp, 4; iretd: back to virtual-8086 mode with every register.
    cpu.put([0x83, 0xc4, 0x04, 0xcf], at: 0x4000 + 13 * 16 + 1)
    cpu.put([0x90], at: 0x1000)
    cpu.processor.isHalted = false
    #expect(cpu.runToHalt())
    // NOP, then HLT is #GP again.
    #expect(cpu.vector == 13)
    #expect(cpu.stack(10, as: UInt32.self) == [0, 0x1001, 0, 0x3_0002, 0x7000, 0x20, 0, 0x30, 0x40, 0x50])
  }

  @Test func longModePageFault() {
    // mov [0x6008], eax with the page not present.
    let cpu = SystemCPU(.long, code: [0x89, 0x04, 0x25, 0x08, 0x60, 0, 0], ring: 3)
    cpu.put(0 as UInt64, at: 0x13000 + 6 * 8)
    cpu.put(0xa008 as UInt64, at: SystemCPU.tss + 36)
    cpu.setGate(14, isLong: true, stack: 1)
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 14)
    #expect(cpu.cpu.pointee.cr2 == 0x6008)
    #expect(cpu.stack(6, as: UInt64.self) == [6, 0x1000, 0x1b, 0x1_0002, 0x8000, 0x23])
    #expect(cpu.processor.general[4] == 0xa000 - 48)
    #expect(cpu.processor.segments[SegmentIndex.ss].selector == 0)
    #expect(!cpu.processor.segments[SegmentIndex.ss].isUsable)
  }

  @Test func interruptedStateStaysWhereItsStackFaults() {
    let cpu = SystemCPU(.long, code: [0x0f, 0x0b], ring: 3)
    // The ring-0 stack is not present: #PF while delivering #UD, and that again: double, then triple fault.
    cpu.put(0 as UInt64, at: 0x13000 + 8 * 8)
    let exit = cpu.processor.run()
    guard case .tripleFault = exit else {
      Issue.record("\(exit)")
      return
    }
    #expect(cpu.cpu.pointee.rip == 0x1000)
    #expect(cpu.cpu.pointee.cpl == 3)
    #expect(cpu.processor.general[4] == SystemCPU.stack3)
    #expect(cpu.cpu.pointee.cr2 == 0x8ff8)
  }

  @Test func externalInterruptsAndNMIs() {
    // sti; nop; nop; hlt: the shadow lets the first NOP through.
    let cpu = SystemCPU(.long, code: [0xfb, 0x90, 0x90, 0xf4])
    cpu.processor.pendingInterrupt = 0x30
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 0x30)
    #expect(cpu.stack(3, as: UInt64.self) == [0x1002, 8, 0x202])
    // An NMI ends HLT, and masks further ones until IRET.
    cpu.processor.postNMI()
    cpu.processor.isHalted = false
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 2)
    #expect(cpu.cpu.pointee.nmi_masked)
    cpu.put([0x48, 0xcf], at: cpu.cpu.pointee.rip)  // iretq
    cpu.put([0x90, 0xf4], at: 0x4000 + 0x30 * 16 + 1)
    cpu.processor.isHalted = false
    #expect(cpu.runToHalt())
    #expect(!cpu.cpu.pointee.nmi_masked)
    #expect(cpu.cpu.pointee.rip == 0x4000 + 0x30 * 16 + 3)
  }

  @Test func interruptReturnToUser() {
    // iretq to ring 3, where HLT faults.
    let cpu = SystemCPU(.long, code: [0x48, 0xcf])
    cpu.put([0xf4], at: 0x1800)
    cpu.processor.general[4] = 0x8f00
    for (index, value) in ([0x1800, 0x1b, 0x3202, 0x7700, 0x23] as [UInt64]).enumerated() {
      cpu.put(value, at: 0x8f00 + UInt64(index * 8))
    }
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 13)
    #expect(cpu.stack(6, as: UInt64.self) == [0, 0x1800, 0x1b, 0x1_3202, 0x7700, 0x23])
    // DS was ring 0's data: taken away.
    #expect(!cpu.processor.segments[SegmentIndex.ds].isUsable)
  }
}
