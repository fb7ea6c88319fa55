import Accelerator
import X86

/// States of a vCPU: of every mode, sensible enough that code runs, with nonsense in places.
struct RandomState {
  /// Where code is executed: what CR0, EFER, RFLAGS.VM and CS say.
  enum Mode: Int, CaseIterable {
    case real, virtual8086, protected16, protected32, compatibility16, compatibility32, long

    var code: CodeMode {
      switch self {
      case .real, .virtual8086, .protected16, .compatibility16: .code16
      case .protected32, .compatibility32: .code32
      case .long: .code64
      }
    }
    /// Whether EFER.LMA is set.
    var isLong: Bool { self == .long || self == .compatibility16 || self == .compatibility32 }
  }

  /// What CR3 leads to.
  enum Paging: Int { case none, two, pae, four, five }

  let mode: Mode
  let paging: Paging
  let isUser: Bool

  init(_ random: inout RandomSource) {
    mode = random.pick(Mode.allCases)
    isUser = mode == .virtual8086 || mode != .real && random.oneIn(2)
    paging =
      mode == .real ? .none : mode.isLong ? (random.oneIn(3) ? .five : .four) : random.pick([.none, .two, .pae])
  }

  /// A whole state, made of one that the accelerator gave.
  func make(from old: VCPUState, _ random: inout RandomSource) -> VCPUState {
    var state = old
    makeGeneral(&state, &random)
    makeSystem(&state.system, &random)
    makeSegments(&state.system, &random)
    makeExtended(&state.extended, &random)
    state.xcr0 = random.pick([1, 3, 7, 7, 7])
    for index in state.modelSpecific.indices where random.oneIn(4) {
      // SYSENTER's, SYSCALL's and the other registers alike; the time-stamp counter may be anything.
      state.modelSpecific[index].value = random.oneIn(2) ? random.integer() : 0x18_0008_0000_1000
    }
    state.events = PendingEvents()
    state.events.interruptShadow = random.oneIn(8) ? UInt8(random.below(4)) : 0
    state.events.nmiPending = random.oneIn(16)
    state.events.nmiMasked = random.oneIn(8)
    if random.oneIn(16) {
      state.events.exceptionPending = true
      state.events.exceptionVector = UInt8(random.below(32))
      state.events.exceptionHasErrorCode = random.oneIn(2)
      state.events.exceptionErrorCode = UInt32(truncatingIfNeeded: random.integer())
      state.events.exceptionPayload = random.oneIn(2) ? random.integer() : nil
    }
    state.debug = DebugRegisters()
    if random.oneIn(4) {
      for index in 0..<4 {
        state.debug.addresses[index] = random.oneIn(2) ? 0x1000 + UInt64(random.below(64)) : random.address()
      }
      state.debug.dr7 = random.next()
      state.debug.dr6 = random.next()
    }
    state.activity = random.oneIn(32) ? .halted : .runnable
    return state
  }

  private func makeGeneral(_ state: inout VCPUState, _ random: inout RandomSource) {
    for field in GeneralRegisters.fields.prefix(16) {
      let value = random.integer()
      state.general[keyPath: field] = mode == .long || random.oneIn(16) ? value : value & 0xffff_ffff
    }
    state.general.rsp = random.oneIn(8) ? random.address() : 0x7000 + UInt64(random.below(0x200)) * 8
    state.general.rip = random.oneIn(16) ? random.address() : 0x1000 + UInt64(random.below(64))
    // Ones among what system instructions look at: MSRs, selectors, leaves.
    if random.oneIn(3) {
      state.general.rcx = random.pick([0xc000_0080, 0xc000_0081, 0x1b, 0x10, 0x174, 0x277, 0x6e0, 0x800, 0x830, 0xd, 3])
    }
    var flags = random.next() & 0x24_0cd5 | 2
    if random.oneIn(2) { flags &= ~0x400 }
    if !random.oneIn(3) { flags &= ~0x4_0000 }
    if random.oneIn(2) { flags |= 0x200 }
    if random.oneIn(8) { flags |= 0x100 }
    if random.oneIn(8) { flags |= 0x1_0000 }
    if random.oneIn(8) { flags |= 0x4000 }
    flags |= UInt64(isUser && random.oneIn(2) ? 3 : random.below(4)) << 12
    if mode == .virtual8086 { flags |= 0x2_0000 | random.next() & 0x18_0000 }
    state.general.rflags = flags
  }

