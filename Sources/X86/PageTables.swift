/// Bits of a paging-structure entry (Intel SDM, volume 3, tables 4-14 to 4-20).
public struct PageTableEntry: NamedBits {
  /// The entry; a 32-bit one zero-extended.
  public var rawValue: UInt64
  /// The bits of an entry.
  @inlinable public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// P: the entry is used.
  @inlinable public static var present: Self { Self(rawValue: 1 << 0) }
  /// R/W: writes are allowed.
  @inlinable public static var writable: Self { Self(rawValue: 1 << 1) }
  /// U/S: user-mode accesses are allowed.
  @inlinable public static var user: Self { Self(rawValue: 1 << 2) }
  /// PWT: write-through.
  @inlinable public static var writeThrough: Self { Self(rawValue: 1 << 3) }
  /// PCD: cache disable.
  @inlinable public static var cacheDisable: Self { Self(rawValue: 1 << 4) }
  /// A: used in a translation.
  @inlinable public static var accessed: Self { Self(rawValue: 1 << 5) }
  /// D: the page was written.
  @inlinable public static var dirty: Self { Self(rawValue: 1 << 6) }
  /// PS: the entry maps a large page (in a 4 KiB page's entry this bit is PAT).
  @inlinable public static var pageSize: Self { Self(rawValue: 1 << 7) }
  /// G: the translation outlives a change of CR3.
  @inlinable public static var global: Self { Self(rawValue: 1 << 8) }
  /// XD: no instruction fetch.
  @inlinable public static var executeDisable: Self { Self(rawValue: 1 << 63) }

  /// The names, for `description`.
  public static var names: [(bits: PageTableEntry, name: String)] {
    [
      (.present, "P"), (.writable, "W"), (.user, "U"), (.writeThrough, "PWT"), (.cacheDisable, "PCD"),
      (.accessed, "A"), (.dirty, "D"), (.pageSize, "PS"), (.global, "G"), (.executeDisable, "XD"),
    ]
  }
}

/// How linear addresses are translated (Intel SDM, volume 3, section 4.1.1).
public enum PagingMode: UInt8, Sendable {
  /// CR0.PG is clear: a linear address is a physical one.
  case none
  /// Two levels of 4-byte entries, 4 KiB and 4 MiB pages.
  case bits32
  /// Three levels of 8-byte entries, 4 KiB and 2 MiB pages.
  case pae
  /// Four levels, 48-bit addresses, 4 KiB, 2 MiB and 1 GiB pages.
  case level4
  /// Five levels, 57-bit addresses.
  case level5

  /// The mode that the control registers select.
  public init(cr0: CR0, cr4: CR4, efer: EFER) {
    self =
      !cr0.contains(.pg)
      ? .none
      : efer.contains(.lma) ? (cr4.contains(.la57) ? .level5 : .level4) : cr4.contains(.pae) ? .pae : .bits32
  }

  /// The number of levels of paging structures.
  public var levels: Int {
    switch self {
    case .none: 0
    case .bits32: 2
    case .pae: 3
    case .level4: 4
    case .level5: 5
    }
  }
}

/// What an access wants of a translation; with none of these: a supervisor-mode data read.
public struct PageAccess: OptionSet, Sendable {
  /// The bits.
  public let rawValue: UInt8
  /// An access from its bits.
  @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }

  /// A data write.
  @inlinable public static var write: Self { Self(rawValue: 1) }
  /// An instruction fetch.
  @inlinable public static var fetch: Self { Self(rawValue: 2) }
  /// A user-mode access: CPL 3, and not one to a system data structure.
  @inlinable public static var user: Self { Self(rawValue: 4) }
  /// A supervisor-mode access to a system data structure (GDT, IDT, TSS...): RFLAGS.AC does not lift SMAP from it.
  @inlinable public static var implicit: Self { Self(rawValue: 8) }
}

/// One entry that a walk read: what a crash report shows.
public struct PageWalkStep: Sendable {
  /// The level, from `PagingMode.levels` down to 1 (the entry of a 4 KiB page).
  public var level: Int
  /// The guest-physical address of the entry.
  public var entryAddress: UInt64
  /// The entry.
  public var entry: PageTableEntry
}

