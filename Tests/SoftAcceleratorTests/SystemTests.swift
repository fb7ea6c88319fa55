import Accelerator
import CSoftCPU
import Testing
import X86

@testable import SoftAccelerator

@Suite struct SystemTests {
  // MARK: Segments and far transfers

  @Test func callGateCopiesParametersAndReturns() {
    // In ring 3: push 0x11; push 0x22; lcall gate:0; (ring 0: retf 8) hlt
    let code: [UInt8] = [0x6a, 0x11, 0x6a, 0x22, 0x9a, 0, 0, 0, 0, 0x3b, 0, 0xf4]
    let cpu = SystemCPU(.protected, code: code, ring: 3)
    // Two parameters, DPL 3, to 8:0x1800.
    cpu.setDescriptor(SystemCPU.own, 0x1800 | 8 << 16 | 2 << 32 | 0xec << 40)
    cpu.put([0x8b, 0x44, 0x24, 0x08, 0x8b, 0x5c, 0x24, 0x0c, 0x8c, 0xd1, 0xca, 8, 0], at: 0x1800)
    #expect(cpu.runToHalt())
    // The inner procedure saw its parameters and its stack segment.
    #expect(cpu.processor.general[0] == 0x22)
    #expect(cpu.processor.general[3] == 0x11)
    #expect(cpu.processor.general[1] == 0x10)
    // Its frame: EIP, CS, parameters, ESP, SS.
    let frame = (0..<6).map { cpu.get(SystemCPU.stack0 - 24 + UInt64($0 * 4), as: UInt32.self) }
    // #GP of HLT in ring 3 has overwritten the frame from the top.
    #expect(frame[5] == 0x23)
    #expect(cpu.vector == 13)
    #expect(cpu.stack(6, as: UInt32.self) == [0, 0x100b, 0x1b, 0x1_0002, 0x8000, 0x23])
  }

  @Test func segmentLoadsCheckTheirDescriptors() {
    func load(_ descriptor: UInt64, _ selector: UInt16, _ code: [UInt8], ring: UInt8 = 0) -> (UInt64?, UInt64) {
      let cpu = SystemCPU(.protected, code: code + [0xf4], ring: ring)
      cpu.setDescriptor(SystemCPU.own, descriptor)
      cpu.processor.general[0] = UInt64(selector)
      _ = cpu.runToHalt()
      return (cpu.vector, cpu.vector == nil ? 0 : cpu.stack(1, as: UInt32.self)[0])
    }
    let toDS: [UInt8] = [0x8e, 0xd8]
    let toSS: [UInt8] = [0x8e, 0xd0]
    let data: UInt64 = 0x00cf_9200_0000_ffff
    #expect(load(data, 0x38, toDS) == (nil, 0))
    #expect(load(data, 0, toDS) == (nil, 0))
    #expect(load(data, 0, toSS) == (13, 0))
    #expect(load(data, 0x80, toDS) == (13, 0x80))
    #expect(load(data & ~(1 << 47), 0x38, toDS) == (11, 0x38))
    #expect(load(data & ~(1 << 47), 0x38, toSS) == (12, 0x38))
    #expect(load(data, 0x3b, toSS) == (13, 0x38))
    #expect(load(data & ~(1 << 41), 0x38, toSS) == (13, 0x38))
    // Code that cannot be read.
    #expect(load(0x00cf_9800_0000_ffff, 0x38, toDS) == (13, 0x38))
    // An LDT that is not there.
    #expect(load(data, 0x3c, toDS) == (13, 0x3c))
  }

  @Test func loadsSetTheAccessedBit() {
    let cpu = SystemCPU(.protected, code: [0x8e, 0xd8, 0xf4])
    cpu.setDescriptor(SystemCPU.own, 0x00cf_9200_0000_ffff)
    cpu.processor.general[0] = 0x38
    #expect(cpu.runToHalt())
    #expect(cpu.get(0x838, as: UInt64.self) == 0x00cf_9300_0000_ffff)
    #expect(cpu.processor.segments[SegmentIndex.ds].attributes == 0xc93)
  }

