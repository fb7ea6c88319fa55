import Accelerator
import GuestMemory
import MemoryViews
import StateTree
import Synchronization

/// What a guest has registered, its two views, and where its vCPUs are: a part of a saved machine.
extension LoaderHardening {
  private static let nodeName = "hardening"
  /// Runs of pages that a view may have: each of at least a page with others between, of a large guest.
  private static let mostRuns: UInt32 = 1 << 22
  private static let mostProtections: UInt32 = 1 << 16
  private static let longestName = 4096
  /// Interruptions of the loader that one vCPU may have put off.
  private static let mostSuspended: UInt32 = 1 << 16

  private struct View {
    var rights: PageRights
    var runs: [(range: GuestRange, rights: PageRights)] = []
  }

  private struct Visit {
    var isInside = false
    var isHolding = false
    var entries: UInt64 = 0
    var denials: UInt64 = 0
    var verified: UInt64 = 0
    var last: (rip: UInt64, address: UInt64, count: Int) = (0, 0, 0)
    var suspended: [GeneralRegisters] = []
  }

  /// Version 1. While no vCPU runs.
  public func save() -> StateNode {
    guard let attached = machine.withLock({ $0 }) else { return StateNode(Self.nodeName, version: 1) }
    let shared = shared.withLock { $0 }
    return StateNode(Self.nodeName, version: 1) { writer in
      writer.write(shared.loader?.start.rawValue ?? 0)
      writer.write(shared.loader?.size ?? 0)
      writer.write(shared.linear)
      for list in [shared.entries, shared.exits] {
        writer.write(UInt32(list.count))
        for address in list { writer.write(address) }
      }
      writer.write(shared.isLocked)
      writer.write(UInt32(shared.protections.count))
      for protection in shared.protections {
        writer.write(protection.name)
        Self.write(protection.range, protection.rights, &writer)
      }
      for view in [attached.kernel, attached.loader] {
        writer.write(view.defaultRights.rawValue)
        let runs = view.runs
        writer.write(UInt32(runs.count))
        for run in runs { Self.write(run.range, run.entry.rights, &writer) }
      }
      writer.write(UInt32(attached.visitors.count))
      for visitor in attached.visitors { Self.write(visitor, &writer) }
    }
  }

  private static func write(_ range: GuestRange, _ rights: PageRights, _ writer: inout StateWriter) {
    writer.write(range.start.rawValue)
    writer.write(range.size)
    writer.write(rights.rawValue)
  }

  private static func write(_ visitor: LoaderVisitor, _ writer: inout StateWriter) {
    writer.write(visitor.isInside)
    writer.write(visitor.heldSince.load(ordering: .relaxed) != 0)
    writer.write(visitor.entryCount.load(ordering: .relaxed))
    writer.write(visitor.denialCount.load(ordering: .relaxed))
    writer.write(visitor.verified)
    writer.write(visitor.last.rip)
    writer.write(visitor.last.address)
    writer.write(UInt64(visitor.last.count))
    writer.write(UInt32(visitor.suspended.count))
    for registers in visitor.suspended { registers.write(to: &writer) }
  }

  /// Makes the views as they were and puts every vCPU into the one that it was in; their registers come after that.
  ///
  /// - Parameter node: the machine's.
  /// - Returns: what does that; this alone changes nothing.
  /// - Throws: what is wrong with the node.
  public func restore(_ node: StateNode) throws(StateError) -> @Sendable () throws(AcceleratorError) -> Void {
    guard let attached = machine.withLock({ $0 }) else { return { () throws(AcceleratorError) in } }
    let count = attached.visitors.count
    var shared = Shared()
    var views: [View] = []
    var visits: [Visit] = []
    try node.child(Self.nodeName).read(Self.nodeName, versions: 1...1) { reader, _ throws(StateError) in
      shared = try Self.shared(&reader)
      for _ in 0..<2 { views.append(try Self.view(&reader)) }
      let saved = try reader.read(UInt32.self)
      guard saved == count else { throw reader.invalid("vCPUs", UInt64(saved)) }
      for _ in 0..<count { visits.append(try Self.visit(&reader)) }
    }
    return { [self, shared, views, visits] () throws(AcceleratorError) in try put(shared, views, visits, attached) }
  }

