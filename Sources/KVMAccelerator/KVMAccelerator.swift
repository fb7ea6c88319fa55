import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host

/// Linux's KVM (Documentation/virt/kvm/api.rst), on VMX, SVM and paravirtual hosts.
public final class KVMAccelerator: Accelerator {
  /// The device file.
  public static let devicePath = "/dev/kvm"

  /// `kvm`.
  public let name = "kvm"
  /// What the host's KVM offers.
  public let capabilities: AcceleratorCapabilities
  let device: FileDescriptor
  let vcpuMappingSize: Int
  /// Bytes of a vCPU's XSAVE area.
  let extendedStateSize: Int
  /// What the host saves of a vCPU's model-specific registers.
  let modelSpecificIndices: [UInt32]
  /// What the guest itself may change of them at any time, and so moves with every change of views.
  let carriedIndices: [UInt32]
  /// SYSENTER, system calls, GS bases, PAT, TSC_AUX, XSS, SPEC_CTRL of both kinds, the paravirtual clock, UMWAIT, TSX, CPUID
  /// faults, XFD, bounds, shadow stacks.
  private static let carried: [UInt32] = [
    0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102, 0xc000_0103, 0x277, 0xda0,
    0x48, 0xc001_011f, 0x1a0, 0x4b56_4d00, 0x4b56_4d01, 0x11, 0x12, 0xe1, 0x122, 0x140, 0x1c4, 0x1c5, 0xd90,
    0x6a0, 0x6a2, 0x6a4, 0x6a5, 0x6a6, 0x6a7, 0x6a8,
  ]
  /// Whether KVM leaves registers in the page that it shares.
  let hasSyncedRegisters: Bool
  /// Entries of each vCPU's dirty ring; nil for the dirty log. KVM offers one or the other to a VM.
  let dirtyRingEntries: Int?

  /// Opens KVM and asks what it can do.
  public init(path: String = KVMAccelerator.devicePath, dirtyRingEntries: Int? = nil) throws(AcceleratorError) {
    do {
      device = try FileDescriptor.open(path, O_RDWR)
    } catch {
      switch error.errno {
      case EACCES, EPERM: throw .noPermission(path: path)
      default: throw .missing(engine: "kvm", path: path, reason: HostError.reason(error.errno))
      }
    }
    do {
      try ThreadIdentity.installKickHandler()
    } catch {
      throw .call("sigaction", errno: error.errno, reason: HostError.reason(error.errno))
    }
    let version = try kvmCall("KVM_GET_API_VERSION", device.rawValue, CLINUX_KVM_GET_API_VERSION)
    guard version == KVM_API_VERSION else {
      throw .interfaceVersion(found: version, wanted: KVM_API_VERSION)
    }
    vcpuMappingSize = Int(try kvmCall("KVM_GET_VCPU_MMAP_SIZE", device.rawValue, CLINUX_KVM_GET_VCPU_MMAP_SIZE))
    self.dirtyRingEntries = dirtyRingEntries
    let descriptor = device.rawValue
    func value(_ capability: Int32) -> Int32 { ioctl(descriptor, CLINUX_KVM_CHECK_EXTENSION, capability) }
    func has(_ capability: Int32) -> Bool { value(capability) > 0 }
    guard has(KVM_CAP_USER_MEMORY), has(KVM_CAP_IMMEDIATE_EXIT), has(KVM_CAP_XSAVE), has(KVM_CAP_XCRS) else {
      throw .unsupported(engine: "kvm", what: "user memory, immediate exit or XSAVE state in its KVM")
    }
    extendedStateSize = max(MemoryLayout<kvm_xsave>.size, Int(value(KVM_CAP_XSAVE2)))
    modelSpecificIndices = try Self.savedRegisterIndices(descriptor)
    carriedIndices = Self.carried.filter { [modelSpecificIndices] in modelSpecificIndices.contains($0) }
    let synced = CLINUX_KVM_SYNC_X86_REGS | CLINUX_KVM_SYNC_X86_SREGS | CLINUX_KVM_SYNC_X86_EVENTS
    hasSyncedRegisters = UInt64(max(0, value(KVM_CAP_SYNC_REGS))) & synced == synced
    var capabilities: AcceleratorCapabilities = [.dirtyLog]
    if has(KVM_CAP_READONLY_MEM) { capabilities.insert(.readOnlyMemory) }
    if has(KVM_CAP_IRQCHIP), has(KVM_CAP_PIT2) { capabilities.insert(.inKernelInterrupts) }
    if has(KVM_CAP_SPLIT_IRQCHIP) { capabilities.insert(.splitInterrupts) }
    if has(KVM_CAP_IRQFD), has(KVM_CAP_IOEVENTFD) { capabilities.insert(.eventNotifiers) }
    if has(KVM_CAP_X86_USER_SPACE_MSR), has(KVM_CAP_X86_MSR_FILTER) { capabilities.insert(.controllerRegisters) }
    if capabilities.contains(.readOnlyMemory), dirtyRingEntries == nil { capabilities.insert(.memoryViews) }
    if has(KVM_CAP_SET_GUEST_DEBUG) { capabilities.insert(.guestDebug) }
    if has(KVM_CAP_TSC_CONTROL) { capabilities.insert(.tscScaling) }
    if Self.hasHardwareVirtualization() {
      capabilities.formUnion([.nativeRing0, .watchpoints])
      // Without, KVM emulates runs of ring-0 instructions between its looks at the ring: it exits too late, and entries
      // that nobody has read are overwritten.
      if has(KVM_CAP_DIRTY_LOG_RING) { capabilities.insert(.dirtyRing) }
    }
    self.capabilities = capabilities
  }

