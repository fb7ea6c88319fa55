import Accelerator
import Glibc
import Host
import Synchronization

/// Keeps vCPUs out of the guest while slots or rights change: a vCPU passes it before it enters, and whoever changes
/// something closes it and waits until nobody is inside.
final class KVMGate: Sendable {
  private let isClosed = Atomic(false)
  private let change = Condition(())
  private let changer = Condition(())

  /// Passes, once nothing is being changed; on the vCPU's thread.
  @inline(__always)
  func enter(_ vcpu: KVMVirtualCPU) {
    // Each side stores its own flag before it looks at the other's: one of them sees the other.
    vcpu.isInside.store(true, ordering: .sequentiallyConsistent)
    while isClosed.load(ordering: .sequentiallyConsistent) { waitOutside(vcpu) }
  }

  private func waitOutside(_ vcpu: KVMVirtualCPU) {
    vcpu.isInside.store(false, ordering: .sequentiallyConsistent)
    change.wait { _ in isClosed.load(ordering: .sequentiallyConsistent) ? nil : () }
    vcpu.isInside.store(true, ordering: .sequentiallyConsistent)
  }

  /// The vCPU is out of the guest and has used what it looked at.
  @inline(__always)
  func leave(_ vcpu: KVMVirtualCPU) { vcpu.isInside.store(false, ordering: .sequentiallyConsistent) }

  /// Runs `body` while none of `vcpus` is inside. The caller is not inside itself.
  func whileClosed<Result>(
    _ vcpus: [KVMVirtualCPU], _ body: () throws(AcceleratorError) -> Result
  ) throws(AcceleratorError) -> Result {
    let result = changer.withLock { _ in
      isClosed.store(true, ordering: .sequentiallyConsistent)
      for vcpu in vcpus where vcpu.isInside.load(ordering: .sequentiallyConsistent) {
        vcpu.leaveSoon()
        while vcpu.isInside.load(ordering: .sequentiallyConsistent) { sched_yield() }
      }
      defer {
        isClosed.store(false, ordering: .sequentiallyConsistent)
        change.withLock { _ in }
      }
      return Swift.Result { () throws(AcceleratorError) in try body() }
    }
    return try result.get()
  }
}
