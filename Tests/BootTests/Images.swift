import GuestMemory

@testable import Boot

/// Images made by hand, field by field, so that each test can break one of them.
enum Images {
  struct Segment {
    var type: UInt32 = 1  // PT_LOAD
    var physical: UInt64
    var virtual: UInt64?
    var bytes: [UInt8]
    var memory: UInt64?
    var alignment: UInt64 = 4
  }

  static let code: [UInt8] = [0xf4, 0xeb, 0xfd] + (0..<61).map { UInt8($0) }

  /// An ELF file: header, program headers, then the segments' bytes one after the other.
  static func elf(
    is64Bit: Bool = true, machine: UInt16? = nil, type: UInt16 = 2, entry: UInt64 = 0x20_0000,
    prefix: [UInt8] = [], segments: [Segment] = [Segment(physical: 0x20_0000, bytes: code, memory: 0x3000)]
  ) -> [UInt8] {
    var table = TableBytes()
    table.append([0x7f, 0x45, 0x4c, 0x46, is64Bit ? 2 : 1, 1, 1] + [UInt8](repeating: 0, count: 9))
    table.append(type)
    table.append(machine ?? (is64Bit ? 62 : 3))
    table.append(UInt32(1))
    func word(_ value: UInt64) {
      if is64Bit { table.append(value) } else { table.append(UInt32(truncatingIfNeeded: value)) }
    }
    let headerSize = is64Bit ? 64 : 52
    let entrySize = is64Bit ? 56 : 32
    word(entry)
    word(UInt64(headerSize))
    word(0)
    table.append(UInt32(0))
    for value in [headerSize, entrySize, segments.count, is64Bit ? 64 : 40, 0, 0] { table.append(UInt16(value)) }
    var offset = headerSize + entrySize * segments.count + prefix.count
    for segment in segments {
      table.append(segment.type)
      if is64Bit { table.append(UInt32(7)) }
      word(UInt64(offset))
      word(segment.virtual ?? segment.physical)
      word(segment.physical)
      word(UInt64(segment.bytes.count))
      word(segment.memory ?? UInt64(segment.bytes.count))
      if !is64Bit { table.append(UInt32(7)) }
      word(segment.alignment)
      offset += segment.bytes.count
    }
    table.append(prefix)
    for segment in segments { table.append(segment.bytes) }
    return table.bytes
  }

  static func note(name: String = "Xen", type: UInt32 = 18, value: [UInt8]) -> Segment {
    var table = TableBytes()
    table.append(UInt32(name.utf8.count + 1))
    table.append(UInt32(value.count))
    table.append(type)
    table.append(cString: name)
    table.pad(to: 4)
    table.append(value)
    table.pad(to: 4)
    return Segment(type: 4, physical: 0, bytes: table.bytes)
  }

  /// An ELF file with a PVH note; by default another note stands before it.
  static func pvh(
    entry: [UInt8] = [0x10, 0, 0x20, 0, 0, 0, 0, 0], is64Bit: Bool = true, code: [Segment]? = nil
  ) -> [UInt8] {
    let other = note(name: "GNU", type: 3, value: [1, 2, 3, 4, 5])
    var notes = note(value: entry)
    notes.bytes = other.bytes + notes.bytes
    return elf(
      is64Bit: is64Bit, entry: 0x20_0000,
      segments: (code ?? [Segment(physical: 0x20_0000, bytes: Images.code, memory: 0x3000)]) + [notes])
  }

  static func multibootHeader(flags: UInt32 = 0, addresses: [UInt32] = []) -> [UInt8] {
    var table = TableBytes()
    table.append(UInt32(0x1bad_b002))
    table.append(flags)
    table.append(0 &- (0x1bad_b002 &+ flags))
    for address in addresses { table.append(address) }
    return table.bytes
  }

  /// An ELF file that starts with a Multiboot header in its first segment.
  static func multiboot(is64Bit: Bool = false, flags: UInt32 = 0, machine: UInt16? = nil) -> [UInt8] {
    elf(
      is64Bit: is64Bit, machine: machine, entry: 0x20_000c,
      segments: [Segment(physical: 0x20_0000, bytes: multibootHeader(flags: flags) + code, memory: 0x3000)])
  }

