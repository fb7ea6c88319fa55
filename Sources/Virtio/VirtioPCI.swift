import DeviceModel
import GuestMemory
import Host
import PlatformDevices
import StateTree
import Synchronization

/// A virtio device on PCI (virtio 1.2, 4.1; no legacy interface): registers in one BAR, MSI-X or INTx.
///
/// Registers belong to the vCPUs, behind a lock; queues and the device behind them to one I/O loop, which eventfds wake.
public final class VirtioPCI: PCIDevice, DrainableDevice, @unchecked Sendable {
  typealias Registers = VirtioPCIRegisters

  /// The device's name.
  public let name: String
  /// Configuration space, BAR and interrupts.
  public let function: PCIFunction
  /// What is behind the transport.
  public let device: any VirtioDevice
  let memory: GuestMemory
  private let loop: EventLoop
  /// One a queue: a driver's write to the queue's notification address.
  private let notifiers: [QueueNotifier]
  /// Where in configuration space the window on the BAR is.
  private let window: Int
  private let isSynchronous: Bool
  private let onFault: @Sendable (String) -> Void
  let registers: Mutex<Registers>
  /// The queues that the device works on. The I/O loop's, but for when the device is drained.
  private var queues: [Virtqueue?] = []
  /// The driver has broken a queue and not reset the device since: nothing more is taken.
  private let isBroken = Atomic(false)

  /// A device of `host` whose queues `loop` runs.
  ///
  /// - Parameters:
  ///   - device: what kind of device it is.
  ///   - host: the bus.
  ///   - line: see `PCIHost.line`.
  ///   - interrupts: where messages go.
  ///   - memory: the guest's.
  ///   - loop: the thread of the queues.
  ///   - isSynchronous: whether a notification ends when what it is about has been done and told: for machines that do the
  ///     same at every run.
  ///   - onFault: told in one line, on any thread, when the driver has broken a queue.
  /// - Throws: when the host gives no eventfd.
  public init(
    _ device: any VirtioDevice, host: PCIHost, line: InterruptLine.Source, interrupts: any InterruptSink,
    memory: GuestMemory, loop: EventLoop, isSynchronous: Bool = false,
    onFault: @escaping @Sendable (String) -> Void = { _ in }
  ) throws(HostError) {
    name = device.name
    self.device = device
    self.memory = memory
    self.loop = loop
    self.isSynchronous = isSynchronous
    self.onFault = onFault
    let (configuration, window) = Self.configuration(of: device)
    self.window = window
    function = PCIFunction(configuration, host: host, line: line, interrupts: interrupts)
    registers = Mutex(Registers(queueSizes: device.queueSizes))
    var notifiers: [QueueNotifier] = []
    for _ in device.queueSizes { notifiers.append(try QueueNotifier()) }
    self.notifiers = notifiers
    device.configurationChanged = { [weak self] in self?.configurationChanged() }
    device.serve = { [weak self] queue in self?.process(queue) }
    for (index, notifier) in notifiers.enumerated() {
      try loop.add(notifier.event.descriptor.rawValue, .readable) { [weak self] _ in
        _ = notifier.event.drain()
        self?.process(index)
      }
    }
  }

  /// Lets go of the loop, when nothing is under way any more: the machine has lost the device.
  public func disconnect() {
    quiesce()
    onLoop { [self] in
      for notifier in notifiers { loop.remove(notifier.event.descriptor.rawValue) }
      device.disconnect()
    }
  }

  /// What the device offers.
  public var offeredFeatures: VirtioFeatures { device.features.union(.transport) }

  // MARK: BAR 0

  enum Layout {
    static let common: UInt64 = 0x0000
    static let interruptStatus: UInt64 = 0x1000
    static let device: UInt64 = 0x2000
    static let notify: UInt64 = 0x3000
    static let end: UInt64 = 0x4000
    static let messages: UInt32 = 0x8000
    static let pending: UInt32 = 0xc000
    static let size: UInt64 = 0x10000
    /// Bytes between two queues' notification addresses.
    static let notifyStep: UInt64 = 4
  }

  /// A register, or the device's configuration.
  public func readBAR(_ bar: Int, offset: UInt64, size: Int) -> UInt64 {
    switch offset {
    case Layout.common..<Layout.interruptStatus:
      registers.withLock { $0.read(Int(offset), size, offered: offeredFeatures) }
    case Layout.interruptStatus: readInterruptStatus()
    case Layout.device..<Layout.notify:
      device.readConfiguration(offset: Int(offset - Layout.device), size: size)
    default: 0
    }
  }

