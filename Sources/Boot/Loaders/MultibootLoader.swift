import Accelerator
import GuestMemory

/// Multiboot 1 (Multiboot Specification 0.6.96): ELF32, ELF64 below 4 GiB, or addresses in the header (the a.out kludge).
///
/// EAX holds the magic and EBX the information structure: memory sizes, command line, modules, memory map, loader's name.
/// As with QEMU, the command line begins with the image's path, and modules follow the kernel.
struct MultibootLoader: BootLoader {
  let kind = BootKind.multiboot
  let inputs: Set<BootInput> = [.commandLine, .initialRAMDisk, .modules]

  /// The header and its place in the file.
  private struct Header {
    var offset: Int
    var flags: UInt32
  }

  private static let loaderName = "swiftvmm"

  /// A disk with GRUB on it has GRUB's own Multiboot header in the sectors after the first: it is a disk all the same.
  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool {
    guard let header = Self.header(image) else { return false }
    return ELFImage.hasMagic(image) || header.offset < 512 || !BootSectorLoader.hasSignature(image)
  }

  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState {
    guard let header = Self.header(image) else { throw .unknownKind(path: image.path) }
    // Bits 0-15 must be met or refused; 0 and 1 are met always.
    guard header.flags & 0xfffc == 0 else {
      throw .malformed(path: image.path, .multibootRequirements(header.flags & 0xffff))
    }
    let entry: UInt64
    if header.flags & 1 << 16 != 0 {
      entry = try Self.loadByAddresses(image, header, &placer)
    } else {
      let elf = try ELFImage(image)
      entry = try elf.physicalEntry()
      guard entry < Platform.fourGiB else { throw .malformed(path: image.path, .entryOutside(entry)) }
      try elf.load(image, &placer)
    }
    let information = try Self.placeInformation(image, request, &placer)
    var state = try EntryState.flat32(entry: entry, &placer)
    state.general.rax = 0x2bad_b002
    state.general.rbx = information.start.rawValue
    return state
  }

  /// The header: in the first 8 KiB, on 4 bytes, its first three fields adding up to 0 (3.1.1).
  private static func header(_ image: BootImage) -> Header? {
    let head = image.head
    for offset in stride(from: 0, to: head.count - 11, by: 4) where head[offset] == 0x02 {
      guard head.number(at: offset, as: UInt32.self) == 0x1bad_b002,
        let flags = head.number(at: offset + 4, as: UInt32.self),
        let checksum = head.number(at: offset + 8, as: UInt32.self),
        checksum &+ flags &+ 0x1bad_b002 == 0
      else { continue }
      return Header(offset: offset, flags: flags)
    }
    return nil
  }

  /// Loads by the header's address fields (3.1.3).
  private static func loadByAddresses(
    _ image: BootImage, _ header: Header, _ placer: inout Placer
  ) throws(BootError) -> UInt64 {
    let fields = try image.bytes(.kernel, at: UInt64(header.offset) + 12, count: 20)
    func field(_ index: Int) -> UInt32 { fields.number(at: index * 4) ?? 0 }
    let (address, load, loadEnd, bssEnd, entry) = (field(0), field(1), field(2), field(3), field(4))
    let defect = ImageDefect.multibootAddresses(header: address, load: load, loadEnd: loadEnd, bssEnd: bssEnd)
    guard load <= address, UInt64(address - load) <= UInt64(header.offset) else {
      throw .malformed(path: image.path, defect)
    }
    let fileOffset = UInt64(header.offset) - UInt64(address - load)
    guard loadEnd == 0 || loadEnd > load else { throw .malformed(path: image.path, defect) }
    let fileSize = loadEnd == 0 ? image.size - fileOffset : UInt64(loadEnd - load)
    guard fileSize <= image.size - fileOffset else {
      throw .truncated(path: image.path, part: .kernel, offset: fileOffset, count: fileSize, size: image.size)
    }
    guard bssEnd == 0 || UInt64(bssEnd) >= UInt64(load) + fileSize else {
      throw .malformed(path: image.path, defect)
    }
    let size = bssEnd == 0 ? fileSize : UInt64(bssEnd - load)
    let range = try placer.claim(.kernel, at: UInt64(load), size: size)
    guard range.contains(GuestPhysicalAddress(UInt64(entry))) else {
      throw .malformed(path: image.path, .entryOutside(UInt64(entry)))
    }
    if let file = GuestRange(start: range.start, size: fileSize) {
      try placer.copy(image, .kernel, at: fileOffset, to: file)
    }
    try placer.clear(range.start + fileSize, size: size - fileSize)
    return UInt64(entry)
  }

  /// The information structure (3.3) with its lists.
  private static func placeInformation(
    _ image: BootImage, _ request: BootRequest, _ placer: inout Placer
  ) throws(BootError) -> GuestRange {
    let text = request.commandLine.isEmpty ? image.path : image.path + " " + request.commandLine
    let commandLine = try placer.placeCommandLine(text, path: image.path)
    let modules = try placer.placeModules(
      request.allModules, from: placer.end, prefer: .lowest,
      path: image.path)
    let entries = request.memoryMap.entries
    let moduleOffset = 120
    let mapOffset = moduleOffset + 16 * modules.count
    let nameOffset = mapOffset + 24 * entries.count
    let range = try placer.place(.multibootInformation, size: UInt64(nameOffset + loaderName.utf8.count + 1))
    let base = UInt32(range.start.rawValue)

    var table = TableBytes(zeros: moduleOffset)
    table.store(0x24d as UInt32, at: 0)  // memory, command line, modules, map, name
    table.store(UInt32(Platform.extendedBIOSData.start.rawValue >> 10), at: 4)
    table.store(UInt32((request.memoryMap.lowRAM.size - Platform.oneMiB) >> 10), at: 8)
    table.store(UInt32(commandLine), at: 16)
    table.store(UInt32(modules.count), at: 20)
    table.store(base + UInt32(moduleOffset), at: 24)
    table.store(UInt32(24 * entries.count), at: 44)
    table.store(base + UInt32(mapOffset), at: 48)
    table.store(base + UInt32(nameOffset), at: 64)
    for module in modules {
      table.append(UInt32(module.range.start.rawValue))
      table.append(UInt32(module.range.end.rawValue))
      table.append(UInt32(module.string))
      table.append(UInt32(0))
    }
    for entry in entries {
      table.append(UInt32(20))  // bytes that follow
      table.append(entry.range.start.rawValue)
      table.append(entry.range.size)
      table.append(entry.kind.rawValue)
    }
    table.append(cString: loaderName)
    try placer.write(table.bytes, at: range.start)
    return range
  }
}
