import Accelerator
import GDBStub
import GuestMemory
import Host
import Machine
import MemoryViews
import Synchronization

/// A machine as gdb sees it: vCPUs are threads, addresses are linear addresses of the vCPU in question.
///
/// Breakpoints of every kind are the processor's own, set on behalf of the host: the guest's memory and debug registers do
/// not show them, and a guest without a #BP handler never meets one.
final class MachineDebugger: DebugTarget {
  private static let kernelGSBase: UInt32 = 0xc000_0102

  private let machine: Machine
  private let engine: String
  private let capabilities: AcceleratorCapabilities
  let hasAVX: Bool
  private let state = Mutex(State())

  private struct State {
    var breakpoints: [DebugBreakpoint] = []
    var observer: (@Sendable (DebugStop) -> Void)?
    /// Our own stops are no news to the debugger.
    var isStopping = false
  }

  init(_ machine: Machine, on accelerator: any Accelerator) throws(AcceleratorError) {
    self.machine = machine
    engine = accelerator.name
    capabilities = accelerator.capabilities
    hasAVX = try accelerator.supportedCPUID().contains { $0.function == 1 && $0.ecx & 1 << 28 != 0 }
  }

  /// Serves the machine on `--gdb`.
  static func serve(_ machine: Machine, on accelerator: any Accelerator, at text: String) throws(Failure) -> GDBServer {
    guard accelerator.capabilities.contains(.guestDebug) else {
      throw .accelerator(.unsupported(engine: accelerator.name, what: "guest debugging (KVM_CAP_SET_GUEST_DEBUG)"))
    }
    do {
      machine.stopsAtCrash.store(true, ordering: .relaxed)
      return try GDBServer(StreamListener(StreamEndpoint(text)), target: MachineDebugger(machine, on: accelerator))
    } catch let error as HostError {
      throw .host(error)
    } catch let error as AcceleratorError {
      throw .accelerator(error)
    } catch {
      throw .control("\(error)")
    }
  }

  // MARK: Running

  var threadCount: Int { machine.vcpus.count }

  func summary(of thread: Int) -> String {
    guard let registers = try? machine.vcpus[thread].readRegisters() else { return "vCPU \(thread)" }
    return "vCPU \(thread) at 0x\(String(registers.rip, radix: 16))"
  }

  func observeStops(_ handler: @escaping @Sendable (DebugStop) -> Void) {
    state.withLock { $0.observer = handler }
    machine.addListener { [weak self] event in self?.note(event) }
  }

  private func note(_ event: MachineEvent) {
    let stop: DebugStop? =
      switch event {
      case .debug(let vcpu, let event): Self.stop(vcpu, event, state.withLock { $0.breakpoints })
      case .crashed(let report): .crash(thread: report.vcpu)
      case .stopped: state.withLock { $0.isStopping } ? nil : .paused
      case .shutdown: .exited(status: UInt8(truncatingIfNeeded: machine.result?.status ?? 0))
      default: nil
      }
    if case .crashed(let report) = event { for line in report.lines { printError("swiftvmm: \(line)") } }
    if let stop { state.withLock { $0.observer }?(stop) }
  }

  /// DR6 (SDM vol. 3, 18.2.3): bit 14 is a single step.
  private static func stop(_ vcpu: Int, _ event: DebugEvent, _ breakpoints: [DebugBreakpoint]) -> DebugStop {
    if let number = event.breakpoint, breakpoints.indices.contains(number) {
      switch breakpoints[number].kind {
      case .software, .hardware: return .breakpoint(thread: vcpu)
      case .write, .read, .access: return .watchpoint(thread: vcpu, address: breakpoints[number].address)
      }
    }
    return event.status & 1 << 14 != 0 ? .step(thread: vcpu) : .breakpoint(thread: vcpu)
  }

  func stopAll() {
    state.withLock { $0.isStopping = true }
    machine.pause()
    state.withLock { $0.isStopping = false }
  }

  func resume(_ actions: [ResumeAction]) throws(DebugError) {
    var held: Set<Int> = []
    for (vcpu, action) in zip(machine.vcpus, actions) {
      if action == .stay { held.insert(vcpu.index) }
      do { try vcpu.setDebug(control(stepping: action == .step)) } catch { throw .accelerator("\(error)") }
    }
    machine.resume(holding: held)
  }

  func quit() {
    machine.finish(.quit)
  }

  // MARK: Breakpoints

