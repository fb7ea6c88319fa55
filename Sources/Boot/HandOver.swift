import GuestMemory

// What loaders share of handing texts, modules and the memory map over to a guest.

/// Where the texts and modules of a request lie in guest memory.
struct PlacedInputs {
  /// A module, with the address of its string.
  struct Module {
    var range: GuestRange
    var string: UInt64
  }
  /// The command line, NUL-terminated.
  var commandLine: UInt64
  var modules: [Module] = []
}

extension Placer {
  /// The most text that is handed over; Linux takes 2047 bytes, others no more than a page or so.
  static let textLimit = 1 << 16

  /// Places a command line with its NUL.
  mutating func placeCommandLine(_ text: String, limit: Int = textLimit, path: String) throws(BootError) -> UInt64 {
    let count = text.utf8.count
    guard count <= min(limit, Self.textLimit) else {
      throw .commandLineLength(path: path, count: count, limit: min(limit, Self.textLimit))
    }
    return try place(.commandLine, Array(text.utf8) + [0], alignment: 1).start.rawValue
  }

  /// Places a file on whole pages and reads it in.
  mutating func placeFile(
    _ image: BootImage, _ part: BootPart, from lowest: UInt64, below limit: UInt64 = Platform.fourGiB,
    prefer: Preference
  ) throws(BootError) -> GuestRange {
    let range = try reserve(part, size: image.size, alignment: 4096, from: lowest, below: limit, prefer: prefer)
    try copy(image, part, at: 0, to: range)
    return range
  }

  /// Places modules and their strings.
  mutating func placeModules(
    _ modules: [BootModule], from lowest: UInt64, below limit: UInt64 = Platform.fourGiB, prefer: Preference,
    path: String
  ) throws(BootError) -> [PlacedInputs.Module] {
    guard !modules.isEmpty else { return [] }
    var strings: [UInt8] = []
    var offsets: [UInt64] = []
    for module in modules {
      offsets.append(UInt64(strings.count))
      strings += Array(module.string.utf8) + [0]
    }
    guard strings.count <= Self.textLimit else {
      throw .commandLineLength(path: path, count: strings.count, limit: Self.textLimit)
    }
    let text = try place(.moduleStrings, strings, alignment: 1).start.rawValue
    var placed: [PlacedInputs.Module] = []
    for (index, module) in modules.enumerated() {
      let range = try placeFile(module.image, .module(index), from: lowest, below: limit, prefer: prefer)
      placed.append(PlacedInputs.Module(range: range, string: text + offsets[index]))
    }
    return placed
  }

  /// Places Xen's hvm_start_info, version 1, with its module list and memory map.
  ///
  /// Layout: Xen, xen/include/public/arch-x86/hvm/start_info.h.
  mutating func placeStartInfo(_ inputs: PlacedInputs, _ request: BootRequest) throws(BootError) -> GuestRange {
    let entries = request.memoryMap.entries
    let moduleOffset = 56
    let mapOffset = moduleOffset + 32 * inputs.modules.count
    let range = try place(.startInfo, size: UInt64(mapOffset + 24 * entries.count))
    let base = range.start.rawValue
    var table = TableBytes()
    table.append(UInt32(0x336e_c578))  // magic
    table.append(UInt32(1))  // version
    table.append(UInt32(0))  // flags
    table.append(UInt32(inputs.modules.count))
    table.append(inputs.modules.isEmpty ? 0 : base + UInt64(moduleOffset))
    table.append(inputs.commandLine)
    table.append(request.acpiRSDP?.rawValue ?? 0)
    table.append(base + UInt64(mapOffset))
    table.append(UInt32(entries.count))
    table.append(UInt32(0))
    for module in inputs.modules {
      table.append(module.range.start.rawValue)
      table.append(module.range.size)
      table.append(module.string)
      table.append(UInt64(0))
    }
    for entry in entries {
      table.append(entry.range.start.rawValue)
      table.append(entry.range.size)
      table.append(entry.kind.rawValue)
      table.append(UInt32(0))
    }
    try write(table.bytes, at: range.start)
    return range
  }
}
