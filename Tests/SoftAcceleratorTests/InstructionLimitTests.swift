import CSoftCPU
import Testing
import X86

@testable import SoftAccelerator

/// Limits, and the time that instructions make.
struct InstructionLimitTests {
  /// mov ecx, 1000; then 1000 times: eleven increments, dec ecx, jnz; then hlt: blocks of 12 and 13 instructions.
  private static let loop: [UInt8] =
    [0xb9, 0xe8, 0x03, 0, 0] + (0..<11).flatMap { _ in [0x48, 0xff, 0xc0] as [UInt8] } + [0xff, 0xc9, 0x75, 0xdb, 0xf4]

  private func isLimit(_ exit: PendingExit) -> Bool {
    if case .instructionLimit = exit { true } else { false }
  }

  @Test func runsStopAfterExactlyAsManyInstructions() {
    let cpus = [TestCPU(code: Self.loop), TestCPU(code: Self.loop)]
    defer { withExtendedLifetime(cpus) {} }
    let (plain, limited) = (cpus[0].processor, cpus[1].processor)
    for _ in 0..<5000 { try? plain.step() }
    var total: UInt64 = 0
    // Every length up to more than a block, and some beyond.
    for count in (1...90).map(UInt64.init) + [200, 705] {
      limited.limitInstructions(count)
      #expect(isLimit(limited.run()))
      total += count
      #expect(limited.cpu.pointee.instructions == total)
    }
    #expect(total == 5000)
    #expect(limited.cpu.pointee.rip == plain.cpu.pointee.rip)
    #expect(limited.general[0] == plain.general[0])
    #expect(limited.general[1] == plain.general[1])
    // Nothing is executed where nothing is left, and a new limit takes the place of the old one.
    limited.limitInstructions(0)
    #expect(isLimit(limited.run()))
    #expect(limited.cpu.pointee.instructions == 5000)
    limited.limitInstructions(.max)
    guard case .halt = limited.run() else {
      Issue.record("did not reach hlt")
      return
    }
    #expect(limited.cpu.pointee.instructions == 13_002)
  }

  @Test func theTimeStampCounterCountsInstructionsInsideBlocks() {
    // rdtsc; mov ebx, eax; nop; nop; rdtsc; sub eax, ebx; hlt
    let code: [UInt8] = [0x0f, 0x31, 0x89, 0xc3, 0x90, 0x90, 0x0f, 0x31, 0x29, 0xd8, 0xf4]
    for single in [false, true] {
      let time = SoftVirtualTime()
      let cpu = TestCPU(code: code)
      defer { withExtendedLifetime(cpu) {} }
      let processor = cpu.processor
      processor.timeSource = time.source
      time.run(processor.cpu)
      time.set(7_000_000)
      if single { processor.limitInstructions(20) }
      guard case .halt = processor.run() else {
        Issue.record("did not reach hlt")
        return
      }
      #expect(processor.general[3] == 7_000_000)
      #expect(processor.general[0] == 4)
      #expect(time.now == 7_000_007)
    }
  }

  @Test func timeGoesOnWhereAnotherProcessorTakesOver() {
    let time = SoftVirtualTime()
    let cpus = [TestCPU(code: Self.loop), TestCPU(code: Self.loop)]
    defer { withExtendedLifetime(cpus) {} }
    #expect(time.now == 0)
    var expected: UInt64 = 0
    for (turn, count) in [10, 300, 5, 77].enumerated() {
      let processor = cpus[turn & 1].processor
      time.run(processor.cpu)
      processor.limitInstructions(UInt64(count))
      _ = processor.run()
      expected += UInt64(count)
      #expect(time.now == expected)
    }
  }

  @Test func randomNumbersAreTheSameEveryTimeAndNotOneNumber() {
    // rdrand rax; rdseed rbx; rdrand rcx; hlt
    let code: [UInt8] = [0x48, 0x0f, 0xc7, 0xf0, 0x48, 0x0f, 0xc7, 0xfb, 0x48, 0x0f, 0xc7, 0xf1, 0xf4]
    func numbers(seed: UInt64) -> [UInt64] {
      let cpu = TestCPU(code: code)
      defer { withExtendedLifetime(cpu) {} }
      let processor = cpu.processor
      processor.isDeterministic = true
      processor.randomState = seed
      _ = processor.run()
      return [processor.general[0], processor.general[3], processor.general[1]]
    }
    let first = numbers(seed: 0)
    #expect(first == numbers(seed: 0))
    // SplitMix64's first output for the seed 0.
    #expect(first[0] == 0xe220_a839_7b1d_cdaf)
    #expect(Set(first + numbers(seed: 1)).count == 6)
  }

  @Test func repeatedStringsRetireAsOftenWhateverTheTLBHolds() {
    // mov ecx, 100000; mov edi, 0x20000; rep stosb; hlt
    let code: [UInt8] = [0xb9, 0xa0, 0x86, 1, 0, 0xbf, 0, 0, 2, 0, 0xf3, 0xaa, 0xf4]
    var counts: Set<UInt64> = []
    for page: UInt64 in [0, 0x20000, 0x23000, 0x30000] {
      let cpu = TestCPU(code: code)
      defer { withExtendedLifetime(cpu) {} }
      let processor = cpu.processor
      if page != 0 { _ = processor.fill(page, size: 1, isWrite: true) }
      _ = processor.run()
      #expect(processor.general[1] == 0)
      #expect(processor.general[7] == 0x20000 + 100_000)
      counts.insert(processor.cpu.pointee.instructions)
    }
    // Three times 32768 iterations, and the rest.
    #expect(counts == [7])
  }
}
