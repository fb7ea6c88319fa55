import GuestMemory
import Host

/// Why a guest cannot be booted. All but `memory` and `noRoom` speak of a file that the user named: exit status 66.
public enum BootError: Error, Equatable, CustomStringConvertible {
  /// The file cannot be opened or read.
  case unreadable(path: String, HostError)
  /// The file is a directory.
  case directory(path: String)
  /// The file has no bytes.
  case empty(path: String)
  /// A file that is not regular, and so is read whole, goes on for too long.
  case endless(path: String, limit: Int)
  /// The file ends before a part of it does.
  case truncated(path: String, part: BootPart, offset: UInt64, count: UInt64, size: UInt64)
  /// No loader knows the bytes.
  case unknownKind(path: String)
  /// An option was given that guests of this kind have no place for.
  case unusedInput(path: String, kind: BootKind, input: BootInput)
  /// The image breaks the rules of its kind.
  case malformed(path: String, ImageDefect)
  /// A part wants addresses that are not all usable RAM.
  case outsideMemory(path: String, part: BootPart, address: UInt64, size: UInt64)
  /// Two parts want the same addresses.
  case overlap(path: String, part: BootPart, GuestRange, other: BootPart, GuestRange)
  /// A part that may go anywhere finds no free RAM.
  case noRoom(path: String, part: BootPart, size: UInt64)
  /// The command line is longer than the kernel takes.
  case commandLineLength(path: String, count: Int, limit: Int)
  /// A string for the guest holds a NUL, which would end it early.
  case stringWithNUL(path: String)
  /// The kernel does not fit in what a boot disk's first sector can load.
  case bootDiskKernel(path: String, start: UInt64, end: UInt64, limit: UInt64)
  /// The firmware image has a size that no ROM has.
  case firmwareSize(path: String, size: UInt64)
  /// Neither an image nor a firmware was given.
  case nothingToBoot
  /// The amount of RAM is one that no platform has.
  case memorySize(UInt64)
  /// ACPI's tables need more room than there is below the boot ROM.
  case tablesTooLarge(size: UInt64, room: UInt64)
  /// Guest memory is not the one that the memory map describes.
  case memory(GuestMemoryError)

  /// One line: what failed, with which value, why, and what to do.
  public var description: String {
    switch self {
    case .unreadable(let path, let error): "cannot read \(path): \(HostError.reason(error.errno))"
    case .directory(let path): "cannot boot \(path): it is a directory; name a file"
    case .empty(let path): "cannot boot \(path): it is empty"
    case .endless(let path, let limit): "cannot boot \(path): it is no regular file and goes on past \(limit >> 20) MiB"
    case .truncated(let path, let part, let offset, let count, let size):
      "\(path) is truncated: its \(part) is \(count) bytes at offset \(offset), and the file has \(size) bytes"
    case .unknownKind(let path):
      "cannot boot \(path): it is no bzImage, PVH, Multiboot or 64-bit ELF file and no boot sector; "
        + "give a flat binary's address with --load-address"
    case .unusedInput(let path, let kind, let input):
      "\(path) is of kind \(kind.rawValue), which does not take \(input.optionName): leave it out"
    case .malformed(let path, let defect): "\(path) is malformed: \(defect)"
    case .outsideMemory(let path, let part, let address, let size):
      "cannot boot \(path): its \(part), \(size) bytes at \(GuestPhysicalAddress(address)), is not all in usable RAM; "
        + "give more with --memory if it lies above it"
    case .overlap(let path, let part, let range, let other, let otherRange):
      "cannot boot \(path): its \(part) at \(range) overlaps its \(other) at \(otherRange)"
    case .noRoom(let path, let part, let size):
      "cannot boot \(path): no free RAM for its \(part) of \(size) bytes; give more with --memory"
    case .commandLineLength(let path, let count, let limit):
      "cannot boot \(path): the command line has \(count) bytes and the kernel takes \(limit); shorten --append"
    case .stringWithNUL(let path): "cannot boot \(path): a command line or module string holds a NUL character"
    case .bootDiskKernel(let path, let start, let end, let limit):
      "cannot make a boot disk of \(path): it loads at \(GuestPhysicalAddress(start)) to \(GuestPhysicalAddress(end)), "
        + "and must lie from \(GuestPhysicalAddress(Platform.oneMiB)) to \(GuestPhysicalAddress(limit))"
    case .firmwareSize(let path, let size):
      "\(path) is no firmware: it has \(size) bytes, and a ROM has a multiple of 4096, at most 16 MiB"
    case .nothingToBoot: "nothing to boot: name a guest or give --firmware"
    case .memorySize(let size): "\(size) bytes of guest memory cannot be laid out: ask for whole pages from 1M on"
    case .tablesTooLarge(let size, let room):
      "an ACPI table of \(size) bytes does not fit in the \(room) bytes left for it"
    case .memory(let error): "\(error)"
    }
  }
}

