import Accelerator
import CSoftCPU
import GuestMemory
import MemoryViews
import Synchronization

/// What guest-physical addresses mean to the CPUs of one machine: slots of host memory, devices everywhere else.
///
/// CPUs read an immutable table without a lock; whoever changes the slots publishes a new one and then makes every CPU
/// drop what it cached of the old one.
final class PhysicalMemory: Sendable {
  /// One slot, as a lookup needs it.
  struct Slot {
    var number: UInt32
    var start: UInt64
    var size: UInt64
    var host: UnsafeMutableRawPointer
    var isWritable: Bool
    /// A byte a page, 1 where the page was written since the log was last taken; nil where nothing is logged.
    var dirtyPages: UnsafeMutablePointer<UInt8>?
  }

  /// Where a physical page is.
  struct Page {
    /// The host's address of its first byte.
    var host: UnsafeMutableRawPointer
    var isWritable: Bool
    /// The page's byte in the dirty log, nil where nothing is logged.
    var dirty: UnsafeMutablePointer<UInt8>?
    /// Whether the TLB may serve loads and stores of the page: not where the active view forbids them.
    var takesReads = true
    var takesWrites = true
  }

  /// The address of the table: the number of slots, and 16 bytes on the slots.
  private let current: Atomic<Int>
  /// Every table that was ever current: a CPU may still read one.
  private let tables: Mutex<[Int]>

  init() {
    let empty = Self.makeTable([])
    current = Atomic(empty)
    tables = Mutex([empty])
  }

  deinit {
    tables.withLock { for table in $0 { UnsafeMutableRawPointer(bitPattern: table)?.deallocate() } }
  }

  /// The page with a guest-physical address; nil where a device, or nothing, is.
  @inline(__always)
  func page(_ physical: UInt64) -> Page? {
    let table = UnsafeMutableRawPointer(bitPattern: current.load(ordering: .acquiring)).unsafelyUnwrapped
    let count = table.load(as: Int.self)
    let slots = (table + 16).assumingMemoryBound(to: Slot.self)
    for index in 0..<count {
      let offset = physical &- slots[index].start
      if offset < slots[index].size {
        let page = Int(offset >> 12)
        return Page(
          host: slots[index].host + page << 12, isWritable: slots[index].isWritable,
          dirty: slots[index].dirtyPages.map { $0 + page })
      }
    }
    return nil
  }

  /// Replaces all slots.
  func publish(_ slots: [Slot]) {
    let table = Self.makeTable(slots)
    tables.withLock {
      $0.append(table)
      current.store(table, ordering: .releasing)
    }
  }

  private static func makeTable(_ slots: [Slot]) -> Int {
    let table = UnsafeMutableRawPointer.allocate(byteCount: 16 + slots.count * MemoryLayout<Slot>.stride, alignment: 16)
    table.storeBytes(of: slots.count, as: Int.self)
    (table + 16).bindMemory(to: Slot.self, capacity: slots.count).initialize(from: slots, count: slots.count)
    return Int(bitPattern: table)
  }
}

extension Processor {
  /// The page with a guest-physical address as the active view has it; nil where a device, or nothing, is.
  ///
  /// - Throws: the exit of an access that the view forbids.
  @inline(__always)
  func page(_ physical: UInt64, _ needed: PageRights, linear: UInt64) throws(Interruption) -> PhysicalMemory.Page? {
    guard let view else { return memory.page(physical) }
    return try page(physical, needed, linear: linear, in: view)
  }

  @inline(never)
  private func page(
    _ physical: UInt64, _ needed: PageRights, linear: UInt64, in view: MemoryView
  ) throws(Interruption) -> PhysicalMemory.Page? {
    let entry = view[GuestPhysicalAddress(physical)]
    guard entry.rights.isSuperset(of: needed) else {
      pendingExit = .viewViolation(
        ViewViolation(
          view: view.number, address: GuestPhysicalAddress(physical), linear: linear,
          missing: needed.subtracting(entry.rights), rip: cpu.pointee.rip))
      throw .exit
    }
    guard var page = memory.page(physical) else { return nil }
    if let host = UnsafeMutableRawPointer(bitPattern: entry.hostPage) { page.host = host }
    if !entry.rights.contains(.write) { page.takesWrites = false }
    if !entry.rights.contains(.read) { page.takesReads = false }
    return page
  }
}
