import Accelerator
import CLinux
import Glibc
import Host
import StateTree

extension KVMVirtualCPU {
  /// The general registers (`KVM_GET_REGS`).
  public func readRegisters() throws(AcceleratorError) -> GeneralRegisters {
    var regs = kvm_regs()
    if isSynced {
      regs = face.registers.pointee.regs
    } else {
      try kvmCall("KVM_GET_REGS", descriptor, CLINUX_KVM_GET_REGS, with: &regs)
    }
    var general = GeneralRegisters()
    general.rax = regs.rax
    general.rbx = regs.rbx
    general.rcx = regs.rcx
    general.rdx = regs.rdx
    general.rsi = regs.rsi
    general.rdi = regs.rdi
    general.rsp = regs.rsp
    general.rbp = regs.rbp
    general.r8 = regs.r8
    general.r9 = regs.r9
    general.r10 = regs.r10
    general.r11 = regs.r11
    general.r12 = regs.r12
    general.r13 = regs.r13
    general.r14 = regs.r14
    general.r15 = regs.r15
    general.rip = regs.rip
    general.rflags = regs.rflags
    return general
  }

  /// Replaces the general registers (`KVM_SET_REGS`).
  public func writeRegisters(_ general: GeneralRegisters) throws(AcceleratorError) {
    try endForbidden()
    var regs = kvm_regs()
    regs.rax = general.rax
    regs.rbx = general.rbx
    regs.rcx = general.rcx
    regs.rdx = general.rdx
    regs.rsi = general.rsi
    regs.rdi = general.rdi
    regs.rsp = general.rsp
    regs.rbp = general.rbp
    regs.r8 = general.r8
    regs.r9 = general.r9
    regs.r10 = general.r10
    regs.r11 = general.r11
    regs.r12 = general.r12
    regs.r13 = general.r13
    regs.r14 = general.r14
    regs.r15 = general.r15
    regs.rip = general.rip
    regs.rflags = general.rflags
    forbidInjection()
    if isSynced {
      face.registers.pointee.regs = regs
      shared.pointee.kvm_dirty_regs |= CLINUX_KVM_SYNC_X86_REGS
      return
    }
    try kvmCall("KVM_SET_REGS", descriptor, CLINUX_KVM_SET_REGS, with: &regs)
  }

  /// Segment, control and table registers (`KVM_GET_SREGS`).
  public func readSystemRegisters() throws(AcceleratorError) -> SystemRegisters {
    var sregs = kvm_sregs()
    if isSynced {
      sregs = face.registers.pointee.sregs
    } else {
      try kvmCall("KVM_GET_SREGS", descriptor, CLINUX_KVM_GET_SREGS, with: &sregs)
    }
    var system = SystemRegisters()
    system.cs = SegmentRegister(sregs.cs)
    system.ds = SegmentRegister(sregs.ds)
    system.es = SegmentRegister(sregs.es)
    system.fs = SegmentRegister(sregs.fs)
    system.gs = SegmentRegister(sregs.gs)
    system.ss = SegmentRegister(sregs.ss)
    system.tr = SegmentRegister(sregs.tr)
    system.ldt = SegmentRegister(sregs.ldt)
    system.gdt = DescriptorTable(base: sregs.gdt.base, limit: sregs.gdt.limit)
    system.idt = DescriptorTable(base: sregs.idt.base, limit: sregs.idt.limit)
    system.cr0 = sregs.cr0
    system.cr2 = sregs.cr2
    system.cr3 = sregs.cr3
    system.cr4 = sregs.cr4
    system.cr8 = sregs.cr8
    system.efer = sregs.efer
    system.apicBase = sregs.apic_base
    return system
  }

