import Accelerator

/// The one list of registers: from it come the order and sizes of the `g` packet, and the target description.
///
/// The order is gdb's own for amd64, so that a client which reads no description agrees too; what it does not know by
/// itself (bases, control registers, upper halves of YMM) follows. As in QEMU the registers are always the 64-bit ones,
/// whatever mode the vCPU is in, and addresses are linear ones.
struct RegisterLayout {
  struct Register: Equatable {
    let name: String
    let type: String
    let group: String?
    let feature: String
    let offset: Int
    let size: Int
  }

  let registers: [Register]
  /// Bytes of all registers together.
  let size: Int
  private let hasAVX: Bool

  init(hasAVX: Bool) {
    self.hasAVX = hasAVX
    var blank = DebuggerRegisters(general: .init(), system: .init(), kernelGSBase: 0, extended: [])
    var visitor = RegisterVisitor(bytes: [], isStoring: false)
    visitor.visitAll(&blank, hasAVX: hasAVX)
    registers = visitor.registers
    size = visitor.bytes.count
  }

  /// All registers in the order of the list, each little-endian.
  func bytes(of registers: DebuggerRegisters) -> [UInt8] {
    var registers = registers
    var visitor = RegisterVisitor(bytes: [], isStoring: false)
    visitor.visitAll(&registers, hasAVX: hasAVX)
    return visitor.bytes
  }

  /// Puts all registers, of which there are `size` bytes, in place.
  func store(_ bytes: [UInt8], in registers: inout DebuggerRegisters) {
    var visitor = RegisterVisitor(bytes: bytes, isStoring: true)
    visitor.visitAll(&registers, hasAVX: hasAVX)
  }
}

/// Goes over every register, either out of a vCPU's or into them.
private struct RegisterVisitor {
  var bytes: [UInt8]
  let isStoring: Bool
  var registers: [RegisterLayout.Register] = []
  private var position = 0
  private var feature = ""

  init(bytes: [UInt8], isStoring: Bool) {
    self.bytes = bytes
    self.isStoring = isStoring
  }

  mutating func visitAll(_ state: inout DebuggerRegisters, hasAVX: Bool) {
    feature = "org.gnu.gdb.i386.core"
    visitGeneral(&state.general)
    visitSegments(&state.system)
    visitX87(&state.extended)
    feature = "org.gnu.gdb.i386.sse"
    for index in 0..<16 { visit("xmm\(index)", "vec128", nil, &state.extended, at: 160 + 16 * index, 16) }
    visit("mxcsr", "i386_mxcsr", "vector", &state.extended, at: 24, 4)
    feature = "org.gnu.gdb.i386.segments"
    visit("fs_base", "int", nil, &state.system.fs.base)
    visit("gs_base", "int", nil, &state.system.gs.base)
    feature = "org.swiftvmm.system"
    visit("k_gs_base", "int64", "system", &state.kernelGSBase)
    visit("cr0", "cr0_flags", "system", &state.system.cr0)
    visit("cr2", "data_ptr", "system", &state.system.cr2)
    visit("cr3", "int64", "system", &state.system.cr3)
    visit("cr4", "cr4_flags", "system", &state.system.cr4)
    visit("cr8", "int64", "system", &state.system.cr8)
    visit("efer", "efer_flags", "system", &state.system.efer)
    visitTables(&state.system)
    guard hasAVX else { return }
    feature = "org.gnu.gdb.i386.avx"
    for index in 0..<16 { visit("ymm\(index)h", "uint128", nil, &state.extended, at: 576 + 16 * index, 16) }
  }

  private mutating func visitGeneral(_ general: inout GeneralRegisters) {
    visit("rax", "int64", nil, &general.rax)
    visit("rbx", "int64", nil, &general.rbx)
    visit("rcx", "int64", nil, &general.rcx)
    visit("rdx", "int64", nil, &general.rdx)
    visit("rsi", "int64", nil, &general.rsi)
    visit("rdi", "int64", nil, &general.rdi)
    visit("rbp", "data_ptr", nil, &general.rbp)
    visit("rsp", "data_ptr", nil, &general.rsp)
    visit("r8", "int64", nil, &general.r8)
    visit("r9", "int64", nil, &general.r9)
    visit("r10", "int64", nil, &general.r10)
    visit("r11", "int64", nil, &general.r11)
    visit("r12", "int64", nil, &general.r12)
    visit("r13", "int64", nil, &general.r13)
    visit("r14", "int64", nil, &general.r14)
    visit("r15", "int64", nil, &general.r15)
    visit("rip", "code_ptr", nil, &general.rip)
    var flags = UInt32(truncatingIfNeeded: general.rflags)
    visit("eflags", "i386_eflags", nil, &flags)
    general.rflags = UInt64(flags)
  }

  private mutating func visitSegments(_ system: inout SystemRegisters) {
    let isRealMode = system.cr0 & 1 == 0
    visit("cs", &system.cs, isRealMode)
    visit("ss", &system.ss, isRealMode)
    visit("ds", &system.ds, isRealMode)
    visit("es", &system.es, isRealMode)
    visit("fs", &system.fs, isRealMode)
    visit("gs", &system.gs, isRealMode)
  }

