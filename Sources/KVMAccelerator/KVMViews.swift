import Accelerator
import CLinux
import GuestMemory
import Host
import MemoryViews
import Synchronization

/// A view as KVM can have it: a virtual machine of its own over the same memory, whose slots show what the view allows.
///
/// KVM lets a slot be writable or read-only, and both can be executed. So a page that may be read and executed is in a
/// slot, writable or not; any other page is in none: fetches from it fail, and its data accesses come to the VMM. Only pages
/// of which the view has been told nothing may always be executed where they may be read: to serve each access to them would
/// be to serve all of the guest's.
final class KVMView {
  /// One slot of the view's machine: pages of one of the whole machine's slots.
  struct Piece {
    /// Its number in the view's machine.
    var number: UInt32
    var range: GuestRange
    /// The machine's own slot.
    var parent: MemorySlot
    var look: Look
  }

  /// How a page shows.
  struct Look: Equatable {
    var isPresent: Bool
    var isWritable = false
    /// The host's page; 0 for the parent's own.
    var hostPage: UInt = 0
  }

  weak var view: MemoryView?
  let number: UInt32
  let shell: KVMVirtualMachine
  private var pieces: [Piece] = []
  private var freeNumbers: [UInt32] = []
  private var nextNumber: UInt32 = 0

  init(_ view: MemoryView, shell: KVMVirtualMachine) {
    self.view = view
    number = view.number
    self.shell = shell
  }

  /// How the view shows a page of a slot.
  private func look(_ address: GuestPhysicalAddress, in slot: MemorySlot, _ view: MemoryView) -> Look {
    let entry = view.entry(address)
    let rights = entry?.rights ?? view.defaultRights
    let needed: PageRights = entry == nil ? .read : [.read, .execute]
    guard rights.isSuperset(of: needed) else { return Look(isPresent: false) }
    return Look(
      isPresent: true, isWritable: rights.contains(.write) && slot.access == .readWriteExecute,
      hostPage: entry?.hostPage ?? 0)
  }

  /// Makes the view's slots say what the view says of a range of one of the machine's slots.
  func update(
    _ range: GuestRange, in slot: MemorySlot, log: (_ parent: UInt32, _ first: UInt64, _ words: [UInt64]) -> Void
  ) throws(AcceleratorError) {
    guard let view else { return }
    let touched = pieces.filter { $0.range.overlaps(range) && $0.parent.number == slot.number }
    // The commonest change is of pages that are one piece already, or none: nothing else moves then.
    var kept: [(GuestRange, MemorySlot, Look)] = []
    for piece in touched {
      if piece.range.start < range.start {
        kept.append((Self.span(piece.range.start, range.start), piece.parent, piece.look))
      }
      if range.end < piece.range.end {
        var look = piece.look
        let skipped = range.end.rawValue - piece.range.start.rawValue
        if look.hostPage != 0 { look.hostPage += UInt(skipped) }
        kept.append((Self.span(range.end, piece.range.end), piece.parent, look))
      }
      try remove(piece, log: log)
    }
    for (range, parent, look) in kept { try place(range, parent, look) }
    var start = range.start
    while start < range.end {
      let first = look(start, in: slot, view)
      var end = start + 0x1000
      while end < range.end {
        var next = look(end, in: slot, view)
        if next.hostPage != 0 { next.hostPage &-= UInt(end.rawValue - start.rawValue) }
        guard next == first else { break }
        end = end + 0x1000
      }
      if first.isPresent { try place(Self.span(start, end), slot, first) }
      start = end
    }
  }

  /// Takes every piece of a slot away.
  func remove(
    _ slot: UInt32, log: (_ parent: UInt32, _ first: UInt64, _ words: [UInt64]) -> Void
  ) throws(AcceleratorError) {
    for piece in pieces where piece.parent.number == slot { try remove(piece, log: log) }
  }

  /// Tells what the guest has written through the view's pieces of a slot since the last call.
  func collect(
    _ slot: UInt32, log: (_ parent: UInt32, _ first: UInt64, _ words: [UInt64]) -> Void
  ) throws(AcceleratorError) {
    for piece in pieces where piece.parent.number == slot && piece.parent.logsDirtyPages { try collect(piece, log) }
  }