  /// A register, or a notification.
  public func writeBAR(_ bar: Int, offset: UInt64, size: Int, value: UInt64) {
    switch offset {
    case Layout.common..<Layout.interruptStatus: writeCommon(Int(offset), size, value)
    case Layout.notify..<Layout.end:
      let index = Int((offset - Layout.notify) / Layout.notifyStep)
      guard index < notifiers.count else { break }
      if isSynchronous { serve(index) } else { notifiers[index].event.signal() }
    default: break
    }
  }

  /// Reading takes the bits and releases the pin (4.1.4.5).
  private func readInterruptStatus() -> UInt64 {
    let bits = registers.withLock { registers in
      defer { registers.interruptStatus = 0 }
      return registers.interruptStatus
    }
    function.setInterruptPin(false)
    return UInt64(bits)
  }

  private func writeCommon(_ offset: Int, _ size: Int, _ value: UInt64) {
    let action = registers.withLock { $0.write(offset, size, value, offered: offeredFeatures) }
    switch action {
    case .none: break
    case .reset:
      quiesce()
      registers.withLock { $0 = Registers(queueSizes: device.queueSizes) }
      function.setInterruptPin(false)
    case .start: start(isRestored: false)
    }
  }

  // MARK: The window on the BAR in configuration space (4.1.4.9)

  /// The access that the window stands for; nil where the driver has set none that is allowed.
  private var windowAccess: (offset: UInt64, size: Int)? {
    let bar = function.readConfiguration(offset: window + 4, size: 1)
    let offset = function.readConfiguration(offset: window + 8, size: 4)
    let size = function.readConfiguration(offset: window + 12, size: 4)
    guard bar == 0, size == 1 || size == 2 || size == 4, UInt64(offset) < Layout.size, offset % size == 0 else {
      return nil
    }
    return (UInt64(offset), Int(size))
  }

  private func touchesWindow(_ offset: Int, _ size: Int) -> Bool {
    offset < window + Self.windowData + 4 && window + Self.windowData < offset + size
  }

  /// Fetches what the window shows.
  public func willReadConfiguration(offset: Int, size: Int) {
    guard touchesWindow(offset, size), let access = windowAccess else { return }
    let value = UInt32(truncatingIfNeeded: read(offset: access.offset, size: access.size))
    function.setConfiguration(offset: window + Self.windowData, size: 4, value: value)
  }

  /// Writes through the window; takes requests that waited until the device may reach memory.
  public func didWriteConfiguration(offset: Int, size: Int) {
    if touchesWindow(offset, size), let access = windowAccess {
      let value = function.readConfiguration(offset: window + Self.windowData, size: 4)
      write(offset: access.offset, size: access.size, value: UInt64(value))
    }
    if offset < 8, function.isBusMaster { for notifier in notifiers { notifier.event.signal() } }
  }

  // MARK: Queues

  /// Makes the queues where the driver has put them. A restored device goes on when the machine does.
  private func start(isRestored: Bool) {
    let (settings, features) = registers.withLock { ($0.queues, $0.driverFeatures) }
    isBroken.store(false, ordering: .relaxed)
    var queues: [Virtqueue?] = []
    do throws(VirtqueueError) {
      for queue in settings {
        queues.append(
          queue.isEnabled
            ? try Virtqueue(queue.configuration, features: features, memory: memory, progress: queue.progress) : nil)
      }
    } catch {
      return fail(queues.count, error)
    }
    let made = QueueList(queues)
    onLoop { [self] in
      self.queues = made.queues
      device.start(made.queues, features: features) { [unowned self] queue in interrupt(queue) }
      // The driver may have filled them before it said that it is ready.
      if !isRestored { for index in made.queues.indices { process(index) } }
    }
  }

  private final class QueueNotifier: Sendable {
    let event: EventNotifier
    init() throws(HostError) { event = try EventNotifier() }
  }

  private struct QueueList: @unchecked Sendable {
    let queues: [Virtqueue?]
    init(_ queues: [Virtqueue?]) { self.queues = queues }
  }

  private func process(_ index: Int) {
    if begin(index) { notifiers[index].event.signal() }
  }

