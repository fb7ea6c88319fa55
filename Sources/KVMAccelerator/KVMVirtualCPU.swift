import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import MemoryViews
import StateTree
import Synchronization

/// One KVM vCPU: the run call, its exits, debugging. Its state is in KVMVirtualCPU+State.swift.
public final class KVMVirtualCPU: VirtualCPU, @unchecked Sendable {
  /// Its number and APIC id.
  public let index: Int
  let machine: KVMVirtualMachine
  /// KVM's vCPUs that stand for this one, one a view that it has had, by the view's number; 0: no view.
  var faces: [UInt32: KVMFace]
  /// The one that runs; `kick` reads its flag's address from other threads.
  var face: KVMFace {
    didSet { immediateExitAddress.store(Int(bitPattern: face.immediateExit), ordering: .sequentiallyConsistent) }
  }
  private let immediateExitAddress: Atomic<Int>
  /// Held while a face's flag is set from another thread, and while faces are forgotten.
  let kicks = Mutex(())
  /// The descriptor and the shared page of the one that runs.
  var descriptor: Int32 { face.descriptor.rawValue }
  var shared: UnsafeMutablePointer<kvm_run> { face.shared }
  private var immediateExit: UnsafeMutablePointer<Atomic<UInt8>> { face.immediateExit }
  /// CPUID's leaves, for faces still to come.
  let cpuid: [CPUIDLeaf]
  /// What `selectView` chose last.
  public internal(set) var activeView: MemoryView?
  /// The exit that KVM waits for an answer to was about an access that the view forbids.
  var hasForbidden = false
  /// Whether this thread is where a change of slots or rights must wait for it.
  let isInside = Atomic(false)
  /// Whether the shared page has the registers, as of the last run and with what was written since.
  var isSynced = false
  /// What the debugger wants, for every face.
  var debug = kvm_guest_debug()
  /// A kick that `run` has not answered yet; `completeExit` borrows `immediateExit` and must not lose it.
  private let isKicked = Atomic(false)
  /// Kernel id of the thread that called `run` last, the one to interrupt; 0 before the first. A pthread_t would not do:
  /// the next thread gets that of one that has ended.
  private let runner = Atomic<Int32>(0)
  /// The interrupt controllers in the VMM, where they are: what drives INTR, and the local APIC.
  var source: (any InterruptSource)?
  var controller: (any LocalInterruptController)?
  /// What the controller has for IA32_APIC_BASE and CR8, to see when the guest changes them.
  var apicBase: UInt64 = 0
  var taskPriority: UInt64 = 0

  init(machine: KVMVirtualMachine, index: Int, cpuid: [CPUIDLeaf]) throws(AcceleratorError) {
    self.machine = machine
    self.index = index
    self.cpuid = cpuid
    face = try KVMFace(machine, index: index, cpuid: cpuid)
    faces = [0: face]
    immediateExitAddress = Atomic(Int(bitPattern: face.immediateExit))
  }

  /// Runs the guest (`KVM_RUN`).
  public func run() throws(AcceleratorError) -> VCPUExit {
    if hasForbidden { try endForbidden() }
    // A kick that was meant for another face.
    if machine.hasViews, isKicked.load(ordering: .sequentiallyConsistent) {
      immediateExit.pointee.store(1, ordering: .sequentiallyConsistent)
    }
    // Sequentially consistent here and in `kick`: one of the two sees what the other stored.
    if runner.load(ordering: .relaxed) != ThreadIdentity.current.id {
      runner.store(ThreadIdentity.becomeInterruptible().id, ordering: .sequentiallyConsistent)
    }
    if let source { try offerInterrupt(source) }
    if let exit = try enter() { return exit }
    var tries = 0
    while tries < Self.mostTries, try mayHoldBreakpoint() {
      if let exit = try goOnShortly() { return exit }
      tries += 1
    }
    // A kick from here on is answered by this return, or sets the flag anew for the next run.
    isKicked.store(false, ordering: .sequentiallyConsistent)
    immediateExit.pointee.store(0, ordering: .sequentiallyConsistent)
    return .interrupted
  }

  /// Lets KVM finish the last exit's access, then come back before the guest runs; another part of the access may be due.
  public func completeExit() throws(AcceleratorError) -> VCPUExit? {
    immediateExit.pointee.store(1, ordering: .sequentiallyConsistent)
    defer {
      immediateExit.pointee.store(0, ordering: .sequentiallyConsistent)
      if isKicked.load(ordering: .sequentiallyConsistent) {
        immediateExit.pointee.store(1, ordering: .sequentiallyConsistent)
      }
    }
    return try enter()
  }

  /// Every second try may end at a breakpoint again, and a guest that spins right behind one looks the same for ever.
  private static let mostTries = 32

