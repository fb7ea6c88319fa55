import Accelerator

/// One debugger's conversation, without the transport: bytes in, bytes out (GDB manual, appendix E).
///
/// All-stop mode: while one vCPU is stopped, all are. Connecting stops the machine; after `D` it runs on without the
/// debugger's breakpoints; where the connection is lost they go too, and the machine stays as it is.
public struct GDBSession {
  /// What came of the debugger's bytes.
  public struct Output: Equatable, Sendable {
    /// To be sent.
    public var bytes: [UInt8] = []
    /// Whether the debugger has taken its leave.
    public var isOver = false
  }

  let target: any DebugTarget
  let layout: RegisterLayout
  let description: [UInt8]
  private var reader = PacketReader()
  private var acknowledges = true
  private var lastPacket: [UInt8] = []
  var output = Output()
  var isRunning = false
  /// What happened while all was stopped, and must not be lost.
  private var pending: [DebugStop] = []
  private var lastStop = DebugStop.paused
  var breakpoints: [DebugBreakpoint] = []
  /// The thread of register and memory packets, and the one of `c` and `s` (nil: all).
  var generalThread = 0
  var resumeThread: Int?
  /// Whether the debugger understands why a breakpoint stopped it.
  var tellsBreakpointKinds = false

  /// Begins a conversation; stops the machine.
  public init(_ target: any DebugTarget) {
    self.target = target
    layout = RegisterLayout(hasAVX: target.hasAVX)
    description = Array(TargetDescription(layout).xml.utf8)
    target.stopAll()
  }

  /// Takes bytes from the debugger.
  public mutating func receive(_ bytes: some Sequence<UInt8>) -> Output {
    for byte in bytes where !output.isOver {
      switch reader.take(byte) {
      case nil, .acknowledgement: break
      case .damaged: if acknowledges { output.bytes.append(UInt8(ascii: "-")) }
      case .retransmission: if acknowledges { output.bytes += lastPacket }
      case .interrupt: interrupt()
      case .packet(let content):
        if acknowledges { output.bytes.append(UInt8(ascii: "+")) }
        handle(content)
      }
    }
    return takeOutput()
  }

  /// Takes what the target reported.
  public mutating func stopped(_ stop: DebugStop) -> Output {
    if isRunning {
      report(stop)
    } else if Self.isWorthKeeping(stop) {
      pending.append(stop)
    }
    return takeOutput()
  }

  /// Ends a conversation whose connection is gone.
  public mutating func disconnect() {
    try? target.setBreakpoints([])
  }

  private mutating func takeOutput() -> Output {
    defer { output = Output(isOver: output.isOver) }
    return output
  }

  private mutating func interrupt() {
    guard isRunning else { return }
    report(.paused)
  }

  /// A breakpoint that was not reported is met again, for its instruction has not been executed; the rest is not.
  private static func isWorthKeeping(_ stop: DebugStop) -> Bool {
    switch stop {
    case .breakpoint, .step, .paused: false
    case .watchpoint, .crash, .exited: true
    }
  }

  private mutating func report(_ stop: DebugStop) {
    target.stopAll()
    isRunning = false
    lastStop = stop
    if let thread = thread(of: stop) { generalThread = thread }
    sendStop()
  }

  /// Lets the machine go, unless there is something to report first.
  mutating func resume(_ actions: [ResumeAction]) {
    guard pending.isEmpty else { return report(pending.removeFirst()) }
    do throws(DebugError) {
      // Before it is let go: a stop may be reported before `resume` returns.
      isRunning = true
      try target.resume(actions)
    } catch {
      isRunning = false
      send(.accelerator)
    }
  }

  // MARK: Replies

  mutating func send(_ content: some Sequence<UInt8>) {
    lastPacket = PacketReader.frame(Array(content))
    output.bytes += lastPacket
  }

  mutating func send(_ text: String) {
    send(text.utf8)
  }

  mutating func send(_ error: ErrorCode) {
    send("E" + String(decoding: Hex.encode([error.rawValue]), as: UTF8.self))
  }

  mutating func acknowledge(_ isDone: Bool = true, else error: ErrorCode = .invalid) {
    if isDone { send("OK") } else { send(error) }
  }

  /// The protocol has numbers without a meaning of their own; these are Linux's errno values.
  enum ErrorCode: UInt8 {
    case noThread = 0x03
    case accelerator = 0x05
    case badAddress = 0x0e
    case running = 0x10
    case invalid = 0x16
    case noRoom = 0x1c
  }

  mutating func startNoAcknowledgements() {
    acknowledge()
    acknowledges = false
  }

  /// `T`, `W`: why all is stopped.
  mutating func sendStop() {
    let thread = thread(of: lastStop) ?? generalThread
    let place = "thread:\(String(thread + 1, radix: 16));"
    switch lastStop {
    case .breakpoint: send("T05\(place)\(breakpointKind(thread))")
    case .step: send("T05\(place)")
    case .watchpoint(_, let address):
      send("T05\(place)\(watchKind(address)):\(String(address, radix: 16));")
    case .paused: send("T02\(place)")
    case .crash: send("T06\(place)")
    case .exited(let status): send("W" + String(decoding: Hex.encode([status]), as: UTF8.self))
    }
  }

  /// Told which kind it is, gdb does not look for an `int3` before RIP.
  private func breakpointKind(_ thread: Int) -> String {
    guard tellsBreakpointKinds, let rip = try? target.readRegisters(of: thread).general.rip else { return "" }
    return breakpoints.contains { $0.kind == .hardware && $0.address == rip } ? "hwbreak:;" : "swbreak:;"
  }

  private func watchKind(_ address: UInt64) -> String {
    let watchpoint = breakpoints.first { breakpoint in
      breakpoint.kind.rawValue > 1 && address &- breakpoint.address < UInt64(breakpoint.length)
    }
    switch watchpoint?.kind {
    case .read: return "rwatch"
    case .access: return "awatch"
    default: return "watch"
    }
  }

  private func thread(of stop: DebugStop) -> Int? {
    switch stop {
    case .breakpoint(let thread), .step(let thread), .watchpoint(let thread, _), .crash(let thread):
      (0..<target.threadCount).contains(thread) ? thread : nil
    case .paused, .exited: nil
    }
  }
}
