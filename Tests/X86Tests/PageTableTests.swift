import Testing
import X86

/// Guest-physical memory of `count` 4 KiB pages, with a page-table builder.
private struct Memory {
  var words: [UInt32]
  var nextTable: UInt64 = 0x1000

  init(pages: Int) { words = [UInt32](repeating: 0, count: pages * 1024) }

  func read(_ address: UInt64, _ size: Int) -> UInt64? {
    guard address % UInt64(size) == 0, address / 4 + UInt64(size / 4) <= words.count else { return nil }
    let low = UInt64(words[Int(address / 4)])
    return size == 4 ? low : low | UInt64(words[Int(address / 4) + 1]) << 32
  }

  mutating func write(_ address: UInt64, _ size: Int, _ value: UInt64) {
    words[Int(address / 4)] = UInt32(truncatingIfNeeded: value)
    if size == 8 { words[Int(address / 4) + 1] = UInt32(truncatingIfNeeded: value >> 32) }
  }

  /// Maps one address, making tables as needed; `bits` are those of each level's entry, the highest level first.
  mutating func map(
    _ linear: UInt64, to physical: UInt64, root: UInt64, entrySize: Int, _ bits: [PageTableEntry], leaf: Int
  ) {
    let indexBits: UInt64 = entrySize == 4 ? 10 : 9
    var table = root
    for (position, entryBits) in bits.enumerated() {
      let level = bits.count - position + leaf - 1
      let shift = 12 + UInt64(level - 1) * indexBits
      let address = table + (linear >> shift & (1 << indexBits - 1)) * UInt64(entrySize)
      if position == bits.count - 1 {
        write(address, entrySize, physical | entryBits.rawValue)
      } else {
        nextTable += 0x1000
        write(address, entrySize, nextTable | entryBits.rawValue)
        table = nextTable
      }
    }
  }
}

private let root: UInt64 = 0x1000
private let all: PageTableEntry = [.present, .writable, .user]
private let large: PageTableEntry = [.present, .writable, .user, .pageSize]

private func longMode(_ cr4: CR4 = [], wp: Bool = true, nxe: Bool = true, rflags: RFLAGS = []) -> Paging {
  Paging(
    cr0: wp ? [.pe, .pg, .wp] : [.pe, .pg], cr3: root | 0x18, cr4: cr4.union(.pae),
    efer: nxe ? [.lme, .lma, .nxe] : [.lme, .lma], rflags: rflags, physicalAddressBits: 40)
}

@Suite struct PageTableTests {
  private func fault(_ paging: Paging, _ memory: Memory, _ linear: UInt64, _ access: PageAccess = []) -> PageWalkFault?
  {
    do throws(PageWalkFault) {
      _ = try paging.translate(linear, access, read: memory.read)
      return nil
    } catch { return error }
  }

  @Test func withoutPagingAddressesAreThemselves() throws {
    let paging = Paging(cr0: [.pe], cr3: 0, cr4: [], efer: [])
    let translation = try paging.translate(0x1_2345_6789, .write) { _, _ in nil }
    #expect(paging.mode == .none && translation.physicalAddress == 0x2345_6789)
  }

  @Test func fourLevels() throws {
    var memory = Memory(pages: 16)
    memory.map(0xffff_8000_1234_5000, to: 0xabc_d000, root: root, entrySize: 8, [all, all, all, all], leaf: 1)
    var steps: [PageWalkStep] = []
    let translation = try longMode().translate(0xffff_8000_1234_5678, read: memory.read) { steps.append($0) }
    #expect(translation.physicalAddress == 0xabc_d678 && translation.pageSize == 4096)
    #expect(translation.isWritable && translation.isUser && translation.isExecutable)
    #expect(steps.map(\.level) == [4, 3, 2, 1])
    #expect(steps.first?.entryAddress == root + 256 * 8)
    #expect(steps.last?.entry.rawValue == 0xabc_d007)
    #expect(steps.last?.entry.description == "U W P")
    #expect(fault(longMode(), memory, 0x8000_0000_0000)?.reason == .notCanonical)
  }

