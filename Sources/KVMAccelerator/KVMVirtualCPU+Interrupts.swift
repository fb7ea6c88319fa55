import Accelerator
import CLinux
import Host

/// Interrupts from controllers in the VMM: injected before a run, in the window that KVM opens where they cannot be.
extension KVMVirtualCPU {
  /// Takes interrupts, CR8, IA32_APIC_BASE and the APIC's other MSRs to `controller` from now on.
  public func attach(_ controller: any LocalInterruptController) throws(AcceleratorError) {
    source = controller
    self.controller = controller
    apicBase = controller.readMSR(Self.apicBaseIndex) ?? 0
  }

  /// Takes the PIC's interrupts from `source` from now on; KVM's local APIC says whether they pass.
  public func attach(external source: any InterruptSource) throws(AcceleratorError) {
    self.source = source
  }

  /// Hands an interrupt to the processor (`KVM_INTERRUPT`). KVM would take a second one in place of the first.
  public func injectInterrupt(vector: UInt8) throws(AcceleratorError) {
    try unsync()
    var request = kvm_interrupt(irq: UInt32(vector))
    try kvmCall("KVM_INTERRUPT", descriptor, CLINUX_KVM_INTERRUPT, with: &request)
    shared.pointee.ready_for_interrupt_injection = 0
  }

  /// Whether an interrupt can be injected now.
  public var isInterruptible: Bool { shared.pointee.ready_for_interrupt_injection != 0 && shared.pointee.if_flag != 0 }

  /// Asks for `.interruptWindow` as soon as an interrupt can be injected.
  public func requestInterruptWindow(_ wanted: Bool) {
    shared.pointee.request_interrupt_window = wanted ? 1 : 0
  }

  /// Makes an NMI pending (`KVM_NMI`).
  public func injectNMI() throws(AcceleratorError) {
    try unsync()
    _ = try kvmCall("KVM_NMI", descriptor, CLINUX_KVM_NMI)
  }

  /// Injects what the controllers have, or asks for the window in which that can be done.
  func offerInterrupt(_ source: any InterruptSource) throws(AcceleratorError) {
    if source.hasInterrupt, isInterruptible, let vector = source.acknowledgeInterrupt() {
      try injectInterrupt(vector: vector)
    }
    requestInterruptWindow(source.hasInterrupt)
    if let controller {
      taskPriority = UInt64(controller.taskPriority)
      shared.pointee.cr8 = taskPriority
    }
  }

  /// State that came from elsewhere may forbid what the last exit allowed.
  func forbidInjection() {
    if source != nil { shared.pointee.ready_for_interrupt_injection = 0 }
  }

  /// KVM has CR8 and IA32_APIC_BASE of its own; what the guest has done to them goes to the controller.
  @inline(__always)
  func takeRegisters(_ controller: any LocalInterruptController) {
    if shared.pointee.cr8 != taskPriority {
      taskPriority = shared.pointee.cr8 & 0xf
      controller.taskPriority = UInt8(taskPriority)
    }
    if shared.pointee.apic_base != apicBase {
      apicBase = shared.pointee.apic_base
      _ = controller.writeMSR(Self.apicBaseIndex, value: apicBase)
    }
  }

  /// Answers an exit for an MSR; KVM raises #GP for those that the controller does not have, as it would have by itself.
  func accessRegister(_ controller: any LocalInterruptController) throws(AcceleratorError) -> Bool {
    switch Int32(bitPattern: shared.pointee.exit_reason) {
    case KVM_EXIT_X86_RDMSR:
      let value = controller.readMSR(shared.pointee.msr.index)
      shared.pointee.msr.data = value ?? 0
      shared.pointee.msr.error = value == nil ? 1 : 0
      return true
    case KVM_EXIT_X86_WRMSR:
      let (index, value) = (shared.pointee.msr.index, shared.pointee.msr.data)
      let isDone = controller.writeMSR(index, value: value)
      // KVM's own copy decides what CPUID shows of the APIC.
      if isDone, index == Self.apicBaseIndex {
        try writeModelSpecificRegisters([ModelSpecificRegister(index: index, value: value)])
        apicBase = value
      }
      shared.pointee.msr.error = isDone ? 0 : 1
      return true
    default: return false
    }
  }

  /// Guest nanoseconds until the time-stamp counter, read now, has this value.
  public func nanoseconds(untilTimestamp ticks: UInt64) -> UInt64? {
    let kilohertz = UInt64(readTSCRate())
    guard kilohertz > 0, let now = try? readModelSpecificRegisters([Self.timestampIndex]).first?.value else {
      return nil
    }
    guard ticks > now else { return 0 }
    let product = (ticks - now).multipliedFullWidth(by: 1_000_000)
    return product.high < kilohertz ? kilohertz.dividingFullWidth(product).quotient : nil
  }

  private static let apicBaseIndex: UInt32 = 0x1b
  static let timestampIndex: UInt32 = 0x10
}

extension KVMVirtualMachine {
  /// Makes accesses to the x2APIC's registers, which are invalid to a KVM without local APICs, to the TSC deadline, which
  /// it would ignore, and writes to the APIC base, of which none may be missed, exits that `accessRegister` answers.
  static func takeControllerRegisters(on machine: Int32) throws(AcceleratorError) {
    let reasons = UInt64(KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
    try enable(KVM_CAP_X86_USER_SPACE_MSR, reasons, on: machine)
    var denied: UInt64 = 0
    let result = withUnsafeMutableBytes(of: &denied) { bitmap in
      Result { () throws(AcceleratorError) in
        let bits = bitmap.baseAddress?.assumingMemoryBound(to: UInt8.self)
        let (read, write) = (UInt32(KVM_MSR_FILTER_READ), UInt32(KVM_MSR_FILTER_WRITE))
        var filter = kvm_msr_filter()
        filter.ranges.0 = kvm_msr_filter_range(flags: read | write, nmsrs: 1, base: 0x6e0, bitmap: bits)
        filter.ranges.1 = kvm_msr_filter_range(flags: write, nmsrs: 1, base: 0x1b, bitmap: bits)
        try kvmCall("KVM_X86_SET_MSR_FILTER", machine, CLINUX_KVM_X86_SET_MSR_FILTER, with: &filter)
      }
    }
    try result.get()
  }
}
