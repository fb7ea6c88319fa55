import Accelerator
import GuestMemory

/// Linux's bzImage by its boot protocol, 2.06 or later (Linux, Documentation/arch/x86/boot.rst).
///
/// Entered at startup_64 in long mode with RSI at boot_params where the kernel is a 64-bit one (XLF_KERNEL_64), else at
/// the 32-bit entry point. The real-mode code is not run.
struct LinuxLoader: BootLoader {
  let kind = BootKind.linux
  let inputs: Set<BootInput> = [.commandLine, .initialRAMDisk]

  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool {
    image.head.number(at: 0x1fe, as: UInt16.self) == 0xaa55
      && image.head.number(at: 0x202, as: UInt32.self) == 0x5372_6448  // "HdrS"
  }

  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState {
    let header = try LinuxSetupHeader(image)
    let range = try Self.placeKernel(image, header, &placer)
    if let file = GuestRange(start: range.start, size: header.kernelSize) {
      try placer.copy(image, .kernel, at: header.kernelOffset, to: file)
    }
    var parameters = BootParameters(request)
    parameters.setHeader(header.bytes)
    parameters.setCodeStart(range.start.rawValue)
    let commandLine = try placer.placeCommandLine(
      request.commandLine, limit: header.commandLineLimit, path: image.path)
    parameters.setCommandLine(commandLine)
    if let disk = request.initialRAMDisk {
      parameters.setInitialRAMDisk(
        try placer.placeFile(
          disk, .initialRAMDisk, from: Platform.oneMiB, below: min(header.initialRAMDiskEnd, Platform.fourGiB),
          prefer: .highest))
    }
    let zeroPage = try placer.place(.bootParameters, parameters.bytes, alignment: 4096)
    var state =
      header.is64Bit
      ? try EntryState.long(entry: range.start.rawValue + 0x200, &placer)
      : try EntryState.flat32(entry: range.start.rawValue, &placer)
    state.general.rsi = zeroPage.start.rawValue
    return state
  }

  /// Where the kernel wants to be, or else, where it can move, the lowest place with room to unpack itself.
  private static func placeKernel(
    _ image: BootImage, _ header: LinuxSetupHeader, _ placer: inout Placer
  ) throws(BootError) -> GuestRange {
    let size = max(header.kernelSize, header.unpackedSize)
    if !header.isRelocatable || placer.isFree(header.preferredAddress, size: size) {
      return try placer.claim(.kernel, at: header.preferredAddress, size: size)
    }
    return try placer.reserve(
      .kernel, size: size, alignment: header.alignment, from: Platform.oneMiB, below: Platform.fourGiB, prefer: .lowest)
  }
}

/// The fields of a bzImage's setup header that a loader acts on, checked.
struct LinuxSetupHeader {
  /// From 0x1f1 to the header's end.
  let bytes: [UInt8]
  /// Where in the file the protected-mode code begins, and its length.
  let kernelOffset: UInt64
  let kernelSize: UInt64
  /// Where the kernel wants its code.
  let preferredAddress: UInt64
  /// Bytes from there that it uses before it knows the memory map; 0 before protocol 2.10.
  let unpackedSize: UInt64
  let alignment: UInt64
  let isRelocatable: Bool
  let is64Bit: Bool
  let commandLineLimit: Int
  /// First address after the highest that the initial RAM disk may use.
  let initialRAMDiskEnd: UInt64

  init(_ image: BootImage) throws(BootError) {
    let head = image.head
    let version: UInt16 = head.number(at: 0x206) ?? 0
    guard version >= 0x206 else { throw .malformed(path: image.path, .linuxProtocol(version)) }
    let end = 0x202 + Int(head.number(at: 0x201, as: UInt8.self) ?? 0)
    let needed = version >= 0x20a ? 0x264 : 0x23c
    guard end >= needed, end <= head.count else {
      throw .malformed(path: image.path, .linuxHeaderLength(end - BootParameters.headerOffset))
    }
    bytes = Array(head[BootParameters.headerOffset..<end])
    func field<T: FixedWidthInteger>(_ offset: Int, since: UInt16 = 0x206, as type: T.Type = T.self) -> T {
      version >= since ? head.number(at: offset) ?? 0 : 0
    }
    guard field(0x211, as: UInt8.self) & 1 != 0 else { throw .malformed(path: image.path, .linuxLoadedLow) }

    let sectors = field(0x1f1, as: UInt8.self)
    kernelOffset = (UInt64(sectors == 0 ? 4 : sectors) + 1) * 512
    guard kernelOffset < image.size else { throw .malformed(path: image.path, .linuxNoKernel) }
    kernelSize = image.size - kernelOffset
    // The file may go on after the code (a signature), which does no harm in memory.
    let declared = UInt64(field(0x1f4, as: UInt32.self)) * 16
    guard declared <= kernelSize else {
      throw .truncated(path: image.path, part: .kernel, offset: kernelOffset, count: declared, size: image.size)
    }
    isRelocatable = field(0x234, as: UInt8.self) != 0
    let wanted = field(0x230, as: UInt32.self)
    guard wanted.nonzeroBitCount == 1 || !isRelocatable else {
      throw .malformed(path: image.path, .linuxAlignment(wanted))
    }
    alignment = UInt64(max(wanted, 4096))
    preferredAddress =
      version >= 0x20a ? field(0x258, as: UInt64.self) : UInt64(field(0x214, as: UInt32.self))
    unpackedSize = UInt64(field(0x260, since: 0x20a, as: UInt32.self))
    is64Bit = field(0x236, since: 0x20c, as: UInt16.self) & 1 != 0
    // 0 stood for 255 before the field came; a kernel that still says so means it.
    let limit = field(0x238, as: UInt32.self)
    commandLineLimit = limit == 0 ? 255 : Int(limit)
    initialRAMDiskEnd = UInt64(field(0x22c, as: UInt32.self)) + 1
  }
}
