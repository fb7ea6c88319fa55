import CSoftCPU
import MemoryViews
import X86

/// A linear address translated: what the TLB keeps.
struct Translation {
  /// The guest-physical address of the 4 KiB page.
  var page: UInt64
  /// Whether the guest's page tables let the access be a write, and the page is dirty.
  var isWritable: Bool
  /// Whether the page is larger than 4 KiB.
  var isLarge: Bool
}

/// The page table that the last walk ended in, or the directory of a large page, and what the levels above it leave of the
/// rights: a paging-structure cache of one entry (SDM vol. 3, 4.10.3). It goes with the context of the CPU's translations.
struct PageTableCache {
  /// 1 for a page table, 2 for a directory.
  var level: UInt64 = 1
  /// The upper bits of the linear addresses that the table translates, from `shift` on; `none` holds no table.
  var region = none
  /// The table's guest-physical address.
  var table: UInt64 = 0
  /// As in `walk`.
  var rights: UInt64 = 0

  static let none: UInt64 = ~0

  @inline(__always)
  var shift: UInt64 { 12 &+ 9 &* level }
}

/// The guest's page tables as the CPU walks them (SDM vol. 3, chapter 4): A and D are set with atomic updates.
extension Processor {
  /// Walks the page tables for an access.
  ///
  /// - Throws: #PF with `faultAddress` set.
  func walk(_ linear: UInt64, _ access: PageAccess) throws(Interruption) -> Translation {
    if cpu.pointee.cr0 & CR0.pg.rawValue == 0 {
      return Translation(page: linear & 0xffff_f000, isWritable: true, isLarge: false)
    }
    let isLong = cpu.pointee.efer & EFER.lma.rawValue != 0
    if !isLong, cpu.pointee.cr4 & CR4.pae.rawValue == 0 { return try walk32(linear, access) }

    var level: UInt64
    var table: UInt64
    if isLong {
      level = cpu.pointee.cr4 & CR4.la57.rawValue != 0 ? 5 : 4
      table = cpu.pointee.cr3
    } else {
      // The four entries were loaded with CR3.
      table = soft_pdptes(cpu)[Int(linear >> 30 & 3)]
      guard table & 1 != 0 else { throw pageFault(linear, access, []) }
      level = 2
    }
    table &= Self.addressMask
    let noExecute = cpu.pointee.efer & EFER.nxe.rawValue != 0
    var reserved: UInt64 = Self.addressMask & ~((1 << features.physicalAddressBits) &- 1)
    if !noExecute { reserved |= 1 << 63 }
    if !isLong { reserved |= 0x7ff0_0000_0000_0000 }
    /// The rights that all levels leave: R/W and U/S as in an entry, and XD inverted.
    var rights: UInt64 = PageTableEntry.writable.rawValue | PageTableEntry.user.rawValue | 1 << 63
    if linear >> lastTable.shift == lastTable.region {
      level = lastTable.level
      table = lastTable.table
      rights = lastTable.rights
    }
    while true {
      let number = linear >> (3 &+ 9 &* level) & 0x1ff
      let address = table | number << 3
      let place = try entryPage(address, linear, access)
      var entry = soft_get64(place.host)
      while true {
        guard entry & 1 != 0 else { throw pageFault(linear, access, []) }
        let isLeaf = level == 1 || entry & PageTableEntry.pageSize.rawValue != 0 && level <= 3
        var forbidden = reserved
        if !isLeaf, level > 1, entry & PageTableEntry.pageSize.rawValue != 0 {
          forbidden |= PageTableEntry.pageSize.rawValue
        } else if isLeaf, level > 1 {
          // Bit 12 is PAT; the bits between it and the page's address are reserved.
          let offsetBits = 3 &+ 9 &* level
          forbidden |= ((1 << offsetBits) &- 1) & ~0x1fff
          if level == 3, !features.hasGigabytePages { forbidden |= PageTableEntry.pageSize.rawValue }
        }
        guard entry & forbidden == 0 else { throw pageFault(linear, access, [.present, .reserved]) }
        let all = rights & (entry ^ 1 << 63)
        guard isLeaf else {
          if entry & PageTableEntry.accessed.rawValue == 0 {
            if try canUpdate(place, address, linear),
              !soft_cas64(place.host, &entry, entry | PageTableEntry.accessed.rawValue)
            {
              continue
            }
          }
          rights = all
          break
        }
        try check(linear, access, rights: all, key: entry >> 59 & 15, isLong: isLong)
        let wanted =
          PageTableEntry.accessed.rawValue | (access.contains(.write) ? PageTableEntry.dirty.rawValue : 0)
        if entry & wanted != wanted {
          if try canUpdate(place, address, linear), !soft_cas64(place.host, &entry, entry | wanted) { continue }
        }
        let offsetBits = 3 &+ 9 &* level
        let offsetMask: UInt64 = (1 << offsetBits) &- 1
        return Translation(
          page: entry & Self.addressMask & ~offsetMask | linear & offsetMask & ~0xfff,
          isWritable: access.contains(.write) || isWritableNow(entry | wanted, all, access), isLarge: level > 1)
      }
      table = entry & Self.addressMask
      level &-= 1
      if level <= 2 {
        lastTable = PageTableCache(level: level, table: table, rights: rights)
        lastTable.region = linear >> lastTable.shift
      }
    }
  }

