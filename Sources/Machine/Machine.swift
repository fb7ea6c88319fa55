import Accelerator
import BlockLayer
import Boot
import DeviceModel
import GuestMemory
import Host
import MemoryViews
import PlatformDevices
import StateTree
import Synchronization
import Virtio

/// Memory, vCPUs and devices, and what moves them between running, paused and over.
///
/// Threads: one a vCPU, and the loop that runs devices. Whoever changes the run state holds `operations`; vCPU threads
/// never do: they ask by `request`, which closes the gate they park at and leaves the rest to the loop.
public final class Machine: MachineControl {
  /// RAM.
  public let memory: GuestMemory
  /// The accelerator's side: slots, interrupts.
  public let virtualMachine: any VirtualMachine
  /// The vCPUs by number.
  public let vcpus: [any VirtualCPU]
  /// What CPUID shows the guest, but for the number of the vCPU.
  public let cpuid: [CPUIDLeaf]
  /// Ticks of the vCPUs' time-stamp counters a millisecond; 0 where the host does not know.
  public var counterKilohertz: UInt32 { counterRate.load(ordering: .relaxed) }
  private let counterRate: Atomic<UInt32>
  /// The loop that runs devices; control servers may put descriptors of their own on it.
  public let loop: EventLoop
  /// Exits by reason, one a vCPU.
  public let counters: [ExitCounters]
  /// COM1, whose input comes from outside.
  public var serial: Serial16550 { platform.serial }
  /// Every device, in the order in which they were attached, disks last.
  public var devices: [any Device] { platform.devices + platform.disks.devices }

  private var drainable: [any DrainableDevice] { devices.compactMap { $0 as? any DrainableDevice } }

  /// Whether a crash stops the machine, so that a debugger can look at it, instead of ending the run.
  public let stopsAtCrash = Atomic(false)

  private let clock: any GuestClock
  /// The clock, where time comes from the instructions.
  let virtualClock: VirtualClock?
  private let takesTurns: Bool
  private let platform: MachinePlatform
  let ports: AddressBus
  let memoryBus: AddressBus
  let assist: (any InstructionAssist)?
  let exitTrace: Trace?
  let supervisor: (any ViewSupervisor)?
  let gate: VCPUGate
  let interrupts: MachineInterrupts
  private let boot: BootPlan
  let pristine: (machine: StateNode, vcpus: [VCPUState])
  private let operations = Mutex(Operations())
  private let outcome = Condition<Outcome?>(nil)
  private let bootEntry = Mutex<BootEntry?>(nil)
  private let threads = Mutex<[HostThread]>([])
  let threadIDs: Condition<[Int: Int32]> = Condition([:])
  private let listeners = Mutex<[@Sendable (MachineEvent) -> Void]>([])

  private struct Operations {
    var state = RunState.prelaunch
    var pausedClock: UInt64?
  }

  init(_ parts: consuming MachineParts) throws(AcceleratorError) {
    memory = parts.memory
    virtualMachine = parts.virtualMachine
    vcpus = parts.vcpus
    cpuid = parts.cpuid
    loop = parts.loop
    clock = parts.clock
    virtualClock = parts.clock as? VirtualClock
    takesTurns = parts.takesTurns
    platform = parts.platform
    ports = parts.platform.ports
    memoryBus = parts.platform.memoryBus
    boot = parts.boot
    assist = parts.assist
    exitTrace = parts.exitTrace
    supervisor = parts.supervisor
    interrupts = parts.interrupts
    counters = parts.vcpus.map { _ in ExitCounters() }
    gate = VCPUGate(threads: parts.takesTurns ? 1 : parts.vcpus.count)
    var states: [VCPUState] = []
    for vcpu in parts.vcpus { states.append(try vcpu.readState()) }
    pristine = (try parts.virtualMachine.save(), states)
    counterRate = Atomic(states[0].tscKilohertz)
    interrupts.resetActivities()
  }

  /// Nanoseconds of virtual time since the start; nil where time is the host's.
  public var virtualTime: UInt64? { virtualClock?.now() }

  /// The views that the vCPUs obey, if any.
  public var memoryViews: [MemoryView] { supervisor?.memoryViews ?? [] }

  /// How the run has ended; nil while it has not.
  public var result: Outcome? { outcome.withLock { $0 } }

  /// What the guest is, and what of it is where in memory; nil before the start.
  public var booted: BootEntry? { bootEntry.withLock { $0 } }

  /// What the machine is doing.
  public var state: RunState { operations.withLock { $0.state } }

