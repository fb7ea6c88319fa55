import Accelerator
import CSoftCPU
import GuestMemory
import StateTree
import X86

/// The CPU's state as accelerators exchange it, and the states after RESET and INIT.
extension Processor {
  // MARK: RESET and INIT (SDM vol. 3, table 10-1)

  /// Puts the CPU in the state after power-up or RESET; or after INIT, which leaves x87 and SSE state, CR0's cache bits,
  /// the TSC and most model-specific registers alone.
  func reset(isINIT: Bool = false) {
    for index in 0..<16 { general[index] = 0 }
    general[2] = UInt64(features.leaf(1, 0).eax)
    cpu.pointee.rip = 0xfff0
    rflags = RFLAGS.alwaysSet.rawValue
    let data = soft_segment(base: 0, limit: 0xffff, selector: 0, attributes: 0x93)
    for index in 0..<6 { segments[index] = data }
    segments[SegmentIndex.cs] = soft_segment(base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b)
    segments[SegmentIndex.ldtr] = soft_segment(base: 0, limit: 0xffff, selector: 0, attributes: 0x82)
    segments[SegmentIndex.tr] = soft_segment(base: 0, limit: 0xffff, selector: 0, attributes: 0x8b)
    (cpu.pointee.gdt_base, cpu.pointee.gdt_limit) = (0, 0xffff)
    (cpu.pointee.idt_base, cpu.pointee.idt_limit) = (0, 0xffff)
    let caches = CR0([.cd, .nw]).rawValue
    cpu.pointee.cr0 = CR0.et.rawValue | (isINIT ? cpu.pointee.cr0 & caches : caches)
    (cpu.pointee.cr2, cpu.pointee.cr3, cpu.pointee.cr4, cpu.pointee.cr8) = (0, 0, 0, 0)
    cpu.pointee.efer = 0
    for index in 0..<4 { soft_debug(cpu)[index] = 0 }
    cpu.pointee.dr.6 = DR6.alwaysSet.rawValue
    cpu.pointee.dr.7 = DR7.alwaysSet.rawValue
    cpu.pointee.interrupt_shadow = 0
    cpu.pointee.nmi_masked = false
    pendingDebug = 0
    pendingException = nil
    isHalted = false
    pendingNMIs = 0
    pendingInterrupt = nil
    if !isINIT { resetBeyondINIT() }
    flushTLB()
    selectSpace(keep: false)
    updateMode(privilege: 0)
    updateDebug()
  }

  /// What RESET puts in place and INIT does not.
  private func resetBeyondINIT() {
    // As FNINIT leaves it, where a processor's own reset state has every exception unmasked: KVM starts so, too.
    cpu.pointee.fpu_control = 0x37f
    cpu.pointee.fpu_status = 0
    cpu.pointee.fpu_valid = 0
    (cpu.pointee.fpu_opcode, cpu.pointee.fpu_code_segment, cpu.pointee.fpu_data_segment) = (0, 0, 0)
    (cpu.pointee.fpu_instruction, cpu.pointee.fpu_data) = (0, 0)
    for index in 0..<8 { soft_st(cpu, index).initializeMemory(as: UInt8.self, repeating: 0, count: 16) }
    for index in 0..<16 { soft_vector(cpu, index).initializeMemory(as: UInt8.self, repeating: 0, count: 32) }
    cpu.pointee.mxcsr = 0x1f80
    (cpu.pointee.xcr0, cpu.pointee.xss, cpu.pointee.pkru) = (1, 0, 0)
    (cpu.pointee.tsc_offset, cpu.pointee.tsc_adjust, cpu.pointee.tsc_aux, cpu.pointee.tsc_deadline) = (0, 0, 0, 0)
    (cpu.pointee.star, cpu.pointee.lstar, cpu.pointee.cstar, cpu.pointee.fmask) = (0, 0, 0, 0)
    cpu.pointee.kernel_gs_base = 0
    (cpu.pointee.sysenter_cs, cpu.pointee.sysenter_esp, cpu.pointee.sysenter_eip) = (0, 0, 0)
    cpu.pointee.pat = 0x0007_0406_0007_0406
    cpu.pointee.mtrr_default = 0
    for index in 0..<16 { soft_mtrr_variable(cpu)[index] = 0 }
    for index in 0..<11 { soft_mtrr_fixed(cpu)[index] = 0 }
    // Fast strings; no branch trace store, no event-based sampling.
    cpu.pointee.misc_enable = 0x1801
    (cpu.pointee.spec_ctrl, cpu.pointee.debug_ctl) = (0, 0)
    cpu.pointee.apic_base = number == 0 ? 0xfee0_0900 : 0xfee0_0800
  }

