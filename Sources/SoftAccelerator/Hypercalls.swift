import Accelerator
import CSoftCPU
import X86

/// VMCALL and VMMCALL: calls of the hypervisor that leaf 0x40000000 announces, with KVM's registers and numbers. CPUID
/// does not say so; programs that call without asking find what KVM would tell them.
extension Processor {
  /// Answers a call: the number is in RAX, arguments are in RBX, RCX, RDX and RSI, and the result goes to RAX.
  func hypercall() {
    let mask = is64Bit ? ~0 : 0xffff_ffff as UInt64
    func argument(_ index: Int) -> UInt64 { general[index] & mask }
    let result: Int64
    if cpu.pointee.cpl != 0 {
      result = -1  // EPERM
    } else if argument(0) == Self.sendIPI {
      result = sendIPIs(low: argument(3), high: argument(1), first: argument(2), command: argument(6))
    } else {
      result = -1000  // ENOSYS
    }
    general[0] = UInt64(bitPattern: result) & mask
  }

  /// KVM_HC_SEND_IPI.
  private static let sendIPI: UInt64 = 10

  /// Sends an interrupt to the CPUs whose APIC ids, less `first`, are set in a bitmap; how many there are.
  private func sendIPIs(low: UInt64, high: UInt64, first: UInt64, command: UInt64) -> Int64 {
    let bits: UInt64 = is64Bit ? 64 : 32
    var count: Int64 = 0
    guard let localAPIC, first <= 0xff else { return 0 }
    for number in 0..<2 * bits where (number < bits ? low >> number : high >> (number &- bits)) & 1 != 0 {
      let destination = first &+ number
      guard destination < 0xff else { break }
      if cpu.pointee.apic_base & 0xc00 == 0xc00 {
        _ = localAPIC.writeMSR(MSR.x2APICFirst + 0x30, value: destination << 32 | command & 0xffff)
      } else {
        localAPIC.write(register: 0x310, value: UInt32(destination) << 24)
        localAPIC.write(register: 0x300, value: UInt32(command & 0xffff))
      }
      count += 1
    }
    return count
  }
}