  /// A capability's value (`KVM_CHECK_EXTENSION`); 0 where the host lacks it.
  public func extensionValue(_ capability: Int32) -> Int32 {
    max(0, ioctl(device.rawValue, CLINUX_KVM_CHECK_EXTENSION, capability))
  }

  private static func savedRegisterIndices(_ device: Int32) throws(AcceleratorError) -> [UInt32] {
    let capacity = 4096
    let list = UnsafeMutablePointer<UInt32>.allocate(capacity: capacity + 1)
    defer { list.deallocate() }
    list[0] = UInt32(capacity)
    _ = try kvmCall("KVM_GET_MSR_INDEX_LIST", device, CLINUX_KVM_GET_MSR_INDEX_LIST, UnsafeMutableRawPointer(list))
    let listed = (0..<Int(list[0])).map { list[$0 + 1] }
    // Every KVM has them, and not every one lists them.
    return listed + memoryTypes.filter { !listed.contains($0) }
  }

  /// The MTRRs: eight variable ranges, the fixed ranges, the default type (SDM vol. 4).
  private static let memoryTypes: [UInt32] = (0x200...0x20f) + [0x250, 0x258, 0x259] + (0x268...0x26f) + [0x2ff]

  /// Ticks of the host's time-stamp counter a millisecond, as KVM's guests count it; nil where the host does not know.
  public func counterKilohertz() throws(AcceleratorError) -> UInt32? {
    let machine = FileDescriptor(owning: try kvmCall("KVM_CREATE_VM", device.rawValue, CLINUX_KVM_CREATE_VM))
    let vcpu = FileDescriptor(owning: try kvmCall("KVM_CREATE_VCPU", machine.rawValue, CLINUX_KVM_CREATE_VCPU))
    let rate = ioctl(vcpu.rawValue, CLINUX_KVM_GET_TSC_KHZ, 0)
    return rate > 0 ? UInt32(rate) : nil
  }

  /// Whether the processor shows VMX or SVM: without them KVM is paravirtual and emulates ring 0.
  public static func hasHardwareVirtualization() -> Bool {
    let vmx = clinux_cpuid(1, 0).ecx & 1 << 5 != 0
    let extended = clinux_cpuid(0x8000_0000, 0).eax
    let svm = extended >= 0x8000_0001 && clinux_cpuid(0x8000_0001, 0).ecx & 1 << 2 != 0
    return vmx || svm
  }

