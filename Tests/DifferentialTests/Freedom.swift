import NativeProcess
import X86

/// What the manuals leave open, and what a process cannot compare: the only places where the two sides may differ.
enum Freedom {
  /// Rows that are not compared, with the reason.
  static func exclusion(_ operation: X86.Operation) -> String? {
    if operation == .movsxdGvEw { return "AMD reads four bytes, Intel two" }
    return switch operation.mnemonic {
    case .syscall, .sysenter: "calls the kernel"
    case .sgdt, .sidt, .sldt, .str, .smsw: "emulated by the kernel where UMIP is on"
    case .rdtsc, .rdtscp, .rdpid, .rdrand, .rdseed, .cpuid, .xgetbv: "another value each time or on each CPU"
    case .vmcall, .vmmcall: "calls the hypervisor"
    case .int1: "a hypervisor that looks at #DB shows RIP before it"
    case .monitor, .mwait, .monitorx, .mwaitx: "outside ring 0 as the host's system software chose"
    case .xsave, .xsave64, .xsaveopt, .xsaveopt64, .xsavec, .xsavec64, .xrstor, .xrstor64:
      "depends on XCR0 and on which components the CPU takes for unused"
    case .fxsave, .fxsave64, .fnsave, .fnstenv: "stores x87's last instruction and operand, which a signal changes"
    default:
      switch operation.feature {
      case .vmx, .svm: "virtualisation"
      default: nil
      }
    }
  }

  /// Cases of compared rows that are not compared.
  static func exempts(_ i: Instruction) -> Bool {
    switch i.operation.mnemonic {
    // Linux's other gate for ring 3.
    case .int: i.immediate & 0xff == 0x80
    // Near branches with 66 in 64-bit mode: AMD cuts RIP to 16 bits, Intel ignores the prefix (SDM vol. 2, Jcc).
    case .call, .jmp, .ret, .loop, .loope, .loopne, .jrcxz, .jecxz, .jcxz, .jo, .jno, .jb, .jae, .je, .jne, .jbe, .ja,
      .js, .jns, .jp, .jnp, .jl, .jge, .jle, .jg:
      i.mode == .code64 && i.prefixes.contains(.operandSize) || i.mode == .code64 && isFarPointer(i)
        // AMD lets F2 and F3 choose the condition of LOOPcc; the manuals reserve them.
        || (i.opcode & 0xfe == 0xe0 && i.opcodeMap == 0 && (i.prefixes.contains(.rep) || i.prefixes.contains(.repne)))
    case .lss, .lfs, .lgs: i.mode == .code64 && isFarPointer(i)
    default: false
    }
  }

  /// Far pointers with 64-bit offsets: Intel's only (APM vol. 3, CALL Far, LFS).
  private static func isFarPointer(_ i: Instruction) -> Bool {
    i.rex & 8 != 0 && (0..<2).contains { i.operands[$0].kind == .memory && i.operands[$0].size == 10 }
  }

  /// Whether the sides may end a case differently: what the manuals say nothing about. Vectors are those of exceptions,
  /// 1 where the instruction completed.
  static func permits(
    _ i: Instruction, _ before: UnsafeMutablePointer<native_registers>, _ soft: Int32, _ native: Int32
  ) -> Bool {
    let memory: Set<Int32> = [12, 13, 14, 17]
    guard soft != 1 || native != 1, memory.contains(soft) || memory.contains(native) else { return false }
    let bothFault = memory.contains(soft) && memory.contains(native)
    let isX87 = i.opcodeMap == 0 && i.opcode & 0xf8 == 0xd8
    let isVector = i.operation.feature != .base
    // Unaligned accesses with AC set: AMD looks at alignment before the page, and at that of more than 8 bytes.
    if before.pointee.flags & 1 << 18 != 0, soft == 17 || native == 17, bothFault || isX87 || isVector { return true }
    // So are ENTER's look at the stack's new end, and the bytes beside a pushed selector.
    if before.pointee.flags & 1 << 18 != 0, native == 17,
      i.operation.mnemonic == .enter || i.operation.mnemonic == .push && i.operands[0].register.class == .segment
    {
      return true
    }
    // AMD's SHA instructions take operands at any address.
    if i.operation.feature == .sha, soft == 13 { return true }
    // AMD wants the offset to be canonical, beside the sum of it and FS's or GS's base.
    if i.mode == .code64, i.segment == .fs || i.segment == .gs, native == 13, soft == 1 || soft == 14 { return true }
    // A misaligned operand that also crosses the segment's limit.
    if isVector, bothFault, soft != native, soft != 14, native != 14 { return true }
    switch i.operation.mnemonic {
    // AMD holds each part of x87's state against the segment's limit, so that the whole may wrap around at 4 GiB.
    case .fldenv, .frstor: return bothFault || i.mode == .code32 && soft == 13 && native == 1
    // In which order an instruction's accesses are made, and which of them before it faults, is the processor's own.
    case .cmps, .call, .retf, .jmp, .iret, .pusha, .popa, .arpl, .bound, .fbld, .les,
      .lds, .lfs, .lgs, .lss, .fld:
      return bothFault
    // Whether bytes that are not written fault is the processor's own (SDM vol. 2, MASKMOVQ); AMD's fault comes after
    // x87's state has become MMX's.
    case .maskmovq, .maskmovdqu, .vmaskmovdqu: return memory.contains(native)
    // AMD's newer processors hold the whole operand against the segment's limit, without a look at the mask.
    case .vmaskmovps, .vmaskmovpd, .vpmaskmovd, .vpmaskmovq:
      return i.mode == .code32 && (native == 12 || native == 13)
    // AMD looks at the destination before it knows that an unmasked exception keeps it from being written.
    case .fst, .fstp, .fist, .fistp, .fisttp, .fbstp:
      return bothFault || soft == 1 && memory.contains(native)
    // AMD has MXCSR.MM (bit 17), which SDM reserves.
    case .ldmxcsr, .vldmxcsr, .fxrstor, .fxrstor64: return bothFault || soft == 13 && native == 1
    // Without ModRM on AMD: there is no more to be fetched.
    case .ud0, .ud1: return soft == 14 && native == 6
    case .vcvtps2ph: return soft == 19 && memory.contains(native)
    default: return false
    }
  }