/// Where a linear address leads.
public struct PageTranslation: Equatable, Sendable {
  /// The guest-physical address, offset within the page included.
  public var physicalAddress: UInt64
  /// The page's size in bytes; 4 KiB without paging.
  public var pageSize: UInt64
  /// Every level allows writes.
  public var isWritable: Bool
  /// Every level allows user-mode accesses.
  public var isUser: Bool
  /// No level forbids fetches.
  public var isExecutable: Bool
  /// The page is global (and CR4.PGE is set).
  public var isGlobal: Bool
  /// The page's entry has D set; true without paging.
  public var isDirty: Bool
  /// The protection key, 0 to 15; 0 where the mode has none.
  public var protectionKey: UInt8
}

/// Why a linear address leads nowhere, or not for this access.
public struct PageWalkFault: Error, Equatable {
  /// What forbids the access.
  public enum Reason: Sendable {
    /// The address is not canonical: #GP or #SS instead of #PF.
    case notCanonical
    /// An entry is outside guest memory: what a CPU reads there is for the machine to say.
    case entryNotInMemory
    /// An entry's P is clear.
    case notPresent
    /// An entry has a reserved bit set.
    case reservedBit
    /// A write to a read-only page.
    case notWritable
    /// A user-mode access to a supervisor page.
    case notUser
    /// A fetch from a page with XD.
    case executeDisabled
    /// A supervisor-mode fetch from a user page, with CR4.SMEP.
    case smep
    /// A supervisor-mode data access to a user page, with CR4.SMAP.
    case smap
    /// PKRU forbids the data access.
    case protectionKey
  }

  /// What forbids the access.
  public var reason: Reason
  /// The level of the entry at fault; for permissions, of the page's entry. 0 where there was no walk.
  public var level: Int
  /// The error code of #PF; 0 for `notCanonical`.
  public var errorCode: PageFaultErrorCode

  /// A fault found at a level.
  public init(reason: Reason, level: Int, errorCode: PageFaultErrorCode) {
    self.reason = reason
    self.level = level
    self.errorCode = errorCode
  }
}

extension PageWalkFault: CustomStringConvertible {
  /// One line for a report.
  public var description: String {
    let text =
      switch reason {
      case .notCanonical: "the address is not canonical"
      case .entryNotInMemory: "the level \(level) entry is outside memory"
      case .notPresent: "the level \(level) entry is not present"
      case .reservedBit: "the level \(level) entry has a reserved bit set"
      case .notWritable: "the page is read-only"
      case .notUser: "the page is for the supervisor only"
      case .executeDisabled: "the page is not executable"
      case .smep: "SMEP: the supervisor may not execute user pages"
      case .smap: "SMAP: the supervisor may not access user pages"
      case .protectionKey: "the page's protection key forbids the access"
      }
    return errorCode.isEmpty ? text : text + " (error code 0x\(String(errorCode.rawValue, radix: 16)): \(errorCode))"
  }
}

/// A vCPU's paging as its registers set it up: walks the guest's page tables as the CPU does.
///
/// A walk only reads. It does not set A and D, which an accelerator does itself, atomically, and it caches nothing, so
/// it does not show what a TLB may still hold. With PAE paging it reads the page-directory-pointer table from memory,
/// where a CPU uses the four entries it loaded with CR3. Supervisor protection keys (CR4.PKS) and shadow stacks are
/// not modelled.
public struct Paging: Sendable {
  /// Control register 0.
  public var cr0: CR0
  /// Control register 3.
  public var cr3: UInt64
  /// Control register 4.
  public var cr4: CR4
  /// The extended-feature-enable register.
  public var efer: EFER
  /// The status register, for AC with SMAP.
  public var rflags: RFLAGS
  /// The protection-key rights register.
  public var pkru: UInt32
  /// The width of physical addresses in bits (CPUID 8000_0008, EAX bits 7:0): those above are reserved in entries.
  public var physicalAddressBits: UInt64
  /// Whether 1 GiB pages exist (CPUID 8000_0001, EDX bit 26): PS is reserved at level 3 otherwise.
  public var has1GiBPages: Bool

