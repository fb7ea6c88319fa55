import Accelerator
import CSoftCPU
import RandomCode
import Testing
import X86

@testable import SoftAccelerator

/// Random code in every mode, as `scripts/fuzz RandomCPU` runs it for hours; and what that has found.
@Suite struct RandomCodeTests {
  @Test func nonsenseNeverTraps() throws {
    let run = try RandomRun()
    for seed in 1...40 as ClosedRange<UInt64> { try run.run(seed: seed) }
    #expect(run.cases == 640)
    #expect(run.instructions > 200_000)
    // Every kind of exit was met.
    for exit in [
      "budget", "debug", "halt", "interrupt window", "memory fault", "memory read", "memory write", "port read",
      "port write", "triple fault", "view violation",
    ] {
      #expect(run.exits[exit, default: 0] > 10, "\(exit)")
    }
  }

  /// An access over a page's end whose second page was in the TLB entry of the first: host memory below a page of the
  /// guest's was accessed.
  @Test(arguments: [0x7fff_f000, 0xffff_f000, 0x7_ffff_f000, 0xffff_ffff_ffff_f000] as [UInt64])
  func neighboursShareNoEntry(page: UInt64) {
    #expect(Processor.tlbIndex(page) != Processor.tlbIndex(page &+ 0x1000))
  }

  /// The same for all pages below 16 GiB and above the last 16.
  @Test func noNeighboursShareAnEntry() {
    for start in [0, 0xffff_fffc_0000_0000] as [UInt64] {
      for number in 0..<(4 << 20) as Range<UInt64> {
        let page = start &+ number << 12
        if Processor.tlbIndex(page) == Processor.tlbIndex(page &+ 0x1000) {
          Issue.record("page \(page)")
          return
        }
      }
    }
  }

  /// #AC whose handler's frame raises #AC: a processor never leaves that, but the VMM must get it out of there.
  @Test func endlessAlignmentChecksCanBeLeft() {
    let cpu = SystemCPU(.protected, code: [0x0f, 0x0b], ring: 3)
    for vector in [6, 17] as [UInt64] {
      let handler = 0x4000 + vector * 16
      cpu.put(handler | UInt64(SystemCPU.code3) << 16 | 0xee << 40, at: SystemCPU.idt + vector * 8)
    }
    cpu.cpu.pointee.cr0 |= CR0.am.rawValue
    cpu.processor.rflags |= RFLAGS.ac.rawValue
    cpu.processor.general[4] = SystemCPU.stack3 - 1
    cpu.processor.updateMode()
    cpu.processor.isKicked = true
    soft_set_attention(cpu.cpu, .min)
    guard case PendingExit.none = cpu.processor.run() else {
      Issue.record("not kicked")
      return
    }
    cpu.processor.limitInstructions(100)
    guard case .instructionLimit = cpu.processor.run() else {
      Issue.record("not out of budget")
      return
    }
    #expect(cpu.cpu.pointee.rip == 0x1000)
    #expect(cpu.processor.general[4] == SystemCPU.stack3 - 1)
  }

  /// A stack in the local APIC's page: what an exception's delivery accesses there is not the next instruction's, which
  /// would hold off kicks until it is done.
  @Test func deliveryIsNoInstruction() {
    let cpu = SystemCPU(.protected, code: [0x0f, 0x0b])
    cpu.processor.localAPIC = SilentAPIC()
    cpu.put([0x0f, 0x0b], at: 0x4000 + 6 * 16)
    cpu.processor.general[4] = 0xfee0_0400
    cpu.processor.limitInstructions(20)
    guard case .instructionLimit = cpu.processor.run() else {
      Issue.record("not out of budget")
      return
    }
    #expect(cpu.cpu.pointee.rip == 0x4060)
    #expect(cpu.processor.general[4] == 0xfee0_0400 - 20 * 12)
  }

  private final class SilentAPIC: LocalInterruptController, @unchecked Sendable {
    var hasInterrupt: Bool { false }
    func acknowledgeInterrupt() -> UInt8? { nil }
    func read(register offset: UInt16) -> UInt32 { 0 }
    func write(register offset: UInt16, value: UInt32) {}
    func readMSR(_ index: UInt32) -> UInt64? { nil }
    func writeMSR(_ index: UInt32, value: UInt64) -> Bool { false }
    var taskPriority: UInt8 = 0
  }
}