  /// Two levels of 4-byte entries (SDM vol. 3, 4.3).
  private func walk32(_ linear: UInt64, _ access: PageAccess) throws(Interruption) -> Translation {
    var table = cpu.pointee.cr3 & 0xffff_f000
    var rights: UInt64 = PageTableEntry.writable.rawValue | PageTableEntry.user.rawValue | 1 << 63
    var level: UInt64 = 2
    while true {
      let number = linear >> (2 &+ 10 &* level) & 0x3ff
      let address = table | number << 2
      let place = try entryPage(address, linear, access)
      var entry = soft_get32(place.host)
      while true {
        guard entry & 1 != 0 else { throw pageFault(linear, access, []) }
        let isLarge = level == 2 && entry & 0x80 != 0 && cpu.pointee.cr4 & CR4.pse.rawValue != 0
        // Bits 20:13 of a 4 MiB page's entry are address bits 39:32 (PSE-36); bit 21 is reserved.
        if isLarge, entry & 1 << 21 != 0 { throw pageFault(linear, access, [.present, .reserved]) }
        let all = rights & (UInt64(entry) | 1 << 63)
        guard isLarge || level == 1 else {
          if entry & 0x20 == 0 {
            if try canUpdate(place, address, linear), !soft_cas32(place.host, &entry, entry | 0x20) { continue }
          }
          rights = all
          break
        }
        try check(linear, access, rights: all, key: 0, isLong: false)
        let wanted: UInt32 = access.contains(.write) ? 0x60 : 0x20
        if entry & wanted != wanted {
          if try canUpdate(place, address, linear), !soft_cas32(place.host, &entry, entry | wanted) { continue }
        }
        let page: UInt64 =
          isLarge
          ? UInt64(entry & 0xffc0_0000) | UInt64(entry >> 13 & 0xff) << 32 | linear & 0x3f_f000
          : UInt64(entry & 0xffff_f000)
        return Translation(
          page: page, isWritable: access.contains(.write) || isWritableNow(UInt64(entry | wanted), all, access),
          isLarge: isLarge)
      }
      table = UInt64(entry & 0xffff_f000)
      level = 1
    }
  }

  private static let addressMask: UInt64 = 0x000f_ffff_ffff_f000

  /// Whether a translation made for a read serves writes as well.
  private func isWritableNow(_ entry: UInt64, _ rights: UInt64, _ access: PageAccess) -> Bool {
    entry & PageTableEntry.dirty.rawValue != 0 && cpu.pointee.cr4 & CR4.pke.rawValue == 0
      && (rights & PageTableEntry.writable.rawValue != 0
        || !access.contains(.user) && cpu.pointee.cr0 & CR0.wp.rawValue == 0)
  }

  /// Checks the rights that a walk ended with (SDM vol. 3, 4.6). `rights` has XD inverted.
  private func check(
    _ linear: UInt64, _ access: PageAccess, rights: UInt64, key: UInt64, isLong: Bool
  ) throws(Interruption) {
    let isUserPage = rights & PageTableEntry.user.rawValue != 0
    let isWrite = access.contains(.write)
    let isFetch = access.contains(.fetch)
    let cr4 = CR4(rawValue: cpu.pointee.cr4)
    let obeysReadOnly = access.contains(.user) || cpu.pointee.cr0 & CR0.wp.rawValue != 0
    var isAllowed = !isWrite || !obeysReadOnly || rights & PageTableEntry.writable.rawValue != 0
    if access.contains(.user) {
      if !isUserPage { isAllowed = false }
    } else if isUserPage {
      if isFetch {
        if cr4.contains(.smep) { isAllowed = false }
      } else if cr4.contains(.smap),
        access.contains(.implicit) || cpu.pointee.other_flags & RFLAGS.ac.rawValue == 0
      {
        isAllowed = false
      }
    }
    if isFetch {
      if rights >> 63 == 0, cpu.pointee.efer & EFER.nxe.rawValue != 0 { isAllowed = false }
    } else if isLong, isUserPage, cr4.contains(.pke) {
      let bits = cpu.pointee.pkru >> (UInt32(key) &* 2)
      if bits & 1 != 0 || isWrite && obeysReadOnly && bits & 2 != 0 {
        // Reported whatever else forbids the access.
        throw pageFault(linear, access, [.present, .protectionKey])
      }
    }
    guard isAllowed else { throw pageFault(linear, access, .present) }
  }

  /// #PF for an access: `bits` say what the walk found.
  private func pageFault(_ linear: UInt64, _ access: PageAccess, _ bits: PageFaultErrorCode) -> Interruption {
    faultAddress = linear
    var code = bits
    if access.contains(.write) { code.insert(.write) }
    if access.contains(.user) { code.insert(.user) }
    let reportsFetch =
      cpu.pointee.cr4 & CR4.smep.rawValue != 0
      || cpu.pointee.efer & EFER.nxe.rawValue != 0 && cpu.pointee.cr4 & CR4.pae.rawValue != 0
    if access.contains(.fetch), reportsFetch { code.insert(.fetch) }
    return .fault(.pageFault, UInt32(truncatingIfNeeded: code.rawValue))
  }

  /// Where a paging-structure entry is: the page, with the entry's own host address.
  private func entryPage(
    _ physical: UInt64, _ linear: UInt64, _ access: PageAccess
  ) throws(Interruption) -> PhysicalMemory.Page {
    guard var page = try page(physical, .read, linear: linear) else {
      // Nothing answers on the bus: the entry reads as all ones, whose reserved bits are set.
      throw pageFault(linear, access, [.present, .reserved])
    }
    page.host += Int(physical & 0xfff)
    return page
  }

  /// Before A or D is set: the page of the entry is written, which the active view may forbid. Tables in ROM stay as
  /// they are: false.
  private func canUpdate(
    _ page: PhysicalMemory.Page, _ physical: UInt64, _ linear: UInt64
  ) throws(Interruption) -> Bool {
    guard page.isWritable else { return false }
    if !page.takesWrites { _ = try self.page(physical, .write, linear: linear) }
    page.dirty?.pointee = 1
    return true
  }
}
