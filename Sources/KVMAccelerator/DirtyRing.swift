import Accelerator
import CLinux
import Glibc
import Host
import Synchronization

/// One vCPU's dirty ring (api.rst, 8.29): KVM appends, the VMM harvests and KVM resets.
final class DirtyRing: @unchecked Sendable {
  private let mapping: MemoryMapping
  private let entries: Int
  private var next = 0

  init(vcpu: borrowing FileDescriptor, entries: Int) throws(AcceleratorError) {
    do {
      mapping = try MemoryMapping(
        vcpu, offset: Int(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096, count: entries * MemoryLayout<kvm_dirty_gfn>.stride)
    } catch {
      throw .call("mmap of the dirty ring", errno: error.errno, reason: HostError.reason(error.errno))
    }
    self.entries = entries
  }

  /// Takes the entries that KVM has published, in order, and marks them as harvested. The caller holds the VM's ring lock.
  func collect() -> [(slot: UInt32, page: UInt64)] {
    var pages: [(slot: UInt32, page: UInt64)] = []
    while true {
      let entry = mapping.base + next * MemoryLayout<kvm_dirty_gfn>.stride
      // KVM publishes an entry by its flags, the first field; the rest is read after and given back before them.
      let flags = entry.assumingMemoryBound(to: Atomic<UInt32>.self)
      guard
        flags.pointee.load(ordering: .acquiring) & CLINUX_KVM_DIRTY_GFN_F_MASK == CLINUX_KVM_DIRTY_GFN_F_DIRTY
      else { return pages }
      let page = entry.load(as: kvm_dirty_gfn.self)
      pages.append((page.slot & 0xffff, page.offset))
      flags.pointee.store(CLINUX_KVM_DIRTY_GFN_F_RESET, ordering: .releasing)
      next = (next + 1) % entries
    }
  }
}
