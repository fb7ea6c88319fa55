import Accelerator
import GuestMemory

/// A boot module: a file and the string that goes with it (Multiboot 1, 3.3; PVH's modlist).
public struct BootModule: Sendable {
  /// The file.
  public var image: BootImage
  /// The string, without NUL.
  public var string: String

  /// A module with its string.
  public init(image: BootImage, string: String) {
    self.image = image
    self.string = string
  }
}

/// What is to be booted, and in which machine.
public struct BootRequest: Sendable {
  /// The guest; nil boots the firmware alone.
  public var image: BootImage?
  /// The kernel's command line; empty where none was given.
  public var commandLine = ""
  /// The initial RAM disk; a guest that knows modules only gets it as the first module, as with QEMU.
  public var initialRAMDisk: BootImage?
  /// Boot modules.
  public var modules: [BootModule] = []
  /// Where a flat binary goes.
  public var loadAddress: UInt64?
  /// The RAM and what guests are told about it.
  public var memoryMap: MemoryMap
  /// Where ACPI's RSDP was placed; nil where there are no tables.
  public var acpiRSDP: GuestPhysicalAddress?
  /// The boot ROM that the machine has mapped.
  public var firmware: BootROM?
  /// Whether all RAM reads as zero, as it does in a new machine: zeroed parts then need no writing.
  public var memoryIsZero = false

  /// A request with nothing but a guest.
  public init(image: BootImage?, memoryMap: MemoryMap) {
    self.image = image
    self.memoryMap = memoryMap
  }
}

/// What a request may hold that not every kind of guest has a place for.
public enum BootInput: String, Sendable, CaseIterable {
  case commandLine
  case initialRAMDisk
  case modules
  case loadAddress

  /// The option of `swiftvmm run`.
  public var optionName: String {
    switch self {
    case .commandLine: "--append"
    case .initialRAMDisk: "--initrd"
    case .modules: "--module"
    case .loadAddress: "--load-address"
    }
  }
}

/// How the boot processor starts, and what was put where.
///
/// All other registers are as after reset; the application processors wait for SIPI.
public struct BootEntry: Equatable, Sendable {
  /// The kind of guest; nil where the firmware alone was booted.
  public let kind: BootKind?
  /// General registers, RIP and RFLAGS.
  public let general: GeneralRegisters
  /// Segment, control and descriptor-table registers.
  public let system: SystemRegisters
  /// What was put where, in the order it was done.
  public let placements: [BootPlacement]

  /// An entry; without a kind, one that puts nothing into memory.
  public init(
    kind: BootKind? = nil, general: GeneralRegisters, system: SystemRegisters, placements: [BootPlacement] = []
  ) {
    self.kind = kind
    self.general = general
    self.system = system
    self.placements = placements
  }
}
