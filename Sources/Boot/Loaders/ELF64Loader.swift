import Accelerator
import GuestMemory

/// A plain ELF64 file, entered in long mode with the first 4 GiB mapped to themselves and 16 KiB of stack.
///
/// RDI and RBX hold the address of PVH's hvm_start_info, and RSI that of Linux's boot_params: a vmlinux without a PVH
/// note, entered at startup_64, finds what it needs.
struct ELF64Loader: BootLoader {
  let kind = BootKind.elf64
  let inputs: Set<BootInput> = [.commandLine, .initialRAMDisk, .modules]

  private static let stackSize: UInt64 = 16 << 10

  /// Every ELF file that no loader before it wants comes here, so that a malformed one is called malformed.
  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool { ELFImage.hasMagic(image) }

  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState {
    let elf = try ELFImage(image)
    guard elf.is64Bit else { throw .malformed(path: image.path, .elf32WithoutHeader) }
    let entry = try elf.physicalEntry()
    guard entry < Platform.fourGiB else { throw .malformed(path: image.path, .entryOutside(entry)) }
    try elf.load(image, &placer)
    let commandLine = try placer.placeCommandLine(request.commandLine, path: image.path)
    let modules = try placer.placeModules(
      request.allModules, from: Platform.oneMiB, prefer: .highest, path: image.path)
    let info = try placer.placeStartInfo(PlacedInputs(commandLine: commandLine, modules: modules), request)
    let stack = try placer.place(.stack, size: Self.stackSize)

    var parameters = BootParameters(request)
    parameters.setCommandLine(commandLine)
    if request.initialRAMDisk != nil, let disk = modules.first { parameters.setInitialRAMDisk(disk.range) }
    let zeroPage = try placer.place(.bootParameters, parameters.bytes, alignment: 4096)

    var state = try EntryState.long(entry: entry, &placer)
    state.general.rdi = info.start.rawValue
    state.general.rbx = info.start.rawValue
    state.general.rsi = zeroPage.start.rawValue
    state.general.rsp = stack.end.rawValue
    return state
  }
}