  @Test func largePages() throws {
    var memory = Memory(pages: 16)
    memory.map(0x4000_0000, to: 0x8_4000_0000, root: root, entrySize: 8, [all, large], leaf: 3)
    memory.map(0x80_0020_0000, to: 0x60_0000, root: root, entrySize: 8, [all, all, large], leaf: 2)
    let giant = try longMode().translate(0x7fff_ffff, read: memory.read)
    #expect(giant.physicalAddress == 0x8_7fff_ffff && giant.pageSize == 1 << 30)
    let big = try longMode().translate(0x80_003f_ffff, read: memory.read)
    #expect(big.physicalAddress == 0x7f_ffff && big.pageSize == 1 << 21)
    var without = longMode()
    without.has1GiBPages = false
    #expect(
      fault(without, memory, 0x4000_0000)
        == PageWalkFault(reason: .reservedBit, level: 3, errorCode: [.present, .reserved]))
  }

  @Test func fiveLevels() throws {
    var memory = Memory(pages: 16)
    memory.map(0x00ab_cdef_1234_5000, to: 0x5000, root: root, entrySize: 8, [all, all, all, all, all], leaf: 1)
    let paging = longMode([.la57])
    #expect(paging.mode == .level5)
    #expect(try paging.translate(0x00ab_cdef_1234_5678, read: memory.read).physicalAddress == 0x5678)
    #expect(fault(paging, memory, 0x0100_0000_0000_0000)?.reason == .notCanonical)
  }

  @Test func pae() throws {
    var memory = Memory(pages: 16)
    // The page-directory-pointer table is 32 bytes, anywhere on a multiple of that.
    memory.map(0xc000_1000, to: 0x3_0000_7000, root: 0x1020, entrySize: 8, [.present, all, all], leaf: 1)
    memory.map(0x4020_0000, to: 0x40_0000, root: 0x1020, entrySize: 8, [.present, large], leaf: 2)
    var paging = Paging(cr0: [.pe, .pg], cr3: 0x1020, cr4: .pae, efer: .nxe, physicalAddressBits: 36)
    #expect(paging.mode == .pae)
    #expect(
      try paging.translate(0xffff_ffff_c000_1234, [.user, .write], read: memory.read).physicalAddress == 0x3_0000_7234)
    #expect(try paging.translate(0x403f_0000, read: memory.read).physicalAddress == 0x5f_0000)
    paging.physicalAddressBits = 33
    #expect(fault(paging, memory, 0xc000_1000, [.user, .write])?.errorCode == [.present, .reserved, .user, .write])
    memory.map(0x8000_0000, to: 0, root: 0x1020, entrySize: 8, [all, all, all], leaf: 1)
    #expect(fault(paging, memory, 0x8000_0000)?.level == 3)
  }

  @Test func bits32() throws {
    var memory = Memory(pages: 16)
    memory.map(0xc040_1000, to: 0x7000, root: root, entrySize: 4, [all, all], leaf: 1)
    // PSE-36: physical 0x5_0080_0000, bits 39:32 in bits 20:13.
    memory.map(0x0040_0000, to: 0x0080_0000 | 5 << 13, root: root, entrySize: 4, [large], leaf: 2)
    var paging = Paging(cr0: [.pe, .pg], cr3: root, cr4: .pse, efer: [], physicalAddressBits: 36)
    #expect(paging.mode == .bits32)
    #expect(try paging.translate(0xc040_1fff, read: memory.read).physicalAddress == 0x7fff)
    let big = try paging.translate(0x007f_1234, read: memory.read)
    #expect(big.physicalAddress == 0x5_00bf_1234 && big.pageSize == 1 << 22)
    paging.physicalAddressBits = 34
    #expect(fault(paging, memory, 0x0040_0000)?.reason == .reservedBit)
    paging.physicalAddressBits = 36
    // Without PSE the same bit is ignored, and the entry is a table's.
    paging.cr4 = []
    #expect(fault(paging, memory, 0x0040_0000)?.reason == .entryNotInMemory)
  }

  /// Each level's rights count; the error code tells the access and whether a translation exists.
  @Test func rights() {
    for level in 0..<4 {
      var bits = [PageTableEntry](repeating: all, count: 4)
      bits[level].remove(.writable)
      var memory = Memory(pages: 8)
      memory.map(0, to: 0x5000, root: root, entrySize: 8, bits, leaf: 1)
      #expect(fault(longMode(), memory, 0, .write)?.errorCode == [.present, .write])
      #expect(fault(longMode(wp: false), memory, 0, .write) == nil)
      #expect(fault(longMode(wp: false), memory, 0, [.write, .user])?.reason == .notWritable)

      bits[level] = [.present, .writable]
      memory = Memory(pages: 8)
      memory.map(0, to: 0x5000, root: root, entrySize: 8, bits, leaf: 1)
      #expect(fault(longMode(), memory, 0, .user)?.errorCode == [.present, .user])
      #expect(fault(longMode([.smep, .smap]), memory, 0, .fetch) == nil)

      bits[level] = all.union(.executeDisable)
      memory = Memory(pages: 8)
      memory.map(0, to: 0x5000, root: root, entrySize: 8, bits, leaf: 1)
      #expect(fault(longMode(), memory, 0, .fetch)?.errorCode == [.present, .fetch])
      #expect(fault(longMode(), memory, 0) == nil)
      // Without NXE the bit is reserved, and fetches do not show in the error code.
      #expect(fault(longMode(nxe: false), memory, 0, .fetch)?.errorCode == [.present, .reserved])

      bits[level] = []
      memory = Memory(pages: 8)
      memory.map(0, to: 0x5000, root: root, entrySize: 8, bits, leaf: 1)
      let absent = fault(longMode(), memory, 0, [.write, .user])
      #expect(absent == PageWalkFault(reason: .notPresent, level: 4 - level, errorCode: [.write, .user]))
    }
  }

  @Test func supervisorAccessToUserPages() {
    var memory = Memory(pages: 8)
    memory.map(0, to: 0x5000, root: root, entrySize: 8, [all, all, all, all], leaf: 1)
    #expect(fault(longMode(.smep), memory, 0, .fetch)?.reason == .smep)
    #expect(fault(longMode(.smep, nxe: false), memory, 0, .fetch)?.errorCode == [.present, .fetch])
    #expect(fault(longMode(.smep), memory, 0, [.fetch, .user]) == nil)
    #expect(fault(longMode(.smap), memory, 0)?.reason == .smap)
    #expect(fault(longMode(.smap, rflags: .ac), memory, 0) == nil)
    #expect(fault(longMode(.smap, rflags: .ac), memory, 0, .implicit)?.reason == .smap)
    #expect(fault(longMode(.smap), memory, 0, .user) == nil)
  }

  @Test func protectionKeys() {
    var memory = Memory(pages: 8)
    let keyed = PageTableEntry(rawValue: all.rawValue | 3 << 59)
    memory.map(0, to: 0x5000, root: root, entrySize: 8, [all, all, all, keyed], leaf: 1)
    var paging = longMode(.pke)
    paging.pkru = 1 << 6
    #expect(fault(paging, memory, 0, .user)?.errorCode == [.present, .user, .protectionKey])
    #expect(fault(paging, memory, 0, [.user, .fetch]) == nil)
    paging.pkru = 2 << 6
    #expect(fault(paging, memory, 0, .user) == nil)
    #expect(fault(paging, memory, 0, .write)?.reason == .protectionKey)
    paging.cr0.remove(.wp)
    #expect(fault(paging, memory, 0, .write) == nil)
  }

  /// Page tables of random bits in any mode: a walk ends, within its levels, and says something.
  @Test func randomTablesNeverTrap() {
    var random = ObjdumpTests.SplitMix64(state: ObjdumpTests.seed)
    var memory = Memory(pages: 8)
    var translated = 0
    var tooDeep = 0
    for _ in 0..<2000 {
      // Tables that mostly point at each other, so that walks get somewhere.
      for word in memory.words.indices {
        let bits = random.next()
        memory.words[word] =
          word & 1 == 1 && bits >> 60 != 0 ? 0 : UInt32(truncatingIfNeeded: bits) & 0x7fff | (bits >> 62 == 0 ? 0 : 7)
      }
      for _ in 0..<8 {
        var paging = Paging(
          cr0: CR0(rawValue: random.next() | CR0.pg.rawValue), cr3: random.next() & 0x7fff,
          cr4: CR4(rawValue: random.next()), efer: EFER(rawValue: random.next()),
          rflags: RFLAGS(rawValue: random.next()),
          pkru: UInt32(truncatingIfNeeded: random.next()), physicalAddressBits: random.next() & 63)
        paging.has1GiBPages = random.next() & 1 == 0
        var steps = 0
        let access = PageAccess(rawValue: UInt8(random.next() & 15))
        let linear = UInt64(bitPattern: Int64(bitPattern: random.next()) >> Int64(random.next() & 31))
        if (try? paging.translate(linear, access, read: memory.read, visit: { _ in steps += 1 })) != nil {
          translated += 1
        }
        if steps > paging.mode.levels { tooDeep += 1 }
      }
    }
    #expect(tooDeep == 0)
    #expect(translated > 100)
  }
}

