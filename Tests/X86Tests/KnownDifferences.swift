import X86

/// Where the decoder and GNU objdump 2.40 are known to differ, each with its reason.
enum KnownDifferences {
  static func contains(_ bytes: [UInt8], _ our: Objdump.Line, _ their: Objdump.Line, _ mode: CodeMode) -> Bool {
    // objdump gives up on a REX prefix before another prefix; a CPU ignores that REX (SDM volume 2, 2.2.1).
    if Objdump.isPrefixesOnly(their.text) { return true }
    let ours = Objdump.normalised(our.text)
    let theirs = Objdump.normalised(their.text)
    let name = theirs.prefix { $0 != " " }
    if our.length == 0 { return isRejected(String(name), bytes, their.text, mode) }
    // MPX, CET and PREFETCHIT are not in the table: without them their opcodes are the NOPs they were made from.
    if ours.hasPrefix("nop") { return ["bnd", "rdssp", "prefetchit"].contains { name.hasPrefix($0) } }
    // objdump shows FWAIT as a prefix of the x87 instruction after it.
    if ours == "fwait" { return bytes.contains(0x9b) }
    if their.text.contains("(bad)") { return isAcceptedByCPUs(ours) }
    // REX.W wins over 66, but objdump shows the 16-bit source, or far pointer, of 66 alone.
    if bytes.contains(0x66), ["movsxd", "lss", "lfs", "lgs", "call", "jmp"].contains(name) { return true }
    // F3 90 with REX.B is XCHG, as the CPU this was tried on does it.
    if ours.hasPrefix("xchg r8") { return name == "pause" }
    // SEV-ES's VMGEXIT is VMMCALL with F2 or F3.
    if ours == "vmmcall" { return theirs == "vmgexit" }
    // objdump shows YMM registers where VEX.L is ignored.
    if name == "vmovss" || name == "vmovsd" { return ours == theirs.replacing("ymm", with: "xmm") }
    // objdump names the products 2 and 3 of PCLMULQDQ as if they were 10h and 11h; a CPU looks at bits 0 and 4.
    if ours.contains("pclmulqdq"), [2, 3].contains(bytes[our.length - 1]) { return our.length == their.length }
    // objdump does not sign-extend the displacement of a 32-bit address without base in 64-bit mode.
    return our.length == their.length && ours.contains("[eiz*")
  }

  /// What the decoder accepts as CPUs do, and objdump does not.
  private static func isAcceptedByCPUs(_ ours: String) -> Bool {
    // SALC, and F2 or 66 before what F3 makes another instruction; ModRM.rm of fences.
    if ["salc", "wbinvd", "bsf", "bsr", "lfence", "mfence", "sfence", "vmmcall"].contains(where: ours.hasPrefix) {
      return true
    }
    // Aliases of x87 instructions.
    return ["fcom", "fcomp", "fxch", "fstp"].contains(where: ours.hasPrefix)
  }

  /// What the decoder rejects and objdump does not.
  private static func isRejected(_ name: String, _ bytes: [UInt8], _ text: String, _ mode: CodeMode) -> Bool {
    // LOCK where it is not allowed.
    if text.hasPrefix("lock ") || text.contains(" lock ") { return true }
    // Control, debug and segment registers that do not exist; MOV to CS.
    if name == "mov" { return ["cr", "dr", "?", "tr", "mov cs,"].contains { Objdump.normalised(text).contains($0) } }
    if mode != .code64, ["swapgs", "rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase"].contains(name) { return true }
    let prefixCount = bytes.prefix { [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3].contains($0) }.count
    let hasREX = mode == .code64 && bytes[prefixCount] & 0xf0 == 0x40
    let opcode = bytes[(prefixCount + (hasREX ? 1 : 0))...]
    // EVEX and XOP are not in the table. REX, 66, F2 and F3 before VEX are #UD, and so is VEX.pp for VZEROUPPER and
    // VLDMXCSR.
    if opcode.first == 0x62 || opcode.first == 0x8f { return true }
    if opcode.first == 0xc4 || opcode.first == 0xc5 {
      if hasREX || !bytes.prefix(prefixCount).allSatisfy({ ![0x66, 0xf2, 0xf3].contains($0) }) { return true }
      if name.hasPrefix("vzero") || name == "vldmxcsr" || name == "vstmxcsr" { return true }
      // A 256-bit form that AVX does not have (VAES, VPCLMULQDQ).
      if name.hasPrefix("vaes") || name.hasPrefix("vpclmul") { return text.contains("ymm") }
    }
    if isNotInTable(name) || text.contains("{") { return true }
    // Where the table says NP or NFx: without the prefix it is the same instruction.
    let bare = bytes.prefix(prefixCount).filter { ![0x66, 0xf2, 0xf3].contains($0) } + bytes[prefixCount...]
    guard bare.count < bytes.count, let instruction = try? Instruction(Array(bare), mode) else { return false }
    return instruction.operation.mnemonic.text == name
  }

  private static func isNotInTable(_ name: String) -> Bool {
    let names: Set<String> = [
      // 3DNow!
      "femms", "pavgusb", "pi2fd", "pi2fw", "pmulhrw", "pswapd",
      // SSE4a
      "extrq", "insertq", "movntss", "movntsd",
      // 80287
      "frstpm(287",
      // CET
      "incsspd", "incsspq", "saveprevssp", "rstorssp", "wrssd", "wrssq", "wrussd", "wrussq", "setssbsy", "clrssbsy",
      // SGX, SMX, TSX, TDX
      "encls", "enclu", "enclv", "getsec", "xbegin", "xbeginw", "xbegind", "xabort", "xend", "xtest", "xsusldtrk",
      "xresldtrk", "tdcall", "seamret", "seamops", "seamcall",
      // SEV-SNP and other AMD extensions
      "psmash", "pvalidate", "rmpadjust", "rmpupdate", "rmpquery", "invlpgb", "tlbsync", "rdpru", "mcommit",
      // User interrupts, WAITPKG and other Intel extensions
      "senduipi", "uiret", "testui", "clui", "stui", "tpause", "umonitor", "umwait", "serialize", "hreset", "pconfig",
      "ptwrite", "movdiri", "movdir64b", "enqcmd", "enqcmds", "aadd", "aand", "aor", "axor", "wrmsrns", "rdmsrlist",
      "wrmsrlist", "loadiwkey", "encodekey128", "encodekey256", "ldtilecfg", "sttilecfg",
    ]
    if names.contains(name) { return true }
    // 3DNow!, VIA PadLock, Key Locker, AMX, GFNI, AVX-512 masks, AVX-VNNI, AVX-IFMA, AVX-NE-CONVERT, XOP.
    let families = [
      "pf", "xstore", "xcrypt", "montmul", "xsha", "aesencwide", "aesdecwide", "aesenc128", "aesenc256", "aesdec128",
      "aesdec256", "tile", "tdp", "gf2p8", "vgf2p8", "k", "vpdp", "vpmadd52", "vcvtne", "vbcstne", "vpermil2",
    ]
    if families.contains(where: name.hasPrefix) { return true }
    // CMPccXADD; FMA4, whose names have no operand order.
    if name.hasPrefix("cmp"), name.hasSuffix("xadd") { return true }
    return (name.hasPrefix("vfm") || name.hasPrefix("vfnm")) && !name.contains { $0.isNumber }
  }
}