  @Test func rightsAndLimits() {
    // lar ebx, ax; lsl ecx, ax; setz dl; verw ax; setz dh
    let code: [UInt8] = [
      0x0f, 0x02, 0xd8, 0x0f, 0x03, 0xc8, 0x0f, 0x94, 0xc2, 0x0f, 0x00, 0xe8, 0x0f, 0x94, 0xc6, 0xf4,
    ]
    let cpu = SystemCPU(.protected, code: code)
    cpu.processor.general[0] = UInt64(SystemCPU.code3)
    cpu.processor.general[2] = 0
    #expect(cpu.runToHalt())
    #expect(cpu.processor.general[3] == 0xcf_fb00 & 0xf0_ff00)
    #expect(cpu.processor.general[1] == 0xffff_ffff)
    // Code cannot be written.
    #expect(cpu.processor.general[2] == 1)
  }

  // MARK: System calls

  @Test func systemCallAndReturn() {
    // syscall (ring 0: sysretq) hlt
    let cpu = SystemCPU(.long, code: [0x0f, 0x05, 0xf4], ring: 3)
    cpu.put([0x48, 0x0f, 0x07], at: 0x1800)
    cpu.cpu.pointee.star = 0x0013_0008_0000_0000
    cpu.cpu.pointee.lstar = 0x1800
    cpu.cpu.pointee.fmask = 0x200
    cpu.processor.rflags = 0x203
    #expect(cpu.runToHalt())
    #expect(cpu.processor.general[1] == 0x1002)
    #expect(cpu.processor.general[11] == 0x203)
    #expect(cpu.vector == 13)
    // Back in ring 3 with CS 0x23 and SS 0x1b, as STAR says.
    #expect(cpu.stack(6, as: UInt64.self) == [0, 0x1002, 0x23, 0x1_0203, 0x8000, 0x1b])
  }

