import CLinux
import GuestMemory
import X86

/// The registers of a vCPU that say how it translates addresses (Intel SDM, volume 3, 4.1.1).
public struct PagingRegisters: Equatable, Sendable {
  /// The registers' values.
  public var cr0: UInt64
  /// The page-table base, as the guest has it.
  public var cr3: UInt64
  /// See `cr0`.
  public var cr4: UInt64
  /// See `cr0`.
  public var efer: UInt64

  /// The registers of a vCPU that has stopped.
  public init(cr0: UInt64, cr3: UInt64, cr4: UInt64, efer: UInt64) {
    self.cr0 = cr0
    self.cr3 = cr3
    self.cr4 = cr4
    self.efer = efer
  }
}

/// Walks all of the page tables that vCPUs use, and collects the pages that some entry maps for writing, and those that
/// entries map otherwise (SDM, volume 3, 4.3 to 4.5).
///
/// The tables are the guest's and may be anything: they may name themselves, one another, or what is not RAM, and change
/// under the reader. A table is visited once for each level and each right to write that it is reached with, an entry is
/// read once, and work is bounded.
struct PageTableScan {
  /// Entries read and words of bitmaps changed, in all: half a second's work. More than any guest needs whose tables are
  /// no puzzle: 64 GiB in pages of 4 KiB have 16 million entries.
  static let workLimit = 64 << 20

  private let memory: GuestMemory
  private let numbers: PageNumbers
  private var visited: Set<UInt64> = []
  private var work = 0
  private(set) var writable: PageBits
  private(set) var notWritable: PageBits

  init(_ memory: GuestMemory) {
    self.memory = memory
    numbers = PageNumbers(memory)
    writable = PageBits(pages: numbers.total)
    notWritable = writable
  }

  /// Whether everything has been seen.
  var isComplete: Bool { work < Self.workLimit }

  /// The pages that are mapped and not for writing anywhere; none where the tables are too many to tell.
  var readOnly: PageBits {
    guard isComplete else { return PageBits(pages: numbers.total) }
    var pages = notWritable
    pages.subtract(writable)
    return pages
  }

  /// Adds what a vCPU sees; one that does not translate yet, such as one that has not been started, sees nothing.
  mutating func add(_ registers: PagingRegisters) {
    let mode = PagingMode(
      cr0: CR0(rawValue: registers.cr0), cr4: CR4(rawValue: registers.cr4), efer: EFER(rawValue: registers.efer))
    switch mode {
    case .none: return
    case .bits32:
      // Without CR4.PSE the bit of large pages means nothing.
      let format = Format.bits32(hasLargePages: registers.cr4 & 1 << 4 != 0)
      visit(registers.cr3 & 0xffff_f000, level: 2, entries: 1024, format, isWritable: true)
    case .pae: visit(registers.cr3 & 0xffff_ffe0, level: 3, entries: 4, .pae, isWritable: true)
    case .level4: visit(registers.cr3 & Self.address, level: 4, entries: 512, .long, isWritable: true)
    case .level5: visit(registers.cr3 & Self.address, level: 5, entries: 512, .long, isWritable: true)
    }
  }

  private enum Format: Equatable {
    case bits32(hasLargePages: Bool)
    case pae, long
  }

  private static let address: UInt64 = 0x000f_ffff_ffff_f000

  private mutating func visit(_ table: UInt64, level: Int, entries: Int, _ format: Format, isWritable: Bool) {
    // Modes are told apart too: the same table means something else in another.
    let mode: UInt64 =
      switch format {
      case .bits32(let large): large ? 1 : 0
      case .pae: 2
      case .long: 3
      }
    // PAE's topmost table is aligned to 32 bytes: its level tells it from all others.
    let key = table << 6 ^ UInt64(level) << 3 ^ mode << 1 ^ (isWritable ? 1 : 0)
    let size = format == .pae || format == .long ? 8 : 4
    guard isComplete, visited.insert(key).inserted,
      let base = memory.hostPointer(GuestPhysicalAddress(table), count: entries * size)
    else { return }
    work += entries
    for index in 0..<entries {
      let entry = size == 8 ? clinux_load64(base + index * 8) : UInt64(clinux_load32(base + index * 4))
      guard entry & PageTableEntry.present.rawValue != 0 else { continue }
      // The entries of PAE's topmost table have no rights.
      let rightsAreHere = !(format == .pae && level == 3)
      let isWritable = isWritable && (!rightsAreHere || entry & PageTableEntry.writable.rawValue != 0)
      if level == 1 || isLarge(entry, level, format) {
        insert(entry, level, format, isWritable)
      } else {
        let mask = size == 8 ? Self.address : 0xffff_f000
        visit(entry & mask, level: level - 1, entries: size == 8 ? 512 : 1024, format, isWritable: isWritable)
      }
      guard isComplete else { return }
    }
  }

  private func isLarge(_ entry: UInt64, _ level: Int, _ format: Format) -> Bool {
    guard entry & PageTableEntry.pageSize.rawValue != 0 else { return false }
    return switch format {
    case .bits32(let large): level == 2 && large
    case .pae: level == 2
    case .long: level == 2 || level == 3
    }
  }

  private mutating func insert(_ entry: UInt64, _ level: Int, _ format: Format, _ isWritable: Bool) {
    var first: UInt64
    var count: UInt64 = 1
    switch (format, level) {
    case (.bits32, 2):
      // PSE-36: bits 39 to 32 of the address are in bits 20 to 13.
      first = (entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32) >> 12
      count = 1024
    case (.bits32, _): first = (entry & 0xffff_f000) >> 12
    case (_, 1): first = (entry & Self.address) >> 12
    default:
      count = 1 << UInt64(9 * (level - 1))
      first = (entry & Self.address) >> 12 & ~(count - 1)
    }
    var words = 0
    numbers.forEachRun(first: first, count: count) { pages in
      words += isWritable ? writable.insert(pages) : notWritable.insert(pages)
    }
    work += words
  }
}
