import Accelerator
import CSoftCPU
import X86

/// What is neither integer nor vector work: all of it on top of the files that its parts are in.
extension Processor {
  /// Executes a system instruction.
  ///
  /// - Throws: its faults; #UD for what this CPU does not have.
  func executeSystem(_ i: Instruction) throws(Interruption) {
    if try executeSegment(i) { return }
    if try executeControl(i) { return }
    if try executeInterrupt(i) { return }
    if try executeFarTransfer(i) { return }
    if try executeSystemCall(i) { return }
    switch i.operation.mnemonic {
    case .hlt:
      // The run loop finds it halted before the next instruction, and reports that unless an event is due.
      isHalted = true
    case .cpuid: identify()
    case .rdmsr:
      guard let value = readMSR(UInt32(truncatingIfNeeded: general[1])) else { throw .generalProtection }
      general[0] = value & 0xffff_ffff
      general[2] = value >> 32
    case .wrmsr:
      let value = general[2] << 32 | general[0] & 0xffff_ffff
      let index = UInt32(truncatingIfNeeded: general[1])
      if index == MSR.efer { try keep(.noExecute, EFER.nxe.rawValue, of: cpu.pointee.efer, in: value) }
      guard writeMSR(index, value) else { throw .generalProtection }
    case .rdtsc, .rdtscp:
      if cpu.pointee.cr4 & CR4.tsd.rawValue != 0, cpu.pointee.cpl != 0 { throw .generalProtection }
      let ticks = timeStampCounter
      general[0] = ticks & 0xffff_ffff
      general[2] = ticks >> 32
      if i.operation.mnemonic == .rdtscp { general[1] = cpu.pointee.tsc_aux & 0xffff_ffff }
    case .rdpid: write(i.operands[0].register, cpu.pointee.tsc_aux)
    // There are no performance counters.
    case .rdpmc: throw .generalProtection
    case .xgetbv: try readExtendedControl()
    case .xsetbv: try writeExtendedControl()
    case .rdfsbase, .rdgsbase, .wrfsbase, .wrgsbase: try moveSegmentBase(i)
    default: throw .invalidOpcode
    }
  }

  private func moveSegmentBase(_ i: Instruction) throws(Interruption) {
    guard cpu.pointee.cr4 & CR4.fsgsbase.rawValue != 0 else { throw .invalidOpcode }
    let register = i.operands[0].register
    switch i.operation.mnemonic {
    case .rdfsbase: write(register, segments[SegmentIndex.fs].base)
    case .rdgsbase: write(register, segments[SegmentIndex.gs].base)
    default:
      let value = read(register)
      guard isCanonical(value) else { throw .generalProtection }
      segments[i.operation.mnemonic == .wrfsbase ? SegmentIndex.fs : SegmentIndex.gs].base = value
    }
  }

  // MARK: XCR0

  private func readExtendedControl() throws(Interruption) {
    guard cpu.pointee.cr4 & CR4.osxsave.rawValue != 0 else { throw .invalidOpcode }
    var value = cpu.pointee.xcr0
    switch general[1] & 0xffff_ffff {
    case 0: break
    case 1 where features.leaf(0xd, 1).eax & 4 != 0: value &= usedComponents
    default: throw .generalProtection
    }
    general[0] = value & 0xffff_ffff
    general[2] = value >> 32
  }

  private func writeExtendedControl() throws(Interruption) {
    guard cpu.pointee.cr4 & CR4.osxsave.rawValue != 0 else { throw .invalidOpcode }
    let value = general[2] << 32 | general[0] & 0xffff_ffff
    // x87 always; AVX needs SSE.
    guard general[1] & 0xffff_ffff == 0, value & 1 != 0, value & ~features.xcr0 == 0, value & 6 != 4 else {
      throw .generalProtection
    }
    cpu.pointee.xcr0 = value
  }

  // MARK: CPUID

  /// CPUID: a leaf of the table, with the bits that follow the CPU's state (SDM vol. 2A, CPUID).
  private func identify() {
    let function = UInt32(truncatingIfNeeded: general[0])
    let index = UInt32(truncatingIfNeeded: general[1])
    var leaf = features.leaf(function, index)
    switch function {
    case 1:
      if cpu.pointee.apic_base & 0x800 == 0 { leaf.edx &= ~(1 << 9) }
      leaf.ecx = leaf.ecx & ~(1 << 27) | (cpu.pointee.cr4 & CR4.osxsave.rawValue != 0 ? 1 << 27 : 0)
    case 7 where index == 0:
      leaf.ecx = leaf.ecx & ~(1 << 4) | (cpu.pointee.cr4 & CR4.pke.rawValue != 0 ? 1 << 4 : 0)
    case 0xb:
      leaf.ecx = leaf.ecx & ~0xff | index & 0xff
    case 0xd where index == 0: leaf.ebx = UInt32(Self.stateSize(cpu.pointee.xcr0, isCompact: false))
    case 0xd where index == 1 && features.has(.xsavec):
      leaf.ebx = UInt32(Self.stateSize(cpu.pointee.xcr0 | cpu.pointee.xss, isCompact: true))
    case 0x8000_0001:
      // SYSCALL is there in 64-bit mode alone.
      if !is64Bit { leaf.edx &= ~(1 << 11) }
    default: break
    }
    general[0] = UInt64(leaf.eax)
    general[3] = UInt64(leaf.ebx)
    general[1] = UInt64(leaf.ecx)
    general[2] = UInt64(leaf.edx)
  }
}