  /// Calls `listener` with every event from now on, on the thread that causes it; it must not wait for the machine.
  public func addListener(_ listener: @escaping @Sendable (MachineEvent) -> Void) {
    listeners.withLock { $0.append(listener) }
  }

  private func emit(_ event: MachineEvent) {
    for listener in listeners.withLock({ $0 }) { listener(event) }
  }

  // MARK: Start and end

  /// Loads the guest and starts the threads; the vCPUs run at once, or wait for `resume`.
  ///
  /// With `saved`, a state that `save` returned, the guest goes on from there; its RAM is in place already. Where it
  /// `isCopy`, of a machine that may have gone on too, its generation is another one.
  public func start(paused: Bool, from saved: StateNode? = nil, isCopy: Bool = false) throws(MachineError) {
    if let saved { try take(saved, isCopy: isCopy) } else { try load() }
    let loop = loop
    do {
      var started = [try HostThread(name: "devices") { loop.run() }]
      if takesTurns {
        started.append(try HostThread(name: "vcpus") { [self] in runTurns() })
      } else {
        for index in vcpus.indices {
          started.append(try HostThread(name: "vcpu\(index)") { [self] in runVCPU(index) })
        }
      }
      threads.withLock { $0 = started }
    } catch {
      throw .host(error)
    }
    if !paused {
      resume()
    } else if saved != nil {
      operations.withLock { if $0.state == .inMigrate { $0.state = .paused } }
    }
  }

  /// Waits until the run is over, stops every thread and says how it ended.
  public func waitUntilOver() -> Outcome {
    let result = outcome.wait { $0 }
    operations.withLock { operations in
      operations.state =
        switch result {
        case .crashed: .guestPanicked
        case .failed: .internalError
        default: .shutdown
        }
      gate.end()
      for presence in interrupts.presences { presence.kick() }
    }
    let all = threads.withLock { $0 }
    for thread in all.dropFirst() { thread.join() }
    for device in drainable { device.drain() }
    loop.stop()
    all.first?.join()
    return result
  }

  /// Ends the run; the first outcome counts.
  public func finish(_ result: Outcome) {
    let first = outcome.withLock { outcome in
      guard outcome == nil else { return false }
      outcome = result
      return true
    }
    guard first else { return }
    gate.close()
    switch result {
    case .poweredOff: emit(.shutdown(byGuest: true, reason: "guest-shutdown"))
    case .debugExit: emit(.shutdown(byGuest: true, reason: "guest-shutdown"))
    case .quit: emit(.shutdown(byGuest: false, reason: "host-qmp-quit"))
    case .interrupted: emit(.shutdown(byGuest: false, reason: "host-signal"))
    case .timeLimit: emit(.shutdown(byGuest: false, reason: "host-ui"))
    case .crashed:
      emit(.panicked)
      emit(.shutdown(byGuest: true, reason: "guest-panic"))
    case .failed: emit(.shutdown(byGuest: false, reason: "host-error"))
    }
  }

  // MARK: Run states

  /// Stops every vCPU and guest time; returns when all are out of the guest.
  public func pause() { pause(as: .paused) }

  private func pause(as state: RunState) {
    let stopped = operations.withLock { operations in
      guard operations.state == .running else { return false }
      quiesce(&operations)
      operations.state = state
      return true
    }
    if stopped { emit(.stopped) }
  }

  /// Lets guest time and the vCPUs go on, but for the vCPUs in `held`, which stay where they are until the next resume.
  public func resume(holding held: Set<Int> = []) {
    let resumed = operations.withLock { operations in
      guard [.paused, .prelaunch, .ioError].contains(operations.state) else { return false }
      go(&operations, holding: held)
      return true
    }
    if resumed { emit(.resumed) }
  }

  /// Resets every vCPU and device and boots the guest again.
  public func reset(byGuest: Bool) {
    let failure = operations.withLock { operations -> MachineError? in
      // What is not here, or here no more, cannot begin anew.
      guard ![.inMigrate, .finishMigrate, .postMigrate].contains(operations.state) else { return nil }
      let wasRunning = operations.state == .running
      quiesce(&operations)
      do throws(MachineError) {
        try resetParts()
        try load()
      } catch {
        return error
      }
      if wasRunning { go(&operations) }
      return nil
    }
    if let failure {
      finish(.failed(.call("reset", errno: 0, reason: "\(failure)")))
    } else {
      emit(.reset(byGuest: byGuest))
    }
  }

  /// The disks and their places on PCI bus 0, which a saved state relies on.
  public var diskPlaces: [(name: String, slot: UInt8)] { platform.disks.places }

