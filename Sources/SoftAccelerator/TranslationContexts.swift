import CSoftCPU
import MemoryViews
import X86

/// Numbers for the contexts in which translations hold: an address space seen by the supervisor, by the user, or by
/// the supervisor with RFLAGS.AC set under SMAP.
///
/// A TLB entry carries its context's number in its tag, so that leaving an address space, or coming back to one whose
/// translations were kept (PCIDs, views), changes one number and touches no entry. To flush a space is to forget its
/// numbers. Global pages are ordinary ones: a CPU may drop a translation whenever it likes.
struct TranslationContexts {
  /// One address space.
  struct Space {
    /// The PCID, and in the high half the view.
    var key: UInt64
    /// Data contexts by `kind`; 0: none given yet.
    var data: (UInt64, UInt64, UInt64) = (0, 0, 0)
    /// Code contexts of the supervisor and the user; never used twice. 0: none given yet.
    var code: (UInt64, UInt64) = (0, 0)
    /// The page table that the last walk ended in when the space was left.
    var lastTable = PageTableCache()
  }

  /// The spaces; the current one is first.
  var spaces = [Space(key: 0)]
  /// The next data context's number.
  var nextData: UInt64 = 1
  /// The next code context's number.
  var nextCode: UInt64 = 1

  /// Spaces that are kept.
  static let limit = 16
  /// The number that no entry carries: accesses with it always take the slow path.
  static let slow: UInt64 = 0xfff

  /// Makes the space with `key` the current one; translations of its PCID are kept from earlier, in every view, if `keep`.
  mutating func select(_ key: UInt64, keep: Bool) {
    if !keep { flush(pcid: key & 0xffff_ffff) }
    if spaces[0].key != key {
      if let index = spaces.firstIndex(where: { $0.key == key }) {
        spaces.swapAt(0, index)
      } else {
        if spaces.count == Self.limit { spaces.removeLast() }
        spaces.insert(Space(key: key), at: 0)
      }
    }
  }

  /// Forgets every translation, of every space.
  mutating func flush() {
    spaces.removeSubrange(1...)
    spaces[0] = Space(key: spaces[0].key)
  }

  /// Forgets the translations of a PCID, in every view.
  mutating func flush(pcid: UInt64) {
    for index in spaces.indices where spaces[index].key & 0xffff_ffff == pcid {
      spaces[index] = Space(key: spaces[index].key)
    }
  }

  /// Forgets the page tables that walks ended in, in every space.
  mutating func forgetTables() {
    for index in spaces.indices { spaces[index].lastTable = PageTableCache() }
  }

  /// Forgets where code is, in every space.
  mutating func flushCode() {
    for index in spaces.indices { spaces[index].code = (0, 0) }
  }
}

extension Processor {
  /// Sets the contexts of data accesses and of code after anything they depend on has changed: CPL, RFLAGS.AC, the
  /// address space, or a flush.
  func updateContext() {
    lastTable.region = PageTableCache.none
    let isUser = cpu.pointee.cpl == 3
    let liftsSMAP =
      !isUser && cpu.pointee.cr4 & CR4.smap.rawValue != 0 && cpu.pointee.other_flags & RFLAGS.ac.rawValue != 0
    plainContext = dataContext(isUser ? 1 : liftsSMAP ? 2 : 0)
    cpu.pointee.data_context = checksEveryAccess ? TranslationContexts.slow : plainContext
    // Decoded code is known by instruction pointer: outside 64-bit mode that is another place with another base.
    let codeSegment = is64Bit ? (0, 0) : (segments[1].base, UInt64(segments[1].limit))
    if codeSegment != codePlace {
      codePlace = codeSegment
      contexts.flushCode()
    }
    codeContext = codeContext(isUser: isUser)
  }

  /// The number of a data context of the current space: 0 supervisor, 1 user, 2 supervisor with SMAP lifted.
  @inline(__always)
  func dataContext(_ kind: Int) -> UInt64 {
    let known =
      switch kind {
      case 0: contexts.spaces[0].data.0
      case 1: contexts.spaces[0].data.1
      default: contexts.spaces[0].data.2
      }
    return known != 0 ? known : newDataContext(kind)
  }

  private func newDataContext(_ kind: Int) -> UInt64 {
    if contexts.nextData == TranslationContexts.slow {
      clearTLB()
      contexts.flush()
      contexts.nextData = 1
    }
    let number = contexts.nextData
    contexts.nextData += 1
    switch kind {
    case 0: contexts.spaces[0].data.0 = number
    case 1: contexts.spaces[0].data.1 = number
    default: contexts.spaces[0].data.2 = number
    }
    return number
  }

  private func codeContext(isUser: Bool) -> UInt64 {
    let known = isUser ? contexts.spaces[0].code.1 : contexts.spaces[0].code.0
    if known != 0 { return known }
    let number = contexts.nextCode
    contexts.nextCode += 1
    if isUser { contexts.spaces[0].code.1 = number } else { contexts.spaces[0].code.0 = number }
    return number
  }

  /// Whether every data access must be looked at: alignment checks or data breakpoints are on.
  var checksEveryAccess: Bool {
    checksAlignment || watchesData
  }

  /// Whether unaligned data accesses are #AC (SDM vol. 3, 6.15, interrupt 17).
  var checksAlignment: Bool {
    cpu.pointee.cpl == 3 && cpu.pointee.cr0 & CR0.am.rawValue != 0
      && cpu.pointee.other_flags & RFLAGS.ac.rawValue != 0
  }

  /// Forgets every translation.
  func flushTLB() {
    contexts.flush()
    holdsLargePages = false
    updateContext()
  }

  /// Forgets the translations of one linear address: INVLPG.
  func flushTLB(_ linear: UInt64) {
    if holdsLargePages { return flushTLB() }
    cpu.pointee.tlb[Self.tlbIndex(linear)] = soft_tlb_entry()
    contexts.flushCode()
    contexts.forgetTables()
    updateContext()
  }

  /// Selects the address space that CR3 (with its PCID) and the view stand for.
  func selectSpace(keep: Bool) {
    let pcid = cpu.pointee.cr4 & CR4.pcide.rawValue != 0 ? cpu.pointee.cr3 & CR3.pcid.rawValue : 0
    contexts.spaces[0].lastTable = lastTable
    contexts.select(pcid | UInt64(view?.number ?? 0) << 32, keep: keep)
    updateContext()
    lastTable = contexts.spaces[0].lastTable
  }

  /// Empties the TLB's memory: needed only where context numbers start again, or host addresses changed.
  func clearTLB() {
    let tlb = UnsafeMutableRawPointer(cpu.pointee.tlb)
    let size = Int(SOFT_TLB_ENTRIES) * MemoryLayout<soft_tlb_entry>.size
    tlb.initializeMemory(as: UInt8.self, repeating: 0, count: size)
  }

  /// The TLB's entry for a page. Higher bits are mixed in, since programs copy between buffers a power of two apart.
  ///
  /// Two pages that follow one another never share an entry: only the tag of an access's last byte is looked at, which must
  /// not be in the entry of its first byte's page. A sum keeps that where the page number wraps or carries; XOR does not.
  @inline(__always)
  static func tlbIndex(_ linear: UInt64) -> Int {
    Int((linear >> 12 &+ linear >> UInt64(12 &+ SOFT_TLB_BITS)) & UInt64(SOFT_TLB_ENTRIES &- 1))
  }
}