  // MARK: Registers

  /// General registers, RIP and RFLAGS.
  var generalRegisters: GeneralRegisters {
    get {
      var registers = GeneralRegisters()
      for index in 0..<16 { registers[keyPath: GeneralRegisters.fields[index]] = general[index] }
      registers.rip = cpu.pointee.rip
      registers.rflags = rflags
      return registers
    }
    set {
      for index in 0..<16 { general[index] = newValue[keyPath: GeneralRegisters.fields[index]] }
      cpu.pointee.rip = newValue.rip
      rflags = newValue.rflags
      updateMode()
    }
  }

  /// Segment, control and descriptor-table registers.
  var systemRegisters: SystemRegisters {
    get {
      var system = SystemRegisters()
      system.es = register(SegmentIndex.es)
      system.cs = register(SegmentIndex.cs)
      system.ss = register(SegmentIndex.ss)
      system.ds = register(SegmentIndex.ds)
      system.fs = register(SegmentIndex.fs)
      system.gs = register(SegmentIndex.gs)
      system.ldt = register(SegmentIndex.ldtr)
      system.tr = register(SegmentIndex.tr)
      system.gdt = DescriptorTable(base: cpu.pointee.gdt_base, limit: cpu.pointee.gdt_limit)
      system.idt = DescriptorTable(base: cpu.pointee.idt_base, limit: cpu.pointee.idt_limit)
      system.cr0 = cpu.pointee.cr0
      system.cr2 = cpu.pointee.cr2
      system.cr3 = cpu.pointee.cr3
      system.cr4 = cpu.pointee.cr4
      system.cr8 = taskPriority
      system.efer = cpu.pointee.efer
      system.apicBase = cpu.pointee.apic_base
      return system
    }
    set {
      set(SegmentIndex.es, newValue.es)
      set(SegmentIndex.cs, newValue.cs)
      set(SegmentIndex.ss, newValue.ss)
      set(SegmentIndex.ds, newValue.ds)
      set(SegmentIndex.fs, newValue.fs)
      set(SegmentIndex.gs, newValue.gs)
      set(SegmentIndex.ldtr, newValue.ldt)
      set(SegmentIndex.tr, newValue.tr)
      (cpu.pointee.gdt_base, cpu.pointee.gdt_limit) = (newValue.gdt.base, newValue.gdt.limit)
      (cpu.pointee.idt_base, cpu.pointee.idt_limit) = (newValue.idt.base, newValue.idt.limit)
      cpu.pointee.cr0 = newValue.cr0 | CR0.et.rawValue
      cpu.pointee.cr2 = newValue.cr2
      cpu.pointee.cr3 = newValue.cr3
      cpu.pointee.cr4 = newValue.cr4
      cpu.pointee.cr8 = newValue.cr8
      localAPIC?.taskPriority = UInt8(newValue.cr8 & 15)
      // LMA follows LME and PG, as in a processor.
      let isLong = newValue.efer & EFER.lme.rawValue != 0 && newValue.cr0 & CR0.pg.rawValue != 0
      cpu.pointee.efer = newValue.efer & ~EFER.lma.rawValue | (isLong ? EFER.lma.rawValue : 0)
      cpu.pointee.apic_base = newValue.apicBase
      _ = localAPIC?.writeMSR(MSR.apicBase, value: newValue.apicBase)
      if !isLong, newValue.cr0 & CR0.pg.rawValue != 0, newValue.cr4 & CR4.pae.rawValue != 0 {
        _ = loadDirectoryPointers(newValue.cr3)
      }
      flushTLB()
      selectSpace(keep: false)
      updateMode()
      updateDebug()
    }
  }

