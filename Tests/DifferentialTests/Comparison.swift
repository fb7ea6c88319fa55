import Glibc
import NativeProcess
import X86

/// Two results of one case, side by side.
enum Comparison {
  /// CF, PF, AF, ZF, SF, TF, DF, OF, NT, AC and ID: what a process can change.
  private static let flags: UInt64 = 0x24_4dd5

  /// What differs; empty where nothing does.
  static func differences(
    _ i: Instruction, _ c: UnsafeMutablePointer<native_case>, _ soft: UnsafeMutablePointer<native_result>,
    _ native: UnsafeMutablePointer<native_result>
  ) -> String {
    let before = native_before(c)
    let (s, n) = (native_after(soft), native_after(native))
    if Freedom.permits(i, before, soft.pointee.vector, native.pointee.vector) { return "" }
    var text = ""
    func check(_ name: @autoclosure () -> String, _ soft: UInt64, _ native: UInt64) {
      if soft != native { text += "\n      \(name()): \(hex(soft)), physical \(hex(native))" }
    }
    let completed = soft.pointee.vector == 1
    check("vector", UInt64(UInt32(bitPattern: soft.pointee.vector)), UInt64(UInt32(bitPattern: native.pointee.vector)))
    if soft.pointee.vector == native.pointee.vector, !completed {
      let isPageFault = soft.pointee.vector == 14
      // Linux shows every fault of the upper half as one of protection.
      let hidden: UInt32 = isPageFault && native.pointee.address >= 0x7fff_ffff_f000 ? 1 : 0
      check("error code", UInt64(soft.pointee.error | hidden), UInt64(native.pointee.error | hidden))
      if isPageFault { check("address", soft.pointee.address, native.pointee.address) }
    }
    let general = (native_general(s), native_general(n))
    let undefined = completed ? Freedom.undefinedRegister(i, before) : nil
    let is64 = i.mode == .code64
    // A far branch to another mode leaves the upper halves undefined (SDM vol. 1, 3.4.1.1).
    let staysWide = is64 && native_selectors(s)[1] == native_selectors(before)[1]
    for index in 0..<(is64 ? 16 : 8) where index != undefined {
      let mask: UInt64 = (staysWide ? ~0 : 0xffff_ffff) & ~Freedom.undefinedBits(i)
      check("r\(index)", general.0[index] & mask, general.1[index] & mask)
    }
    check("rip", s.pointee.rip, n.pointee.rip)
    let defined = flags & ~(completed ? Freedom.undefinedFlags(i, before) : 0)
    check("flags", s.pointee.flags & defined, n.pointee.flags & defined)
    let selectors = (native_selectors(s), native_selectors(n))
    for index in 0..<6 {
      // A null selector's low bits do not survive the kernel's return to the process.
      let (a, b) = (selectors.0[index], selectors.1[index])
      check("selector \(index)", a < 4 ? 0 : UInt64(a), b < 4 ? 0 : UInt64(b))
    }
    check("fs base", s.pointee.fs_base, n.pointee.fs_base)
    check("gs base", s.pointee.gs_base, n.pointee.gs_base)
    check("fcw", UInt64(s.pointee.control), UInt64(n.pointee.control))
    check("fsw", UInt64(s.pointee.status), UInt64(n.pointee.status))
    check("ftw", UInt64(s.pointee.valid), UInt64(n.pointee.valid))
    check("mxcsr", UInt64(s.pointee.mxcsr), UInt64(n.pointee.mxcsr))
    if memcmp(native_stack(s, 0), native_stack(n, 0), 128) != 0 {
      for index in 0..<8 {
        let (a, b) = (bytes(native_stack(s, index), 10), bytes(native_stack(n, index), 10))
        if a != b { text += "\n      st\(index): \(a), physical \(b)" }
      }
    }
    let count = is64 ? 16 : 8
    if memcmp(native_vector(s, 0), native_vector(n, 0), count * 32) != 0 {
      for index in 0..<count {
        let (a, b) = (bytes(native_vector(s, index), 32), bytes(native_vector(n, index), 32))
        if a != b { text += "\n      ymm\(index): \(a), physical \(b)" }
      }
    }
    let isSame =
      soft.pointee.first == native.pointee.first && soft.pointee.end == native.pointee.end
      && soft.pointee.digest == native.pointee.digest
    if !isSame, !(completed && Freedom.isMemoryUndefined(i, before)) {
      text += "\n      memory: \(change(soft)), physical \(change(native))"
    }
    return text
  }

  /// What the instruction reads, for a report.
  static func state(_ i: Instruction, _ r: UnsafeMutablePointer<native_registers>) -> String {
    let general = native_general(r)
    var text = "flags \(hex(r.pointee.flags)) rax \(hex(general[0])) rcx \(hex(general[1])) rdx \(hex(general[2]))"
    text += " rsp \(hex(general[4])) mxcsr \(hex(UInt64(r.pointee.mxcsr))) fcw \(hex(UInt64(r.pointee.control)))"
    text += " fsw \(hex(UInt64(r.pointee.status))) ftw \(hex(UInt64(r.pointee.valid)))"
    text += " fs \(hex(r.pointee.fs_base)) gs \(hex(r.pointee.gs_base))"
    func add(_ register: Register) {
      let index = Int(register.index)
      switch register.class {
      case .general8, .general8High, .general16, .general32, .general64:
        text += " \(register) of \(hex(general[register.class == .general8High ? index & 3 : index]))"
      case .xmm, .ymm: text += " \(register) \(bytes(native_vector(r, index), register.class == .xmm ? 16 : 32))"
      case .x87, .mmx: text += " \(register) \(bytes(native_stack(r, index), 10))"
      default: break
      }
    }
    for position in 0..<4 where i.operands[position].kind == .register { add(i.operands[position].register) }
    add(i.base)
    add(i.index)
    if i.opcodeMap == 0, i.opcode & 0xf8 == 0xd8 {
      add(Register(.x87, 0))
      add(Register(.x87, 1))
    }
    return text
  }

  private static func change(_ result: UnsafeMutablePointer<native_result>) -> String {
    "\(hex(UInt64(result.pointee.first)))..<\(hex(UInt64(result.pointee.end))) digest \(hex(result.pointee.digest))"
  }

  static func hex(_ value: UInt64) -> String { String(value, radix: 16) }

  private static func bytes(_ pointer: UnsafePointer<UInt8>, _ count: Int) -> String {
    (0..<count).reversed().map { (pointer[$0] < 16 ? "0" : "") + hex(UInt64(pointer[$0])) }.joined()
  }
}
