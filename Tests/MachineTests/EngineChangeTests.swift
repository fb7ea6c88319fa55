import Accelerator
import Glibc
import KVMAccelerator
import PlatformDevices
import SoftAccelerator
import StateTree
import Testing

@testable import Machine

/// Machines that are saved in one engine and restored in another.
@Suite(.enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "no usable /dev/kvm on this host"))
struct EngineChangeTests {
  /// hlt; jmp back
  private static let code: [UInt8] = [0xf4, 0xeb, 0xfd]
  /// The time-stamp counter goes on.
  private static let counter: UInt32 = 0x10

  private func machine(_ engine: String, _ controllers: InterruptControllerModel) throws -> Machine {
    let kvm = try KVMAccelerator()
    let soft = SoftAccelerator(hostCounterKilohertz: try kvm.counterKilohertz())
    return try SmallMachine(
      Self.code, cpus: 2, controllers: controllers, cpu: .common, on: engine == "kvm" ? kvm : soft
    ).machine
  }

  private func state(_ node: StateNode, _ index: Int) throws -> VCPUState {
    try VCPUState(node.child("vcpu\(index)"), index: index)
  }

  /// A state with no two values alike, as far as any vCPU can have it.
  private func disturbed(_ reset: VCPUState) -> VCPUState {
    var state = reset
    for (number, path) in GeneralRegisters.fields.prefix(16).enumerated() {
      state.general[keyPath: path] = 0x0101_0101_0101_0101 &* UInt64(number + 1)
    }
    state.general.rip = 0x1000
    state.general.rflags = 0x8d7
    state.system.cr0 = 0x8005_0033
    state.system.cr2 = 0xdead_b000
    state.system.cr3 = 0x1000
    state.system.cr4 = 0x620
    state.system.efer = 0xd01
    state.system.cs = .code64(selector: 8)
    state.system.ss = .data(selector: 16)
    state.system.fs.base = 0x1111_2000
    state.system.gs.base = 0x3333_4000
    state.system.gdt = DescriptorTable(base: 0x500, limit: 63)
    state.system.idt = DescriptorTable(base: 0x6000, limit: 0x3ff)
    state.debug.addresses = [0x1000, 0x2000, 0x3000, 0x4000]
    state.debug.dr6 = 0xffff_4ff1
    let values: [UInt32: UInt64] = [
      0xc000_0081: 0x0023_0010_0000_0000, 0xc000_0082: 0xffff_ffff_8000_1000, 0xc000_0084: 0x4_7700,
      0xc000_0102: 0x1234_5678_9abc, 0x174: 8, 0x175: 0x7ff0, 0x176: 0x9000, 0x277: 0x0007_0406_0107_0406,
      0x200: 0x6, 0x201: 0xff_8000_0800, 0x250: 0x0606_0606_0606_0606, 0x268: 0x0505_0505_0505_0505, 0x2ff: 0xc06,
      0x3b: 0x1234,
    ]
    for index in state.modelSpecific.indices {
      if let value = values[state.modelSpecific[index].index] { state.modelSpecific[index].value = value }
    }
    #expect(state.modelSpecific.count { values.keys.contains($0.index) } == values.count)
    // Control and tag words, the ST registers' 10 of each 16 bytes, XMM (SDM vol. 1, table 10-2).
    (state.extended[0], state.extended[1], state.extended[4]) = (0x3f, 0x03, 0xff)
    for register in 0..<8 {
      for byte in 0..<10 { state.extended[32 + register * 16 + byte] = UInt8(register * 16 + byte) }
    }
    for byte in 160..<416 { state.extended[byte] = UInt8(truncatingIfNeeded: byte &* 7) }
    state.extended[512] |= 3
    state.events.nmiMasked = true
    return state
  }

  /// What matters of a state: what every engine has, and what goes on by itself left out.
  private func essence(_ state: VCPUState, as first: VCPUState) -> VCPUState {
    var state = state
    let known = Set(first.modelSpecific.map(\.index))
    state.modelSpecific = state.modelSpecific.filter { $0.index != Self.counter && known.contains($0.index) }
    state.modelSpecific.sort { $0.index < $1.index }
    // FCS and FDS, which a processor without them keeps at 0, and MXCSR_MASK, which is the host's, are no state.
    state.extended = Array(state.extended[..<28] + state.extended[32..<416])
    // IA32_APIC_BASE is in the system registers, the local APIC's current count goes on.
    for byte in 0x390..<0x394 where !state.localAPIC.isEmpty { state.localAPIC[byte] = 0 }
    return state
  }

