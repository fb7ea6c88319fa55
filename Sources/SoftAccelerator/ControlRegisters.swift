import Accelerator
import CSoftCPU
import X86

/// Control registers, and the instructions that change what translations hold (SDM vol. 3, 2.5 and 4.10).
extension Processor {
  /// Executes one; false for any other instruction.
  func executeControl(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .mov:
      if i.operands[0].register.class == .debug || i.operands[1].register.class == .debug {
        try moveDebug(i)
      } else if i.operands[0].register.class == .control {
        try writeControl(i.operands[0].register.index, read(i.operands[1].register))
      } else if i.operands[1].register.class == .control {
        write(i.operands[0].register, try readControl(i.operands[1].register.index))
      } else {
        return false
      }
    case .clts: cpu.pointee.cr0 &= ~CR0.ts.rawValue
    case .lmsw:
      // PE can be set here, never cleared.
      let low = try read(i, 0) & 15
      try writeCR0(cpu.pointee.cr0 & ~14 | low)
    case .invlpg:
      let place = offset(i)
      let address = is64Bit && i.segment.index < 4 ? place : segments[Int(i.segment.index)].base &+ place
      flushTLB(systemAddress(address))
    case .invpcid: try invalidateContext(i)
    case .invd, .wbinvd, .wbnoinvd: break
    case .clflush, .clflushopt, .clwb: try checkAccess(address(i, size: 1, isWrite: false), count: 1, dataAccess)
    case .clac, .stac:
      if i.operation.mnemonic == .stac {
        cpu.pointee.other_flags |= RFLAGS.ac.rawValue
      } else {
        cpu.pointee.other_flags &= ~RFLAGS.ac.rawValue
      }
      updateContext()
    case .rdpkru:
      guard cpu.pointee.cr4 & CR4.pke.rawValue != 0 else { throw .invalidOpcode }
      guard general[1] & 0xffff_ffff == 0 else { throw .generalProtection }
      general[0] = UInt64(cpu.pointee.pkru)
      general[2] = 0
    case .wrpkru:
      guard cpu.pointee.cr4 & CR4.pke.rawValue != 0 else { throw .invalidOpcode }
      guard (general[1] | general[2]) & 0xffff_ffff == 0 else { throw .generalProtection }
      cpu.pointee.pkru = UInt32(truncatingIfNeeded: general[0])
      // Translations carry the rights that keys left them.
      flushTLB()
    default: return false
    }
    return true
  }

  // MARK: Registers

  private func readControl(_ number: UInt8) throws(Interruption) -> UInt64 {
    switch number {
    case 0: return cpu.pointee.cr0
    case 2: return cpu.pointee.cr2
    case 3: return cpu.pointee.cr3
    case 4: return cpu.pointee.cr4
    case 8: return taskPriority
    default: throw .invalidOpcode
    }
  }

  /// CR8: the local APIC's register, where there is one.
  var taskPriority: UInt64 {
    if let localAPIC { return UInt64(localAPIC.taskPriority & 15) }
    return cpu.pointee.cr8
  }

  private func writeControl(_ number: UInt8, _ value: UInt64) throws(Interruption) {
    switch number {
    case 0:
      try keep(.writeProtect, CR0.wp.rawValue, of: cpu.pointee.cr0, in: value)
      try writeCR0(value)
    case 2: cpu.pointee.cr2 = value
    case 3: try writeCR3(value)
    case 4:
      try keep(.smep, CR4.smep.rawValue, of: cpu.pointee.cr4, in: value)
      try keep(.smap, CR4.smap.rawValue, of: cpu.pointee.cr4, in: value)
      try writeCR4(value)
    case 8:
      guard value <= 15 else { throw .generalProtection }
      cpu.pointee.cr8 = value
      localAPIC?.taskPriority = UInt8(value)
    default: throw .invalidOpcode
    }
  }

  /// Refuses a value that clears a bit which is pinned.
  func keep(
    _ register: PinnedRegister, _ bit: UInt64, of old: UInt64, in new: UInt64
  ) throws(Interruption) {
    if !pins.isEmpty, old & bit != 0, new & bit == 0 { try refuse(register, value: new) }
  }

  /// The exit for an instruction that would change a register, where that is pinned.
  func refuse(_ register: PinnedRegister, value: UInt64) throws(Interruption) {
    guard pins.contains(register) else { return }
    pendingExit = .pinnedRegister(register, value: value)
    throw .exit
  }

  private func writeCR0(_ value: UInt64) throws(Interruption) {
    guard value >> 32 == 0 else { throw .generalProtection }
    let known: CR0 = [.pe, .mp, .em, .ts, .ne, .wp, .am, .nw, .cd, .pg]
    let new = CR0(rawValue: value & known.rawValue | CR0.et.rawValue)
    let old = CR0(rawValue: cpu.pointee.cr0)
    guard !new.contains(.pg) || new.contains(.pe), !new.contains(.nw) || new.contains(.cd) else {
      throw .generalProtection
    }
    let changed = new.symmetricDifference(old)
    let cr4 = CR4(rawValue: cpu.pointee.cr4)
    if changed.contains(.pg) {
      if new.contains(.pg) {
        if cpu.pointee.efer & EFER.lme.rawValue != 0 {
          guard cr4.contains(.pae), segments[SegmentIndex.cs].attributes & soft_segment.long == 0 else {
            throw .generalProtection
          }
          cpu.pointee.efer |= EFER.lma.rawValue
        } else if cr4.contains(.pae) {
          guard loadDirectoryPointers(cpu.pointee.cr3) else { throw .generalProtection }
        }
      } else {
        guard !is64Bit, !cr4.contains(.pcide) else { throw .generalProtection }
        cpu.pointee.efer &= ~EFER.lma.rawValue
      }
    } else if new.contains(.pg), !isLongMode, cr4.contains(.pae), !changed.isDisjoint(with: [.cd, .nw]) {
      guard loadDirectoryPointers(cpu.pointee.cr3) else { throw .generalProtection }
    }
    cpu.pointee.cr0 = new.rawValue
    if !changed.isDisjoint(with: [.pg, .pe, .wp]) { flushTLB() }
    if !changed.isDisjoint(with: [.pg, .pe, .am]) { updateMode(privilege: cpu.pointee.cpl) }
  }

  private func writeCR3(_ value: UInt64) throws(Interruption) {
    var value = value
    var keeps = false
    if isLongMode {
      if cpu.pointee.cr4 & CR4.pcide.rawValue != 0 {
        keeps = value & CR3.noFlush.rawValue != 0
        value &= ~CR3.noFlush.rawValue
      }
      guard value >> features.physicalAddressBits == 0 else { throw .generalProtection }
    } else if cpu.pointee.cr0 & CR0.pg.rawValue != 0, cpu.pointee.cr4 & CR4.pae.rawValue != 0 {
      guard loadDirectoryPointers(value) else { throw .generalProtection }
    }
    cpu.pointee.cr3 = value
    selectSpace(keep: keeps)
  }

  private func writeCR4(_ value: UInt64) throws(Interruption) {
    guard value & ~features.cr4.rawValue == 0 else { throw .generalProtection }
    let new = CR4(rawValue: value)
    let changed = new.symmetricDifference(CR4(rawValue: cpu.pointee.cr4))
    if isLongMode {
      guard !changed.contains(.la57), new.contains(.pae) else { throw .generalProtection }
    }
    if changed.contains(.pcide), new.contains(.pcide) {
      guard isLongMode, cpu.pointee.cr3 & CR3.pcid.rawValue == 0 else { throw .generalProtection }
    }
    if cpu.pointee.cr0 & CR0.pg.rawValue != 0, new.contains(.pae), !isLongMode,
      !changed.isDisjoint(with: [.pae, .pge, .pse, .smep])
    {
      guard loadDirectoryPointers(cpu.pointee.cr3) else { throw .generalProtection }
    }
    cpu.pointee.cr4 = value
    if !changed.isDisjoint(with: [.pae, .pge, .pse, .pcide, .smep, .smap, .pke, .la57]) {
      flushTLB()
      selectSpace(keep: true)
    }
    if changed.contains(.de) { updateDebug() }
  }

  /// Loads the four page-directory-pointer entries of PAE paging; false, and nothing changed, where one has a reserved
  /// bit set (SDM vol. 3, 4.4.1).
  func loadDirectoryPointers(_ cr3: UInt64) -> Bool {
    var entries = InlineArray<4, UInt64>(repeating: 0)
    let reserved = features.noAddressBits | 0x1e6
    for index in 0..<4 {
      let address = (cr3 & 0xffff_ffe0) &+ UInt64(index) &* 8
      guard let page = memory.page(address) else { return false }
      entries[index] = Self.read(page.host + Int(address & 0xfff), size: 8)
      guard entries[index] & 1 == 0 || entries[index] & reserved == 0 else { return false }
    }
    for index in 0..<4 { soft_pdptes(cpu)[index] = entries[index] }
    return true
  }

  // MARK: Translations

  private func invalidateContext(_ i: Instruction) throws(Interruption) {
    let kind = read(i.operands[0].register)
    guard kind <= 3 else { throw .generalProtection }
    let place = try address(i, size: 16, isWrite: false)
    let context = try load(place, size: 8)
    let linear = try load(wrapped(place &+ 8), size: 8)
    if kind < 2 {
      guard context >> 12 == 0 else { throw .generalProtection }
      guard context == 0 || cpu.pointee.cr4 & CR4.pcide.rawValue != 0 else { throw .generalProtection }
      if kind == 0 { guard isCanonical(linear) else { throw .generalProtection } }
      contexts.flush(pcid: context)
      updateContext()
    } else {
      guard context >> 12 == 0 else { throw .generalProtection }
      flushTLB()
    }
  }
}
