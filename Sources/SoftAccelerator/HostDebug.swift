import Accelerator
import CSoftCPU
import X86

/// What a debugger on the host wants of a CPU. The guest's own debug registers are not touched, and it sees nothing.
struct HostDebug {
  /// Stop after each instruction.
  var singleStep = false
  /// Stop at the guest's INT3.
  var software = false
  /// Linear addresses of instructions to stop before, by the number of the breakpoint.
  var code: [(number: Int, address: UInt64)] = []
  /// Data to stop after an access to.
  var data: [(number: Int, breakpoint: DebugControl.Breakpoint)] = []
  /// The first data breakpoint that the instruction under way has met.
  var met: Int?
  /// Whether instructions may be breakpoints.
  var isActive: Bool { singleStep || !code.isEmpty }

  init() {}

  init(_ control: DebugControl) {
    singleStep = control.singleStep
    software = control.software
    for (number, breakpoint) in control.breakpoints.enumerated() {
      if breakpoint.kind == .execute {
        code.append((number, breakpoint.address))
      } else {
        data.append((number, breakpoint))
      }
    }
  }
}

extension Processor {
  /// Sets what a debugger wants.
  func setHostDebug(_ control: DebugControl) {
    hostDebug = HostDebug(control)
    // Blocks must end before instructions with breakpoints, and need not any more where there are none.
    forgetAllCode()
    updateDebug()
  }

  /// Whether a breakpoint of the debugger is on the instruction at an instruction pointer.
  @inline(__always)
  func isHostBreakpoint(_ ip: UInt64) -> Bool {
    guard !hostDebug.code.isEmpty else { return false }
    let address = codeAddress(ip)
    return hostDebug.code.contains { $0.address == address }
  }

  /// Stops before the instruction at RIP where the debugger has a breakpoint on it.
  func checkHostBreakpoints() throws(Interruption) {
    let address = codeAddress(cpu.pointee.rip)
    guard let met = hostDebug.code.first(where: { $0.address == address }) else { return }
    pendingExit = .debug(hostEvent(met.number, isStep: false))
    throw .exit
  }

  /// Records the debugger's data breakpoints that an access meets.
  func noteForHost(_ linear: UInt64, count: Int, isWrite: Bool) {
    for (number, breakpoint) in hostDebug.data where breakpoint.kind != (isWrite ? .read : .write) {
      let length = UInt64(breakpoint.length)
      if linear &- breakpoint.address < length || breakpoint.address &- linear < UInt64(count) {
        hostDebug.met = min(number, hostDebug.met ?? number)
        leavesBlock = true
      }
    }
  }

  /// The stop that is due after an instruction, if any.
  func hostStop() -> PendingExit? {
    guard hostDebug.singleStep || hostDebug.met != nil, replay.values.isEmpty else { return nil }
    defer { hostDebug.met = nil }
    return .debug(hostEvent(hostDebug.met, isStep: hostDebug.singleStep))
  }

  /// What the debugger is told; DR6 has bits for the first four breakpoints.
  private func hostEvent(_ number: Int?, isStep: Bool) -> DebugEvent {
    var status: UInt64 = isStep ? 1 << 14 : 0
    if let number, number < 4 { status |= 1 << UInt64(number) }
    return DebugEvent(
      address: codeAddress(cpu.pointee.rip), status: status, vector: ExceptionVector.debug.rawValue, breakpoint: number)
  }
}