  /// Bits of general registers that are undefined: LAR's 19:16. One segment of Linux's has the CPU's number as limit.
  static func undefinedBits(_ i: Instruction) -> UInt64 {
    switch i.operation.mnemonic {
    case .lar: 0xf_0000
    case .lsl: 0xfff
    default: 0
    }
  }

  /// The status flags that an instruction leaves undefined (SDM vol. 2 and APM vol. 3, each instruction's "Flags
  /// Affected"), where either manual does.
  static func undefinedFlags(_ i: Instruction, _ before: UnsafeMutablePointer<native_registers>) -> UInt64 {
    let (cf, pf, af, zf, sf, of): (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) = (1, 4, 16, 64, 128, 2048)
    switch i.operation.mnemonic {
    case .aaa, .aas: return of | sf | zf | pf
    case .aad, .aam: return of | af | cf
    case .daa, .das: return of
    case .and, .or, .xor, .test: return af
    case .andn, .blsi, .blsmsk, .blsr, .bzhi: return af | pf
    case .bextr: return af | sf | pf
    case .bsf, .bsr: return cf | of | sf | af | pf
    case .bt, .bts, .btr, .btc: return of | sf | af | pf
    case .div, .idiv: return cf | of | sf | zf | af | pf
    case .mul, .imul: return sf | zf | af | pf
    case .lzcnt, .tzcnt: return of | sf | pf | af
    case .rol, .ror, .rcl, .rcr: return count(i, before) == 1 ? 0 : of
    case .shl, .shr, .sar, .shld, .shrd:
      let count = count(i, before)
      guard count != 0 else { return 0 }
      let isWide = count >= i.operands[0].size * 8
      let isDouble = i.operation.mnemonic == .shld || i.operation.mnemonic == .shrd
      if isDouble, count > i.operands[0].size * 8 { return cf | of | sf | zf | af | pf }
      return af | (count > 1 ? of : 0) | (isWide && i.operation.mnemonic != .sar ? cf : 0)
    default: return 0
    }
  }

  /// The masked count of a shift or rotation.
  private static func count(_ i: Instruction, _ before: UnsafeMutablePointer<native_registers>) -> UInt8 {
    let last = i.operands[2].kind != .none ? i.operands[2] : i.operands[1]
    let count: UInt8 =
      switch last.kind {
      case .immediate: UInt8(truncatingIfNeeded: i.immediate)
      case .one: 1
      default: UInt8(truncatingIfNeeded: native_general(before)[1])
      }
    return count & (i.operands[0].size == 8 ? 63 : 31)
  }

  /// The general register whose value is undefined, if any: SHLD and SHRD by more than the size.
  static func undefinedRegister(_ i: Instruction, _ before: UnsafeMutablePointer<native_registers>) -> Int? {
    switch i.operation.mnemonic {
    case .shld, .shrd:
      guard i.operands[0].size == 2, count(i, before) > 16, i.operands[0].kind == .register else { return nil }
      return Int(i.operands[0].register.index)
    default: return nil
    }
  }

  /// Whether the memory that an instruction writes is undefined.
  static func isMemoryUndefined(_ i: Instruction, _ before: UnsafeMutablePointer<native_registers>) -> Bool {
    switch i.operation.mnemonic {
    case .shld, .shrd: i.operands[0].kind == .memory && i.operands[0].size == 2 && count(i, before) > 16
    // The bytes beside the selector: written as zeros by some, left alone by others (SDM vol. 2, PUSH).
    case .push: i.operands[0].register.class == .segment
    default: false
    }
  }
}
