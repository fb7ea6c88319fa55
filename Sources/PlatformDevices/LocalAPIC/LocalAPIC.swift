import Accelerator
import DeviceModel
import StateTree
import Synchronization

/// The local APIC of one vCPU in the VMM (Intel SDM vol. 3, chapter 11): xAPIC and x2APIC.
///
/// Every register is an atomic word. The vCPU's thread alone writes them, but for the request and trigger-mode registers,
/// into which any thread posts: a message sets a bit, sees by one read of the processor priority whether the vCPU must
/// know, and wakes it if so. Neither side takes a lock. The timer has one, since its registers and its expiry go together.
public final class LocalAPIC: LocalInterruptController, BusDevice, @unchecked Sendable {
  /// What a local APIC offers beyond the xAPIC; CPUID must say the same.
  public struct Features: OptionSet, Sendable {
    /// Bits as below.
    public let rawValue: UInt8
    /// Bits as below.
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    /// x2APIC mode (CPUID leaf 1, ECX bit 21).
    public static let x2APIC = Self(rawValue: 1)
    /// The timer's TSC-deadline mode (CPUID leaf 1, ECX bit 24).
    public static let timestampDeadline = Self(rawValue: 2)
  }

  /// Messages to the processor that are no interrupt vectors.
  struct Events {
    static let nonMaskable: UInt32 = 1
    static let initialize: UInt32 = 2
    static let startUp: UInt32 = 4
    /// The PIC's interrupt, asked for by a message instead of its line.
    static let external: UInt32 = 8
    /// A second NMI, before the first was taken: a processor takes the first at once and keeps the second.
    static let secondNonMaskable: UInt32 = nonMaskable << secondShift
    static let secondShift: UInt32 = 4
    static let vectorShift: UInt32 = 8
  }

  /// Guest-physical address of the registers after reset.
  public static let address: UInt64 = 0xfee0_0000
  /// Version 0x14 with six local vectors, and the suppression of end-of-interrupt broadcasts: the IOAPIC has the register
  /// that replaces them.
  static let version: UInt32 = 0x0105_0014

  /// `lapic` and the vCPU's number.
  public let name: String
  /// The vCPU's number: the initial APIC id and the x2APIC id.
  public let index: Int
  let features: Features
  unowned let bus: LocalAPICBus
  let registers: APICRegisterPage
  let timer: LocalAPICTimer
  /// IA32_APIC_BASE.
  let base: Atomic<UInt64>
  let events = Atomic<UInt32>(0)
  /// Errors since the guest last wrote the error status register.
  let errors = Atomic<UInt32>(0)
  /// Whether an interrupt may be deliverable: set by whoever posts one, cleared by the vCPU's thread when it finds none.
  private let requested = Atomic(false)
  private let wake: @Sendable () -> Void

  init(
    index: Int, features: Features, bus: LocalAPICBus, clock: any DeviceClock,
    untilTimestamp: @escaping @Sendable (UInt64) -> UInt64?, wake: @escaping @Sendable () -> Void
  ) {
    name = "lapic\(index)"
    self.index = index
    self.features = features
    self.bus = bus
    self.wake = wake
    registers = APICRegisterPage()
    base = Atomic(Self.resetBase(index))
    timer = LocalAPICTimer(registers: registers, clock: clock, untilTimestamp: untilTimestamp)
    timer.onExpiry = { [unowned self] in accept(vector: $0, isLevel: false) }
    resetRegisters()
  }

  static func resetBase(_ index: Int) -> UInt64 {
    address | APICBase.enabled | (index == 0 ? APICBase.isBootProcessor : 0)
  }

  // MARK: Mode

  /// Guest-physical address of the register page while there is one: in xAPIC mode.
  public var registerPage: UInt64? {
    let base = base.load(ordering: .relaxed)
    guard base & (APICBase.enabled | APICBase.extended) == APICBase.enabled else { return nil }
    return base & ~0xfff
  }