  /// Whether a breakpoint's exception may be about to be delivered that no call tells of: KVM leaves software exceptions out of
  /// `KVM_GET_VCPU_EVENTS`, as the instruction is executed again, but where ring 3 runs without VMX or SVM, RIP is behind
  /// it already. A state that were read now could lack it.
  private func mayHoldBreakpoint() throws(AcceleratorError) -> Bool {
    guard !machine.accelerator.capabilities.contains(.nativeRing0) else { return false }
    var events = kvm_vcpu_events()
    try kvmCall("KVM_GET_VCPU_EVENTS", descriptor, CLINUX_KVM_GET_VCPU_EVENTS, with: &events)
    // INT3 and INTO.
    let opcode: UInt8
    switch events.exception.nr {
    case 3: opcode = 0xcc
    case 4: opcode = 0xce
    default: return false
    }
    let code = try readSystemRegisters().cs
    guard code.selector & 3 == 3 else { return false }
    let rip = try readRegisters().rip
    guard let address = try translate(code.base &+ rip &- 1) else { return false }
    return (try? machine.memory.read(address, as: UInt8.self)) == opcode
  }

  /// Runs the guest for a moment more.
  private func goOnShortly() throws(AcceleratorError) -> VCPUExit? {
    immediateExit.pointee.store(0, ordering: .sequentiallyConsistent)
    let kicker: HostThread
    do throws(HostError) {
      kicker = try HostThread(name: "kicker") { [self] in
        usleep(100)
        leaveSoon()
      }
    } catch {
      throw .call("a thread's start", errno: error.errno, reason: HostError.reason(error.errno))
    }
    defer {
      kicker.join()
      immediateExit.pointee.store(
        isKicked.load(ordering: .sequentiallyConsistent) ? 1 : 0, ordering: .sequentiallyConsistent)
    }
    return try enter()
  }

  /// Takes the vCPU out of the guest: the flag stops a run that has not begun, the signal one that has.
  public func kick() {
    isKicked.store(true, ordering: .sequentiallyConsistent)
    leaveSoon()
  }

  /// The same for one that has nothing to be told: it comes back, and goes on.
  func leaveSoon() {
    kicks.withLock { _ in
      let flag = immediateExitAddress.load(ordering: .sequentiallyConsistent)
      UnsafeMutablePointer<Atomic<UInt8>>(bitPattern: flag)?.pointee.store(1, ordering: .sequentiallyConsistent)
    }
    let thread = runner.load(ordering: .sequentiallyConsistent)
    if thread != 0 { ThreadIdentity(id: thread).interrupt() }
  }

  /// `KVM_RUN` until there is an exit; nil where it was interrupted.
  @inline(__always)
  private func enter() throws(AcceleratorError) -> VCPUExit? {
    while true {
      let hasViews = machine.hasViews
      if hasViews { machine.gate.enter(self) }
      let result = ioctl(descriptor, CLINUX_KVM_RUN, 0)
      let code = errno
      if hasViews {
        isSynced = shared.pointee.kvm_valid_regs != 0
        if result >= 0, let exit = serveView() {
          machine.gate.leave(self)
          if case .served = exit { continue }
          if let controller { takeRegisters(controller) }
          if case .violation(let violation) = exit { return .viewViolation(violation) }
        }
        machine.gate.leave(self)
      }
      if let controller { takeRegisters(controller) }
      if result >= 0 {
        if let controller, try accessRegister(controller) { continue }
        return exit()
      }
      switch code {
      case EINTR: return nil
      // An application processor that was woken by SIPI reports so once; there is nothing to do.
      case EAGAIN: continue
      case EFAULT, EHWPOISON:
        if shared.pointee.exit_reason == UInt32(KVM_EXIT_MEMORY_FAULT) { return exit() }
      default: break
      }
      throw .call("KVM_RUN of vCPU \(index)", errno: code, reason: HostError.reason(code))
    }
  }

  private func exit() -> VCPUExit {
    switch Int32(bitPattern: shared.pointee.exit_reason) {
    case KVM_EXIT_IO:
      let io = shared.pointee.io
      return .portIO(
        PortAccess(
          port: io.port, size: io.size, isWrite: Int32(io.direction) == KVM_EXIT_IO_OUT, count: io.count,
          data: UnsafeMutableRawPointer(shared) + Int(io.data_offset)))
    case KVM_EXIT_MMIO:
      return .memoryIO(
        MemoryAccess(
          address: GuestPhysicalAddress(shared.pointee.mmio.phys_addr), size: UInt8(shared.pointee.mmio.len),
          isWrite: shared.pointee.mmio.is_write != 0, data: clinux_kvm_mmio_data(shared)))
    case KVM_EXIT_HLT: return .halt
    // CR8 was lowered: the next run looks for an interrupt that may pass now.
    case KVM_EXIT_INTR, KVM_EXIT_SET_TPR: return .interrupted
    case KVM_EXIT_IRQ_WINDOW_OPEN: return .interruptWindow
    case KVM_EXIT_SHUTDOWN: return .tripleFault
    case KVM_EXIT_SYSTEM_EVENT:
      guard let event = SystemEvent(rawValue: shared.pointee.system_event.type) else {
        return .unknown(reason: shared.pointee.exit_reason)
      }
      return .systemEvent(event)
    case KVM_EXIT_DEBUG:
      let debug = shared.pointee.debug.arch
      return .debug(
        DebugEvent(address: debug.pc, status: debug.dr6, vector: UInt8(truncatingIfNeeded: debug.exception)))
    case KVM_EXIT_INTERNAL_ERROR: return internalError()
    case KVM_EXIT_MEMORY_FAULT:
      let fault = shared.pointee.memory_fault
      return .memoryFault(GuestPhysicalAddress(fault.gpa), size: fault.size, flags: fault.flags)
    case KVM_EXIT_IOAPIC_EOI: return .endOfInterrupt(vector: shared.pointee.eoi.vector)
    case KVM_EXIT_DIRTY_RING_FULL: return .dirtyRingFull
    case KVM_EXIT_HYPERCALL:
      let call = shared.pointee.hypercall
      return .hypercall(
        number: call.nr, arguments: (call.args.0, call.args.1, call.args.2, call.args.3, call.args.4),
        result: clinux_kvm_hypercall_result(shared))
    case KVM_EXIT_FAIL_ENTRY:
      return .entryFailure(reason: shared.pointee.fail_entry.hardware_entry_failure_reason)
    default: return .unknown(reason: shared.pointee.exit_reason)
    }
  }

