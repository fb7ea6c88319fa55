import Accelerator
import GuestMemory
import Host
import MemoryViews
import Synchronization

/// Keeps a guest's code loading in bounds by two views: the kernel's, in which the loader is neither executable nor visible,
/// and the loader's, in which nothing else is executable. A vCPU changes to the loader's where it fetches an entry point,
/// and back where it leaves. docs/hardening.md describes it.
public final class LoaderHardening: ViewSupervisor {
  /// Where guests call.
  public var port: UInt16 { Hypercall.port }
  /// What is forbidden.
  public let policy: HardeningPolicy

  let machine = Mutex<Attached?>(nil)
  let shared = Mutex(Shared())
  private let record: (@Sendable (AuditEvent) -> Void)?
  private let started = monotonicNanoseconds()

  func monotonic() -> UInt64 { monotonicNanoseconds() }

  /// The machine, and what is kept of each of its vCPUs on that one's thread.
  struct Attached {
    var machine: any VirtualMachine
    var memory: GuestMemory { machine.memory }
    var visitors: [LoaderVisitor]
    var kernel: MemoryView
    var loader: MemoryView
  }

  /// What all vCPUs share.
  struct Shared {
    /// Guest-physical; and the linear address of its first byte.
    var loader: GuestRange?
    var linear: UInt64 = 0
    var entries: [UInt64] = []
    var exits: [UInt64] = []
    var isLocked = false
    /// The policy's, and what came from outside.
    var protections: [HardeningPolicy.Protection] = []
  }

  /// Hardening of one machine; `record`, if anybody, gets every event, on any thread.
  public init(_ policy: HardeningPolicy, record: (@Sendable (AuditEvent) -> Void)?) {
    self.policy = policy
    self.record = record
    shared.withLock { $0.protections = policy.protections }
  }

  /// Makes the views and puts every vCPU into the kernel's.
  public func attach(_ machine: any VirtualMachine, _ vcpus: [any VirtualCPU]) throws(AcceleratorError) {
    let kernel = try machine.makeView(base: nil)
    var changes: [ViewChange] = []
    for protection in policy.protections { changes.append(ViewChange(kernel, protection.range, protection.rights)) }
    try machine.change(changes)
    let loader = try machine.makeView(base: kernel)
    var visitors: [LoaderVisitor] = []
    for vcpu in vcpus {
      try vcpu.selectView(kernel)
      visitors.append(LoaderVisitor(vcpu))
    }
    self.machine.withLock { [visitors] in
      $0 = Attached(machine: machine, visitors: visitors, kernel: kernel, loader: loader)
    }
    machine.memory.setDeviceGuard { [weak self] address, count, isWrite in
      self?.allowsDevice(address, count: count, isWrite: isWrite) ?? true
    }
  }

  /// Forgets what was registered and makes the views anew.
  public func reset() throws(AcceleratorError) {
    guard let attached = machine.withLock({ $0 }) else { return }
    shared.withLock { [policy] in
      $0 = Shared()
      $0.protections = policy.protections
    }
    for visitor in attached.visitors where !policy.pins.isEmpty { try? visitor.vcpu.pin([]) }
    try attach(attached.machine, attached.visitors.map(\.vcpu))
  }

  /// Devices are bound to the kernel's view; what that may not write, or not read, they do not either.
  private func allowsDevice(_ address: GuestPhysicalAddress, count: Int, isWrite: Bool) -> Bool {
    guard count > 0, let view = machine.withLock({ $0?.kernel }) else { return true }
    let needed: PageRights = isWrite ? .write : .read
    var page = address.rawValue & ~0xfff
    let (last, overflows) = address.rawValue.addingReportingOverflow(UInt64(count - 1))
    guard !overflows else { return true }
    while page <= last {
      if !view[GuestPhysicalAddress(page)].rights.contains(needed) {
        var event = self.event(.denied, nil, rip: nil)
        event.address = max(page, address.rawValue)
        event.size = UInt64(count)
        event.rights = "\(needed)"
        event.reason = "\(DenialReason.device)"
        // A device has no instruction to interrupt: its access fails, unless violations are let through.
        event.reaction = policy.reaction == .log ? "logged" : "refused"
        audit(event)
        return policy.reaction == .log
      }
      page += 0x1000
      if page == 0 { break }
    }
    return true
  }