  /// The network cards, in the order of their places.
  public var networkCards: [PlacedNetworkCard] { platform.disks.networkCards }

  /// The generation id, as a GUID is written.
  public var generationID: String { platform.generation.text }

  /// Presses the ACPI power button; what follows is the guest's choice.
  public func pressPowerButton() {
    platform.power.pressPowerButton()
    emit(.powerdown)
  }

  /// Stops the vCPUs until `wake`, as ACPI S3 does; guest time goes on, since a timer may be what wakes it.
  private func suspend() {
    let sleeps = operations.withLock { operations in
      guard operations.state == .running else { return false }
      quiesce(&operations)
      clock.start()
      operations.state = .suspended
      return true
    }
    guard sleeps else { return }
    emit(.suspended)
    passTime()
  }

  /// Virtual time must pass while the machine sleeps, too, for what wakes it.
  private func passTime() {
    guard let virtualClock, state == .suspended, virtualClock.skip() else { return }
    virtualClock.fireDue()
    loop.execute { [self] in passTime() }
  }

  /// Wakes the machine from S3: everything but RAM is reset, and the boot processor begins at the FACS's waking vector.
  public func wake() {
    let failure = operations.withLock { operations -> MachineError? in
      guard operations.state == .suspended else { return nil }
      do throws(MachineError) {
        try resetParts()
        try start(boot.wake(memory))
      } catch {
        return error
      }
      platform.power.wake()
      go(&operations)
      return nil
    }
    if let failure {
      finish(.failed(.call("wake-up", errno: 0, reason: "\(failure)")))
    } else {
      emit(.wokeUp)
    }
  }

  /// Runs `body` while every vCPU is out of the guest, and lets them go on afterwards if they ran.
  public func whilePaused<Result>(_ body: () -> Result) -> Result {
    operations.withLock { operations in
      let wasRunning = operations.state == .running
      if wasRunning { quiesce(&operations) }
      defer { if wasRunning { go(&operations) } }
      return body()
    }
  }

  /// Takes every vCPU out of the guest and stops guest time.
  private func quiesce(_ operations: inout Operations) {
    gate.close()
    guard !threads.withLock({ $0.isEmpty }) else { return }
    for presence in interrupts.presences { presence.kick() }
    gate.waitUntilParked()
    clock.stop()
    for device in drainable { device.drain() }
    operations.pausedClock = try? virtualMachine.readClock()
  }

  private func go(_ operations: inout Operations, holding held: Set<Int> = []) {
    // The accelerator's paravirtual clock must not show the pause either.
    if let pausedClock = operations.pausedClock { try? virtualMachine.writeClock(pausedClock) }
    operations.pausedClock = nil
    operations.state = .running
    for device in drainable { device.undrain() }
    clock.start()
    gate.open(holding: held)
  }

  private func resetParts() throws(MachineError) {
    do {
      try virtualMachine.restore(pristine.machine)
      try supervisor?.reset()
      for (vcpu, state) in zip(vcpus, pristine.vcpus) { try vcpu.writeState(state) }
    } catch {
      throw .accelerator(error)
    }
    counterRate.store(pristine.vcpus[0].tscKilohertz, ordering: .relaxed)
    for device in devices { device.reset() }
    for local in interrupts.locals { local.reset() }
    interrupts.resetActivities()
  }

  /// Puts the guest into memory and the boot processor at its entry.
  private func load() throws(MachineError) {
    let entry = try boot.load(memory)
    do { try platform.generation.place() } catch { throw .memory(error) }
    bootEntry.withLock { $0 = entry }
    try start(entry)
  }

  private func start(_ entry: BootEntry) throws(MachineError) {
    do {
      try vcpus[0].writeRegisters(entry.general)
      try vcpus[0].writeSystemRegisters(entry.system)
    } catch {
      throw .accelerator(error)
    }
  }

  // MARK: Requests of devices

  /// Called by devices in the middle of an access: the vCPU that makes it parks right after it.
  public func request(_ request: MachineRequest) {
    switch request {
    // A wake-up may come at any time and means nothing to a machine that does not sleep.
    case .wake, .ejected: break
    case .ioError(let report): if report.stops { gate.close() }
    default: gate.close()
    }
    loop.execute { [self] in
      switch request {
      case .powerOff: finish(.poweredOff)
      case .debugExit(let value): finish(.debugExit(value))
      case .reset: reset(byGuest: true)
      case .suspend: suspend()
      case .wake: wake()
      case .ejected(let slot):
        if let name = platform.disks.remove(slot: slot) { emit(.deviceDeleted(name)) }
      case .ioError(let report):
        emit(.ioError(report))
        if report.stops { pause(as: .ioError) }
      }
    }
  }