  @Test func nothingIsLostOnTheWay() throws {
    let source = try machine("soft", .userSpace)
    let accelerated = try source.vcpus.map { try disturbed($0.readState()) }
    for (vcpu, state) in zip(source.vcpus, accelerated) { try vcpu.writeState(state) }
    // A timer that counts slowly, a task priority, and a request that it holds back.
    for local in source.interrupts.locals {
      local.write(register: 0x0f0, value: 0x1ff)
      local.write(register: 0x320, value: 0x2_0031)
      local.write(register: 0x3e0, value: 0xa)
      local.write(register: 0x380, value: 0x4000_0000)
      local.write(register: 0x080, value: 0x50)
      local.write(register: 0x310, value: UInt32(local.index) << 24)
      local.write(register: 0x300, value: 0x4045)
    }
    source.interrupts.presences[1].activity = .halted
    var saved = try source.save()
    let first = try (0..<2).map { try state(saved, $0) }
    #expect(first[0].localAPIC[0x220] == 1 << 5, "vector 0x45 is requested")
    for (engine, controllers) in [
      ("kvm", .split), ("soft", .userSpace), ("kvm", .userSpace), ("soft", .userSpace), ("kvm", .split),
      ("kvm", .userSpace),
    ] as [(String, InterruptControllerModel)] {
      let next = try machine(engine, controllers)
      try next.restore(StateNode(decoding: saved.encoded()))
      saved = try next.save()
      for index in 0..<2 {
        let now = try state(saved, index)
        let (was, found) = (essence(first[index], as: first[index]), essence(now, as: first[index]))
        #expect(found.general == was.general, "\(engine) \(controllers)")
        #expect(found.system == was.system, "\(engine) \(controllers)")
        #expect(found.extended == was.extended, "\(engine) \(controllers)")
        #expect(found.xcr0 == was.xcr0)
        #expect(found.modelSpecific == was.modelSpecific, "\(engine) \(controllers)")
        #expect(found.localAPIC == was.localAPIC, "\(engine) \(controllers)")
        #expect(found.events == was.events, "\(engine) \(controllers)")
        #expect(found.debug == was.debug)
        #expect(found.activity == was.activity, "\(engine) \(controllers)")
        #expect(found.tscKilohertz == was.tscKilohertz)
      }
    }
  }

  /// Registers of one engine alone are left behind as long as the guest has not changed them.
  @Test func whatTheGuestHasSetOfOneEngineIsRefused() throws {
    let kvm = try machine("kvm", .split)
    let untouched = try kvm.save()
    try machine("soft", .userSpace).restore(untouched)
    var state = try kvm.vcpus[0].readState()
    // The paravirtual clock: at 0x2000, enabled.
    let place = try #require(state.modelSpecific.firstIndex { $0.index == 0x4b56_4d01 })
    state.modelSpecific[place].value = 0x2001
    try kvm.vcpus[0].writeState(state)
    let soft = try machine("soft", .userSpace)
    let saved = try kvm.save()
    do {
      try soft.restore(saved)
      Issue.record("it was taken")
    } catch {
      #expect("\(error)".contains("kvmclock (MSR 0x4b564d01)"), "\(error)")
    }
    try machine("kvm", .userSpace).restore(saved)
  }

  /// An exception on its way is delivered first, and is in a state that is read before that.
  @Test func anExceptionOnItsWayIsKept() throws {
    let soft = try machine("soft", .userSpace)
    var state = try soft.vcpus[0].readState()
    state.events.exceptionInjected = true
    state.events.exceptionVector = 14
    state.events.exceptionHasErrorCode = true
    state.events.exceptionErrorCode = 2
    state.events.exceptionPayload = 0x5000
    try soft.vcpus[0].writeState(state)
    #expect(try soft.vcpus[0].readState().events == state.events)
  }

  @Test func featuresAreComparedByName() {
    func leaf(_ ecx: UInt32, vendor: UInt32 = 0x756e_6547) -> CPUFeatures {
      CPUFeatures([
        CPUIDLeaf(function: 0, ebx: vendor, ecx: 0x6c65_746e, edx: 0x4965_6e69), CPUIDLeaf(function: 1, ecx: ecx),
      ])
    }
    #expect(leaf(1).missing(in: leaf(1 | 1 << 28)) == [])
    #expect(leaf(1 << 28 | 1 << 20).missing(in: leaf(1)) == ["sse4_2", "avx"])
    // OSXSAVE and the hypervisor's bit are no features.
    #expect(leaf(1 << 27 | 1 << 31).missing(in: leaf(0)) == [])
    #expect(leaf(1 << 16).missing(in: leaf(0)) == ["bit 16 beside pni"])
    #expect(leaf(0, vendor: 0x0a41_4141).missing(in: leaf(0)) == ["vendor AAAineIntel (not GenuineIntel)"])
  }
}