  /// Replaces segment, control and table registers (`KVM_SET_SREGS`).
  ///
  /// The bitmap of an interrupt being delivered, which the call also carries, is kept as it is.
  public func writeSystemRegisters(_ system: SystemRegisters) throws(AcceleratorError) {
    try endForbidden()
    try unsync()
    var sregs = kvm_sregs()
    try kvmCall("KVM_GET_SREGS", descriptor, CLINUX_KVM_GET_SREGS, with: &sregs)
    sregs.cs = kvm_segment(system.cs)
    sregs.ds = kvm_segment(system.ds)
    sregs.es = kvm_segment(system.es)
    sregs.fs = kvm_segment(system.fs)
    sregs.gs = kvm_segment(system.gs)
    sregs.ss = kvm_segment(system.ss)
    sregs.tr = kvm_segment(system.tr)
    sregs.ldt = kvm_segment(system.ldt)
    sregs.gdt = kvm_dtable(base: system.gdt.base, limit: system.gdt.limit, padding: (0, 0, 0))
    sregs.idt = kvm_dtable(base: system.idt.base, limit: system.idt.limit, padding: (0, 0, 0))
    sregs.cr0 = system.cr0
    sregs.cr2 = system.cr2
    sregs.cr3 = system.cr3
    sregs.cr4 = system.cr4
    sregs.cr8 = system.cr8
    sregs.efer = system.efer
    sregs.apic_base = system.apicBase
    try kvmCall("KVM_SET_SREGS", descriptor, CLINUX_KVM_SET_SREGS, with: &sregs)
  }

  /// The whole state.
  public func readState() throws(AcceleratorError) -> VCPUState {
    try endForbidden()
    try settle()
    var state = VCPUState()
    state.general = try readRegisters()
    state.system = try readSystemRegisters()
    state.extended = try readExtendedState()
    var control = kvm_xcrs()
    try kvmCall("KVM_GET_XCRS", descriptor, CLINUX_KVM_GET_XCRS, with: &control)
    state.xcr0 = control.xcrs.0.value
    state.modelSpecific = try readModelSpecificRegisters(machine.accelerator.modelSpecificIndices)
    var activity = kvm_mp_state()
    try kvmCall("KVM_GET_MP_STATE", descriptor, CLINUX_KVM_GET_MP_STATE, with: &activity)
    state.activity = ActivityState(rawValue: activity.mp_state) ?? .runnable
    if machine.interrupts != .userSpace {
      var page = kvm_lapic_state()
      try kvmCall("KVM_GET_LAPIC", descriptor, CLINUX_KVM_GET_LAPIC, with: &page)
      state.localAPIC = withUnsafeBytes(of: &page) { Array($0) }
    }
    var events = kvm_vcpu_events()
    try kvmCall("KVM_GET_VCPU_EVENTS", descriptor, CLINUX_KVM_GET_VCPU_EVENTS, with: &events)
    state.events = PendingEvents(events)
    var debug = kvm_debugregs()
    try kvmCall("KVM_GET_DEBUGREGS", descriptor, CLINUX_KVM_GET_DEBUGREGS, with: &debug)
    state.debug.addresses = [debug.db.0, debug.db.1, debug.db.2, debug.db.3]
    state.debug.dr6 = debug.dr6
    state.debug.dr7 = debug.dr7
    state.tscKilohertz = readTSCRate()
    return state
  }

