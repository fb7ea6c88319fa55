import GuestMemory

/// The kinds of guest image, with the names that reports print.
public enum BootKind: String, Sendable, CaseIterable {
  /// Linux's bzImage.
  case linux = "bzImage"
  /// An ELF file with Xen's note of a 32-bit entry point.
  case pvh = "PVH"
  /// Multiboot 1, in an ELF file or with addresses in its header.
  case multiboot = "Multiboot"
  /// An ELF64 file that is entered in long mode.
  case elf64 = "ELF64"
  /// Bytes without a header, at the address the user gives.
  case flat = "flat"
  /// The first sector of a disk.
  case bootSector = "boot sector"
}

/// A way to put one kind of image into memory.
protocol BootLoader: Sendable {
  /// The kind it loads.
  var kind: BootKind { get }
  /// What a request may hold for it, besides the image.
  var inputs: Set<BootInput> { get }
  /// Whether the image is of this kind, malformed or not.
  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool
  /// Places the image and all that belongs to it.
  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState
}

/// All loaders; the first that recognises an image loads it.
public enum BootCatalogue {
  /// Adding a loader is its file and its line here. A flat binary may end its first sector by chance as a boot sector
  /// does, so the user's `--load-address` comes first.
  static let loaders: [any BootLoader] = [
    LinuxLoader(), PVHLoader(), MultibootLoader(), ELF64Loader(), FlatLoader(), BootSectorLoader(),
  ]

  /// The kind of an image, read from its bytes; `loadAddress` makes what is otherwise unknown a flat binary.
  ///
  /// Errors: `.unknownKind`.
  public static func kind(of image: BootImage, loadAddress: UInt64? = nil) throws(BootError) -> BootKind {
    try loader(for: image, loadAddress: loadAddress).kind
  }

  /// The memory that a boot sector's disk takes, for `MemoryMap`; 0 for other kinds, and for a disk of one sector.
  ///
  /// Errors: `.unknownKind`.
  public static func bootDiskSize(of image: BootImage, loadAddress: UInt64? = nil) throws(BootError) -> UInt64 {
    try kind(of: image, loadAddress: loadAddress) == .bootSector ? BootSectorLoader.diskSize(image) : 0
  }

  /// Checks what can be checked before there is a machine: the kind, and that it takes what the request holds.
  ///
  /// Errors: `.nothingToBoot`, `.unknownKind`, `.unusedInput`, `.stringWithNUL`.
  public static func check(_ request: BootRequest) throws(BootError) {
    guard let image = request.image else {
      guard request.firmware != nil else { throw .nothingToBoot }
      return
    }
    _ = try checkedLoader(for: image, request)
  }

  /// Puts the guest into memory.
  ///
  /// Can be done again for the same request, after a reset. Errors: all of `BootError`; memory may be written in part.
  public static func boot(_ request: BootRequest, into memory: GuestMemory) throws(BootError) -> BootEntry {
    guard let image = request.image else {
      guard request.firmware != nil else { throw .nothingToBoot }
      let state = EntryState.reset
      return BootEntry(general: state.general, system: state.system)
    }
    let loader = try checkedLoader(for: image, request)
    var placer = Placer(
      path: image.path, memory: memory, map: request.memoryMap, memoryIsZero: request.memoryIsZero)
    let state = try loader.load(image, request, &placer)
    return BootEntry(
      kind: loader.kind, general: state.general, system: state.system, placements: placer.placements)
  }

  private static func loader(for image: BootImage, loadAddress: UInt64?) throws(BootError) -> any BootLoader {
    for loader in loaders where loader.recognises(image, loadAddress: loadAddress) { return loader }
    throw .unknownKind(path: image.path)
  }

  private static func checkedLoader(
    for image: BootImage, _ request: BootRequest
  ) throws(BootError) -> any BootLoader {
    let loader = try loader(for: image, loadAddress: request.loadAddress)
    for input in BootInput.allCases where request.has(input) && !loader.inputs.contains(input) {
      throw .unusedInput(path: image.path, kind: loader.kind, input: input)
    }
    for string in [request.commandLine] + request.modules.map(\.string) where string.utf8.contains(0) {
      throw .stringWithNUL(path: image.path)
    }
    return loader
  }
}

extension BootRequest {
  fileprivate func has(_ input: BootInput) -> Bool {
    switch input {
    case .commandLine: !commandLine.isEmpty
    case .initialRAMDisk: initialRAMDisk != nil
    case .modules: !modules.isEmpty
    case .loadAddress: loadAddress != nil
    }
  }

  /// The modules, with the initial RAM disk as the first of them.
  var allModules: [BootModule] {
    (initialRAMDisk.map { [BootModule(image: $0, string: $0.path)] } ?? []) + modules
  }
}