  @Test func repeatedMoveReadsBeforeItLooksAtItsDestination() {
    let cpu = SystemCPU(.long, code: [0xf3, 0xa4, 0xf4])
    cpu.processor.general[1] = 4
    cpu.processor.general[6] = UInt64(SystemCPU.size)  // not mapped
    cpu.processor.general[7] = 0x8000_0000_0000  // not canonical
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 14)
  }

  // MARK: Control registers

  @Test func controlRegistersRefuseWhatDoesNotExist() {
    func fault(_ code: [UInt8], _ value: UInt64) -> UInt64? {
      let cpu = SystemCPU(.long, code: code + [0xf4])
      cpu.processor.general[0] = value
      _ = cpu.runToHalt()
      return cpu.vector
    }
    let toCR0: [UInt8] = [0x0f, 0x22, 0xc0]
    let toCR3: [UInt8] = [0x0f, 0x22, 0xd8]
    let toCR4: [UInt8] = [0x0f, 0x22, 0xe0]
    #expect(fault(toCR0, 0x8001_0011) == nil)
    #expect(fault(toCR0, 1 << 32) == 13)
    #expect(fault(toCR0, 0x8000_0010) == 13)  // PG without PE
    #expect(fault(toCR0, 0xa000_0011) == 13)  // NW without CD
    #expect(fault(toCR0, 0x11) == 13)  // PG cleared in 64-bit mode
    #expect(fault(toCR3, 1 << 45) == 13)
    #expect(fault(toCR4, 0x20) == nil)
    #expect(fault(toCR4, 0) == 13)  // PAE cleared in long mode
    #expect(fault(toCR4, 0x20 | CR4.vmxe.rawValue) == 13)
    #expect(fault(toCR4, 0x20 | CR4.la57.rawValue) == 13)
    #expect(fault(toCR4, 0x20 | CR4.pcide.rawValue) == nil)
    #expect(fault([0x0f, 0x20, 0xc8], 0) == 6)  // CR1
    #expect(fault([0x44, 0x0f, 0x22, 0xc0], 16) == 13)  // CR8
  }

  @Test func modelSpecificRegisters() {
    let cpu = SystemCPU(.long)
    let p = cpu.processor
    #expect(p.readMSR(0x1234_5678) == nil)
    #expect(!p.writeMSR(0x1234_5678, 0))
    #expect(!p.writeMSR(MSR.lstar, 1 << 47))
    #expect(p.writeMSR(MSR.lstar, 0xffff_8000_0000_0000))
    #expect(!p.writeMSR(MSR.efer, 1 << 1))
    #expect(!p.writeMSR(MSR.efer, 0))  // LME under paging
    #expect(!p.writeMSR(MSR.pat, 2))
    #expect(p.writeMSR(MSR.pat, 0x0706_0504_0100_0607))
    #expect(!p.writeMSR(MSR.tscAux, 1 << 32))
    // Off to x2APIC, and x2APIC to xAPIC, are not among the transitions.
    #expect(!p.writeMSR(MSR.apicBase, 0xfee0_0400))
    #expect(p.writeMSR(MSR.apicBase, 0xfee0_0d00))
    #expect(!p.writeMSR(MSR.apicBase, 0xfee0_0900))
    // IA32_TSC_ADJUST follows a write of the counter.
    #expect(p.writeMSR(MSR.tscAdjust, 5))
    let before = p.timeStampCounter
    #expect(p.writeMSR(MSR.timeStampCounter, before &+ 1 << 40))
    #expect((p.readMSR(MSR.tscAdjust) ?? 0) &- 5 <= 1 << 40)
    #expect((p.readMSR(MSR.tscAdjust) ?? 0) > 1 << 39)
  }

  @Test func fromRealToLongMode() {
    let cpu = SystemCPU(.long)
    // The tables of long mode, entered from real mode through protected mode.
    let p = cpu.processor
    p.reset()
    p.loadRealSegment(SegmentIndex.cs, 0)
    p.general[4] = 0x7000
    cpu.cpu.pointee.rip = 0x1000
    cpu.put(UInt16(0x7f), at: 0x1f00)
    cpu.put(UInt32(0x800), at: 0x1f02)
    cpu.setDescriptor(SystemCPU.own, 0x00cf_9b00_0000_ffff)
    cpu.put(
      [
        0x0f, 0x01, 0x16, 0x00, 0x1f,  // lgdt [0x1f00]
        0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0,  // mov eax, cr0; or al, 1; mov cr0, eax
        0xea, 0x00, 0x18, 0x38, 0x00,  // jmp 0x38:0x1800
      ], at: 0x1000)
    cpu.put(
      [
        0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0,  // CR4.PAE
        0xb8, 0x00, 0x00, 0x01, 0x00, 0x0f, 0x22, 0xd8,  // CR3
        0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0, 0, 0x0f, 0x30,  // EFER.LME
        0x0f, 0x20, 0xc0, 0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0,  // CR0.PG
        0xea, 0x00, 0x19, 0, 0, 0x08, 0x00,  // jmp 8:0x1900
      ], at: 0x1800)
    // mov rax, 0x123456789abcdef; hlt
    cpu.put([0x48, 0xb8, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, 0xf4], at: 0x1900)
    #expect(cpu.runToHalt())
    #expect(p.general[0] == 0x0123_4567_89ab_cdef)
    #expect(p.is64Bit)
    #expect(cpu.cpu.pointee.efer & EFER.lma.rawValue != 0)
    #expect(p.segments[SegmentIndex.cs].selector == 8)
  }

  // MARK: Debug

  @Test func singleStepTrapsAfterEachInstruction() {
    let cpu = SystemCPU(.long, code: [0x90, 0x90, 0xf4])
    cpu.processor.rflags = 0x102
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 1)
    #expect(cpu.stack(3, as: UInt64.self) == [0x1001, 8, 0x102])
    #expect(cpu.cpu.pointee.dr.6 == 0xffff_4ff0)
    #expect(cpu.processor.rflags & 0x100 == 0)
  }

  @Test func stackSegmentLoadPostponesTraps() {
    // mov ss, eax; nop; hlt with TF
    let cpu = SystemCPU(.protected, code: [0x8e, 0xd0, 0x90, 0x90, 0xf4])
    cpu.processor.general[0] = 0x10
    cpu.processor.rflags = 0x102
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 1)
    #expect(cpu.stack(1, as: UInt32.self) == [0x1003])
  }

  @Test func breakpoints() {
    // mov [0x6004], eax with a 4-byte write breakpoint there; nop; hlt
    let cpu = SystemCPU(.long, code: [0x89, 0x04, 0x25, 0x04, 0x60, 0, 0, 0x90, 0xf4])
    cpu.cpu.pointee.dr.1 = 0x6004
    cpu.cpu.pointee.dr.7 = 0x400 | 1 << 2 | 0xd << 20
    cpu.processor.updateDebug()
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 1)
    #expect(cpu.stack(1, as: UInt64.self) == [0x1007])
    #expect(cpu.cpu.pointee.dr.6 == 0xffff_0ff2)

    // On an instruction: before it, and not again with RF.
    let code = SystemCPU(.long, code: [0x90, 0x90, 0xf4])
    code.cpu.pointee.dr.0 = 0x1001
    code.cpu.pointee.dr.7 = 0x401
    code.processor.updateDebug()
    #expect(code.runToHalt())
    #expect(code.vector == 1)
    #expect(code.stack(3, as: UInt64.self) == [0x1001, 8, 2])
    code.put([0x48, 0xcf], at: code.cpu.pointee.rip)
    code.put(0x1_0002 as UInt64, at: code.processor.general[4] + 16)
    code.processor.isHalted = false
    #expect(code.runToHalt())
    #expect(code.cpu.pointee.rip == 0x1003)
    #expect(code.processor.rflags & 0x1_0000 == 0)
  }

  @Test func generalDetect() {
    let cpu = SystemCPU(.long, code: [0x0f, 0x21, 0xf8, 0xf4])  // mov rax, dr7
    cpu.cpu.pointee.dr.7 = 0x2400
    #expect(cpu.runToHalt())
    #expect(cpu.vector == 1)
    #expect(cpu.stack(1, as: UInt64.self) == [0x1000])
    #expect(cpu.cpu.pointee.dr.6 & 0x2000 != 0)
    #expect(cpu.cpu.pointee.dr.7 & 0x2000 == 0)
  }

  // MARK: Tasks

  @Test func taskSwitchAndBack() {
    // call task:0; hlt. The new task: iretd.
    let cpu = SystemCPU(.protected, code: [0x9a, 0, 0, 0, 0, 0x38, 0, 0xf4])
    cpu.setDescriptor(SystemCPU.own, SegmentDescriptor(base: 0x6000, limit: 0x67, attributes: 0x89).rawValue)
    let fields: [(UInt64, UInt32)] = [
      (32, 0x1800), (36, 2), (40, 0x1234), (56, 0x7000), (72, 0x10), (76, 8), (80, 0x10), (84, 0x10),
    ]
    for (offset, value) in fields { cpu.put(value, at: 0x6000 + offset) }
    cpu.put([0xa3, 0x00, 0x70, 0, 0, 0xcf], at: 0x1800)  // mov [0x7000], eax; iretd
    cpu.processor.general[0] = 0x55
    #expect(cpu.runToHalt())
    #expect(cpu.vector == nil)
    #expect(cpu.cpu.pointee.rip == 0x1008)
    #expect(cpu.get(0x7000, as: UInt32.self) == 0x1234)
    #expect(cpu.processor.general[0] == 0x55)
    #expect(cpu.processor.segments[SegmentIndex.tr].selector == SystemCPU.task)
    #expect(cpu.cpu.pointee.cr0 & 8 != 0)
    // The nested task had NT and a link, and is available again.
    #expect(cpu.get(0x6000, as: UInt16.self) == SystemCPU.task)
    #expect(cpu.get(0x83d, as: UInt8.self) == 0x89)
    #expect(cpu.get(0x82d, as: UInt8.self) == 0x8b)
    #expect(cpu.get(0x6024, as: UInt32.self) == 2)
  }

  // MARK: State

  @Test func stateRoundTrip() throws {
    let cpu = SystemCPU(.long, ring: 3)
    let p = cpu.processor
    for index in 0..<16 { p.general[index] = UInt64(index) &* 0x0101_0101_0101 }
    soft_vector(p.cpu, 3).storeBytes(of: 0x1122_3344, as: UInt32.self)
    p.cpu.pointee.star = 0x0013_0008_0000_0000
    p.cpu.pointee.pat = 0x0706_0504_0100_0607
    p.cpu.pointee.dr.0 = 0x1234
    p.rflags = 0x3247
    var saved = p.state
    let other = SystemCPU(.real).processor
    try other.setState(saved)
    var restored = other.state
    // The counter runs.
    saved.modelSpecific.removeAll { $0.index == MSR.timeStampCounter }
    restored.modelSpecific.removeAll { $0.index == MSR.timeStampCounter }
    #expect(saved == restored)
    #expect(other.cpu.pointee.cpl == 3)
    #expect(other.is64Bit)
  }

  @Test func identification() {
    // mov eax, 1; cpuid
    let cpu = SystemCPU(.long, code: [0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0xf4])
    #expect(cpu.runToHalt())
    #expect(cpu.processor.general[0] == 0x30661)
    // OSXSAVE follows CR4.
    #expect(cpu.processor.general[1] & 1 << 27 == 0)
    #expect(cpu.processor.general[1] & 1 << 31 != 0)
    #expect(cpu.processor.general[2] & 1 << 9 != 0)
    cpu.cpu.pointee.rip = 0x1000
    cpu.cpu.pointee.cr4 |= CR4.osxsave.rawValue
    cpu.processor.isHalted = false
    #expect(cpu.runToHalt())
    #expect(cpu.processor.general[1] & 1 << 27 != 0)
  }
}