  /// What segment registers hold beside their selectors, and the descriptor tables.
  private mutating func visitTables(_ system: inout SystemRegisters) {
    visit("cs_base", "int64", "system", &system.cs.base)
    visit("ss_base", "int64", "system", &system.ss.base)
    visit("ds_base", "int64", "system", &system.ds.base)
    visit("es_base", "int64", "system", &system.es.base)
    visit("gdt_base", "data_ptr", "system", &system.gdt.base)
    visit("gdt_limit", "int16", "system", &system.gdt.limit)
    visit("idt_base", "data_ptr", "system", &system.idt.base)
    visit("idt_limit", "int16", "system", &system.idt.limit)
    visit("ldt", "int16", "system", &system.ldt.selector)
    visit("ldt_base", "data_ptr", "system", &system.ldt.base)
    visit("tr", "int16", "system", &system.tr.selector)
    visit("tr_base", "data_ptr", "system", &system.tr.base)
  }

  /// The legacy region's x87 part (SDM vol. 1, table 10-2); gdb wants 32 bits of each register, and the full tag word.
  private mutating func visitX87(_ extended: inout [UInt8]) {
    for index in 0..<8 { visit("st\(index)", "i387_ext", nil, &extended, at: 32 + 16 * index, 10) }
    visitWord("fctrl", &extended, at: 0)
    visitWord("fstat", &extended, at: 2)
    var tags = UInt32(X87Tags.full(extended))
    visit("ftag", "int", "float", &tags)
    if isStoring, extended.count > 4 { extended[4] = X87Tags.abridged(UInt16(truncatingIfNeeded: tags)) }
    visitWord("fiseg", &extended, at: 12)
    visit("fioff", "int", "float", &extended, at: 8, 4)
    visitWord("foseg", &extended, at: 20)
    visit("fooff", "int", "float", &extended, at: 16, 4)
    visitWord("fop", &extended, at: 6)
    // What is written must not be taken for the initial state (XSTATE_BV: x87, SSE, AVX).
    if isStoring, extended.count >= 576 { extended[512] |= extended.count >= 832 ? 7 : 3 }
  }

  private mutating func visit(_ name: String, _ segment: inout SegmentRegister, _ isRealMode: Bool) {
    var selector = UInt32(segment.selector)
    visit(name, "int32", nil, &selector)
    guard isStoring, selector != UInt32(segment.selector) else { return }
    segment.selector = UInt16(truncatingIfNeeded: selector)
    if isRealMode { segment.base = UInt64(segment.selector) << 4 }
  }

  /// 16 bits of the XSAVE area, shown as 32.
  private mutating func visitWord(_ name: String, _ extended: inout [UInt8], at offset: Int) {
    visit(name, "int", "float", &extended, at: offset, 2)
    if !isStoring { bytes += [0, 0] }
    position += 2
    registers[registers.count - 1] = registers[registers.count - 1].widened(by: 2)
  }

  private mutating func visit<Value: FixedWidthInteger>(
    _ name: String, _ type: String, _ group: String?, _ value: inout Value
  ) {
    var area = (0..<MemoryLayout<Value>.size).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }
    visit(name, type, group, &area, at: 0, area.count)
    if isStoring { value = area.reversed().reduce(0) { $0 << 8 | Value(truncatingIfNeeded: $1) } }
  }

  /// `size` bytes at `offset` of `area`; what lies beyond its end reads as zero.
  private mutating func visit(
    _ name: String, _ type: String, _ group: String?, _ area: inout [UInt8], at offset: Int, _ size: Int
  ) {
    registers.append(.init(name: name, type: type, group: group, feature: feature, offset: position, size: size))
    let isThere = offset + size <= area.count
    if !isStoring {
      bytes += isThere ? area[offset..<offset + size] : ArraySlice(repeating: 0, count: size)
    } else if isThere {
      area.replaceSubrange(offset..<offset + size, with: bytes[position..<position + size])
    }
    position += size
  }
}

extension RegisterLayout.Register {
  fileprivate func widened(by bytes: Int) -> Self {
    Self(name: name, type: type, group: group, feature: feature, offset: offset, size: size + bytes)
  }
}

/// The x87 tag word: two bits a register in full, one in FXSAVE's abridged form (SDM vol. 1, 8.1.7 and 10.5.1.1).
enum X87Tags {
  /// The full word, found from the registers' contents.
  static func full(_ extended: [UInt8]) -> UInt16 {
    guard extended.count >= 160 else { return 0xffff }
    let top = Int(extended[3] >> 3 & 7)
    return (0..<8).reduce(0) { tags, physical in
      let stack = 32 + 16 * ((physical - top) & 7)
      let tag = extended[4] >> physical & 1 == 0 ? 3 : Self.tag(extended[stack..<stack + 10])
      return tags | tag << (2 * physical)
    }
  }

  /// FXSAVE's form.
  static func abridged(_ full: UInt16) -> UInt8 {
    (0..<8).reduce(0) { tags, physical in full >> (2 * physical) & 3 == 3 ? tags : tags | 1 << physical }
  }

  /// 0 valid, 1 zero, 2 special.
  private static func tag(_ value: ArraySlice<UInt8>) -> UInt16 {
    let bytes = Array(value)
    let exponent = UInt16(bytes[9] & 0x7f) << 8 | UInt16(bytes[8])
    let hasInteger = bytes[7] & 0x80 != 0
    if exponent == 0, bytes[..<8].allSatisfy({ $0 == 0 }) { return 1 }
    return exponent == 0x7fff || !hasInteger ? 2 : 0
  }
}
