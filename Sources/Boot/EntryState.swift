import Accelerator
import GuestMemory

/// The boot processor's registers at the first instruction.
struct EntryState {
  var general: GeneralRegisters
  var system: SystemRegisters

  /// As after reset: the first instruction is the boot ROM's, at F000:FFF0.
  static var reset: EntryState {
    let state = VCPUState()
    return EntryState(general: state.general, system: state.system)
  }

  /// Real mode, all data segments alike.
  static func realMode(codeSegment: UInt16, ip: UInt16, dataSegment: UInt16, stackSegment: UInt16, sp: UInt16) -> Self {
    var general = GeneralRegisters()
    var system = VCPUState().system
    general.rip = UInt64(ip)
    general.rsp = UInt64(sp)
    system.cs = .real(selector: codeSegment, code: true)
    system.ds = .real(selector: dataSegment)
    system.es = system.ds
    system.fs = system.ds
    system.gs = system.ds
    system.ss = .real(selector: stackSegment)
    system.idt = DescriptorTable(base: 0, limit: 0x3ff)
    return EntryState(general: general, system: system)
  }

  /// Protected mode without paging, flat 4 GiB segments, interrupts off: what Multiboot, PVH and Linux's 32-bit entry ask.
  static func flat32(entry: UInt64, _ placer: inout Placer) throws(BootError) -> Self {
    try flat(entry: entry, code: .code32(selector: 0x10), cr0: 0x11, &placer)
  }

  /// Long mode with the first 4 GiB mapped to themselves in 2 MiB pages, interrupts off.
  static func long(entry: UInt64, _ placer: inout Placer) throws(BootError) -> Self {
    let tables = try placer.place(.pageTables, size: 6 * 4096, alignment: 4096)
    try placer.write(identityPageTables(at: tables.start.rawValue), at: tables.start)
    var state = try flat(entry: entry, code: .code64(selector: 0x10), cr0: 0x8000_0011, &placer)
    state.system.cr3 = tables.start.rawValue
    state.system.cr4 = 0x20  // PAE
    state.system.efer = 0x500  // LME, LMA
    return state
  }

  /// A GDT lies behind the selectors, though no protocol but Linux's asks for it, so that a kernel's first far jump or
  /// segment load works. The IDT is empty: an exception before the kernel has its own is a crash report, not a jump to 0.
  private static func flat(
    entry: UInt64, code: SegmentRegister, cr0: UInt64, _ placer: inout Placer
  ) throws(BootError) -> Self {
    var table = TableBytes()
    for segment in [nil, nil, code, data] { table.append(descriptor(segment)) }
    let gdt = try placer.place(.descriptorTable, table.bytes)
    var general = GeneralRegisters()
    var system = VCPUState().system
    general.rip = entry
    system.cs = code
    system.ds = data
    system.es = data
    system.fs = data
    system.gs = data
    system.ss = data
    system.tr = .task(selector: 0)
    system.gdt = DescriptorTable(base: gdt.start.rawValue, limit: UInt16(gdt.size - 1))
    system.idt = DescriptorTable(base: 0, limit: 0)
    system.cr0 = cr0
    return EntryState(general: general, system: system)
  }

  private static let data = SegmentRegister.data(selector: 0x18)

  /// The 8 bytes of a flat segment's descriptor (SDM vol. 3, 3.4.5).
  private static func descriptor(_ segment: SegmentRegister?) -> UInt64 {
    guard let segment else { return 0 }
    let attributes = UInt64(segment.attributes)
    return 0xffff | (attributes & 0xff) << 40 | 0xf << 48 | (attributes >> 8 & 0xf) << 52
  }

  /// PML4, one page-directory-pointer table, four page directories (SDM vol. 3, 4.5), present and writable.
  private static func identityPageTables(at base: UInt64) -> [UInt64] {
    var table = [UInt64](repeating: 0, count: 6 * 512)
    table[0] = base + 0x1000 | 3
    for gigabyte in 0..<4 { table[512 + gigabyte] = base + 0x2000 + UInt64(gigabyte) << 12 | 3 }
    for page in 0..<2048 { table[1024 + page] = UInt64(page) << 21 | 0x83 }  // PS
    return table
  }
}
