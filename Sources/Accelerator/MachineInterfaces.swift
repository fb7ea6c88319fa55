import GuestMemory

/// A run of guest-physical addresses that the accelerator maps from host memory.
public struct MemorySlot: Equatable, Sendable {
  /// What the guest may do natively in a slot; anything else exits.
  public enum Access: UInt8, Sendable {
    case readWriteExecute
    case readExecute
  }

  /// The slot's number, the key for replacing and removing it.
  public var number: UInt32
  /// Guest-physical addresses, whole 4 KiB pages.
  public var range: GuestRange
  /// The host's address of the first byte; the memory outlives the slot.
  public nonisolated(unsafe) var hostBase: UnsafeMutableRawPointer
  /// What the guest may do natively.
  public var access: Access
  /// Whether the guest's writes are logged.
  public var logsDirtyPages: Bool

  /// A slot over host memory that outlives it.
  public init(
    number: UInt32, range: GuestRange, hostBase: UnsafeMutableRawPointer, access: Access = .readWriteExecute,
    logsDirtyPages: Bool = false
  ) {
    self.number = number
    self.range = range
    self.hostBase = hostBase
    self.access = access
    self.logsDirtyPages = logsDirtyPages
  }
}

/// Where the signal on a global system interrupt number goes.
public struct InterruptRoute: Equatable, Sendable {
  /// A destination.
  public enum Target: Equatable, Sendable {
    /// An input of the first PIC (0-7) or of the second (0-7).
    case pic(second: Bool, pin: UInt32)
    /// An input of the IOAPIC.
    case ioapic(pin: UInt32)
    /// A message-signalled interrupt.
    case message(address: UInt64, data: UInt32)
  }
  /// The global system interrupt.
  public var gsi: UInt32
  /// Where it goes.
  public var target: Target

  /// A route of one GSI; several routes may share it.
  public init(gsi: UInt32, target: Target) {
    self.gsi = gsi
    self.target = target
  }

  /// A PC's wiring: ISA interrupts to both PICs and the IOAPIC (timer on pin 2), the other pins to the IOAPIC alone.
  public static let legacy: [InterruptRoute] =
    (0..<16).filter { $0 != 2 }.map { InterruptRoute(gsi: $0, target: .pic(second: $0 >= 8, pin: $0 & 7)) }
    + (0..<24).filter { $0 != 2 }.map { InterruptRoute(gsi: $0, target: .ioapic(pin: $0 == 0 ? 2 : $0)) }
}

/// A guest write that is turned into an event without an exit.
public struct Doorbell: Equatable, Sendable {
  /// Which space the address belongs to.
  public enum Space: UInt8, Sendable {
    case memory
    case port
  }
  /// Address space.
  public var space: Space
  /// First byte or port.
  public var address: UInt64
  /// Bytes of the write: 0 (any), 1, 2, 4 or 8.
  public var size: UInt32
  /// The only value that rings it; nil for any.
  public var match: UInt64?

  /// A doorbell at an address.
  public init(space: Space, address: UInt64, size: UInt32, match: UInt64? = nil) {
    self.space = space
    self.address = address
    self.size = size
    self.match = match
  }
}

/// One CPUID leaf as the guest sees it.
public struct CPUIDLeaf: Equatable, Sendable {
  /// EAX on input.
  public var function: UInt32
  /// ECX on input, where it matters.
  public var index: UInt32
  /// Whether ECX on input matters.
  public var hasIndex: Bool
  /// EAX on output.
  public var eax: UInt32
  /// EBX on output.
  public var ebx: UInt32
  /// ECX on output.
  public var ecx: UInt32
  /// EDX on output.
  public var edx: UInt32

  /// A leaf with its outputs.
  public init(
    function: UInt32, index: UInt32 = 0, hasIndex: Bool = false, eax: UInt32 = 0, ebx: UInt32 = 0, ecx: UInt32 = 0,
    edx: UInt32 = 0
  ) {
    self.function = function
    self.index = index
    self.hasIndex = hasIndex
    self.eax = eax
    self.ebx = ebx
    self.ecx = ecx
    self.edx = edx
  }
}
