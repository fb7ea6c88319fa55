import Accelerator
import CLinux
import Glibc
import Host
import Synchronization

/// One of KVM's vCPUs: a descriptor and the page it shares. A vCPU of the machine has one, or one for each of its views.
final class KVMFace {
  let descriptor: FileDescriptor
  private let mapping: MemoryMapping
  let shared: UnsafeMutablePointer<kvm_run>
  /// `immediate_exit` of the shared page: KVM_RUN returns EINTR before it enters the guest while it is 1.
  let immediateExit: UnsafeMutablePointer<Atomic<UInt8>>
  /// What the face had when it was left: parts that are the same when the vCPU comes back need not be written.
  var left: KVMCarried?

  init(_ machine: KVMVirtualMachine, index: Int, cpuid: [CPUIDLeaf]) throws(AcceleratorError) {
    let vcpu = FileDescriptor(
      owning: try kvmCall(
        "KVM_CREATE_VCPU", machine.descriptor.rawValue, CLINUX_KVM_CREATE_VCPU,
        UnsafeMutableRawPointer(bitPattern: index)))
    do {
      mapping = try MemoryMapping(vcpu, count: machine.accelerator.vcpuMappingSize)
    } catch {
      throw .call("mmap of vCPU \(index)", errno: error.errno, reason: HostError.reason(error.errno))
    }
    shared = mapping.base.assumingMemoryBound(to: kvm_run.self)
    immediateExit = (mapping.base + MemoryLayout<kvm_run>.offset(of: \.immediate_exit)!)
      .assumingMemoryBound(to: Atomic<UInt8>.self)
    try CPUIDTable(cpuid).call("KVM_SET_CPUID2", vcpu.rawValue, CLINUX_KVM_SET_CPUID2)
    descriptor = vcpu
  }

  /// The registers in the shared page, where KVM keeps them there.
  var registers: UnsafeMutablePointer<kvm_sync_regs> { clinux_kvm_sync_regs(shared) }
}

/// What a vCPU carries from face to face besides general registers, as KVM's structures, byte by byte.
final class KVMCarried {
  /// nil where the face's are not known.
  var system: kvm_sregs?
  var debug = kvm_debugregs()
  var control = kvm_xcrs()
  let extended: UnsafeMutableRawBufferPointer
  let modelSpecific: MSRTable

  init(extendedStateSize: Int, modelSpecific: MSRTable) {
    extended = .allocate(byteCount: extendedStateSize, alignment: 64)
    extended.initializeMemory(as: UInt8.self, repeating: 0)
    self.modelSpecific = modelSpecific
  }

  func hasSameExtended(_ other: KVMCarried) -> Bool {
    guard let mine = extended.baseAddress, let others = other.extended.baseAddress else { return false }
    return memcmp(mine, others, extended.count) == 0
  }

  deinit {
    extended.deallocate()
  }
}