  /// Replaces the whole state.
  ///
  /// The order matters: XCR0 before the extended state it enables; the APIC base (in the system registers) before the
  /// LAPIC page; the TSC's rate before its value; both and the LAPIC before the TSC deadline that arms its timer; pending
  /// events after everything that clears them.
  public func writeState(_ state: VCPUState) throws(AcceleratorError) {
    try endForbidden()
    try unsync()
    var activity = kvm_mp_state(mp_state: state.activity.rawValue)
    if machine.interrupts != .userSpace {
      try kvmCall("KVM_SET_MP_STATE", descriptor, CLINUX_KVM_SET_MP_STATE, with: &activity)
    }
    try writeRegisters(state.general)
    try writeSystemRegisters(state.system)
    if state.xcr0 != 0 {
      var control = kvm_xcrs()
      control.nr_xcrs = 1
      control.xcrs.0.value = state.xcr0
      try kvmCall("KVM_SET_XCRS", descriptor, CLINUX_KVM_SET_XCRS, with: &control)
      face.left?.control = control
    }
    if !state.extended.isEmpty { try writeExtendedState(state.extended) }
    var debug = kvm_debugregs()
    debug.db = (state.debug.addresses[0], state.debug.addresses[1], state.debug.addresses[2], state.debug.addresses[3])
    debug.dr6 = state.debug.dr6
    debug.dr7 = state.debug.dr7
    try kvmCall("KVM_SET_DEBUGREGS", descriptor, CLINUX_KVM_SET_DEBUGREGS, with: &debug)
    if machine.interrupts != .userSpace, !state.localAPIC.isEmpty {
      guard state.localAPIC.count == MemoryLayout<kvm_lapic_state>.size else {
        throw invalid("the size of its local APIC", state.localAPIC.count)
      }
      var page = kvm_lapic_state()
      withUnsafeMutableBytes(of: &page) { $0.copyBytes(from: state.localAPIC) }
      try kvmCall("KVM_SET_LAPIC", descriptor, CLINUX_KVM_SET_LAPIC, with: &page)
    }
    try writeTSCRate(state.tscKilohertz)
    try writeModelSpecificRegisters(state.modelSpecific)
    try checkCounter(state)
    var events = kvm_vcpu_events(state.events)
    // KVM refuses the parts that the virtual machine could not turn on.
    if !machine.hasExceptionPayloads { events.flags &= ~UInt32(KVM_VCPUEVENT_VALID_PAYLOAD) }
    if !machine.hasTripleFaultEvents { events.flags &= ~UInt32(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) }
    try kvmCall("KVM_SET_VCPU_EVENTS", descriptor, CLINUX_KVM_SET_VCPU_EVENTS, with: &events)
  }

  /// Kilohertz; 0 where the host does not know.
  func readTSCRate() -> UInt32 { UInt32(max(0, ioctl(descriptor, CLINUX_KVM_GET_TSC_KHZ, 0))) }

  /// A host that cannot scale keeps its own rate; asked all the same, it may only change what it says the rate is.
  private func writeTSCRate(_ kilohertz: UInt32) throws(AcceleratorError) {
    guard machine.accelerator.capabilities.contains(.tscScaling), kilohertz != 0, kilohertz != readTSCRate() else {
      return
    }
    _ = try kvmCall(
      "KVM_SET_TSC_KHZ", descriptor, CLINUX_KVM_SET_TSC_KHZ,
      UnsafeMutableRawPointer(bitPattern: UInt(kilohertz)))
  }

  /// Without VMX or SVM the counter is the host's whatever is written: it may be ahead of the state's, by the time that has passed.
  private func checkCounter(_ state: VCPUState) throws(AcceleratorError) {
    guard !machine.accelerator.capabilities.contains(.nativeRing0),
      let saved = state.modelSpecific.first(where: { $0.index == Self.timestampIndex })?.value,
      let here = try readModelSpecificRegisters([Self.timestampIndex]).first?.value, saved > here
    else { return }
    throw .counterBehind(saved: saved, here: here)
  }

  private func invalid(_ field: String, _ value: Int) -> AcceleratorError {
    .state(.invalid(node: "vcpu\(index)", field: field, value: UInt64(value)))
  }

  private func readExtendedState() throws(AcceleratorError) -> [UInt8] {
    let area = UnsafeMutableRawBufferPointer.allocate(byteCount: machine.accelerator.extendedStateSize, alignment: 64)
    defer { area.deallocate() }
    area.initializeMemory(as: UInt8.self, repeating: 0)
    try readExtendedState(into: area)
    return Array(area)
  }

  /// Into as many bytes as the accelerator says, zeroed once.
  func readExtendedState(into area: UnsafeMutableRawBufferPointer) throws(AcceleratorError) {
    if area.count > MemoryLayout<kvm_xsave>.size {
      _ = try kvmCall("KVM_GET_XSAVE2", descriptor, CLINUX_KVM_GET_XSAVE2, area.baseAddress)
    } else {
      _ = try kvmCall("KVM_GET_XSAVE", descriptor, CLINUX_KVM_GET_XSAVE, area.baseAddress)
    }
  }