  /// The paging of a vCPU.
  public init(
    cr0: CR0, cr3: UInt64, cr4: CR4, efer: EFER, rflags: RFLAGS = [], pkru: UInt32 = 0,
    physicalAddressBits: UInt64 = 52, has1GiBPages: Bool = true
  ) {
    self.cr0 = cr0
    self.cr3 = cr3
    self.cr4 = cr4
    self.efer = efer
    self.rflags = rflags
    self.pkru = pkru
    self.physicalAddressBits = min(max(physicalAddressBits, 32), 52)
    self.has1GiBPages = has1GiBPages
  }

  /// How addresses are translated.
  public var mode: PagingMode { PagingMode(cr0: cr0, cr4: cr4, efer: efer) }

  /// Translates a linear address for an access (Intel SDM, volume 3, sections 4.3 to 4.7).
  ///
  /// - Parameters:
  ///   - linear: the address; outside long mode only its low 32 bits count.
  ///   - access: what the access wants.
  ///   - read: reads the little-endian entry of 4 or 8 bytes at a guest-physical address, zero-extended; nil where
  ///     there is no memory. Addresses are multiples of the size.
  ///   - visit: is told each entry as it is read, the highest level first.
  /// - Returns: where the address leads.
  /// - Throws: `PageWalkFault`.
  public func translate(
    _ linear: UInt64, _ access: PageAccess = [],
    read: (_ address: UInt64, _ size: Int) -> UInt64?,
    visit: (PageWalkStep) -> Void = { _ in }
  ) throws(PageWalkFault) -> PageTranslation {
    let mode = self.mode
    guard mode != .none else { return identity(linear & 0xffff_ffff) }
    let isLong = mode == .level4 || mode == .level5
    let linear = isLong ? linear : linear & 0xffff_ffff
    if isLong {
      let unused = Int64(mode == .level4 ? 16 : 7)
      guard (Int64(bitPattern: linear) << unused) >> unused == Int64(bitPattern: linear) else {
        throw PageWalkFault(reason: .notCanonical, level: 0, errorCode: [])
      }
    }

    let entrySize: UInt64 = mode == .bits32 ? 4 : 8
    let indexBits: UInt64 = mode == .bits32 ? 10 : 9
    var level = mode.levels
    var table = cr3 & (isLong ? addressMask : mode == .pae ? 0xffff_ffe0 : 0xffff_f000)
    var all: PageTableEntry = [.writable, .user]
    var any: PageTableEntry = []
    while true {
      let shift = 12 + UInt64(level - 1) * indexBits
      let address = table + (linear >> shift & (1 << indexBits - 1)) * entrySize
      guard let raw = read(address, Int(entrySize)) else { throw fault(.entryNotInMemory, level, access) }
      let entry = PageTableEntry(rawValue: raw)
      visit(PageWalkStep(level: level, entryAddress: address, entry: entry))
      guard entry.contains(.present) else { throw fault(.notPresent, level, access) }
      let isPage = level == 1 || (entry.contains(.pageSize) && allowsLargePages(mode, level))
      guard raw & reservedBits(mode, level, isPage: isPage) == 0 else { throw fault(.reservedBit, level, access) }
      // PAE's third level has no permissions.
      if !(mode == .pae && level == 3) {
        all.formIntersection(entry)
        any.formUnion(entry)
      }
      if isPage {
        let offset = linear & (1 << shift - 1)
        var page = raw & addressMask & ~(1 << shift - 1)
        // PSE-36: bits 20:13 are the address's bits 39:32.
        if mode == .bits32, level == 2 { page = raw & 0xffc0_0000 | (raw >> 13 & 0xff) << 32 }
        let translation = PageTranslation(
          physicalAddress: page | offset, pageSize: 1 << shift, isWritable: all.contains(.writable),
          isUser: all.contains(.user), isExecutable: !(efer.contains(.nxe) && any.contains(.executeDisable)),
          isGlobal: entry.contains(.global) && cr4.contains(.pge), isDirty: entry.contains(.dirty),
          protectionKey: isLong ? UInt8(raw >> 59 & 15) : 0)
        if let reason = violation(translation, access) { throw fault(reason, level, access) }
        return translation
      }
      table = mode == .bits32 ? raw & 0xffff_f000 : raw & addressMask
      level -= 1
    }
  }