  /// Begins requests of a queue; true where some are left. A device that may not reach memory (PCI's bus master bit) takes
  /// none, and looks again when it may.
  private func begin(_ index: Int) -> Bool {
    guard queues.indices.contains(index), queues[index] != nil, function.isBusMaster,
      !isBroken.load(ordering: .relaxed)
    else { return false }
    do throws(VirtqueueError) {
      return try device.process(queue: index)
    } catch {
      fail(index, error)
      return false
    }
  }

  /// Returns when all requests of a queue have been answered.
  private func serve(_ index: Int) {
    var isMore = true
    while isMore {
      isMore = onLoop { [self] in begin(index) }
      drain()
      onLoop { [self] in device.undrain() }
    }
  }

  /// The driver must reset the device (2.1.1).
  private func fail(_ queue: Int, _ error: VirtqueueError) {
    isBroken.store(true, ordering: .relaxed)
    onFault(VirtioMessage.queueBroken(device: name, queue: queue, error).text)
    registers.withLock { $0.status |= Registers.Status.needsReset }
    configurationChanged()
  }

  /// Runs `body` on the I/O loop and waits for it.
  private func onLoop<Result: Sendable>(_ body: @escaping @Sendable () -> Result) -> Result {
    let outcome = Condition<Result?>(nil)
    loop.execute {
      let result = body()
      outcome.withLock { $0 = result }
    }
    return outcome.wait { $0 }
  }

  /// Waits until nothing is under way, and takes the queues away.
  private func quiesce() {
    drain()
    onLoop { [self] in
      device.stop()
      queues = []
    }
  }

  /// Returns once nothing is under way; nothing is begun until `undrain`.
  public func drain() {
    let done = Condition(false)
    loop.execute { [self] in
      device.drain { done.withLock { $0 = true } }
    }
    _ = done.wait { $0 ? true : nil }
  }

  /// Whether requests wait for an error of the host's to be mended.
  public var hasStoppedRequests: Bool { onLoop { [self] in device.hasStoppedRequests } }

  /// Lets the device go on.
  public func undrain() {
    loop.execute { [self] in
      device.undrain()
      for index in queues.indices { process(index) }
    }
  }

  // MARK: Interrupts

  /// Tells the driver of used entries of a queue.
  private func interrupt(_ queue: Int) {
    let vector = registers.withLock { registers in
      if !registers.queues.indices.contains(queue) { return Registers.noVector }
      return registers.queues[queue].vector
    }
    raise(Registers.InterruptStatus.queue, vector)
  }

  /// Tells the driver that the device's configuration has changed.
  public func configurationChanged() {
    let vector = registers.withLock { registers in
      registers.generation &+= 1
      return registers.status & Registers.Status.driverOK == 0 ? nil : registers.configurationVector
    }
    if let vector { raise(Registers.InterruptStatus.configuration, vector) }
  }

  private func raise(_ bit: UInt8, _ vector: UInt16) {
    if function.isMSIXEnabled {
      if vector != Registers.noVector { function.signal(vector: Int(vector)) }
    } else {
      registers.withLock { $0.interruptStatus |= bit }
      function.setInterruptPin(true)
    }
  }

  // MARK: Life

  /// The state after power-on.
  public func reset() {
    quiesce()
    registers.withLock { $0 = Registers(queueSizes: device.queueSizes) }
    function.reset(for: self)
  }

  /// Version 1. The device is drained.
  public func save() -> StateNode {
    let registers = registers.withLock { registers in
      for (index, queue) in queues.enumerated() {
        if let queue { registers.queues[index].progress = queue.progress }
      }
      return registers
    }
    let own = onLoop { [self] in device.save() }
    return StateNode(name, version: 1, children: [function.save()] + [own].compactMap(\.self)) {
      registers.write(to: &$0)
    }
  }

  /// Puts a saved state in place. The device is drained.
  public func restore(_ node: StateNode) throws(StateError) {
    let sizes = device.queueSizes
    let offered = offeredFeatures
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      try Registers(from: &reader, queueSizes: sizes, offered: offered)
    }
    let putFunction = try function.prepareRestore(node.child(PCIFunction.nodeName), for: self)
    let own = node.children.first { $0.name != PCIFunction.nodeName }
    quiesce()
    try onLoop { [self] in Result { () throws(StateError) in try device.restore(own) } }.get()
    registers.withLock { $0 = restored }
    putFunction()
    if restored.status & Registers.Status.driverOK != 0 { start(isRestored: true) }
  }
}
