import Accelerator
import GDBStub
import Glibc
import Host
import Synchronization

/// A machine in miniature: each vCPU executes one-byte instructions, from 0x1000 to 0x1fff in a circle. The instruction
/// at 0x1080 writes RAX to 0x2000.
final class FakeTarget: DebugTarget {
  static let code: UInt64 = 0x1000
  static let store: UInt64 = 0x1080
  static let data: UInt64 = 0x2000

  struct State {
    var registers: [DebuggerRegisters] = []
    var memory = [UInt8](repeating: 0x90, count: 0x2000)
    var breakpoints: [DebugBreakpoint] = []
    var actions: [ResumeAction] = []
    var isStopping = false
    var resumes = 0
    var hasQuit = false
    var isStuck = false
  }

  let state = Mutex(State())
  let threadCount = 2
  let hasAVX = true
  let monitorCommands = [
    DebugMonitorCommand(name: "greet", help: "says hello") { "hello " + $0.joined(separator: "+") + "\n" },
    DebugMonitorCommand(name: "long", help: "says much") { _ in String(repeating: "0123456789abcde\n", count: 2000) },
  ]
  private let handler = Mutex<(@Sendable (DebugStop) -> Void)?>(nil)
  private let threads = Mutex<[HostThread]>([])
  /// Whether vCPUs execute; a fuzzer has its own ideas of what they report.
  private let executes: Bool

  init(executes: Bool = true) {
    self.executes = executes
    state.withLock { state in
      for thread in 0..<2 {
        var registers = DebuggerRegisters(
          general: GeneralRegisters(), system: SystemRegisters(), kernelGSBase: 0xffff_8880_0000_0000,
          extended: [UInt8](repeating: 0, count: 832))
        registers.general.rax = 0x1111_2222_3333_4444 + UInt64(thread)
        registers.general.rip = Self.code
        registers.general.rsp = 0x1_0000_0001
        registers.general.rflags = 0x246
        registers.system.cr0 = 0x8005_0033
        registers.system.cr3 = 0xabc000
        registers.system.efer = 0xd01
        registers.system.cs = .code64(selector: 0x10)
        registers.system.fs.base = 0x7fff_0000
        registers.extended[0] = 0x7f
        registers.extended[1] = 0x03
        // Stack top at 7, one number there: ST0 is 1.0.
        registers.extended[3] = 7 << 3
        registers.extended[4] = 1 << 7
        registers.extended[39] = 0x80
        registers.extended[40] = 0xff
        registers.extended[41] = 0x3f
        registers.extended[24] = 0x80
        registers.extended[25] = 0x1f
        for index in 0..<16 { registers.extended[160 + index] = UInt8(index) }
        for index in 0..<16 { registers.extended[576 + index] = UInt8(0x10 + index) }
        state.registers.append(registers)
      }
      state.memory[0x20] = 0xf4
    }
  }

  func summary(of thread: Int) -> String { "vCPU \(thread) at rest" }

  func observeStops(_ handler: @escaping @Sendable (DebugStop) -> Void) { self.handler.withLock { $0 = handler } }

  func report(_ stop: DebugStop) { handler.withLock { $0 }?(stop) }

  func stopAll() {
    state.withLock { $0.isStopping = true }
    for thread in threads.withLock({ threads in threads }) { thread.join() }
  }

  func resume(_ actions: [ResumeAction]) throws(DebugError) {
    guard !state.withLock({ $0.isStuck }) else { throw .accelerator("stuck") }
    state.withLock { state in
      state.resumes += 1
      state.actions = actions
      state.isStopping = false
    }
    guard executes else { return }
    let started = actions.enumerated().filter { $0.element != .stay }.compactMap { thread, action in
      try? HostThread(name: "fake") { self.execute(thread, action) }
    }
    threads.withLock { $0 = started }
  }

  func quit() { state.withLock { $0.hasQuit = true } }

  func readRegisters(of thread: Int) throws(DebugError) -> DebuggerRegisters { state.withLock { $0.registers[thread] } }

  func writeRegisters(_ registers: DebuggerRegisters, of thread: Int) throws(DebugError) {
    state.withLock { $0.registers[thread] = registers }
  }

  func readMemory(at address: UInt64, count: Int, of thread: Int) -> [UInt8] {
    guard (Self.code..<0x3000).contains(address) else { return [] }
    return state.withLock { Array($0.memory.dropFirst(Int(address - Self.code)).prefix(count)) }
  }

  func writeMemory(_ bytes: [UInt8], at address: UInt64, of thread: Int) -> Int {
    guard (Self.code..<0x3000).contains(address) else { return 0 }
    return state.withLock { state in
      let start = Int(address - Self.code)
      let count = min(bytes.count, state.memory.count - start)
      state.memory.replaceSubrange(start..<start + count, with: bytes.prefix(count))
      return count
    }
  }

  func setBreakpoints(_ breakpoints: [DebugBreakpoint]) throws(DebugError) {
    if breakpoints.contains(where: { $0.kind == .read }) { throw .unsupported }
    if breakpoints.count > 4 { throw .noRoom(limit: 4) }
    state.withLock { $0.breakpoints = breakpoints }
  }

  private func execute(_ thread: Int, _ action: ResumeAction) {
    while true {
      sched_yield()
      let stop = state.withLock { state -> (isDone: Bool, report: DebugStop?) in
        if state.isStopping { return (true, nil) }
        let rip = state.registers[thread].general.rip
        if state.breakpoints.contains(where: { $0.kind.rawValue < 2 && $0.address == rip }) {
          return (true, .breakpoint(thread: thread))
        }
        state.registers[thread].general.rip = Self.code + (rip &+ 1) & 0xfff
        if rip == Self.store {
          let rax = state.registers[thread].general.rax
          for byte in 0..<8 { state.memory[0x1000 + byte] = UInt8(truncatingIfNeeded: rax >> (8 * byte)) }
          if state.breakpoints.contains(where: { $0.kind.rawValue >= 2 && $0.address == Self.data }) {
            return (true, .watchpoint(thread: thread, address: Self.data))
          }
        }
        return action == .step ? (true, .step(thread: thread)) : (false, nil)
      }
      if let report = stop.report { self.report(report) }
      if stop.isDone { return }
    }
  }
}

/// SplitMix64: small, and the same on every run.
struct SplitMix {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
    return z ^ (z >> 31)
  }

  mutating func next(below bound: Int) -> Int { Int(next() % UInt64(bound)) }
}