  private func put(
    _ shared: Shared, _ views: [View], _ visits: [Visit], _ attached: Attached
  ) throws(AcceleratorError) {
    self.shared.withLock { $0 = shared }
    var made: [MemoryView] = []
    for saved in views {
      let view = try attached.machine.makeView(base: nil)
      try attached.machine.change(
        [ViewChange(view, nil, saved.rights)] + saved.runs.map { ViewChange(view, $0.range, $0.rights) })
      made.append(view)
    }
    var visitors: [LoaderVisitor] = []
    for (visit, former) in zip(visits, attached.visitors) {
      let visitor = LoaderVisitor(former.vcpu)
      visitor.isInside = visit.isInside
      visitor.heldSince.store(visit.isHolding ? max(1, monotonic()) : 0, ordering: .relaxed)
      visitor.entryCount.store(visit.entries, ordering: .relaxed)
      visitor.denialCount.store(visit.denials, ordering: .relaxed)
      (visitor.verified, visitor.last, visitor.suspended) = (visit.verified, visit.last, visit.suspended)
      if !policy.pins.isEmpty { try visitor.vcpu.pin(shared.isLocked ? policy.pins : []) }
      try visitor.vcpu.selectView(made[visit.isInside ? 1 : 0])
      visitors.append(visitor)
    }
    machine.withLock { [visitors, made] in
      $0 = Attached(machine: attached.machine, visitors: visitors, kernel: made[0], loader: made[1])
    }
  }

  // MARK: Reading

  private static func shared(_ reader: inout StateReader) throws(StateError) -> Shared {
    var shared = Shared()
    let start = try reader.read(UInt64.self)
    let size = try reader.read(UInt64.self)
    if size > 0 {
      guard let range = GuestRange(start: GuestPhysicalAddress(start), size: size) else {
        throw reader.invalid("loader", start)
      }
      shared.loader = range
    }
    shared.linear = try reader.read()
    shared.entries = try addresses(&reader)
    shared.exits = try addresses(&reader)
    shared.isLocked = try reader.read()
    let count = try reader.read(UInt32.self)
    guard count <= mostProtections else { throw reader.invalid("protections", UInt64(count)) }
    for _ in 0..<count {
      let name = try reader.readString(limit: longestName)
      let (range, rights) = try range(&reader)
      shared.protections.append(HardeningPolicy.Protection(name: name, range: range, rights: rights))
    }
    return shared
  }

  private static func addresses(_ reader: inout StateReader) throws(StateError) -> [UInt64] {
    let count = try reader.read(UInt32.self)
    guard count <= addressLimit else { throw reader.invalid("addresses", UInt64(count)) }
    var addresses: [UInt64] = []
    for _ in 0..<count { addresses.append(try reader.read()) }
    return addresses
  }

  private static func range(_ reader: inout StateReader) throws(StateError) -> (GuestRange, PageRights) {
    let start = try reader.read(UInt64.self)
    let size = try reader.read(UInt64.self)
    let rights = try rights(&reader)
    guard size > 0, let range = GuestRange(start: GuestPhysicalAddress(start), size: size),
      range.end.rawValue <= 1 << 48
    else { throw reader.invalid("range", start) }
    return (range, rights)
  }

  private static func rights(_ reader: inout StateReader) throws(StateError) -> PageRights {
    let value = try reader.read(UInt8.self)
    guard value & ~PageRights.all.rawValue == 0 else { throw reader.invalid("rights", UInt64(value)) }
    return PageRights(rawValue: value)
  }

  private static func view(_ reader: inout StateReader) throws(StateError) -> View {
    var view = View(rights: try rights(&reader))
    let count = try reader.read(UInt32.self)
    guard count <= mostRuns else { throw reader.invalid("runs", UInt64(count)) }
    for _ in 0..<count { view.runs.append(try range(&reader)) }
    return view
  }

  private static func visit(_ reader: inout StateReader) throws(StateError) -> Visit {
    var visit = Visit()
    visit.isInside = try reader.read()
    visit.isHolding = try reader.read()
    visit.entries = try reader.read()
    visit.denials = try reader.read()
    visit.verified = try reader.read()
    visit.last = (try reader.read(), try reader.read(), Int(clamping: try reader.read(UInt64.self)))
    let count = try reader.read(UInt32.self)
    guard count <= mostSuspended else { throw reader.invalid("suspended", UInt64(count)) }
    for _ in 0..<count { visit.suspended.append(try GeneralRegisters(from: &reader)) }
    return visit
  }
}

extension HardeningPolicy {
  /// The same for policies that forbid the same, wherever their audit goes; else another one.
  public var identity: String {
    var writer = StateWriter()
    writer.write(reaction.rawValue)
    writer.write(exclusive)
    writer.write(requiresSignature)
    writer.write(UInt32(keys.count))
    for key in keys { writer.write(key) }
    writer.write(interrupts.rawValue)
    writer.write(UInt64(interruptBound))
    writer.write(UInt32(protections.count))
    for protection in protections {
      writer.write(protection.name)
      writer.write(protection.range.start.rawValue)
      writer.write(protection.range.size)
      writer.write(protection.rights.rawValue)
    }
    for register in PinnedRegister.allCases { writer.write(pins.contains(register)) }
    return SHA512.digest(writer.bytes).prefix(8).map { byte in
      (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }.joined()
  }
}