@Suite struct ArchitectureTests {
  @Test func descriptions() {
    #expect(CR0(rawValue: 0x8001_0033).description == "PG WP NE ET MP PE")
    #expect(EFER(rawValue: 0xd01).description == "NXE LMA LME SCE")
    #expect(RFLAGS(rawValue: 0x10246).description == "RF IF ZF PF")
    #expect(ExceptionVector.generalProtection.description == "#GP")
    #expect(ExceptionVector.allCases.filter(\.hasErrorCode).map(\.rawValue) == [8, 10, 11, 12, 13, 14, 17, 21, 29, 30])
    #expect(Register(.general64, 13).description == "r13" && Register(.general8, 4).description == "spl")
  }

  @Test func segmentDescriptors() {
    // Linux's 64-bit kernel code, and a flat 32-bit data segment.
    let code = SegmentDescriptor(rawValue: 0x00af_9b00_0000_ffff)
    #expect(code.isCode && code.isLong && !code.isBig && code.isPresent && code.dpl == 0)
    #expect(code.limit == 0xffff_ffff && code.base == 0)
    let data = SegmentDescriptor(base: 0x1234_5678, limit: 0xabcde, attributes: 0x40f3)
    #expect(data.base == 0x1234_5678 && data.limit == 0xabcde && data.dpl == 3 && data.isBig && !data.isCode)
    let tss = SegmentDescriptor(base: 0xffff_0000, limit: 0x67, attributes: 0x8b)
    #expect(tss.systemType == .tss32Busy && tss.limit == 0x67 && tss.base == 0xffff_0000)
    #expect(SegmentSelector(rawValue: 0x2b).rpl == 3 && SegmentSelector(rawValue: 3).isNull)
  }
}
