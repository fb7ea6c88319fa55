import Accelerator
import Boot
import Glibc
import GuestMemory
import Host
import KVMAccelerator
import PlatformDevices
import StateTree
import Testing

@testable import Machine

/// Interrupt controllers in the VMM, on KVM.
@Suite(.enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "no usable /dev/kvm on this host"))
struct MachineInterruptTests {
  /// mov dword [0xfee000 + offset], value
  private func store(_ offset: UInt16, _ value: UInt32) -> [UInt8] {
    [0xc7, 0x05] + bytes(0xfee0_0000 + UInt32(offset)) + bytes(value)
  }
  private func bytes(_ value: UInt32) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) } }
  /// mov al, n; out 0x80, al
  private func record(_ value: UInt8) -> [UInt8] { [0xb0, value, 0xe6, 0x80] }

  private func waitForHalt(_ machine: Machine, vcpu: Int = 0) {
    while machine.counters[vcpu][.halt] == 0 { usleep(1_000) }
  }

  @Test func aHaltedMachinePausesAndEnds() throws {
    // hlt with interrupts off; jmp back
    let small = try SmallMachine(record(1) + [0xf4, 0xeb, 0xfd], controllers: .userSpace)
    let machine = small.machine
    try machine.start(paused: false)
    waitForHalt(machine)
    for _ in 0..<20 {
      machine.pause()
      #expect(machine.state == .paused)
      let state = try VCPUState(machine.save().child("vcpu0"), index: 0)
      #expect(state.activity == .halted)
      machine.resume()
    }
    // It sleeps: no exit but the first.
    #expect(machine.counters[0][.halt] == 1)
    machine.finish(.quit)
    guard case .quit = machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
  }

  /// The boot processor sends INIT and SIPI to the other, which runs at 0x2000 in real mode and exits with 0x55.
  @Test func startUpWakesAnApplicationProcessor() throws {
    let target: [UInt8] = [0xb0, 0x55, 0xe6, 0xf4, 0xeb, 0xfe]
    let code =
      store(0x310, 1 << 24) + store(0x300, 0x4500) + store(0x300, 0x4602) + [0xfa, 0xf4, 0xeb, 0xfd]
    let small = try SmallMachine(code, cpus: 2, controllers: .userSpace)
    try small.machine.start(paused: true)
    try small.machine.memory.write(target, to: .init(0x2000))
    small.machine.resume()
    guard case .debugExit(0x55) = small.machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
    #expect(small.machine.interrupts.presences[1].activity == .runnable)
  }

  /// The guest arms its timer for 200 ms, halts, and is moved meanwhile; the other machine takes the interrupt.
  @Test func aSleepingGuestWakesInAnotherMachine() throws {
    let idt = 0x3000
    let handler: [UInt8] = [0xb0, 0x33, 0xe6, 0xf4, 0xeb, 0xfe]
    let code =
      [0x0f, 0x01, 0x1d] + bytes(0x4000)  // lidt [0x4000]
      + store(0xf0, 0x1ff) + store(0x3e0, 0xb) + store(0x320, 0x41) + store(0x380, 200_000_000)
      + [0xfb, 0xf4, 0xeb, 0xfd]
    // A gate for vector 0x41 and a flat code segment to enter it through.
    var gate = [UInt8](repeating: 0, count: 8)
    gate.replaceSubrange(0..<8, with: [0x00, 0x28, 0x08, 0x00, 0x00, 0x8e, 0x00, 0x00])
    func prepare(_ machine: Machine) throws {
      try machine.memory.write(handler, to: .init(0x2800))
      try machine.memory.write(gate, to: .init(UInt64(idt + 0x41 * 8)))
      try machine.memory.write([0xff, 0x07] + bytes(UInt32(idt)), to: .init(0x4000))
      // GDT at 0, which is where GDTR points: null and flat code.
      try machine.memory.write([0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0], to: .init(8))
    }
    let first = try SmallMachine(code, controllers: .userSpace)
    try first.machine.start(paused: true)
    try prepare(first.machine)
    first.machine.resume()
    waitForHalt(first.machine)
    first.machine.pause()
    let saved = try first.machine.save()
    let ram = try first.machine.memory.bytes(.init(0), count: 1 << 20)
    first.machine.finish(.quit)
    _ = first.machine.waitUntilOver()

    let second = try SmallMachine(code, controllers: .userSpace)
    try second.machine.start(paused: true)
    try second.machine.memory.write(ram, to: .init(0))
    try second.machine.restore(StateNode(decoding: saved.encoded()))
    second.machine.resume()
    guard case .debugExit(0x33) = second.machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
  }

  @Test func withoutTheirRegistersNeitherX2APICNorDeadlineIsShown() throws {
    let leaf = CPUIDLeaf(function: 1, ecx: 1 << 24)
    func ecx(_ policy: CPUIDPolicy) -> UInt32 {
      policy.leaves(supported: [leaf], apicID: 0)[0].ecx & (1 << 21 | 1 << 24)
    }
    #expect(ecx(CPUIDPolicy(cpus: 1, controllers: .userSpace)) == 0)
    #expect(ecx(CPUIDPolicy(cpus: 1, controllers: .userSpace, hasControllerRegisters: true)) == 1 << 21 | 1 << 24)
    #expect(CPUIDPolicy(cpus: 1, controllers: .userSpace).localAPICFeatures(supported: [leaf]) == [])
    let policy = CPUIDPolicy(cpus: 1, controllers: .userSpace, hasControllerRegisters: true)
    #expect(policy.localAPICFeatures(supported: [leaf]) == [.x2APIC, .timestampDeadline])
    #expect(policy.localAPICFeatures(supported: [CPUIDLeaf(function: 1)]) == [.x2APIC])
  }
}
