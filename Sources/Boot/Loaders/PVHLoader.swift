import Accelerator
import GuestMemory

/// Xen's PVH: an ELF file whose note 18 names a 32-bit entry point (Xen, docs/misc/pvh.pandoc).
///
/// EBX holds the address of an hvm_start_info, version 1, with modules, command line, RSDP and memory map.
struct PVHLoader: BootLoader {
  let kind = BootKind.pvh
  let inputs: Set<BootInput> = [.commandLine, .initialRAMDisk, .modules]

  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool {
    guard ELFImage.hasMagic(image), let elf = try? ELFImage(image) else { return false }
    return elf.pvhNote != nil
  }

  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState {
    let elf = try ELFImage(image)
    let entry = try Self.entry(elf)
    try elf.checkEntry(entry)
    try elf.load(image, &placer)
    let commandLine = try placer.placeCommandLine(request.commandLine, path: image.path)
    let modules = try placer.placeModules(
      request.allModules, from: Platform.oneMiB, prefer: .highest, path: image.path)
    let info = try placer.placeStartInfo(PlacedInputs(commandLine: commandLine, modules: modules), request)
    var state = try EntryState.flat32(entry: entry, &placer)
    state.general.rbx = info.start.rawValue
    return state
  }

  /// The address that the note names.
  static func entry(_ elf: ELFImage) throws(BootError) -> UInt64 {
    let note = elf.pvhNote ?? []
    switch note.count {
    case 4: return UInt64(note.number(at: 0, as: UInt32.self) ?? 0)
    case 8:
      let entry = note.number(at: 0, as: UInt64.self) ?? 0
      guard entry < Platform.fourGiB else { throw .malformed(path: elf.path, .entryOutside(entry)) }
      return entry
    default: throw .malformed(path: elf.path, .noteSize(UInt64(note.count)))
    }
  }
}
