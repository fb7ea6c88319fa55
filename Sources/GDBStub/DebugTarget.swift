import Accelerator

/// What the debugger needs of a machine. Threads are vCPUs, by their index. All of it is called on the server's thread,
/// one call at a time; registers and memory only while the vCPUs are stopped.
public protocol DebugTarget: AnyObject, Sendable {
  /// How many vCPUs there are, at least one.
  var threadCount: Int { get }
  /// Whether the vCPUs have AVX, and so `DebuggerRegisters.extended` its component.
  var hasAVX: Bool { get }
  /// What `monitor` offers.
  var monitorCommands: [DebugMonitorCommand] { get }
  /// A few words on a vCPU for `info threads`.
  func summary(of thread: Int) -> String

  /// Takes `handler`, to be called from any thread when a vCPU has stopped by itself. The other vCPUs may still run:
  /// the server calls `stopAll` then.
  func observeStops(_ handler: @escaping @Sendable (DebugStop) -> Void)
  /// Takes every vCPU out of the guest and returns when all are; no effect where they are.
  func stopAll()
  /// Lets the vCPUs go, one action each; on an error all of them stay where they are.
  func resume(_ actions: [ResumeAction]) throws(DebugError)
  /// Ends the machine; returns before it has ended.
  func quit()

  /// The registers of a vCPU.
  func readRegisters(of thread: Int) throws(DebugError) -> DebuggerRegisters
  /// Replaces the registers of a vCPU; only those that changed are written.
  func writeRegisters(_ registers: DebuggerRegisters, of thread: Int) throws(DebugError)
  /// Reads `count` bytes at a linear address as a vCPU's page tables have it.
  ///
  /// - Returns: The bytes up to the first that is not mapped to memory, so perhaps none.
  func readMemory(at address: UInt64, count: Int, of thread: Int) -> [UInt8]
  /// Writes to a linear address, also where the guest may only read.
  ///
  /// - Returns: How many bytes there was memory for.
  func writeMemory(_ bytes: [UInt8], at address: UInt64, of thread: Int) -> Int

  /// Replaces all breakpoints, of every vCPU. The guest must not see them: neither in its memory nor in its registers.
  ///
  /// - Throws: `noRoom` or `unsupported`; then the breakpoints are as they were.
  func setBreakpoints(_ breakpoints: [DebugBreakpoint]) throws(DebugError)
}

/// What a vCPU does when the machine goes on.
public enum ResumeAction: Equatable, Sendable {
  /// It stays where it is.
  case stay
  /// It executes one instruction.
  case step
  /// It runs.
  case run
}

/// Why a vCPU stopped by itself.
public enum DebugStop: Equatable, Sendable {
  /// It is about to execute the instruction at a breakpoint.
  case breakpoint(thread: Int)
  /// It has executed one instruction.
  case step(thread: Int)
  /// It has accessed a watched address.
  case watchpoint(thread: Int, address: UInt64)
  /// It cannot go on: a triple fault, an instruction that the accelerator cannot execute.
  case crash(thread: Int)
  /// Something other than the debugger paused the machine.
  case paused
  /// The machine has ended.
  case exited(status: UInt8)
}

/// One breakpoint or watchpoint.
public struct DebugBreakpoint: Hashable, Sendable {
  /// What it stops at. `software` is the debugger's default; the target decides how to make it.
  public enum Kind: UInt8, Sendable {
    case software = 0
    case hardware = 1
    case write = 2
    case read = 3
    case access = 4
  }

  /// What it stops at.
  public let kind: Kind
  /// Linear address.
  public let address: UInt64
  /// Bytes; 1 for `software` and `hardware`.
  public let length: Int

  /// A breakpoint on a linear address.
  public init(kind: Kind, address: UInt64, length: Int) {
    self.kind = kind
    self.address = address
    self.length = length
  }
}

/// A command of gdb's `monitor`.
public struct DebugMonitorCommand: Sendable {
  /// Its name, without spaces.
  public let name: String
  /// One line.
  public let help: String
  /// Takes the words after the name; the text is printed.
  public let run: @Sendable (_ arguments: [Substring]) -> String

  /// A command and what it does.
  public init(name: String, help: String, run: @escaping @Sendable (_ arguments: [Substring]) -> String) {
    self.name = name
    self.help = help
    self.run = run
  }
}

/// The registers a debugger sees of a vCPU.
public struct DebuggerRegisters: Equatable, Sendable {
  /// General registers, RIP and RFLAGS.
  public var general: GeneralRegisters
  /// Segment and control registers and EFER.
  public var system: SystemRegisters
  /// MSR 0xC000_0102, which SWAPGS exchanges with GS's base.
  public var kernelGSBase: UInt64
  /// The standard XSAVE layout (SDM vol. 1, 13.4): at least 576 bytes, 832 with AVX.
  public var extended: [UInt8]

  /// The registers of a vCPU.
  public init(general: GeneralRegisters, system: SystemRegisters, kernelGSBase: UInt64, extended: [UInt8]) {
    self.general = general
    self.system = system
    self.kernelGSBase = kernelGSBase
    self.extended = extended
  }
}

/// Why the target could not do what the debugger asked for.
public enum DebugError: Error, Equatable, Sendable, CustomStringConvertible {
  /// There are fewer breakpoint registers than breakpoints asked for.
  case noRoom(limit: Int)
  /// The accelerator cannot do it.
  case unsupported
  /// The accelerator failed.
  case accelerator(String)

  /// One line: what failed, and what to do.
  public var description: String {
    switch self {
    case .noRoom(let limit): "more than \(limit) breakpoints and watchpoints; delete some"
    case .unsupported: "not supported by this accelerator"
    case .accelerator(let reason): reason
    }
  }
}
