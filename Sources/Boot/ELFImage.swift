import CElf
import GuestMemory

/// The program headers of an ELF file, checked one by one; sections are never looked at.
struct ELFImage {
  /// Program headers that are read; Linux has 5, and no kernel is known to have 40.
  static let segmentLimit = 256
  /// The greatest note segment that is searched.
  static let noteLimit: UInt64 = 1 << 20

  /// A loadable segment with at least one byte of memory.
  struct Segment {
    var index: Int
    var offset: UInt64
    var fileSize: UInt64
    var physicalAddress: UInt64
    var virtualAddress: UInt64
    var memorySize: UInt64
  }

  let path: String
  let is64Bit: Bool
  let entry: UInt64
  let segments: [Segment]
  /// XEN_ELFNOTE_PHYS32_ENTRY's value, not yet judged; nil where there is no such note.
  let pvhNote: [UInt8]?

  /// Whether the first bytes are ELF's.
  static func hasMagic(_ image: BootImage) -> Bool { image.head.starts(with: [0x7f, 0x45, 0x4c, 0x46]) }

  init(_ image: BootImage) throws(BootError) {
    path = image.path
    _ = elf_version(UInt32(EV_CURRENT))
    // Reads by descriptor: no copy of the file, and nothing that a shorter file could fault.
    guard let elf = elf_begin(image.descriptor, ELF_C_READ, nil) else { throw Self.failure(path) }
    defer { elf_end(elf) }
    var header = GElf_Ehdr()
    guard elf_kind(elf) == ELF_K_ELF, gelf_getehdr(elf, &header) != nil else { throw Self.failure(path) }
    is64Bit = gelf_getclass(elf) == ELFCLASS64
    let wanted = is64Bit ? [UInt16(EM_X86_64)] : [UInt16(EM_386), UInt16(EM_X86_64)]
    let littleEndian = image.head.count > 5 && image.head[5] == UInt8(ELFDATA2LSB)
    guard littleEndian, wanted.contains(header.e_machine), [UInt16(ET_EXEC), UInt16(ET_DYN)].contains(header.e_type)
    else { throw .malformed(path: path, .elfTarget(machine: header.e_machine, type: header.e_type)) }
    entry = header.e_entry

    var count = 0
    guard elf_getphdrnum(elf, &count) == 0 else { throw Self.failure(path) }
    guard count <= Self.segmentLimit else {
      throw .malformed(path: path, .segmentCount(count, limit: Self.segmentLimit))
    }
    var segments: [Segment] = []
    var note: [UInt8]?
    for index in 0..<count {
      var raw = GElf_Phdr()
      guard gelf_getphdr(elf, Int32(index), &raw) != nil else { throw Self.failure(path) }
      switch raw.p_type {
      case UInt32(PT_LOAD) where raw.p_memsz > 0 || raw.p_filesz > 0:
        segments.append(try Self.segment(index, raw, image))
      case UInt32(PT_NOTE) where note == nil:
        note = try Self.pvhNote(elf, index, raw, image)
      default: break
      }
    }
    guard !segments.isEmpty else { throw .malformed(path: path, .noSegments) }
    self.segments = segments
    pvhNote = note
  }

  private static func segment(_ index: Int, _ raw: GElf_Phdr, _ image: BootImage) throws(BootError) -> Segment {
    guard raw.p_filesz <= raw.p_memsz else {
      throw .malformed(path: image.path, .segmentSizes(index, file: raw.p_filesz, memory: raw.p_memsz))
    }
    guard raw.p_offset <= image.size, raw.p_filesz <= image.size - raw.p_offset else {
      throw .truncated(
        path: image.path, part: .segment(index), offset: raw.p_offset, count: raw.p_filesz, size: image.size)
    }
    return Segment(
      index: index, offset: raw.p_offset, fileSize: raw.p_filesz, physicalAddress: raw.p_paddr,
      virtualAddress: raw.p_vaddr, memorySize: raw.p_memsz)
  }

  /// The value of Xen's note 18 in a note segment.
  private static func pvhNote(
    _ elf: OpaquePointer, _ index: Int, _ raw: GElf_Phdr, _ image: BootImage
  ) throws(BootError) -> [UInt8]? {
    guard raw.p_offset <= image.size, raw.p_filesz <= image.size - raw.p_offset else {
      throw .truncated(
        path: image.path, part: .segment(index), offset: raw.p_offset, count: raw.p_filesz, size: image.size)
    }
    guard raw.p_filesz > 0, raw.p_filesz <= noteLimit else { return nil }
    let alignment = raw.p_align == 8 ? ELF_T_NHDR8 : ELF_T_NHDR
    guard let data = elf_getdata_rawchunk(elf, Int64(raw.p_offset), Int(raw.p_filesz), alignment),
      let base = data.pointee.d_buf
    else { return nil }
    let bytes = UnsafeRawBufferPointer(start: base, count: data.pointee.d_size)
    var offset = 0
    while true {
      var note = GElf_Nhdr()
      var name = 0
      var value = 0
      let next = gelf_getnote(data, offset, &note, &name, &value)
      guard next > offset else { return nil }
      let nameEnd = name + Int(note.n_namesz)
      let valueEnd = value + Int(note.n_descsz)
      guard nameEnd <= bytes.count, valueEnd <= bytes.count else { return nil }
      if note.n_type == 18, bytes[name..<nameEnd].elementsEqual([0x58, 0x65, 0x6e, 0]) {  // "Xen"
        return [UInt8](bytes[value..<valueEnd])
      }
      offset = next
    }
  }

  /// Puts every segment at its physical address.
  func load(_ image: BootImage, _ placer: inout Placer) throws(BootError) {
    var ranges: [GuestRange] = []
    for segment in segments {
      ranges.append(
        try placer.claim(.segment(segment.index), at: segment.physicalAddress, size: segment.memorySize))
    }
    for (segment, range) in zip(segments, ranges) {
      if segment.fileSize > 0, let file = GuestRange(start: range.start, size: segment.fileSize) {
        try placer.copy(image, .segment(segment.index), at: segment.offset, to: file)
      }
      try placer.clear(range.start + segment.fileSize, size: segment.memorySize - segment.fileSize)
    }
  }

  /// The physical address of the entry point, which lies in a segment.
  ///
  /// Entry points are virtual addresses; some linkers' scripts (Linux's) give the physical one.
  func physicalEntry() throws(BootError) -> UInt64 {
    for segment in segments where entry &- segment.virtualAddress < segment.memorySize {
      // A segment that wraps is refused where its memory is claimed.
      return segment.physicalAddress &+ (entry &- segment.virtualAddress)
    }
    try checkEntry(entry)
    return entry
  }

  /// Refuses an entry point outside the segments.
  func checkEntry(_ address: UInt64) throws(BootError) {
    guard segments.contains(where: { address &- $0.physicalAddress < $0.memorySize }) else {
      throw .malformed(path: path, .entryOutside(address))
    }
  }

  private static func failure(_ path: String) -> BootError {
    .malformed(path: path, .elf(reason: elf_errmsg(-1).map { String(cString: $0) } ?? "unknown reason"))
  }
}