  // MARK: Hot-plug

  /// Plugs a disk in and tells the guest. It belongs to the machine until `deviceDeleted`, or the end.
  ///
  /// Errors: `diskName` and `disks`, where the name is taken or the bus is full.
  public func plugIn(_ disk: MachineDisk, on thread: IOThread) throws(MachineError) {
    try platform.disks.add(disk, on: thread, announcing: true)
  }

  /// Asks the guest to give a disk up; `deviceDeleted` follows when it has, or at its next reset.
  ///
  /// Errors: `noDisk`.
  public func requestUnplug(_ name: String) throws(MachineError) { try platform.disks.requestRemoval(of: name) }

  // MARK: vCPU threads

  /// The kernel's thread id of a vCPU, for `query-cpus-fast`; waits until the thread has started.
  public func threadID(vcpu: Int) -> Int32 {
    threadIDs.wait { $0[vcpu] }
  }

  func crash(_ vcpu: any VirtualCPU, _ reason: CrashReport.Reason) {
    gate.close()
    let report = CrashReport(reason: reason, vcpu: vcpu, memory: memory)
    if stopsAtCrash.load(ordering: .relaxed) { stop(.crashed(report)) } else { finish(.crashed(report)) }
  }

  /// Called by a vCPU thread that must not go on: stops the machine and tells why.
  func stop(_ event: MachineEvent) {
    gate.close()
    loop.execute { [self] in
      operations.withLock { operations in
        guard operations.state == .running else { return }
        quiesce(&operations)
        operations.state = .paused
      }
      emit(event)
    }
  }

  // MARK: Saved state

  /// Devices, vCPUs and the accelerator's part; RAM is apart. The machine must be paused.
  public func save() throws(MachineError) -> StateNode {
    do {
      // No local APIC of an accelerator can hold what the vCPU would take next.
      for local in interrupts.locals where local.hasEvents {
        try takeEvents(vcpus[local.index], local, interrupts.presences[local.index])
      }
    } catch {
      throw .accelerator(error)
    }
    var children = devices.map { $0.save() } + interrupts.locals.map { $0.save() }
    if let supervisor { children.append(supervisor.save()) }
    do {
      children.append(try virtualMachine.save())
      var change = EngineChange(clock: try virtualMachine.readClock(), changed: [])
      for vcpu in vcpus {
        var state = try vcpu.readState()
        if interrupts.model == .userSpace {
          let local = interrupts.locals[vcpu.index]
          state.activity = interrupts.presences[vcpu.index].activity
          state.system.cr8 = UInt64(local.taskPriority)
          (state.localAPIC, state.timestampDeadline) = (local.page, local.modelSpecific.deadline)
        }
        change.changed.append(EngineChange.changed(state, since: pristine.vcpus[vcpu.index]))
        children.append(state.node(index: vcpu.index))
      }
      children.append(change.node)
    } catch {
      throw .accelerator(error)
    }
    let now = clock.now()
    return StateNode("machine", version: 1, children: children) { $0.write(now) }
  }

  /// Stops the machine if it runs, calls `body` with its state while RAM and disks rest too, and lets it go on.
  ///
  /// Errors: `unsaved`, where there is something that no saved state carries.
  public func save<Result: Sendable>(_ body: (StateNode) -> Result) throws(MachineError) -> Result {
    let outcome = operations.withLock { operations -> Swift.Result<Result, MachineError> in
      guard [.running, .paused, .ioError].contains(operations.state) else {
        return .failure(.unsaved(.state(operations.state)))
      }
      let wasRunning = operations.state == .running
      if wasRunning { quiesce(&operations) }
      // `body` may have ended the run.
      defer { if wasRunning, result == nil { go(&operations) } }
      // Where the guest's own clock stood when it was stopped, not where a pause has let it come.
      if let pausedClock = operations.pausedClock { try? virtualMachine.writeClock(pausedClock) }
      if let disk = platform.disks.devices.first(where: { $0.hasStoppedRequests }) {
        return .failure(.unsaved(.stoppedRequests(disk: disk.name)))
      }
      do throws(MachineError) { return .success(body(try save())) } catch { return .failure(error) }
    }
    return try outcome.get()
  }

  /// Begins with a saved state instead of a boot.
  private func take(_ saved: StateNode, isCopy: Bool) throws(MachineError) {
    boot.memoryIsUsed()
    for device in drainable { device.drain() }
    try restore(saved)
    if isCopy {
      do { try platform.generation.renew() } catch { throw .memory(error) }
    }
    operations.withLock { $0.pausedClock = try? virtualMachine.readClock() }
  }