  private func makeSystem(_ system: inout SystemRegisters, _ random: inout RandomSource) {
    var cr0 = 0x10 | (mode == .real ? 0 : 1) | (paging == .none ? 0 : 1 << 31 as UInt64)
    if random.oneIn(3) {
      cr0 |= random.next() & 0x6005_002e
    } else {
      cr0 |= 0x5_0022 & ~(random.oneIn(2) ? 0x4_0000 : 0)
    }
    system.cr0 = cr0
    var cr4: UInt64 = 0x600
    if !random.oneIn(8) { cr4 |= 0x4_0000 }
    // VME, PVI, TSD, DE, PSE, MCE, PGE, PCE, UMIP, FSGSBASE, PCIDE, SMEP, SMAP, PKE.
    if random.oneIn(2) { cr4 |= random.next() & 0x73_09df }
    cr4 &= ~0x2_1020
    if !mode.isLong { cr4 &= ~0x2_0000 } else if random.oneIn(2) { cr4 |= 0x2_0000 }
    if paging == .pae || mode.isLong { cr4 |= 0x20 }
    if paging == .five { cr4 |= 0x1000 }
    system.cr4 = cr4
    system.efer = mode.isLong ? 0xd01 : 0
    if random.oneIn(2) { system.efer ^= random.pick([1, 0x800, 0x801]) }
    if !mode.isLong, random.oneIn(4) { system.efer |= 0x801 }
    system.cr3 = RandomMachine.pageTables(paging) | (random.oneIn(4) ? random.next() & 0xfff : 0)
    system.cr2 = random.integer()
    system.cr8 = UInt64(random.oneIn(2) ? 0 : random.below(16))
    system.gdt = DescriptorTable(base: 0x800, limit: random.oneIn(4) ? UInt16(random.below(0x200)) : 0x1ff)
    system.idt =
      mode == .real
      ? DescriptorTable(base: 0, limit: 0x3ff)
      : DescriptorTable(base: 0x2000, limit: mode.isLong ? 0xfff : 0x7ff)
    if random.oneIn(16) { system.idt.limit = UInt16(random.below(0x1000)) }
    if random.oneIn(32) { system.idt.base = random.integer() }
    if random.oneIn(32) { system.gdt.base = random.integer() }
    system.apicBase = 0xfee0_0900 ^ (random.oneIn(4) ? random.pick([0x400, 0xc00, 0x800, 0x1000]) : 0)
  }

  private func makeSegments(_ system: inout SystemRegisters, _ random: inout RandomSource) {
    let isFlat = mode != .real && mode != .virtual8086
    let user: UInt16 = isUser ? 0x60 : 0
    func segment(_ selector: UInt16, _ attributes: UInt16) -> SegmentRegister {
      SegmentRegister(base: 0, limit: 0xffff_ffff, selector: selector | (isUser ? 3 : 0), attributes: attributes | user)
    }
    func segment16() -> SegmentRegister {
      let selector: UInt16 = random.oneIn(2) ? 0 : UInt16(truncatingIfNeeded: random.address() >> 4)
      var made = SegmentRegister(
        base: UInt64(selector) << 4, limit: 0xffff, selector: selector, attributes: mode == .real ? 0x93 : 0xf3)
      if mode == .real, random.oneIn(8) { made.limit = 0xffff_ffff }
      return made
    }
    for path in Self.data {
      var made = isFlat ? segment(isUser ? 0x20 : 0x10, 0xc93) : segment16()
      if isFlat, random.oneIn(8) {
        // Null, expanding down, small, of any type at all.
        made.base = random.address()
        made.limit = UInt32(truncatingIfNeeded: random.address())
        made.attributes = UInt16(truncatingIfNeeded: random.oneIn(2) ? 0x93 | UInt64(user) : random.next() & 0x1fff)
      }
      system[keyPath: path] = made
    }
    switch mode {
    case .real, .virtual8086:
      system.cs = SegmentRegister(base: 0, limit: 0xffff, selector: 0, attributes: mode == .real ? 0x9b : 0xfb)
      if random.oneIn(2) { system.ss = SegmentRegister(attributes: mode == .real ? 0x93 : 0xf3) }
    case .protected16, .compatibility16: system.cs = segment(isUser ? 0x38 : 0x30, 0x89b)
    case .protected32, .compatibility32: system.cs = segment(isUser ? 0x48 : 0x40, 0xc9b)
    case .long: system.cs = segment(isUser ? 0x18 : 0x08, 0xa9b)
    }
    if mode != .long, random.oneIn(16) { system.cs.limit = UInt32(0x1000 + random.below(0x400)) }
    if mode != .long, isFlat, random.oneIn(16) { system.cs.base = UInt64(random.below(64)) }
    system.tr = SegmentRegister(
      base: 0x3000, limit: random.oneIn(4) ? UInt32(random.below(0x2200)) : 0x2067, selector: 0x60,
      attributes: random.oneIn(8) && !mode.isLong ? 0x83 : 0x8b)
    system.ldt = SegmentRegister(
      base: 0x5000, limit: random.oneIn(2) ? 0xff : UInt32(random.below(0x100)), selector: 0x50,
      attributes: random.oneIn(4) ? 0x1082 : 0x82)
  }

  nonisolated(unsafe) private static let data: [WritableKeyPath<SystemRegisters, SegmentRegister>] = [
    \.ds, \.es, \.ss, \.fs, \.gs,
  ]

  /// x87, SSE and AVX in the XSAVE layout; the header stays as it was.
  private func makeExtended(_ bytes: inout [UInt8], _ random: inout RandomSource) {
    guard bytes.count >= 832 else { return }
    func put(_ value: UInt64, _ offset: Int, _ count: Int = 8) {
      for byte in 0..<count { bytes[offset + byte] = UInt8(truncatingIfNeeded: value >> UInt64(8 * byte)) }
    }
    put(random.oneIn(4) ? random.next() : 0x37f, 0, 2)
    put(random.oneIn(4) ? random.next() : random.next() & 0x7f00, 2, 2)
    put(random.oneIn(2) ? 0xff : random.next(), 4, 1)
    put(random.oneIn(4) ? random.next() & 0xffff : 0x1f80 | random.next() & 0x6040, 24, 4)
    for register in 0..<8 {
      put(random.oneIn(4) ? random.integer() : 1 << 63 | random.next(), 32 + register * 16)
      put(random.oneIn(3) ? random.next() : 0x3ff0 + random.next() & 0x3f, 40 + register * 16, 2)
    }
    for register in 0..<16 {
      for half in 0..<2 {
        put(random.oneIn(2) ? random.integer() : random.next(), 160 + register * 16 + half * 8)
        put(random.next(), 576 + register * 16 + half * 8)
      }
    }
  }
}