  private func register(_ index: Int) -> SegmentRegister {
    let segment = segments[index]
    return SegmentRegister(
      base: segment.base, limit: segment.limit, selector: segment.selector, attributes: segment.attributes)
  }

  private func set(_ index: Int, _ register: SegmentRegister) {
    segments[index] = soft_segment(
      base: register.base, limit: register.limit, selector: register.selector, attributes: register.attributes & 0x1fff)
  }

  // MARK: The whole state

  /// The registers that a state carries, in the order that they are put in place.
  private static let stateMSRs: [UInt32] =
    [
      MSR.timeStampCounter, MSR.tscAdjust, MSR.specCtrl, MSR.sysenterCS, MSR.sysenterESP, MSR.sysenterEIP,
      MSR.miscEnable, MSR.debugCtl, MSR.pat, MSR.mtrrDefType, MSR.mtrrFix64K00000, MSR.mtrrFix16K80000,
      MSR.mtrrFix16K80000 + 1, MSR.xss, MSR.star, MSR.lstar, MSR.cstar, MSR.fmask, MSR.kernelGSBase, MSR.tscAux,
    ] + (0..<8).map { MSR.mtrrFix4KC0000 + $0 } + (0..<16).map { MSR.mtrrPhysBase0 + $0 }

  /// Everything the CPU is.
  var state: VCPUState {
    var state = VCPUState()
    state.general = generalRegisters
    state.system = systemRegisters
    state.extended = extendedState
    state.xcr0 = cpu.pointee.xcr0
    state.modelSpecific = Self.stateMSRs.compactMap { index in
      readMSR(index).map { ModelSpecificRegister(index: index, value: $0) }
    }
    state.events.interruptShadow = cpu.pointee.interrupt_shadow
    state.events.nmiPending = pendingNMIs > 0
    state.events.nmiInjected = pendingNMIs > 1
    state.events.nmiMasked = cpu.pointee.nmi_masked
    if let pendingInterrupt {
      state.events.interruptInjected = true
      state.events.interruptVector = pendingInterrupt
    }
    if let pendingException {
      setException(pendingException, &state.events)
    } else if pendingDebug != 0 {
      state.events.exceptionPending = true
      state.events.exceptionVector = ExceptionVector.debug.rawValue
      state.events.exceptionPayload = pendingDebug
    }
    state.debug.addresses = (0..<4).map { soft_debug(cpu)[$0] }
    state.debug.dr6 = cpu.pointee.dr.6
    state.debug.dr7 = cpu.pointee.dr.7
    state.activity = isHalted ? .halted : .runnable
    state.tscKilohertz = timeSource.kilohertz
    return state
  }

  /// Replaces everything the CPU is. A state that no CPU of this kind can be in is refused, before anything changes.
  func setState(_ state: VCPUState) throws(AcceleratorError) {
    guard state.debug.addresses.count == 4 else {
      throw invalid("the number of breakpoint addresses", UInt64(state.debug.addresses.count))
    }
    // Bits that no control register has (SDM vol. 3, 2.5).
    guard state.system.cr0 & ~0xe005_003f == 0 else { throw invalid("CR0", state.system.cr0) }
    for register in state.modelSpecific where register.value != 0 {
      guard Self.isLocalAPIC(register.index) || readMSR(register.index) != nil else {
        throw .modelSpecificRegister(index: register.index, write: true)
      }
    }
    if !state.extended.isEmpty { try setExtendedState(state.extended) }
    // 0, which no XCR0 is, leaves it alone.
    if state.xcr0 != 0 { cpu.pointee.xcr0 = state.xcr0 & features.xcr0 | 1 }
    generalRegisters = state.general
    systemRegisters = state.system
    setCounterRate(state.tscKilohertz)
    for register in state.modelSpecific {
      switch register.index {
      case MSR.timeStampCounter: cpu.pointee.tsc_offset &+= register.value &- timeStampCounter
      case MSR.tscAdjust: cpu.pointee.tsc_adjust = register.value
      // In the system registers, and the local APIC's own.
      case MSR.efer, MSR.apicBase, MSR.tscDeadline, MSR.fsBase, MSR.gsBase, MSR.x2APICFirst...MSR.x2APICLast: break
      default: _ = writeMSR(register.index, register.value)
      }
    }
    alignTimeStampCounter()
    for index in 0..<4 { soft_debug(cpu)[index] = state.debug.addresses[index] }
    cpu.pointee.dr.6 = Self.debugStatus(state.debug.dr6)
    cpu.pointee.dr.7 = Self.debugControl(state.debug.dr7)
    updateDebug()
    isHalted = state.activity == .halted
    setEvents(state.events)
  }

