import Accelerator
import CSoftCPU
import X86

/// Execution of one decoded instruction, of any kind in any mode: the reference that faster paths are checked against.
extension Processor {
  /// Executes an instruction that lies at `cpu.rip`, and moves on to the next.
  ///
  /// - Throws: what stopped it. `cpu.rip` is then still the instruction's.
  func execute(_ i: Instruction) throws(Interruption) {
    nextIP = (cpu.pointee.rip &+ UInt64(i.length)) & instructionPointerMask
    guard features.has(i.operation.feature) else { return try executeWithoutFeature(i) }
    if i.operation.isPrivileged, cpu.pointee.cpl != 0 { throw privilegeFault(i) }
    if i.operation.isProtectedModeOnly, !isProtected { throw .invalidOpcode }
    if i.opcodeMap == 0, i.opcode & 0xf8 == 0xd8 || i.opcode == 0x9b {
      try executeX87(i)
    } else if Self.vectorFeatures >> UInt64(i.operation.feature.rawValue) & 1 != 0, try executeVector(i) {
      // Done.
    } else if hostDebug.software, i.operation.mnemonic == .int3 {
      pendingExit = .debug(DebugEvent(address: codeAddress(cpu.pointee.rip), status: 0, vector: 3))
      throw .exit
    } else if try !executeInteger(i) {
      try executeSystem(i)
    }
    cpu.pointee.rip = nextIP
  }

  /// What an instruction of a missing feature is: #UD, or what its bytes meant before the feature existed.
  private func executeWithoutFeature(_ i: Instruction) throws(Interruption) {
    switch i.operation.mnemonic {
    case .prefetchw: break
    case .vmcall, .vmmcall: hypercall()
    default: throw .invalidOpcode
    }
    cpu.pointee.rip = nextIP
  }

  /// The fault of a privileged instruction outside ring 0.
  private func privilegeFault(_ i: Instruction) -> Interruption {
    // Outside system-management mode it is no instruction, whoever asks.
    if i.operation.mnemonic == .rsm { return .invalidOpcode }
    return switch i.operation.feature {
    // Not there at all for the user (SDM vol. 2: CLAC, STAC; virtualisation off).
    case .smap, .vmx, .svm: .invalidOpcode
    default: .generalProtection
    }
  }

  /// The bits of RIP that the code's mode has.
  @inline(__always)
  var instructionPointerMask: UInt64 { is64Bit ? ~0 : 0xffff_ffff }

  /// Features whose instructions `executeVector` looks at first.
  private static let vectorFeatures: UInt64 = [
    .mmx, .sse, .sse2, .sse3, .ssse3, .sse41, .sse42, .aes, .pclmulqdq, .sha, .avx, .avx2, .f16c, .fma,
    .fxsr, .xsave, .xsaveopt, .xsavec, .xsaves,
  ].reduce(0) { (bits: UInt64, feature: Feature) in bits | 1 << UInt64(feature.rawValue) }
}