  /// The leaves of `KVM_GET_SUPPORTED_CPUID`.
  public func supportedCPUID() throws(AcceleratorError) -> [CPUIDLeaf] {
    var capacity = 128
    while true {
      let table = CPUIDTable(capacity: capacity)
      do {
        try table.call("KVM_GET_SUPPORTED_CPUID", device.rawValue, CLINUX_KVM_GET_SUPPORTED_CPUID)
        return table.leaves
      } catch .call(_, errno: E2BIG, _) where capacity < 4096 {
        capacity *= 2
      }
    }
  }

  /// A virtual machine without slots or vCPUs.
  public func makeVirtualMachine(
    memory: GuestMemory, interrupts: InterruptControllerModel
  ) throws(AcceleratorError) -> any VirtualMachine {
    try KVMVirtualMachine(accelerator: self, memory: memory, interrupts: interrupts)
  }
}

/// One ioctl without or with a pointer; EINTR is the caller's only where a signal is a message (KVM_RUN).
@inline(__always)
func kvmCall(
  _ name: StaticString, _ descriptor: Int32, _ request: UInt, _ argument: UnsafeMutableRawPointer? = nil
) throws(AcceleratorError) -> Int32 {
  while true {
    let result = if let argument { ioctl(descriptor, request, argument) } else { ioctl(descriptor, request, 0) }
    if result >= 0 { return result }
    let code = errno
    if code == EINTR { continue }
    throw .call("\(name)", errno: code, reason: HostError.reason(code))
  }
}

/// One ioctl whose argument is a structure.
@inline(__always)
func kvmCall<Argument>(
  _ name: StaticString, _ descriptor: Int32, _ request: UInt, with argument: inout Argument
) throws(AcceleratorError) {
  while true {
    let result = withUnsafeMutablePointer(to: &argument) { ioctl(descriptor, request, UnsafeMutableRawPointer($0)) }
    if result >= 0 { return }
    let code = errno
    if code == EINTR { continue }
    throw .call("\(name)", errno: code, reason: HostError.reason(code))
  }
}

/// `struct kvm_cpuid2`, whose entries are a flexible array member, which does not import.
final class CPUIDTable {
  private let pointer: UnsafeMutableRawPointer
  private let entries: UnsafeMutablePointer<kvm_cpuid_entry2>

  init(capacity: Int) {
    let header = MemoryLayout<kvm_cpuid2>.size
    let size = header + capacity * MemoryLayout<kvm_cpuid_entry2>.stride
    pointer = .allocate(byteCount: size, alignment: 8)
    pointer.initializeMemory(as: UInt8.self, repeating: 0, count: size)
    pointer.assumingMemoryBound(to: kvm_cpuid2.self).pointee.nent = UInt32(capacity)
    entries = (pointer + header).assumingMemoryBound(to: kvm_cpuid_entry2.self)
  }

  convenience init(_ leaves: [CPUIDLeaf]) {
    self.init(capacity: leaves.count)
    for (index, leaf) in leaves.enumerated() {
      entries[index].function = leaf.function
      entries[index].index = leaf.index
      entries[index].flags = leaf.hasIndex ? CLINUX_KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0
      entries[index].eax = leaf.eax
      entries[index].ebx = leaf.ebx
      entries[index].ecx = leaf.ecx
      entries[index].edx = leaf.edx
    }
  }

  deinit {
    pointer.deallocate()
  }

  /// Hands the table to an ioctl; a pointer that left this class could outlive it.
  func call(_ name: StaticString, _ descriptor: Int32, _ request: UInt) throws(AcceleratorError) {
    _ = try kvmCall(name, descriptor, request, pointer)
  }

  var leaves: [CPUIDLeaf] {
    let count = Int(pointer.assumingMemoryBound(to: kvm_cpuid2.self).pointee.nent)
    return (0..<count).map { index in
      let entry = entries[index]
      return CPUIDLeaf(
        function: entry.function, index: entry.index,
        hasIndex: entry.flags & CLINUX_KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0, eax: entry.eax, ebx: entry.ebx,
        ecx: entry.ecx, edx: entry.edx)
    }
  }
}
