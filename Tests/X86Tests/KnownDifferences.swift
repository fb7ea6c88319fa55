import X86

/// Where the decoder and GNU objdump 2.40 are known to differ, each with its reason.
enum KnownDifferences {
  static func contains(_ bytes: [UInt8], _ our: Objdump.Line, _ their: Objdump.Line, _ mode: CodeMode) -> Bool {
    // objdump gives up on a REX prefix before another prefix; a CPU ignores that REX (SDM volume 2, 2.2.1).
    if Objdump.isPrefixesOnly(their.text) { return true }
    let ours = Objdump.normalised(our.text)
    let theirs = Objdump.normalised(their.text)
    let name = theirs.prefix { $0 != " " }
    // The table does not have x87, MMX, SSE and AVX yet.
    if our.length == 0 { return true }
    // MPX and CET are not in the table: without them their opcodes are the NOPs they were made from.
    // So are the opcodes of PREFETCHIT.
    if ours.hasPrefix("nop") { return ["bnd", "rdssp", "prefetchit"].contains { name.hasPrefix($0) } }
    if their.text.contains("(bad)") { return isAcceptedByCPUs(ours) }
    // REX.W wins over 66, but objdump shows the 16-bit source, or far pointer, of 66 alone.
    if bytes.contains(0x66) { return ["movsxd", "lss", "lfs", "lgs", "call", "jmp"].contains(name) }
    // SEV-ES's VMGEXIT is VMMCALL with F2 or F3.
    if ours == "vmmcall" { return theirs == "vmgexit" }
    // objdump does not sign-extend the displacement of a 32-bit address without base in 64-bit mode.
    return our.length == their.length && ours.contains("[eiz*")
  }

  /// What the decoder accepts as CPUs do, and objdump does not.
  private static func isAcceptedByCPUs(_ ours: String) -> Bool {
    ["salc", "wbinvd", "bsf", "bsr", "lfence", "mfence", "sfence", "vmmcall"].contains { ours.hasPrefix($0) }
  }
}