  // MARK: Going elsewhere

  /// Says that the machine waits for one that is to come; before `start`.
  public func awaitState() { operations.withLock { $0.state = .inMigrate } }

  /// Stops the machine for good unless `comeBack` follows, and returns its state, and whether it ran.
  ///
  /// Errors: `unsaved`, where there is something that no saved state carries; the machine goes on as before.
  public func leave() throws(MachineError) -> (state: StateNode, ran: Bool) {
    let outcome = operations.withLock { operations -> Result<(StateNode, Bool), MachineError> in
      guard [.running, .paused].contains(operations.state), result == nil else {
        return .failure(.unsaved(.state(operations.state)))
      }
      let ran = operations.state == .running
      if ran { quiesce(&operations) }
      if let pausedClock = operations.pausedClock { try? virtualMachine.writeClock(pausedClock) }
      do throws(MachineError) {
        if let disk = platform.disks.devices.first(where: { $0.hasStoppedRequests }) {
          throw MachineError.unsaved(.stoppedRequests(disk: disk.name))
        }
        let state = try save()
        operations.state = .finishMigrate
        return .success((state, ran))
      } catch {
        if ran { go(&operations) }
        return .failure(error)
      }
    }
    return try outcome.get()
  }

  /// Ends what `leave` began: the machine is elsewhere.
  public func stayAway() {
    operations.withLock { operations in
      if operations.state == .finishMigrate { operations.state = .postMigrate }
    }
  }

  /// Undoes `leave`: the machine goes on if it `ran`, else it is paused.
  public func comeBack(_ ran: Bool) {
    operations.withLock { operations in
      guard [.finishMigrate, .postMigrate].contains(operations.state), result == nil else { return }
      if ran { go(&operations) } else { operations.state = .paused }
    }
  }

  /// Puts a saved state in place. The machine must be paused; on an error it is in no usable state.
  public func restore(_ node: StateNode) throws(MachineError) {
    var states: [VCPUState] = []
    let machineNode: StateNode?
    let change: EngineChange?
    var putViews: @Sendable () throws(AcceleratorError) -> Void = { () throws(AcceleratorError) in }
    do throws(StateError) {
      let now = try node.read("machine", versions: 1...1) { reader, _ throws(StateError) in
        try reader.read(UInt64.self)
      }
      clock.set(now)
      for device in devices {
        if let later = device as? any LaterDevice, !node.children.contains(where: { $0.name == later.name }) {
          later.restoreAbsent()
        } else {
          try device.restore(node.child(device.name))
        }
      }
      for vcpu in vcpus { states.append(try VCPUState(node.child("vcpu\(vcpu.index)"), index: vcpu.index)) }
      machineNode = node.children.first { $0.name == pristine.machine.name }
      change = machineNode == nil ? try EngineChange(node.child(EngineChange.nodeName)) : nil
      if let supervisor { putViews = try supervisor.restore(node) }
    } catch {
      throw .state(error)
    }
    if let change {
      let components = CPUFeatures(cpuid).components
      let lost = states.indices.flatMap { index in
        change.adapt(&states[index], index: index, to: pristine.vcpus[index], components: components)
      }
      guard lost.isEmpty else { throw .notCarried(lost) }
    }
    do {
      if let machineNode { try virtualMachine.restore(machineNode) }
      if let change { try virtualMachine.writeClock(change.clock) }
      try putViews()
      for (vcpu, state) in zip(vcpus, states) {
        try vcpu.writeState(state)
        guard interrupts.model == .userSpace else { continue }
        // KVM's local APICs tell a vCPU that waits for INIT from one that waits for SIPI after it.
        interrupts.presences[vcpu.index].activity =
          state.activity == .uninitialized ? .waitForStartup : state.activity
      }
    } catch {
      throw .accelerator(error)
    }
    if states[0].tscKilohertz != 0 { counterRate.store(states[0].tscKilohertz, ordering: .relaxed) }
    do throws(StateError) {
      // After the time-stamp counters that their deadlines count on, and the controllers that drive them.
      for local in interrupts.locals {
        if let node = node.children.first(where: { $0.name == local.name }) {
          try local.restore(node)
        } else {
          let state = states[local.index]
          try local.load(page: state.localAPIC, base: state.system.apicBase, deadline: state.timestampDeadline)
        }
      }
    } catch {
      throw .state(error)
    }
  }
}