  /// A flat file: 64 bytes before the header, which says header, load, load end, bss end and entry addresses.
  static func kludge(
    header: UInt32 = 0x20_0040, load: UInt32 = 0x20_0000, loadEnd: UInt32 = 0, bssEnd: UInt32 = 0x20_2000,
    entry: UInt32 = 0x20_0060, flags: UInt32 = 0x1_0003
  ) -> [UInt8] {
    [UInt8](repeating: 0x90, count: 64)
      + multibootHeader(flags: flags, addresses: [header, load, loadEnd, bssEnd, entry]) + code
  }

  /// A bzImage with one setup sector besides the boot sector and 4 KiB of protected-mode code.
  static func linux(_ change: (inout TableBytes) -> Void = { _ in }) -> [UInt8] {
    var table = TableBytes(zeros: 1024 + 4096)
    table.store(UInt8(1), at: 0x1f1)
    table.store(UInt32(4096 / 16), at: 0x1f4)
    table.store(UInt16(0xaa55), at: 0x1fe)
    table.store(UInt8(0x66), at: 0x201)
    table.store(UInt32(0x5372_6448), at: 0x202)
    table.store(UInt16(0x20f), at: 0x206)
    table.store(UInt8(1), at: 0x211)
    table.store(UInt32(0x10_0000), at: 0x214)
    table.store(UInt32(0x7fff_ffff), at: 0x22c)
    table.store(UInt32(0x20_0000), at: 0x230)
    table.store(UInt8(1), at: 0x234)
    table.store(UInt16(0x3f), at: 0x236)
    table.store(UInt32(2047), at: 0x238)
    table.store(UInt64(0x100_0000), at: 0x258)
    table.store(UInt32(0x20_0000), at: 0x260)
    for index in 0..<4096 { table.store(UInt8(index & 0xff) ^ 0x5a, at: 1024 + index) }
    change(&table)
    return table.bytes
  }

  static func bootSector(count: Int = 512) -> [UInt8] {
    var bytes = [UInt8](repeating: 0xf4, count: count)
    bytes[510] = 0x55
    bytes[511] = 0xaa
    return bytes
  }
}

/// A machine of 64 MiB (or as said), filled with a pattern, so that what a loader must zero shows.
struct TestMachine {
  let map: MemoryMap
  let memory: GuestMemory

  init(size: UInt64 = 64 << 20, pattern: Bool = true) throws {
    map = try MemoryMap(size: size)
    memory = try GuestMemory(map.ram)
    if pattern {
      try memory.fill(GuestPhysicalAddress(0x20_0000), count: 0x8000, with: 0xcc)
    }
  }

  func request(_ bytes: [UInt8], path: String = "guest") throws -> BootRequest {
    BootRequest(image: try BootImage(path: path, bytes: bytes), memoryMap: map)
  }

  func boot(_ bytes: [UInt8], _ change: (inout BootRequest) -> Void = { _ in }) throws -> BootEntry {
    var request = try request(bytes)
    change(&request)
    return try BootCatalogue.boot(request, into: memory)
  }

  /// The error that a boot ends with; nil where it does not.
  func error(_ bytes: [UInt8], _ change: (inout BootRequest) -> Void = { _ in }) throws -> BootError? {
    do { _ = try boot(bytes, change) } catch let error as BootError { return error }
    return nil
  }

  func read<T: FixedWidthInteger>(_ address: UInt64, as type: T.Type = T.self) throws -> T {
    try memory.read(GuestPhysicalAddress(address))
  }

  func bytes(_ address: UInt64, _ count: Int) throws -> [UInt8] {
    try memory.bytes(GuestPhysicalAddress(address), count: count)
  }

  func string(_ address: UInt64) throws -> String {
    var text: [UInt8] = []
    while true {
      let byte: UInt8 = try read(address + UInt64(text.count))
      if byte == 0 { return String(decoding: text, as: UTF8.self) }
      text.append(byte)
    }
  }
}

extension BootEntry {
  /// Where a part is.
  func range(_ part: BootPart) -> GuestRange? { placements.first { $0.part == part }?.range }

  var partsOverlap: Bool {
    placements.indices.contains { a in
      placements[..<a].contains { $0.range.overlaps(placements[a].range) }
    }
  }
}
