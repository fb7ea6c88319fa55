import CGuest
import CRing3
import Synchronization

private let vector: UInt8 = 0x40
/// A page that ring 3 shares: ticks so far, ticks to wait for.
nonisolated(unsafe) private var shared: UInt64 = 0

/// Code in ring 3: calls into the kernel, every exception it can raise, vector registers, and a timer that preempts it.
func guestMain() {
  PIC.begin()
  User.prepare { number, argument in
    switch number {
    case 1:
      Console.write(UInt8(truncatingIfNeeded: argument))
      return 0
    default:
      return argument &+ 1
    }
  }
  shared = guest_allocate(4096, 4096)
  User.share(shared)

  calls()
  exceptions()
  vectors()
  preemption()
  say("ring3: all passed")
}

private func calls() {
  let hello: @convention(c) (UInt64) -> Void = { _ in
    let text: StaticString = "ring 3 says hello\n"
    for index in 0..<text.utf8CodeUnitCount { _ = user_call(1, UInt64(text.utf8Start[index])) }
    _ = user_call(0, 42)
  }
  let outcome = User.run(UInt64(unsafeBitCast(hello, to: UInt.self)))
  expect("the way out of ring 3", outcome.vector, equals: 3)
  expect("its value", outcome.value, equals: 42)
  let registers = User.run(user_registers_address(), 100)
  expect("registers across calls", registers.value, equals: 0x0303_0303_0303_0303)
  say("calls: ok")
}

private func exceptions() {
  expectFault("a division by zero", user_divide_address(), 0, 0)
  expectFault("an undefined instruction", user_undefined_address(), 6, 0)
  expectFault("hlt", user_halt_address(), 13, 0)
  expectFault("cli", user_disable_interrupts_address(), 13, 0)
  expectFault("in", user_port_address(), 13, 0)
  expectFault("mov from cr0", user_control_register_address(), 13, 0)
  expectFault("rdmsr", user_read_msr_address(), 13, 0)
  expectFault("an address that is not canonical", user_non_canonical_address(), 13, 0)
  expectFault("a segment of the kernel's", user_kernel_selector_address(), 13, 0x10)

  let kernelPage = guest_allocate(4096, 4096)
  Paging.map(kernelPage, to: kernelPage, [.writable])
  expectPageFault("a read of the kernel's page", user_read_address(), kernelPage, 5)
  expectPageFault("a write to the kernel's page", user_write_address(), kernelPage, 7)
  expectPageFault("a jump to the kernel's page", user_jump_address(), kernelPage, 0x15)
  let nothing: UInt64 = 0x40_0000_0000
  expectPageFault("a read of nothing", user_read_address(), nothing, 4)
  expectPageFault("a write to nothing", user_write_address(), nothing + 8, 6)
  expectPageFault("a jump to nothing", user_jump_address(), nothing, 0x14)
  expectPageFault("a write to constants", user_write_address(), text_start_address(), 7)
  expectPageFault("a jump to data", user_jump_address(), shared, 0x15)
  say("exceptions: ok")
}

private func expectFault(_ what: StaticString, _ code: UInt64, _ vector: UInt64, _ error: UInt64) {
  let outcome = User.run(code)
  expect(what, outcome.vector, equals: vector)
  expect(what, outcome.error, equals: error)
  expect(what, outcome.rip, in: code...code + 32)
}

private func expectPageFault(_ what: StaticString, _ code: UInt64, _ address: UInt64, _ error: UInt64) {
  let outcome = User.run(code, address)
  expect(what, outcome.vector, equals: 14)
  expect(what, outcome.error, equals: error)
  expect(what, outcome.value, equals: address)
}

private func vectors() {
  let rounds: UInt64 = 10_000
  let squares = (rounds - 1) * rounds * (2 * rounds - 1) / 6
  expect("sse", User.run(user_sse_address(), rounds).value, equals: squares + rounds / 2)
  say("sse: ok")
  // Only when asked for, because the console of all machines is to be the same.
  guard StartInfo.flag("avx") else { return }
  let features = cpuid(1, 0).ecx
  guard features & 1 << 26 != 0, features & 1 << 28 != 0, cpuid(7, 0).ebx & 1 << 5 != 0 else {
    say("avx: this processor has none")
    return
  }
  write_cr4(read_cr4() | 1 << 18)
  xsetbv(0, 7)
  let last = rounds * 4
  expect("avx", User.run(user_avx_address(), rounds).value, equals: last * (last + 1) / 2)
  say("avx: ok")
}

/// The local APIC's timer interrupts a sum in vector registers ten times; the sum must be right, whatever the kernel did.
private func preemption() {
  LocalAPIC.begin()
  set_interrupt_handler(vector) { frame in
    expect("the timer interrupts ring 3", frame.pointee.cs & 3, equals: 3)
    let ticks = load64(shared)
    store64(shared, ticks + 1)
    LocalAPIC.endOfInterrupt()
  }
  store64(shared, 0)
  store64(shared + 8, 10)
  LocalAPIC.startTimer(.periodic, vector: vector, count: 200_000)
  let outcome = User.run(user_compute_address(), shared)
  LocalAPIC.stopTimer()
  expect("the way out of the sum", outcome.vector, equals: 3)
  expect("the sum", outcome.value > 0)
  expect("ticks", load64(shared), in: 10...1_000_000)
  say("preemption: ok")
}