  func setBreakpoints(_ breakpoints: [DebugBreakpoint]) throws(DebugError) {
    let limit = machine.vcpus.map(\.breakpointLimit).min() ?? 0
    guard breakpoints.count <= limit else { throw .noRoom(limit: limit) }
    for breakpoint in breakpoints {
      switch breakpoint.kind {
      case .software, .hardware: break
      case .write, .access, .read:
        // Processors have no breakpoint on reads alone.
        let needed: AcceleratorCapabilities = breakpoint.kind == .read ? .readWatchpoints : .watchpoints
        guard capabilities.contains(needed), [1, 2, 4, 8].contains(breakpoint.length) else { throw .unsupported }
      }
    }
    let old = state.withLock { state in
      defer { state.breakpoints = breakpoints }
      return state.breakpoints
    }
    do {
      for vcpu in machine.vcpus { try vcpu.setDebug(control(stepping: false)) }
    } catch {
      state.withLock { $0.breakpoints = old }
      throw .accelerator("\(error)")
    }
  }

  private func control(stepping: Bool) -> DebugControl {
    var control = DebugControl()
    control.singleStep = stepping
    control.breakpoints = state.withLock { $0.breakpoints }.map { breakpoint in
      let kind: DebugControl.Breakpoint.Kind =
        switch breakpoint.kind {
        case .software, .hardware: .execute
        case .write: .write
        case .read: .read
        case .access: .access
        }
      return DebugControl.Breakpoint(
        address: breakpoint.address, kind: kind, length: kind == .execute ? 1 : UInt8(breakpoint.length))
    }
    return control
  }

  // MARK: Registers and memory

  func readRegisters(of thread: Int) throws(DebugError) -> DebuggerRegisters {
    let state = try readState(thread)
    let kernelGSBase = state.modelSpecific.first { $0.index == Self.kernelGSBase }?.value ?? 0
    return DebuggerRegisters(
      general: state.general, system: state.system, kernelGSBase: kernelGSBase, extended: state.extended)
  }

  func writeRegisters(_ registers: DebuggerRegisters, of thread: Int) throws(DebugError) {
    let vcpu = machine.vcpus[thread]
    let old = try readRegisters(of: thread)
    do {
      if registers.extended != old.extended || registers.kernelGSBase != old.kernelGSBase {
        // Only whole states have these. It is read again: the LAPIC's timer and the TSC go on meanwhile.
        var state = try vcpu.readState()
        state.general = registers.general
        state.system = registers.system
        state.extended = registers.extended
        if let index = state.modelSpecific.firstIndex(where: { $0.index == Self.kernelGSBase }) {
          state.modelSpecific[index].value = registers.kernelGSBase
        }
        try vcpu.writeState(state)
      } else {
        if registers.general != old.general { try vcpu.writeRegisters(registers.general) }
        if registers.system != old.system { try vcpu.writeSystemRegisters(registers.system) }
      }
    } catch {
      throw .accelerator("\(error)")
    }
  }

  private func readState(_ thread: Int) throws(DebugError) -> VCPUState {
    do { return try machine.vcpus[thread].readState() } catch { throw .accelerator("\(error)") }
  }

  func readMemory(at address: UInt64, count: Int, of thread: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    forEachPage(address, count: count, of: thread) { physical, run in
      guard let more = try? machine.memory.bytes(physical, count: run) else { return false }
      bytes += more
      return true
    }
    return bytes
  }

  func writeMemory(_ bytes: [UInt8], at address: UInt64, of thread: Int) -> Int {
    var written = 0
    forEachPage(address, count: bytes.count, of: thread) { physical, run in
      guard (try? machine.memory.write(Array(bytes[written..<written + run]), to: physical)) != nil else {
        return false
      }
      written += run
      return true
    }
    return written
  }

  /// Calls `body` with the guest-physical address and length of each run in one page, until it says no or nothing is mapped.
  private func forEachPage(
    _ address: UInt64, count: Int, of thread: Int, _ body: (GuestPhysicalAddress, Int) -> Bool
  ) {
    var done = 0
    while done < count {
      let linear = address &+ UInt64(done)
      let run = min(count - done, Int(0x1000 - linear & 0xfff))
      guard let physical = (try? machine.vcpus[thread].translate(linear)) ?? nil, body(physical, run) else { return }
      done += run
    }
  }

  // MARK: Monitor commands

  var monitorCommands: [DebugMonitorCommand] {
    [
      DebugMonitorCommand(name: "exits", help: "count of exits by reason") { [machine] _ in
        ExitCounters.Reason.allCases.compactMap { reason in
          let count = machine.counters.reduce(0) { $0 + $1[reason] }
          return count == 0 ? nil : "\(reason.name) \(count)\n"
        }.joined()
      },
      DebugMonitorCommand(name: "reset", help: "reset the machine") { [machine] _ in
        machine.reset(byGuest: false)
        return "reset\n"
      },
      DebugMonitorCommand(name: "views", help: "each vCPU's memory view, its ranges and their rights") {
        [machine, engine, capabilities] _ in
        guard capabilities.contains(.memoryViews) else {
          return "engine \(engine) has one view only: all of memory, rwx\n"
        }
        return machine.vcpus.map {
          "vCPU \($0.index): \($0.activeView?.description ?? "no view: all of memory, rwx")\n"
        }
        .joined()
      },
    ]
  }
}