  var isEnabled: Bool { base.load(ordering: .relaxed) & APICBase.enabled != 0 }
  var isX2APIC: Bool { base.load(ordering: .relaxed) & APICBase.extended != 0 }
  var isSoftwareEnabled: Bool { registers[APICRegister.spuriousVector] & SpuriousVector.enabled != 0 }
  /// The id that messages name: 8 bits in xAPIC mode, 32 in x2APIC mode.
  var id: UInt32 { isX2APIC ? UInt32(index) : registers[APICRegister.id] >> 24 }

  // MARK: Delivery, from any thread

  /// Takes a message that was routed to this local APIC.
  func accept(_ mode: DeliveryMode, vector: UInt8, isLevel: Bool) {
    guard isEnabled else { return }
    switch mode {
    case .fixed, .lowestPriority:
      if isSoftwareEnabled { accept(vector: vector, isLevel: isLevel) }
    case .nonMaskable: post(Events.nonMaskable)
    case .initialize: post(Events.initialize, clearing: Events.startUp)
    case .startUp: post(Events.startUp | UInt32(vector) << Events.vectorShift, clearing: 0xff << Events.vectorShift)
    case .external: post(Events.external)
    // There is no system-management mode here.
    case .systemManagement: break
    }
  }

  private func accept(vector: UInt8, isLevel: Bool) {
    guard vector >= 16 else {
      report(APICError.receiveIllegalVector)
      return
    }
    if isLevel {
      registers.set(vector, in: APICRegister.triggerMode)
    } else {
      registers.clear(vector, in: APICRegister.triggerMode)
    }
    registers.set(vector, in: APICRegister.requests)
    // After the request in the one order of sequentially consistent accesses: either this reads the priority that the
    // vCPU has just lowered, or the vCPU, which looks at the requests after that, finds this one.
    if UInt32(vector >> 4) > registers[APICRegister.processorPriority] >> 4 { request() }
  }

  private func post(_ bits: UInt32, clearing cleared: UInt32 = 0) {
    var old = events.load(ordering: .relaxed)
    while true {
      let (done, seen) = events.weakCompareExchange(
        expected: old, desired: old & ~cleared | bits | (old & bits & Events.nonMaskable) << Events.secondShift,
        ordering: .sequentiallyConsistent)
      if done { break }
      old = seen
    }
    if bits & Events.external != 0 { request() } else { wake() }
  }

  private func request() {
    if !requested.exchange(true, ordering: .sequentiallyConsistent) { wake() }
  }

  /// Notes an error and interrupts for it where it is a new one (SDM vol. 3, 11.5.3).
  func report(_ error: UInt32) {
    let old = errors.bitwiseOr(error, ordering: .relaxed).oldValue
    // An illegal vector in the error's own entry is not reported by it.
    guard old & error == 0, registers[APICRegister.error] & 0xff >= 16 else { return }
    raise(APICRegister.error)
  }

  /// Delivers what a local vector table entry says.
  func raise(_ entry: UInt16) {
    let value = registers[entry]
    guard value & LocalVector.masked == 0 else { return }
    // The error's entry has no delivery mode: those bits are 0, which is fixed.
    guard let mode = LocalVector.delivery(value), mode != .startUp, mode != .lowestPriority else { return }
    accept(mode, vector: UInt8(truncatingIfNeeded: value), isLevel: false)
  }

  /// The PIC's output, wired to LINT0 of every local APIC. Level-triggered fixed delivery, which nobody uses there, is
  /// taken for edge-triggered.
  func externalLineRose() {
    if acceptsExternal {
      request()
    } else if isEnabled, LocalVector.delivery(registers[APICRegister.lint0]) != .external {
      raise(APICRegister.lint0)
    }
  }

  /// Whether the PIC's output reaches the processor: through LINT0, or because there is no local APIC in its way.
  private var acceptsExternal: Bool {
    let entry = registers[APICRegister.lint0]
    return !isEnabled || entry & LocalVector.masked == 0 && LocalVector.delivery(entry) == .external
  }

  // MARK: The processor's side

  /// Whether an interrupt may be deliverable; `acknowledgeInterrupt` says for certain.
  public var hasInterrupt: Bool { requested.load(ordering: .sequentiallyConsistent) }

  /// Whether NMI, INIT or SIPI wait for `takeEvents`.
  @inline(__always)
  public var hasEvents: Bool {
    events.load(ordering: .sequentiallyConsistent) & (Events.nonMaskable | Events.initialize | Events.startUp) != 0
  }