  /// Registers of the local APIC, which is the VMM's.
  private static func isLocalAPIC(_ index: UInt32) -> Bool {
    index == MSR.apicBase || index == MSR.tscDeadline || (MSR.x2APICFirst...MSR.x2APICLast).contains(index)
  }

  /// The counters of a machine's CPUs were read, and are put back, one after another: where they differ by no more than
  /// that can take, they were one.
  private func alignTimeStampCounter() {
    guard number != 0, let first = group.processor(0) else { return }
    let base = first.cpu.pointee.tsc_offset &- first.cpu.pointee.tsc_adjust
    let own = cpu.pointee.tsc_offset &- cpu.pointee.tsc_adjust
    let difference = Int64(bitPattern: own &- base).magnitude
    if difference < UInt64(timeSource.kilohertz) &* 1000 { cpu.pointee.tsc_offset &-= own &- base }
  }

  private func setEvents(_ events: PendingEvents) {
    cpu.pointee.interrupt_shadow = events.interruptShadow & 3
    cpu.pointee.nmi_masked = events.nmiMasked
    pendingNMIs = (events.nmiPending ? 1 : 0) + (events.nmiInjected ? 1 : 0)
    pendingInterrupt = events.interruptInjected && !events.interruptIsSoftware ? events.interruptVector : nil
    pendingDebug = 0
    pendingException = nil
    guard events.exceptionInjected || events.exceptionPending,
      let vector = ExceptionVector(rawValue: events.exceptionVector)
    else { return }
    if vector == .debug {
      pendingDebug = events.exceptionPayload ?? 0
    } else {
      if vector == .pageFault { faultAddress = events.exceptionPayload ?? cpu.pointee.cr2 }
      pendingException = events.exceptionHasErrorCode ? .fault(vector, events.exceptionErrorCode) : .exception(vector)
    }
  }

  private func setException(_ exception: Interruption, _ events: inout PendingEvents) {
    events.exceptionInjected = true
    switch exception {
    case .exception(let vector): events.exceptionVector = vector.rawValue
    case .fault(let vector, let code):
      (events.exceptionVector, events.exceptionHasErrorCode, events.exceptionErrorCode) = (vector.rawValue, true, code)
      if vector == .pageFault { events.exceptionPayload = faultAddress }
    case .exit: break
    }
  }

  private func invalid(_ field: String, _ value: UInt64) -> AcceleratorError {
    .state(.invalid(node: "vcpu\(number)", field: field, value: value))
  }

  // MARK: XSAVE layout (SDM vol. 1, 13.4)

  /// With room for AVX's part, whether the CPU has it or not.
  private var extendedStateSize: Int { max(832, Self.stateSize(features.xcr0, isCompact: false)) }

  private var extendedState: [UInt8] {
    let size = extendedStateSize
    var area = [UInt8](repeating: 0, count: size)
    area.withUnsafeMutableBytes { area in
      let base = area.baseAddress.unsafelyUnwrapped
      storeX87(to: base)
      area.storeBytes(of: cpu.pointee.fpu_opcode, toByteOffset: 6, as: UInt16.self)
      area.storeBytes(of: cpu.pointee.fpu_instruction, toByteOffset: 8, as: UInt64.self)
      area.storeBytes(of: cpu.pointee.fpu_data, toByteOffset: 16, as: UInt64.self)
      area.storeBytes(of: cpu.pointee.mxcsr, toByteOffset: 24, as: UInt32.self)
      area.storeBytes(of: 0xffff, toByteOffset: 28, as: UInt32.self)
      for index in 0..<16 {
        (base + 160 + index * 16).copyMemory(from: soft_vector(cpu, index), byteCount: 16)
        if size >= Self.pkruOffset {
          (base + Self.avxOffset + index * 16).copyMemory(from: soft_vector(cpu, index) + 16, byteCount: 16)
        }
      }
      if size >= Self.pkruOffset + 8 {
        area.storeBytes(of: cpu.pointee.pkru, toByteOffset: Self.pkruOffset, as: UInt32.self)
      }
      // x87 and SSE are there without XSAVE, too.
      area.storeBytes(of: features.xcr0 | 3, toByteOffset: 512, as: UInt64.self)
    }
    return area
  }