  private func writeExtendedState(_ bytes: [UInt8]) throws(AcceleratorError) {
    let size = machine.accelerator.extendedStateSize
    guard bytes.count <= size else { throw invalid("the size of its extended state", bytes.count) }
    let area = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 64)
    defer { area.deallocate() }
    area.initializeMemory(as: UInt8.self, repeating: 0, count: size)
    bytes.withUnsafeBytes { UnsafeMutableRawBufferPointer(start: area, count: size).copyMemory(from: $0) }
    _ = try kvmCall("KVM_SET_XSAVE", descriptor, CLINUX_KVM_SET_XSAVE, area)
  }
}

// MARK: - Model-specific registers

extension KVMVirtualCPU {
  /// IA32_TSC_DEADLINE: set last, because it arms the timer against the TSC and the LAPIC as they are then.
  private static let tscDeadline: UInt32 = 0x6e0

  /// Reads the registers one after another; the ones that this host lists but does not have are left out.
  func readModelSpecificRegisters(_ indices: [UInt32]) throws(AcceleratorError) -> [ModelSpecificRegister] {
    try settle()
    let table = MSRTable(indices.map { ModelSpecificRegister(index: $0, value: 0) })
    var result: [ModelSpecificRegister] = []
    var first = 0
    while first < table.count {
      let (done, refused) = try table.call("KVM_GET_MSRS", descriptor, CLINUX_KVM_GET_MSRS, from: first)
      for index in first..<first + done { result.append(table[index]) }
      first += done + (refused ? 1 : 0)
    }
    return result
  }

  /// Writes the registers. One that the host refuses is skipped where it has that value anyhow (it is read-only there),
  /// or where it is 0 and the host lacks it.
  func writeModelSpecificRegisters(_ registers: [ModelSpecificRegister]) throws(AcceleratorError) {
    try unsync()
    let ordered = registers.filter { $0.index != Self.tscDeadline } + registers.filter { $0.index == Self.tscDeadline }
    let table = MSRTable(ordered)
    var first = 0
    while first < table.count {
      let (done, refused) = try table.call("KVM_SET_MSRS", descriptor, CLINUX_KVM_SET_MSRS, from: first)
      first += done
      guard refused else { continue }
      let present = try readModelSpecificRegisters([table[first].index])
      guard present.first?.value ?? 0 == table[first].value else {
        throw .modelSpecificRegister(index: table[first].index, write: true)
      }
      first += 1
    }
  }
}

/// `struct kvm_msrs`, whose entries are a flexible array member, which does not import.
final class MSRTable {
  let count: Int
  private let entries: UnsafeMutablePointer<kvm_msr_entry>
  private let storage: UnsafeMutableRawPointer

  init(_ registers: [ModelSpecificRegister]) {
    count = registers.count
    // One entry's room in front, whose end serves as the header of a call from any entry on.
    storage = .allocate(byteCount: (count + 1) * MemoryLayout<kvm_msr_entry>.stride, alignment: 16)
    entries = (storage + MemoryLayout<kvm_msr_entry>.stride).assumingMemoryBound(to: kvm_msr_entry.self)
    for (index, register) in registers.enumerated() {
      entries[index] = kvm_msr_entry(index: register.index, reserved: 0, data: register.value)
    }
  }

  deinit {
    storage.deallocate()
  }

  subscript(index: Int) -> ModelSpecificRegister {
    ModelSpecificRegister(index: entries[index].index, value: entries[index].data)
  }

  var registers: [ModelSpecificRegister] { (0..<count).map { self[$0] } }

  /// Of the same registers.
  func hasSameValues(_ other: MSRTable) -> Bool {
    memcmp(entries, other.entries, count * MemoryLayout<kvm_msr_entry>.stride) == 0
  }