  /// Messages to the processor that are no interrupts.
  public struct ProcessorEvents: Equatable, Sendable {
    /// A non-maskable interrupt.
    public var nonMaskable = false
    /// A second one.
    public var secondNonMaskable = false
    /// INIT: comes before the others where there are several.
    public var initialize = false
    /// The vector of a start-up message.
    public var startUp: UInt8?

    /// These messages.
    public init(
      nonMaskable: Bool = false, secondNonMaskable: Bool = false, initialize: Bool = false, startUp: UInt8? = nil
    ) {
      self.nonMaskable = nonMaskable
      self.secondNonMaskable = secondNonMaskable
      self.initialize = initialize
      self.startUp = startUp
    }
  }

  /// Takes NMI, INIT and SIPI; on the vCPU's thread.
  public func takeEvents() -> ProcessorEvents {
    let taken = events.bitwiseAnd(Events.external, ordering: .sequentiallyConsistent).oldValue
    return ProcessorEvents(
      nonMaskable: taken & Events.nonMaskable != 0, secondNonMaskable: taken & Events.secondNonMaskable != 0,
      initialize: taken & Events.initialize != 0,
      startUp: taken & Events.startUp != 0 ? UInt8(truncatingIfNeeded: taken >> Events.vectorShift) : nil)
  }

  /// The vector of the PIC, or the highest request above the processor priority, which is in service from now on.
  public func acknowledgeInterrupt() -> UInt8? {
    if isExternalPending {
      events.bitwiseAnd(~Events.external, ordering: .relaxed)
      let vector = bus.acknowledgeExternal()
      refresh()
      return vector
    }
    guard let vector = deliverable else {
      refresh()
      return nil
    }
    registers.clear(vector, in: APICRegister.requests)
    registers.set(vector, in: APICRegister.inService)
    updatePriority()
    return vector
  }

  private var isExternalPending: Bool {
    events.load(ordering: .sequentiallyConsistent) & Events.external != 0 || bus.isExternalHigh && acceptsExternal
  }

  private var deliverable: UInt8? {
    guard isEnabled, let vector = registers.highest(in: APICRegister.requests) else { return nil }
    return UInt32(vector >> 4) > registers[APICRegister.processorPriority] >> 4 ? vector : nil
  }

  /// CR8: bits 7-4 of the task priority register.
  public var taskPriority: UInt8 {
    get { UInt8(truncatingIfNeeded: registers[APICRegister.taskPriority] >> 4) & 0xf }
    set { setTaskPriority(UInt32(newValue & 0xf) << 4) }
  }

  func setTaskPriority(_ value: UInt32) {
    registers[APICRegister.taskPriority] = value & 0xff
    updatePriority()
  }

  /// SDM vol. 3, 11.8.3.1. The vCPU's thread calls it whenever task priority or the in-service registers change.
  func updatePriority() {
    let task = registers[APICRegister.taskPriority]
    let service = UInt32(registers.highest(in: APICRegister.inService) ?? 0)
    registers.storeSequentially(
      task >> 4 >= service >> 4 ? task : service & 0xf0, at: APICRegister.processorPriority)
    refresh()
  }

  /// Makes `hasInterrupt` exact. A request that is posted meanwhile is either seen here or sets it again.
  func refresh() {
    if !isDeliverable {
      requested.store(false, ordering: .sequentiallyConsistent)
      guard isDeliverable else { return }
    }
    request()
  }

  private var isDeliverable: Bool { isExternalPending || deliverable != nil }

  /// The end of the most urgent interrupt in service; that of a level-triggered one goes on to the IOAPIC.
  func endOfInterrupt() {
    guard let vector = registers.highest(in: APICRegister.inService) else { return }
    // Before the next request of this vector may change its trigger mode.
    let isLevel = registers.contains(vector, in: APICRegister.triggerMode)
    registers.clear(vector, in: APICRegister.inService)
    updatePriority()
    let isSuppressed = registers[APICRegister.spuriousVector] & SpuriousVector.suppressesBroadcast != 0
    if isLevel, !isSuppressed { bus.endOfInterrupt(vector: vector) }
  }
}