  // MARK: Audit

  func event(_ kind: AuditEvent.Kind, _ visitor: LoaderVisitor?, rip: UInt64?) -> AuditEvent {
    var event = AuditEvent(
      time: monotonicNanoseconds() - started, kind: kind, view: visitor?.isInside == true ? "loader" : "kernel")
    event.vcpu = visitor?.vcpu.index
    event.rip = rip
    return event
  }

  func audit(_ event: @autoclosure () -> AuditEvent) {
    guard let record else { return }
    record(event())
  }

  // MARK: What others may know

  /// A view, for people.
  public struct Summary: Sendable {
    /// kernel or loader.
    public var name: String
    /// The accelerator's number.
    public var number: UInt32
    /// The rights of pages in no range.
    public var rights: PageRights
    /// The ranges with other rights.
    public var ranges: [MemoryView.Run]
  }

  /// The kernel's and the loader's.
  public var memoryViews: [MemoryView] { machine.withLock { $0 }.map { [$0.kernel, $0.loader] } ?? [] }

  /// The two views as they are now.
  public var views: [Summary] {
    guard let attached = machine.withLock({ $0 }) else { return [] }
    return [("kernel", attached.kernel), ("loader", attached.loader)].map { name, view in
      Summary(name: name, number: view.number, rights: view.defaultRights, ranges: view.runs)
    }
  }

  /// For each vCPU: whether it is in the loader's view, how often it went there, and how many violations it made.
  public var visits: [(vcpu: Int, isInside: Bool, entries: UInt64, denials: UInt64)] {
    machine.withLock { $0 }?.visitors.map {
      ($0.vcpu.index, $0.isInside, $0.entryCount.load(ordering: .relaxed), $0.denialCount.load(ordering: .relaxed))
    } ?? []
  }

  /// Whether the registration is locked.
  public var isLocked: Bool { shared.withLock { $0.isLocked } }

  /// Changes rights in both views from outside the guest, as the policy's `protect` does.
  public func protect(_ name: String, _ range: GuestRange, _ rights: PageRights) throws(AcceleratorError) {
    guard let attached = machine.withLock({ $0 }) else { return }
    shared.withLock { $0.protections.append(HardeningPolicy.Protection(name: name, range: range, rights: rights)) }
    try attached.machine.change([
      ViewChange(attached.kernel, range, rights), ViewChange(attached.loader, range, rights),
    ])
  }

  /// Takes held interrupts' bound into account: to be called now and then, on any thread.
  public func checkBounds() {
    let now = monotonicNanoseconds()
    for visitor in machine.withLock({ $0 })?.visitors ?? [] {
      let since = visitor.heldSince.load(ordering: .relaxed)
      if since != 0, now > since, now - since > UInt64(policy.interruptBound) * 1_000_000 { visitor.vcpu.kick() }
    }
  }
}

/// One vCPU as a visitor of the loader. Its plain fields belong to the vCPU's thread.
final class LoaderVisitor: @unchecked Sendable {
  let vcpu: any VirtualCPU
  let entryCount = Atomic<UInt64>(0)
  let denialCount = Atomic<UInt64>(0)
  private let inside = Atomic(false)
  /// When interrupts began to wait; 0 while they do not.
  let heldSince = Atomic<UInt64>(0)
  /// Whether registers are to be pinned when the vCPU comes out of the guest next.
  let pins = Atomic(false)
  /// Loader code that an exception or interrupt has put off.
  var suspended: [GeneralRegisters] = []
  /// Modules that were verified on this visit, less those that were made executable: bytes.
  var verified: UInt64 = 0
  /// The violation before this one, and how often it came in a row.
  var last: (rip: UInt64, address: UInt64, count: Int) = (0, 0, 0)

  init(_ vcpu: any VirtualCPU) { self.vcpu = vcpu }

  /// Pins registers where that is still to be done; on the vCPU's thread.
  func takePins(_ registers: Set<PinnedRegister>) throws(AcceleratorError) {
    if pins.exchange(false, ordering: .acquiring) { try vcpu.pin(registers) }
  }

  var isInside: Bool {
    get { inside.load(ordering: .relaxed) }
    set { inside.store(newValue, ordering: .relaxed) }
  }
}