  /// KVM takes fewer than 256 entries a call (MAX_IO_MSRS).
  private static let batch = 255

  /// Returns how many entries from `first` on were handled, and whether the one after them was refused.
  func call(
    _ name: StaticString, _ descriptor: Int32, _ request: UInt, from first: Int
  ) throws(AcceleratorError) -> (done: Int, refused: Bool) {
    let limit = min(count - first, Self.batch)
    let header = UnsafeMutableRawPointer(entries + first) - MemoryLayout<kvm_msrs>.size
    let kept = header.loadUnaligned(as: UInt64.self)
    header.storeBytes(of: UInt64(limit), as: UInt64.self)
    defer { header.storeBytes(of: kept, as: UInt64.self) }
    let done = Int(try kvmCall(name, descriptor, request, header))
    return (done, done < limit)
  }
}

// MARK: - Conversions

extension SegmentRegister {
  fileprivate init(_ segment: kvm_segment) {
    var attributes = UInt16(segment.type) | UInt16(segment.s) << 4 | UInt16(segment.dpl) << 5
    attributes |= UInt16(segment.present) << 7 | UInt16(segment.avl) << 8 | UInt16(segment.l) << 9
    attributes |= UInt16(segment.db) << 10 | UInt16(segment.g) << 11 | UInt16(segment.unusable) << 12
    self.init(base: segment.base, limit: segment.limit, selector: segment.selector, attributes: attributes)
  }
}

extension kvm_segment {
  fileprivate init(_ segment: SegmentRegister) {
    func field(_ shift: UInt16, _ mask: UInt16 = 1) -> UInt8 { UInt8(segment.attributes >> shift & mask) }
    self.init(
      base: segment.base, limit: segment.limit, selector: segment.selector, type: field(0, 15), present: field(7),
      dpl: field(5, 3), db: field(10), s: field(4), l: field(9), g: field(11), avl: field(8), unusable: field(12),
      padding: 0)
  }
}

extension PendingEvents {
  fileprivate init(_ events: kvm_vcpu_events) {
    self.init()
    exceptionInjected = events.exception.injected != 0
    exceptionPending = events.exception.pending != 0
    exceptionVector = events.exception.nr
    exceptionHasErrorCode = events.exception.has_error_code != 0
    exceptionErrorCode = events.exception.error_code
    exceptionPayload = events.exception_has_payload != 0 ? events.exception_payload : nil
    interruptInjected = events.interrupt.injected != 0
    interruptVector = events.interrupt.nr
    interruptIsSoftware = events.interrupt.soft != 0
    interruptShadow = events.interrupt.shadow
    nmiInjected = events.nmi.injected != 0
    nmiPending = events.nmi.pending != 0
    nmiMasked = events.nmi.masked != 0
    startupVector = events.sipi_vector
    tripleFaultPending = events.triple_fault.pending != 0
  }
}

extension kvm_vcpu_events {
  fileprivate init(_ events: PendingEvents) {
    self.init()
    exception.injected = events.exceptionInjected ? 1 : 0
    exception.pending = events.exceptionPending ? 1 : 0
    exception.nr = events.exceptionVector
    exception.has_error_code = events.exceptionHasErrorCode ? 1 : 0
    exception.error_code = events.exceptionErrorCode
    exception_has_payload = events.exceptionPayload == nil ? 0 : 1
    exception_payload = events.exceptionPayload ?? 0
    interrupt.injected = events.interruptInjected ? 1 : 0
    interrupt.nr = events.interruptVector
    interrupt.soft = events.interruptIsSoftware ? 1 : 0
    interrupt.shadow = events.interruptShadow
    nmi.injected = events.nmiInjected ? 1 : 0
    nmi.pending = events.nmiPending ? 1 : 0
    nmi.masked = events.nmiMasked ? 1 : 0
    sipi_vector = events.startupVector
    triple_fault.pending = events.tripleFaultPending ? 1 : 0
    flags = UInt32(
      KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW
        | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
  }
}
