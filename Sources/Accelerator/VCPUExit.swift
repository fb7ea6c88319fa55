import GuestMemory
import MemoryViews

/// Why a vCPU came back from the guest. Data pointers are valid until the next call on the vCPU.
public enum VCPUExit {
  /// An `in`, `out`, `ins` or `outs`.
  case portIO(PortAccess)
  /// A data access to an address without a slot, or a write to a read-only one.
  case memoryIO(MemoryAccess)
  /// `hlt` with the LAPIC in the VMM, or with interrupts off for good.
  case halt
  /// `kick`, or a signal.
  case interrupted
  /// The interrupt window that the VMM asked for is open.
  case interruptWindow
  /// As many instructions as `limitInstructions` said have retired.
  case instructionLimit
  /// A triple fault.
  case tripleFault
  /// The guest asked for power-off, reset, or reported a crash, by a call of the accelerator.
  case systemEvent(SystemEvent)
  /// A breakpoint, step or watchpoint of the debugger.
  case debug(DebugEvent)
  /// An instruction that the accelerator cannot execute; the state is the one before it.
  case emulationFailure(InstructionBytes)
  /// An instruction was fetched from, or page tables lie in, guest-physical space without a slot.
  case memoryFault(GuestPhysicalAddress, size: UInt64, flags: UInt64)
  /// An access that the active view forbids; the state is the one before the instruction, which runs again.
  case viewViolation(ViewViolation)
  /// An instruction that would change a register that `pin` named; it runs again.
  case pinnedRegister(PinnedRegister, value: UInt64)
  /// An end of interrupt for a level-triggered vector, for an IOAPIC in the VMM.
  case endOfInterrupt(vector: UInt8)
  /// A dirty ring is full: collect before running on.
  case dirtyRingFull
  /// A hypercall that the accelerator passes on; the result goes to `result`.
  case hypercall(
    number: UInt64, arguments: (UInt64, UInt64, UInt64, UInt64, UInt64), result: UnsafeMutablePointer<UInt64>)
  /// The processor refused to enter the guest.
  case entryFailure(reason: UInt64)
  /// The accelerator gave up.
  case internalError(subcode: UInt32, data: (UInt64, UInt64, UInt64, UInt64))
  /// A reason this program does not know.
  case unknown(reason: UInt32)
}

/// What the guest asked for in a `systemEvent`.
public enum SystemEvent: UInt32, Sendable {
  /// Power off.
  case shutdown = 1
  /// Reset.
  case reset = 2
  /// The guest's kernel crashed.
  case crash = 3
}

/// Up to 15 bytes of an instruction, kept in the exit itself; `count` is 0 where the accelerator has none.
public struct InstructionBytes: Equatable, Sendable {
  /// Bytes 0-7, the first in the low bits.
  public var low: UInt64
  /// Bytes 8-14.
  public var high: UInt64
  /// How many there are.
  public var count: UInt8

  /// The bytes, at most 15 of them.
  public init(low: UInt64 = 0, high: UInt64 = 0, count: UInt8 = 0) {
    self.low = low
    self.high = high
    self.count = min(count, 15)
  }

  /// The bytes as an array.
  public var array: [UInt8] {
    (0..<UInt64(count)).map { position in
      let half = position < 8 ? low : high
      return UInt8(truncatingIfNeeded: half >> (position % 8 * 8))
    }
  }
}

/// One port access: `count` items of `size` bytes each, one after another at `data`.
public struct PortAccess {
  /// First port.
  public let port: UInt16
  /// Bytes an item: 1, 2 or 4.
  public let size: UInt8
  /// Whether the guest writes.
  public let isWrite: Bool
  /// Items; more than one for string instructions.
  public let count: UInt32
  /// `size * count` bytes: the guest's when it writes, the VMM's when it reads.
  public let data: UnsafeMutableRawPointer

  /// An access as the accelerator saw it.
  public init(port: UInt16, size: UInt8, isWrite: Bool, count: UInt32, data: UnsafeMutableRawPointer) {
    self.port = port
    self.size = size
    self.isWrite = isWrite
    self.count = count
    self.data = data
  }
}

/// One memory access outside the slots.
public struct MemoryAccess {
  /// First byte.
  public let address: GuestPhysicalAddress
  /// Bytes, 1 to 8.
  public let size: UInt8
  /// Whether the guest writes.
  public let isWrite: Bool
  /// `size` bytes: the guest's when it writes, the VMM's when it reads.
  public let data: UnsafeMutableRawPointer

  /// An access as the accelerator saw it.
  public init(address: GuestPhysicalAddress, size: UInt8, isWrite: Bool, data: UnsafeMutableRawPointer) {
    self.address = address
    self.size = size
    self.isWrite = isWrite
    self.data = data
  }
}

/// An access that a view forbids.
public struct ViewViolation: Equatable, Sendable {
  /// The number of the view.
  public let view: UInt32
  /// The byte that was accessed, or the page-table entry.
  public let address: GuestPhysicalAddress
  /// The linear address that the access was for.
  public let linear: UInt64
  /// The right that is missing.
  public let missing: PageRights
  /// The instruction pointer: of the instruction that made the access, or that was to be fetched.
  public let rip: UInt64

  /// A violation as the accelerator saw it.
  public init(view: UInt32, address: GuestPhysicalAddress, linear: UInt64, missing: PageRights, rip: UInt64) {
    self.view = view
    self.address = address
    self.linear = linear
    self.missing = missing
    self.rip = rip
  }
}

/// What stopped a vCPU for the debugger.
public struct DebugEvent: Sendable {
  /// Linear address of the next instruction (of the breakpoint itself for a breakpoint).
  public let address: UInt64
  /// DR6: which breakpoint (bits 0-3) or step (bit 14).
  public let status: UInt64
  /// The exception: 1 (#DB) or 3 (#BP).
  public let vector: UInt8
  /// The first breakpoint that was met, by its place in `DebugControl.breakpoints`; there may be more than DR6 has bits for.
  public let breakpoint: Int?

  /// An event as the accelerator saw it; without a breakpoint, the one that DR6 names.
  public init(address: UInt64, status: UInt64, vector: UInt8, breakpoint: Int? = nil) {
    self.address = address
    self.status = status
    self.vector = vector
    self.breakpoint = breakpoint ?? (status & 15 == 0 ? nil : status.trailingZeroBitCount)
  }
}

/// What a debugger wants of a vCPU. The guest's own debug registers are not touched.
public struct DebugControl: Equatable, Sendable {
  /// One of up to `VirtualCPU.breakpointLimit` hardware breakpoints.
  public struct Breakpoint: Equatable, Sendable {
    /// What it watches, as DR7's R/W field encodes it; `read`, which no processor has, needs `.readWatchpoints`.
    public enum Kind: UInt8, Sendable {
      case execute = 0
      case write = 1
      case access = 3
      case read = 4
    }
    /// Linear address.
    public var address: UInt64
    /// What it watches.
    public var kind: Kind
    /// Bytes: 1, 2, 4 or 8; 1 for `execute`.
    public var length: UInt8

    /// A breakpoint on a linear address.
    public init(address: UInt64, kind: Kind, length: UInt8) {
      self.address = address
      self.kind = kind
      self.length = length
    }
  }
  /// Stop after each instruction. Interrupts wait meanwhile, where the host can hold them: a step would end in a handler.
  public var singleStep = false
  /// At most `VirtualCPU.breakpointLimit`.
  public var breakpoints: [Breakpoint] = []
  /// Whether the debugger wants the guest's `int3` (its own software breakpoints).
  public var software = false

  /// No debugging.
  public init() {}
}