  /// Bits 51:12 of an entry, whatever the width of physical addresses: the rest is checked as reserved.
  private var addressMask: UInt64 { 0x000f_ffff_ffff_f000 }

  private func identity(_ linear: UInt64) -> PageTranslation {
    PageTranslation(
      physicalAddress: linear, pageSize: 4096, isWritable: true, isUser: true, isExecutable: true, isGlobal: false,
      isDirty: true, protectionKey: 0)
  }

  private func allowsLargePages(_ mode: PagingMode, _ level: Int) -> Bool {
    switch mode {
    case .none: false
    case .bits32: level == 2 && cr4.contains(.pse)
    case .pae: level == 2
    case .level4, .level5: level == 2 || (level == 3 && has1GiBPages)
    }
  }

  private func reservedBits(_ mode: PagingMode, _ level: Int, isPage: Bool) -> UInt64 {
    // With 32-bit paging only a 4 MiB page has any: bit 21, and the address bits above the physical width.
    if mode == .bits32 {
      let pse36Bits = min(physicalAddressBits - 32, 8)
      return isPage && level == 2 ? 1 << 21 | (0xff & ~(1 << pse36Bits - 1)) << 13 : 0
    }
    var reserved = addressMask & ~(1 << physicalAddressBits - 1)
    if !efer.contains(.nxe) || (mode == .pae && level == 3) { reserved |= PageTableEntry.executeDisable.rawValue }
    if mode == .pae { reserved |= 0x7ff0_0000_0000_0000 | (level == 3 ? 0x1e6 : 0) }
    if level > 2 && !isPage && mode != .pae { reserved |= PageTableEntry.pageSize.rawValue }
    // Between PAT (bit 12) and the address of a large page.
    if isPage, level > 1 { reserved |= (1 << (12 + UInt64(level - 1) * 9) - 1) & ~0x1fff }
    return reserved
  }

  /// What in the page's rights forbids the access (Intel SDM, volume 3, section 4.6).
  private func violation(_ page: PageTranslation, _ access: PageAccess) -> PageWalkFault.Reason? {
    let isUser = access.contains(.user)
    if isUser, !page.isUser { return .notUser }
    if access.contains(.fetch) {
      if !page.isExecutable { return .executeDisabled }
      return !isUser && page.isUser && cr4.contains(.smep) ? .smep : nil
    }
    if !isUser, page.isUser, cr4.contains(.smap), access.contains(.implicit) || !rflags.contains(.ac) { return .smap }
    let obeysWriteProtection = isUser || cr0.contains(.wp)
    if access.contains(.write), !page.isWritable, obeysWriteProtection { return .notWritable }
    if page.isUser, cr4.contains(.pke), efer.contains(.lma) {
      let rights = pkru >> (UInt32(page.protectionKey) * 2)
      if rights & 1 != 0 || (rights & 2 != 0 && access.contains(.write) && obeysWriteProtection) {
        return .protectionKey
      }
    }
    return nil
  }

  private func fault(_ reason: PageWalkFault.Reason, _ level: Int, _ access: PageAccess) -> PageWalkFault {
    var code: PageFaultErrorCode = []
    if reason != .notPresent && reason != .entryNotInMemory { code.insert(.present) }
    if reason == .reservedBit { code.insert(.reserved) }
    if reason == .protectionKey { code.insert(.protectionKey) }
    if access.contains(.write) { code.insert(.write) }
    if access.contains(.user) { code.insert(.user) }
    // Fetches show only where something can forbid them.
    let hasNX = efer.contains(.nxe) && (cr4.contains(.pae) || efer.contains(.lma))
    if access.contains(.fetch), hasNX || cr4.contains(.smep) { code.insert(.fetch) }
    return PageWalkFault(reason: reason, level: level, errorCode: code)
  }
}