  private func collect(
    _ piece: Piece, _ log: (_ parent: UInt32, _ first: UInt64, _ words: [UInt64]) -> Void
  ) throws(AcceleratorError) {
    guard piece.look.isWritable, piece.look.hostPage == 0 else { return }
    let first = (piece.range.start.rawValue - piece.parent.range.start.rawValue) >> 12
    log(piece.parent.number, first, try shell.takeDirtyLog(slot: piece.number))
  }

  private func remove(
    _ piece: Piece, log: (_ parent: UInt32, _ first: UInt64, _ words: [UInt64]) -> Void
  ) throws(AcceleratorError) {
    if piece.parent.logsDirtyPages { try collect(piece, log) }
    try shell.removeMemorySlot(piece.number)
    pieces.removeAll { $0.number == piece.number }
    freeNumbers.append(piece.number)
  }

  private func place(_ range: GuestRange, _ parent: MemorySlot, _ look: Look) throws(AcceleratorError) {
    let number = freeNumbers.popLast() ?? nextNumber
    if number == nextNumber { nextNumber += 1 }
    let host =
      UnsafeMutableRawPointer(bitPattern: look.hostPage)
      ?? parent.hostBase + Int(range.start.rawValue - parent.range.start.rawValue)
    try shell.setMemorySlot(
      MemorySlot(
        number: number, range: range, hostBase: host, access: look.isWritable ? .readWriteExecute : .readExecute,
        logsDirtyPages: parent.logsDirtyPages))
    pieces.append(Piece(number: number, range: range, parent: parent, look: look))
  }

  /// How many slots the view has.
  var slotCount: Int { pieces.count }

  private static func span(_ start: GuestPhysicalAddress, _ end: GuestPhysicalAddress) -> GuestRange {
    GuestRange(start: start, size: end.rawValue &- start.rawValue) ?? GuestRange.nothing
  }
}

extension GuestRange {
  /// No page at all.
  fileprivate static let nothing = GuestRange(start: GuestPhysicalAddress(0), size: 0).unsafelyUnwrapped

  /// The bytes that both have; nil for none.
  func common(_ other: GuestRange) -> GuestRange? {
    let first = max(start, other.start)
    let last = min(end, other.end)
    return first < last ? GuestRange(start: first, size: last.rawValue - first.rawValue) : nil
  }

  /// The whole pages that the range touches; nil for none.
  var pages: GuestRange? {
    guard size > 0 else { return nil }
    let last = (start.rawValue &+ (size - 1)) | 0xfff
    return GuestRange(start: start.page, size: last &- start.page.rawValue &+ 1)
  }
}

extension KVMVirtualMachine {
  /// Views, and what their slots have logged, behind one lock.
  struct Views {
    var known: [UInt32: KVMView] = [:]
    /// How many there ever were.
    var count: UInt32 = 0
    /// Pages written through views, by slot: a word for 64 pages.
    var written: [UInt32: [UInt64]] = [:]

    mutating func note(_ slot: UInt32, _ first: UInt64, _ words: [UInt64]) {
      for (index, word) in words.enumerated() where word != 0 {
        for bit in 0..<64 where word >> UInt64(bit) & 1 != 0 { note(slot, page: first + UInt64(index * 64 + bit)) }
      }
    }

    mutating func note(_ slot: UInt32, page: UInt64) {
      let index = Int(page >> 6)
      var words = written[slot] ?? []
      while words.count <= index { words.append(0) }
      words[index] |= 1 << (page & 63)
      written[slot] = words
    }
  }