  private func setExtendedState(_ bytes: [UInt8]) throws(AcceleratorError) {
    guard bytes.count == extendedStateSize else {
      throw invalid("the size of its extended state", UInt64(bytes.count))
    }
    // The header's 48 bytes after XSTATE_BV and XCOMP_BV are reserved, and the format is the standard one.
    let reserved = bytes[520..<576].firstIndex { $0 != 0 }
    if let reserved { throw invalid("byte \(reserved) of its extended state", UInt64(bytes[reserved])) }
    bytes.withUnsafeBytes { area in
      let present = area.loadUnaligned(fromByteOffset: 512, as: UInt64.self)
      let base = area.baseAddress.unsafelyUnwrapped
      for index in 0..<8 { soft_st(cpu, index).initializeMemory(as: UInt8.self, repeating: 0, count: 16) }
      if present & 1 != 0 {
        loadX87(from: base)
        cpu.pointee.fpu_opcode = area.loadUnaligned(fromByteOffset: 6, as: UInt16.self) & 0x7ff
        cpu.pointee.fpu_instruction = area.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
        cpu.pointee.fpu_data = area.loadUnaligned(fromByteOffset: 16, as: UInt64.self)
      } else {
        (cpu.pointee.fpu_control, cpu.pointee.fpu_status, cpu.pointee.fpu_valid) = (0x37f, 0, 0)
        (cpu.pointee.fpu_opcode, cpu.pointee.fpu_instruction, cpu.pointee.fpu_data) = (0, 0, 0)
      }
      (cpu.pointee.fpu_code_segment, cpu.pointee.fpu_data_segment) = (0, 0)
      updateX87Summary()
      let hasVectors = present & 6 != 0
      cpu.pointee.mxcsr = hasVectors ? area.loadUnaligned(fromByteOffset: 24, as: UInt32.self) & 0xffff : 0x1f80
      for index in 0..<16 {
        let register = soft_vector(cpu, index)
        register.initializeMemory(as: UInt8.self, repeating: 0, count: 32)
        if present & 2 != 0 { register.copyMemory(from: base + 160 + index * 16, byteCount: 16) }
        if present & 4 != 0, bytes.count >= Self.pkruOffset {
          (register + 16).copyMemory(from: base + Self.avxOffset + index * 16, byteCount: 16)
        }
      }
      let hasPKRU = present & 1 << 9 != 0 && bytes.count >= Self.pkruOffset + 8
      cpu.pointee.pkru = hasPKRU ? area.loadUnaligned(fromByteOffset: Self.pkruOffset, as: UInt32.self) : 0
    }
  }

  // MARK: Translation

  /// The guest-physical address behind a linear one, as the supervisor's reads find it; changes nothing.
  func translate(_ linear: UInt64) -> UInt64? {
    let paging = Paging(
      cr0: CR0(rawValue: cpu.pointee.cr0), cr3: cpu.pointee.cr3, cr4: CR4(rawValue: cpu.pointee.cr4),
      efer: EFER(rawValue: cpu.pointee.efer), rflags: .ac, physicalAddressBits: features.physicalAddressBits,
      has1GiBPages: features.hasGigabytePages)
    let translation = try? paging.translate(linear, []) { address, size in
      memory.page(address).map { Self.read($0.host + Int(address & 0xfff), size: UInt8(size)) }
    }
    return translation?.physicalAddress
  }
}