  private func internalError() -> VCPUExit {
    let error = shared.pointee.`internal`
    guard Int32(error.suberror) == KVM_INTERNAL_ERROR_EMULATION else {
      return .internalError(
        subcode: error.suberror, data: (error.data.0, error.data.1, error.data.2, error.data.3))
    }
    // data[0] is flags; with bit 0, data[1] holds the instruction's length and its bytes (KVM_CAP_EXIT_ON_EMULATION_FAILURE).
    guard error.ndata >= 3, error.data.0 & 1 != 0 else { return .emulationFailure(InstructionBytes()) }
    let count = UInt8(truncatingIfNeeded: error.data.1)
    let low = error.data.1 >> 8 | error.data.2 << 56
    return .emulationFailure(InstructionBytes(low: low, high: error.data.2 >> 8, count: count))
  }

  /// Walks the guest's page tables (`KVM_TRANSLATE` where the registers are not at hand).
  public func translate(_ linear: UInt64) throws(AcceleratorError) -> GuestPhysicalAddress? {
    if let paging = knownPaging { return walk(linear, paging) }
    try settle()
    var translation = kvm_translation()
    translation.linear_address = linear
    try kvmCall("KVM_TRANSLATE", descriptor, CLINUX_KVM_TRANSLATE, with: &translation)
    return translation.valid != 0 ? GuestPhysicalAddress(translation.physical_address) : nil
  }

  /// Sets what the debugger wants (`KVM_SET_GUEST_DEBUG`).
  public func setDebug(_ control: DebugControl) throws(AcceleratorError) {
    guard control.breakpoints.count <= breakpointLimit else {
      throw .breakpointCount(control.breakpoints.count, limit: breakpointLimit)
    }
    for breakpoint in control.breakpoints {
      guard breakpoint.kind != .read else { throw .unsupported(engine: "kvm", what: "watchpoints on reads alone") }
      guard breakpoint.kind == .execute ? breakpoint.length == 1 : [1, 2, 4, 8].contains(breakpoint.length) else {
        throw .breakpointLength(address: breakpoint.address, length: breakpoint.length)
      }
    }
    var debug = kvm_guest_debug()
    if control != DebugControl() { debug.control |= UInt32(KVM_GUESTDBG_ENABLE) }
    if control.singleStep {
      debug.control |= UInt32(KVM_GUESTDBG_SINGLESTEP)
      debug.control |=
        UInt32(machine.accelerator.extensionValue(KVM_CAP_SET_GUEST_DEBUG2)) & CLINUX_KVM_GUESTDBG_BLOCKIRQ
    }
    if control.software { debug.control |= CLINUX_KVM_GUESTDBG_USE_SW_BP }
    if !control.breakpoints.isEmpty { debug.control |= CLINUX_KVM_GUESTDBG_USE_HW_BP }
    withUnsafeMutableBytes(of: &debug.arch.debugreg) { bytes in
      let registers = bytes.bindMemory(to: UInt64.self)
      registers[7] = 0x400
      for (slot, breakpoint) in control.breakpoints.enumerated() {
        registers[slot] = breakpoint.address
        // DR7 (SDM vol. 3, 18.2.4): global enable, then type and length (8 bytes is encoded as 2).
        let length: UInt64 =
          breakpoint.kind == .execute ? 0 : breakpoint.length == 8 ? 2 : UInt64(breakpoint.length) - 1
        registers[7] |= 2 << UInt64(slot * 2)
        registers[7] |= (UInt64(breakpoint.kind.rawValue) | length << 2) << UInt64(16 + slot * 4)
      }
    }
    try unsync()
    self.debug = debug
    try kvmCall("KVM_SET_GUEST_DEBUG", descriptor, CLINUX_KVM_SET_GUEST_DEBUG, with: &debug)
  }
}
