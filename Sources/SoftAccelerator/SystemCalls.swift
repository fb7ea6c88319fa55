import CSoftCPU
import X86

/// SYSCALL, SYSENTER and their returns (SDM vol. 3, 5.8.7 and 5.8.8), SWAPGS.
extension Processor {
  /// Executes one; false for any other instruction.
  func executeSystemCall(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .syscall: try systemCall()
    case .sysret: try systemReturn(is64: false)
    case .sysretq: try systemReturn(is64: true)
    case .sysenter: try systemEnter()
    case .sysexit: try systemExit(is64: false)
    case .sysexitq: try systemExit(is64: true)
    case .swapgs:
      let base = segments[SegmentIndex.gs].base
      segments[SegmentIndex.gs].base = cpu.pointee.kernel_gs_base
      cpu.pointee.kernel_gs_base = base
    default: return false
    }
    return true
  }

  private static let code64: UInt16 = 0xa9b
  private static let code32: UInt16 = 0xc9b
  private static let data: UInt16 = 0xc93
  private static let user: UInt16 = 0x60

  /// Outside 64-bit mode SYSCALL is AMD's, and #UD on Intel's processors, whose system software leaves CSTAR 0.
  private func systemCall() throws(Interruption) {
    guard cpu.pointee.efer & EFER.sce.rawValue != 0, is64Bit || isLongMode && cpu.pointee.cstar != 0 else {
      throw .invalidOpcode
    }
    general[1] = nextIP
    general[11] = rflags & ~RFLAGS.rf.rawValue
    let selector = UInt16(truncatingIfNeeded: cpu.pointee.star >> 32) & ~3
    nextIP = is64Bit ? cpu.pointee.lstar : cpu.pointee.cstar
    rflags &= ~(cpu.pointee.fmask | RFLAGS.rf.rawValue)
    segments[SegmentIndex.cs] = soft_segment(flat: selector, attributes: Self.code64)
    segments[SegmentIndex.ss] = soft_segment(flat: selector &+ 8, attributes: Self.data)
    updateMode(privilege: 0)
    trapAfterFlags()
  }

  /// A system call and its return are stepped where TF is set at their end.
  private func trapAfterFlags() {
    if cpu.pointee.other_flags & RFLAGS.tf.rawValue != 0 { pendingDebug |= DR6.bs.rawValue }
  }

  private func systemReturn(is64: Bool) throws(Interruption) {
    guard cpu.pointee.efer & EFER.sce.rawValue != 0, is64Bit else { throw .invalidOpcode }
    if is64, !isCanonical(general[1]) { throw .generalProtection }
    let selector = UInt16(truncatingIfNeeded: cpu.pointee.star >> 48)
    rflags = general[11] & 0x3c_7fd7
    segments[SegmentIndex.cs] = soft_segment(
      flat: (is64 ? selector &+ 16 : selector) | 3, attributes: (is64 ? Self.code64 : Self.code32) | Self.user)
    segments[SegmentIndex.ss] = soft_segment(flat: (selector &+ 8) | 3, attributes: Self.data | Self.user)
    nextIP = is64 ? general[1] : general[1] & 0xffff_ffff
    updateMode(privilege: 3)
    trapAfterFlags()
  }

  private func systemEnter() throws(Interruption) {
    let selector = UInt16(truncatingIfNeeded: cpu.pointee.sysenter_cs) & ~3
    guard cpu.pointee.cr0 & CR0.pe.rawValue != 0, selector != 0 else { throw .generalProtection }
    cpu.pointee.other_flags &= ~(RFLAGS([.vm, .if, .rf]).rawValue)
    let mask: UInt64 = isLongMode ? ~0 : 0xffff_ffff
    segments[SegmentIndex.cs] = soft_segment(flat: selector, attributes: isLongMode ? Self.code64 : Self.code32)
    segments[SegmentIndex.ss] = soft_segment(flat: selector &+ 8, attributes: Self.data)
    updateMode(privilege: 0)
    general[4] = cpu.pointee.sysenter_esp & mask
    nextIP = cpu.pointee.sysenter_eip & mask
  }

  private func systemExit(is64: Bool) throws(Interruption) {
    let selector = UInt16(truncatingIfNeeded: cpu.pointee.sysenter_cs) & ~3
    guard cpu.pointee.cr0 & CR0.pe.rawValue != 0, selector != 0 else { throw .generalProtection }
    if is64 { guard isCanonical(general[1]), isCanonical(general[2]) else { throw .generalProtection } }
    let first = selector &+ (is64 ? 32 : 16)
    segments[SegmentIndex.cs] = soft_segment(
      flat: first | 3, attributes: (is64 ? Self.code64 : Self.code32) | Self.user)
    segments[SegmentIndex.ss] = soft_segment(flat: (first &+ 8) | 3, attributes: Self.data | Self.user)
    let mask: UInt64 = is64 ? ~0 : 0xffff_ffff
    general[4] = general[1] & mask
    nextIP = general[2] & mask
    updateMode(privilege: 3)
  }
}
