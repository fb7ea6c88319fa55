import CSoftCPU
import X86

/// The images of the x87, SSE and AVX state and PKRU: FXSAVE and the XSAVE family (SDM vol. 1, 10.5 and chapter 13).
///
/// XSAVEOPT and XSAVES leave out components in their initial state, and never the merely unmodified ones, as the
/// architecture allows.
extension Processor {
  /// State components that the software CPU can have in XCR0: x87, SSE, AVX and PKRU.
  static let stateComponents: UInt64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 9
  /// Where the components beyond the legacy area lie in the standard format (CPUID.0DH): AVX, PKRU.
  static let avxOffset = 576
  static let pkruOffset = 832
  private static let headerOffset = 512

  /// The bytes of an XSAVE area for some components (CPUID.0DH), at least the legacy area and the header.
  static func stateSize(_ components: UInt64, isCompact: Bool) -> Int {
    let hasAVX = components & 4 != 0
    let hasPKRU = components & 1 << 9 != 0
    if isCompact { return avxOffset + (hasAVX ? 256 : 0) + (hasPKRU ? 8 : 0) }
    return hasPKRU ? pkruOffset + 8 : hasAVX ? pkruOffset : avxOffset
  }

  /// Executes LDMXCSR, STMXCSR, FXSAVE, FXRSTOR and the XSAVE family; false where the instruction is none of them.
  func executeStateTransfer(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .ldmxcsr, .vldmxcsr:
      try checkMXCSRAccess(i)
      let value = UInt32(truncatingIfNeeded: try read(i, 0))
      guard value & ~MXCSR.all == 0 else { throw .generalProtection }
      cpu.pointee.mxcsr = value
    case .stmxcsr, .vstmxcsr:
      try checkMXCSRAccess(i)
      try write(i, 0, UInt64(cpu.pointee.mxcsr))
    case .fxsave, .fxsave64:
      try fxsave(i)
    case .fxrstor, .fxrstor64:
      try fxrstor(i)
    case .xsave, .xsave64:
      try xsave(i, .standard)
    case .xsaveopt, .xsaveopt64:
      try xsave(i, .optimized)
    case .xsavec, .xsavec64:
      try xsave(i, .compact)
    case .xsaves, .xsaves64:
      try xsave(i, .supervisor)
    case .xrstor, .xrstor64:
      try xrstor(i, isSupervisor: false)
    case .xrstors, .xrstors64:
      try xrstor(i, isSupervisor: true)
    default:
      return false
    }
    return true
  }

  private func checkMXCSRAccess(_ i: Instruction) throws(Interruption) {
    if !i.prefixes.contains(.vex), cpu.pointee.cr4 & CR4.osfxsr.rawValue == 0 { throw .invalidOpcode }
    try checkVectorState(i)
  }

  // MARK: Parts of the legacy area

  /// XMM registers that the code's mode has.
  private var vectorCount: Int { is64Bit ? 16 : 8 }

  /// Without REX.W the pointers are 32 bits, and the selectors beside them 0.
  private func storePointers(to area: UnsafeMutableRawPointer, isWide: Bool) {
    let mask: UInt64 = isWide ? ~0 : 0xffff_ffff
    area.storeBytes(of: cpu.pointee.fpu_opcode, toByteOffset: 6, as: UInt16.self)
    area.storeBytes(of: cpu.pointee.fpu_instruction & mask, toByteOffset: 8, as: UInt64.self)
    area.storeBytes(of: cpu.pointee.fpu_data & mask, toByteOffset: 16, as: UInt64.self)
  }

  private func loadPointers(from area: UnsafeRawPointer, isWide: Bool) {
    let mask: UInt64 = isWide ? ~0 : 0xffff_ffff
    cpu.pointee.fpu_opcode = area.load(fromByteOffset: 6, as: UInt16.self) & 0x7ff
    cpu.pointee.fpu_instruction = area.load(fromByteOffset: 8, as: UInt64.self) & mask
    cpu.pointee.fpu_data = area.load(fromByteOffset: 16, as: UInt64.self) & mask
  }

  /// The upper six bytes of each register's 16 in memory are reserved: written as 0.
  private func storeX87Area(to area: UnsafeMutableRawPointer, isWide: Bool) {
    storeX87(to: area)
    for index in 0..<8 {
      (area + 42 + index * 16).initializeMemory(as: UInt8.self, repeating: 0, count: 6)
    }
    storePointers(to: area, isWide: isWide)
  }

  private func loadX87Area(from area: UnsafeRawPointer, isWide: Bool) {
    loadX87(from: area)
    loadPointers(from: area, isWide: isWide)
    updateX87Summary()
  }

  private func storeMXCSR(to area: UnsafeMutableRawPointer) {
    area.storeBytes(of: cpu.pointee.mxcsr, toByteOffset: 24, as: UInt32.self)
    area.storeBytes(of: MXCSR.all, toByteOffset: 28, as: UInt32.self)
  }

  private func storeVectors(to area: UnsafeMutableRawPointer, offset: Int) {
    for index in 0..<vectorCount {
      (area + index * 16).copyMemory(from: soft_vector(cpu, index) + offset, byteCount: 16)
    }
  }

  private func loadVectors(from area: UnsafeRawPointer, offset: Int) {
    for index in 0..<vectorCount {
      (soft_vector(cpu, index) + offset).copyMemory(from: area + index * 16, byteCount: 16)
    }
  }

  private func clearVectors(offset: Int) {
    for index in 0..<vectorCount {
      (soft_vector(cpu, index) + offset).initializeMemory(as: UInt8.self, repeating: 0, count: 16)
    }
  }

  // MARK: FXSAVE

  private func checkFXSR(_ i: Instruction) throws(Interruption) {
    if !CR0(rawValue: cpu.pointee.cr0).isDisjoint(with: [.em, .ts]) { throw .exception(.deviceNotAvailable) }
  }

  private func fxsave(_ i: Instruction) throws(Interruption) {
    try checkFXSR(i)
    let linear = try address(i, size: 512, isWrite: true)
    try checkVectorAlignment(linear, 16)
    let area = soft_area(cpu)
    storeX87Area(to: area, isWide: i.operation.mnemonic == .fxsave64)
    storeMXCSR(to: area)
    storeVectors(to: area + 160, offset: 0)
    // What lies behind is reserved or the software's.
    try store(from: area, linear, count: 160 + vectorCount * 16)
  }

  private func fxrstor(_ i: Instruction) throws(Interruption) {
    try checkFXSR(i)
    let linear = try address(i, size: 512, isWrite: false)
    try checkVectorAlignment(linear, 16)
    let area = soft_area(cpu)
    try load(linear, into: area, count: 160 + vectorCount * 16)
    let mxcsr = area.load(fromByteOffset: 24, as: UInt32.self)
    guard mxcsr & ~MXCSR.all == 0 else { throw .generalProtection }
    cpu.pointee.mxcsr = mxcsr
    loadX87Area(from: area, isWide: i.operation.mnemonic == .fxrstor64)
    loadVectors(from: area + 160, offset: 0)
  }

  // MARK: XSAVE

  private enum SaveForm {
    case standard
    case optimized
    case compact
    case supervisor
  }

  private func xsaveAddress(_ i: Instruction, isWrite: Bool) throws(Interruption) -> UInt64 {
    guard cpu.pointee.cr4 & CR4.osxsave.rawValue != 0 else { throw .invalidOpcode }
    if cpu.pointee.cr0 & CR0.ts.rawValue != 0 { throw .exception(.deviceNotAvailable) }
    let linear = try address(i, size: Self.avxOffset, isWrite: isWrite)
    try checkVectorAlignment(linear, 64)
    return linear
  }

  private var requestedComponents: UInt64 { general[2] << 32 | general[0] & 0xffff_ffff }

  /// Components that are not in their initial state (XINUSE).
  var usedComponents: UInt64 {
    var used: UInt64 = 0
    let hasX87 =
      cpu.pointee.fpu_control != 0x37f || cpu.pointee.fpu_status != 0 || cpu.pointee.fpu_valid != 0
      || cpu.pointee.fpu_opcode != 0
      || cpu.pointee.fpu_instruction != 0 || cpu.pointee.fpu_data != 0
    if hasX87 || !(0..<8).allSatisfy({ isZero(soft_st(cpu, $0), 16) }) { used |= 1 }
    for index in 0..<vectorCount {
      if !isZero(soft_vector(cpu, index), 16) { used |= 2 }
      if !isZero(soft_vector(cpu, index) + 16, 16) { used |= 4 }
    }
    if cpu.pointee.pkru != 0 { used |= 1 << 9 }
    return used
  }

  private func isZero(_ pointer: UnsafeRawPointer, _ count: Int) -> Bool {
    stride(from: 0, to: count, by: 8).allSatisfy { pointer.load(fromByteOffset: $0, as: UInt64.self) == 0 }
  }

  private func xsave(_ i: Instruction, _ form: SaveForm) throws(Interruption) {
    let linear = try xsaveAddress(i, isWrite: true)
    let isCompact = form == .compact || form == .supervisor
    let requested =
      requestedComponents & (form == .supervisor ? cpu.pointee.xcr0 | cpu.pointee.xss : cpu.pointee.xcr0)
    var used = usedComponents & requested
    if isCompact, requested & 2 != 0, cpu.pointee.mxcsr != 0x1f80 { used |= 2 }
    let saved = form == .standard ? requested : used
    try checkWrite(linear, count: Self.stateSize(requested, isCompact: isCompact))

    let area = soft_area(cpu)
    if saved & 1 != 0 {
      storeX87Area(to: area, isWide: i.rex & 8 != 0 && i.mode == .code64)
      try store(from: area, linear, count: 24)
      try store(from: area + 32, linear &+ 32, count: 128)
    }
    if isCompact ? saved & 2 != 0 : requested & 6 != 0 {
      storeMXCSR(to: area)
      try store(from: area + 24, linear &+ 24, count: 8)
    }
    if saved & 2 != 0 {
      storeVectors(to: area, offset: 0)
      try store(from: area, linear &+ 160, count: vectorCount * 16)
    }
    if saved & 4 != 0 {
      storeVectors(to: area, offset: 16)
      try store(from: area, linear &+ UInt64(Self.avxOffset), count: vectorCount * 16)
    }
    if saved & 1 << 9 != 0 {
      let offset = isCompact && requested & 4 == 0 ? Self.avxOffset : Self.pkruOffset
      try store(UInt64(cpu.pointee.pkru), linear &+ UInt64(offset))
    }
    let header = linear &+ UInt64(Self.headerOffset)
    if isCompact {
      try store(used, header)
      try store(requested | 1 << 63, header &+ 8)
    } else {
      try store(try load(header, as: UInt64.self) & ~requested | used, header)
    }
  }

  private func xrstor(_ i: Instruction, isSupervisor: Bool) throws(Interruption) {
    let linear = try xsaveAddress(i, isWrite: false)
    let enabled = isSupervisor ? cpu.pointee.xcr0 | cpu.pointee.xss : cpu.pointee.xcr0
    let requested = requestedComponents & enabled
    let area = soft_area(cpu)
    try load(linear, into: area, count: Self.avxOffset)
    let header = area + Self.headerOffset
    let present = header.load(as: UInt64.self)
    let format = header.load(fromByteOffset: 8, as: UInt64.self)
    let isCompact = format >> 63 != 0
    if isCompact {
      guard isSupervisor || features.has(.xsavec), format & ~(1 << 63) & ~enabled == 0, present & ~format == 0,
        present >> 63 == 0, isZero(header + 16, 48)
      else { throw .generalProtection }
    } else {
      guard !isSupervisor, format == 0, header.load(fromByteOffset: 16, as: UInt64.self) == 0, present & ~enabled == 0
      else { throw .generalProtection }
    }
    let restored = requested & present
    let mxcsr = area.load(fromByteOffset: 24, as: UInt32.self)
    let loadsMXCSR = isCompact ? restored & 2 != 0 : requested & 6 != 0
    if loadsMXCSR, mxcsr & ~MXCSR.all != 0 { throw .generalProtection }

    // Everything is loaded before anything changes.
    let upper = area + Self.avxOffset
    var pkru: UInt64 = 0
    if restored & 4 != 0 {
      try load(linear &+ UInt64(Self.avxOffset), into: upper, count: vectorCount * 16)
    }
    if restored & 1 << 9 != 0 {
      let offset = isCompact && format & 4 == 0 ? Self.avxOffset : Self.pkruOffset
      pkru = try load(linear &+ UInt64(offset), as: UInt64.self)
    }

    if restored & 1 != 0 {
      loadX87Area(from: area, isWide: i.rex & 8 != 0 && i.mode == .code64)
    } else if requested & 1 != 0 {
      initializeX87()
      for index in 0..<8 { soft_st(cpu, index).initializeMemory(as: UInt8.self, repeating: 0, count: 16) }
    }
    if loadsMXCSR {
      cpu.pointee.mxcsr = mxcsr
    } else if isCompact, requested & 2 != 0 {
      cpu.pointee.mxcsr = 0x1f80
    }
    if restored & 2 != 0 {
      loadVectors(from: area + 160, offset: 0)
    } else if requested & 2 != 0 {
      clearVectors(offset: 0)
    }
    if restored & 4 != 0 {
      loadVectors(from: upper, offset: 16)
    } else if requested & 4 != 0 {
      clearVectors(offset: 16)
    }
    if requested & 1 << 9 != 0, cpu.pointee.pkru != UInt32(truncatingIfNeeded: pkru) {
      cpu.pointee.pkru = UInt32(truncatingIfNeeded: pkru)
      flushTLB()
    }
  }
}
