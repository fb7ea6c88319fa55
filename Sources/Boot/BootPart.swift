import GuestMemory

/// A thing that a loader puts into guest memory.
public enum BootPart: Hashable, Sendable, CustomStringConvertible {
  /// A boot ROM's image.
  case firmware
  /// The first sector of a disk.
  case bootSector
  /// All of a disk, for the boot ROM's INT 13h.
  case disk
  /// A flat binary.
  case flatBinary
  /// A kernel that is one piece: a bzImage's protected-mode part, or an image with Multiboot's address fields.
  case kernel
  /// A loadable segment of an ELF file, by its program header's number.
  case segment(Int)
  /// The initial RAM disk.
  case initialRAMDisk
  /// A boot module, by its place on the command line.
  case module(Int)
  /// The kernel's command line.
  case commandLine
  /// What `BootRequest.modules` says beside each module.
  case moduleStrings
  /// PVH's hvm_start_info with its lists.
  case startInfo
  /// Multiboot's information structure with its lists.
  case multibootInformation
  /// Linux's boot_params, the zero page.
  case bootParameters
  /// Page tables that map the first 4 GiB to themselves.
  case pageTables
  /// A global descriptor table.
  case descriptorTable
  /// The first stack.
  case stack

  /// As reports and errors name it.
  public var description: String {
    switch self {
    case .firmware: "ROM"
    case .bootSector: "boot sector"
    case .disk: "disk"
    case .flatBinary: "flat binary"
    case .kernel: "kernel"
    case .segment(let index): "segment \(index)"
    case .initialRAMDisk: "initial RAM disk"
    case .module(let index): "module \(index)"
    case .commandLine: "command line"
    case .moduleStrings: "module strings"
    case .startInfo: "start info"
    case .multibootInformation: "Multiboot information"
    case .bootParameters: "boot parameters"
    case .pageTables: "page tables"
    case .descriptorTable: "descriptor table"
    case .stack: "stack"
    }
  }
}

/// What was put where.
public struct BootPlacement: Equatable, Sendable, CustomStringConvertible {
  /// The thing.
  public let part: BootPart
  /// Its guest-physical addresses.
  public let range: GuestRange

  /// `kernel at 0x1000000-0x1ffffff`.
  public var description: String { "\(part) at \(range)" }
}