/// A rule of its kind that an image breaks.
public enum ImageDefect: Error, Equatable, CustomStringConvertible {
  /// libelf refuses the file.
  case elf(reason: String)
  /// The ELF file is not for this machine or not an executable.
  case elfTarget(machine: UInt16, type: UInt16)
  /// A 32-bit ELF file says neither by a PVH note nor by a Multiboot header how to enter it.
  case elf32WithoutHeader
  /// There is nothing to load.
  case noSegments
  /// More loadable segments than any kernel has.
  case segmentCount(Int, limit: Int)
  /// A segment has more bytes in the file than in memory.
  case segmentSizes(Int, file: UInt64, memory: UInt64)
  /// The entry point lies in nothing that is loaded.
  case entryOutside(UInt64)
  /// The PVH note holds no address.
  case noteSize(UInt64)
  /// Multiboot's header asks for what no boot loader here gives.
  case multibootRequirements(UInt32)
  /// Multiboot's address fields contradict each other.
  case multibootAddresses(header: UInt32, load: UInt32, loadEnd: UInt32, bssEnd: UInt32)
  /// Linux's boot protocol is older than 2.06.
  case linuxProtocol(UInt16)
  /// The kernel loads below 1 MiB (zImage).
  case linuxLoadedLow
  /// The setup header is shorter than its version says.
  case linuxHeaderLength(Int)
  /// An alignment is no power of two.
  case linuxAlignment(UInt32)
  /// A file without protected-mode code.
  case linuxNoKernel

  /// What is wrong, with the value.
  public var description: String {
    switch self {
    case .elf(let reason): "not readable as ELF: \(reason)"
    case .elfTarget(let machine, let type): "ELF machine \(machine), type \(type) is no x86 executable"
    case .elf32WithoutHeader: "a 32-bit ELF file needs a PVH note or a Multiboot header"
    case .noSegments: "the ELF file has no loadable segment"
    case .segmentCount(let count, let limit): "\(count) program headers, more than the \(limit) that are read"
    case .segmentSizes(let index, let file, let memory):
      "segment \(index) has \(file) bytes in the file and only \(memory) in memory"
    case .entryOutside(let address): "the entry point \(GuestPhysicalAddress(address)) lies outside what is loaded"
    case .noteSize(let size): "the PVH note holds \(size) bytes and an entry point has 4 or 8"
    case .multibootRequirements(let flags):
      "its Multiboot header requires 0x\(String(flags, radix: 16)); only page-aligned modules (1) and memory sizes (2) are given"
    case .multibootAddresses(let header, let load, let loadEnd, let bssEnd):
      "Multiboot addresses do not fit together: header \(hex(header)), load \(hex(load)), load end \(hex(loadEnd)), "
        + "bss end \(hex(bssEnd))"
    case .linuxProtocol(let version): "Linux boot protocol \(version >> 8).\(version & 0xff) is older than 2.06"
    case .linuxLoadedLow: "the kernel is a zImage, which loads below 1 MiB: build a bzImage"
    case .linuxHeaderLength(let count): "the setup header has \(count) bytes, fewer than its version says"
    case .linuxAlignment(let value): "the kernel's alignment \(hex(value)) is no power of two"
    case .linuxNoKernel: "there is no protected-mode kernel after the setup sectors"
    }
  }

  private func hex(_ value: UInt32) -> String { "0x" + String(value, radix: 16) }
}