  /// A view with the next number, and a virtual machine for it.
  public func makeView(base: MemoryView?) throws(AcceleratorError) -> MemoryView {
    guard interrupts == .userSpace, accelerator.capabilities.contains(.memoryViews) else {
      throw .unsupported(engine: "kvm", what: "memory views beside interrupt controllers in the kernel")
    }
    let shell = try KVMVirtualMachine(accelerator: accelerator, memory: memory, interrupts: interrupts, isShell: true)
    for (doorbell, descriptor) in attachedDoorbells { try shell.attachDoorbell(doorbell, eventDescriptor: descriptor) }
    try shell.writeClock(try readClock())
    let slots = slotTable
    let (view, stale) = try withViews { views throws(AcceleratorError) in
      let stale = views.known.values.filter { $0.view == nil }.map(\.number)
      for number in stale { views.known[number] = nil }
      views.count += 1
      let view = base.map { MemoryView(number: views.count, base: $0) } ?? MemoryView(number: views.count)
      let made = KVMView(view, shell: shell)
      for slot in slots {
        try made.update(slot.range, in: slot) { views.note($0, $1, $2) }
      }
      views.known[view.number] = made
      return (view, stale)
    }
    // Nobody can select what nobody has.
    for vcpu in vcpus { vcpu.forget(stale) }
    viewsExist.store(true, ordering: .sequentiallyConsistent)
    return view
  }

  /// Changes views and their slots while no vCPU is in the guest.
  public func change(_ changes: [ViewChange]) throws(AcceleratorError) {
    for change in changes where change.rights.contains(.execute) && !change.rights.contains(.read) {
      throw .unsupported(engine: "kvm", what: "pages that may be executed and not read")
    }
    let slots = slotTable
    try gate.whileClosed(vcpus) { () throws(AcceleratorError) in
      for change in changes { change.apply() }
      try withViews { views throws(AcceleratorError) in
        for change in changes {
          guard let known = views.known[change.view.number] else { throw .unknownView(change.view.number) }
          for slot in slots {
            guard let part = change.range == nil ? slot.range : change.range?.pages.flatMap({ slot.range.common($0) })
            else { continue }
            try known.update(part, in: slot) { views.note($0, $1, $2) }
          }
        }
      }
    }
  }

  /// The virtual machine of a view that was added.
  func shell(of view: MemoryView) throws(AcceleratorError) -> KVMVirtualMachine {
    let shell = try withViews { views throws(AcceleratorError) in views.known[view.number]?.shell }
    guard let shell else { throw .unknownView(view.number) }
    return shell
  }

  /// How many slots of KVM's each view has.
  public var viewSlotCounts: [UInt32: Int] {
    (try? withViews { views throws(AcceleratorError) in views.known.mapValues(\.slotCount) }) ?? [:]
  }

  /// Shows a slot that was set, or its absence, in every view; while the gate is closed.
  func updateViews(removed: UInt32?, set slot: MemorySlot?) throws(AcceleratorError) {
    guard hasViews else { return }
    try withViews { views throws(AcceleratorError) in
      for known in views.known.values {
        if let removed { try known.remove(removed) { views.note($0, $1, $2) } }
        if let slot { try known.update(slot.range, in: slot) { views.note($0, $1, $2) } }
      }
    }
  }

  /// Adds what the guest wrote through views to a slot's log.
  func mergeViewLogs(_ number: UInt32, into words: inout [UInt64]) throws(AcceleratorError) {
    guard hasViews else { return }
    let written = try withViews { views throws(AcceleratorError) in
      for known in views.known.values { try known.collect(number) { views.note($0, $1, $2) } }
      return views.written.removeValue(forKey: number) ?? []
    }
    for (index, word) in written.enumerated() where index < words.count { words[index] |= word }
  }

  /// Notes a write that the VMM made for the guest.
  func noteWrite(_ place: GuestPhysicalAddress, in slot: MemorySlot, _ host: UnsafeMutableRawPointer, count: Int) {
    guard slot.logsDirtyPages, count > 0 else { return }
    let page = (place.rawValue - slot.range.start.rawValue) >> 12
    views.withLock { $0.note(slot.number, page: page) }
  }

  /// Calls `body` with the views; a typed error does not pass through a lock's rethrows.
  private func withViews<Result>(
    _ body: (inout Views) throws(AcceleratorError) -> Result
  ) throws(AcceleratorError) -> Result {
    let result = views.withLock { views in
      Swift.Result { () throws(AcceleratorError) in try body(&views) }
    }
    return try result.get()
  }
}
