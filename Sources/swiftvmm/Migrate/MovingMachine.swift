import Accelerator
import BlockLayer
import Glibc
import GuestMemory
import Host
import Machine
import Migration
import Monitor
import PageClasses
import StateTree
import Synchronization

/// The machine of this process as a migration sees it, on its way there or here.
final class MovingMachine: MigratingMachine, ArrivingMachine {
  private let saver: MachineSaver
  private let agent: AgentControl?
  private let throttle: VCPUThrottle
  /// Disks that the destination gets a copy of.
  private let copied = Mutex<Set<String>>([])
  private var machine: Machine { saver.machine }

  init(_ saver: MachineSaver, agent: AgentControl?) {
    self.saver = saver
    self.agent = agent
    throttle = VCPUThrottle(saver.machine)
  }

  var memory: GuestMemory { machine.memory }

  // MARK: There

  func description() throws(MigrationError) -> StateNode {
    try monitored { () throws(MonitorError) in try saver.check() }
    try notePromisedCopies()
    return saver.description.node
  }

  /// Disks that are copied must still be so at the end: there, nothing else would say that a copy is not whole.
  private func notePromisedCopies() throws(MigrationError) {
    let names = Mutex<Set<String>>([])
    try onDisks { graph, disk throws(BlockError) in
      let (exists, isReady) = graph.mirrorState(of: disk)
      guard exists else { return }
      guard isReady else { throw .mirrorNotReady(disk.name) }
      names.withLock { _ = $0.insert(disk.name) }
    }
    copied.withLock { [names = names.withLock { $0 }] in $0 = names }
  }

  func startDirtyTracking() throws(MigrationError) {
    try own { () throws(MachineError) in try machine.startDirtyTracking() }
  }

  func takeDirtyPages() throws(MigrationError) -> [UInt64] {
    try own { () throws(MachineError) in try machine.takeDirtyPages() }
  }

  func stopDirtyTracking() { machine.stopDirtyTracking() }

  func pageClasses(hintWait: UInt64) -> PageClassMap {
    let registers = machine.whilePaused { machine.vcpus.map { try? $0.readSystemRegisters() } }
    let processors = registers.compactMap { registers in
      registers.map { PagingRegisters(cr0: $0.cr0, cr3: $0.cr3, cr4: $0.cr4, efer: $0.efer) }
    }
    return PageClassMap(
      memory: memory, processors: processors, views: machine.memoryViews,
      hints: agent?.pageHints(milliseconds: hintWait) ?? [])
  }

  func throttle(_ percent: Int) { throttle.set(percent) }

  func leave() throws(MigrationError) -> (state: StateNode, ran: Bool) {
    let left = try own { () throws(MachineError) in try machine.leave() }
    do throws(MonitorError) {
      try saver.flushDisks()
    } catch {
      machine.comeBack(left.ran)
      throw .machine("\(error)")
    }
    return left
  }

  func releaseDisks() throws(MigrationError) {
    for name in copied.withLock({ $0 }) {
      try monitored { () throws(MonitorError) in
        try saver.disks?.wait { graph, done in
          if let disk = graph.disks[name] { graph.finishMirror(of: disk, then: done) } else { done(.noDisk(name)) }
        }
      }
    }
    try onDisks { graph, disk throws(BlockError) in try graph.makeAbsent(disk) }
  }

  func comeBack(_ ran: Bool) throws(MigrationError) {
    do throws(MigrationError) {
      try onDisks { graph, disk throws(BlockError) in try graph.makePresent(disk) }
    } catch {
      machine.stayAway()
      throw error
    }
    machine.comeBack(ran)
  }

  func stayAway() { machine.stayAway() }

  // MARK: Here

  func check(_ description: StateNode) throws(MigrationError) {
    let there: MachineDescription
    do { there = try MachineDescription(description) } catch { throw .state(error) }
    if let (what, there, here) = there.difference(from: saver.description, comparesPaths: false) {
      throw .machine("\(MovingFault.differs(what: what, there: there, here: here))")
    }
    let lacks = there.lacks(saver.description)
    guard lacks.isEmpty else {
      throw .machine("\(MovingFault.lacks(engine: saver.description.engine, lacks))")
    }
  }

  func arrive(_ state: StateNode) throws(MigrationError) {
    try own { () throws(MachineError) in try machine.start(paused: true, from: state) }
  }

  func takeDisks() throws(MigrationError) {
    try monitored { () throws(MonitorError) in try saver.disks?.exports.endFilling() }
    try onDisks { graph, disk throws(BlockError) in try graph.makePresent(disk) }
  }

  func goOn(_ ran: Bool) {
    if ran { machine.resume() }
  }

  // MARK: Errors

  private func onDisks(
    _ body: @escaping (BlockGraph, LiveDisk) throws(BlockError) -> Void
  ) throws(MigrationError) {
    guard let disks = saver.disks else { return }
    let names = Set(machine.diskPlaces.map(\.name))
    try monitored { () throws(MonitorError) in
      try disks.run { graph throws(BlockError) in
        for disk in graph.disks.values where names.contains(disk.name) { try body(graph, disk) }
      }
    }
  }

  private func own<Result>(_ body: () throws(MachineError) -> Result) throws(MigrationError) -> Result {
    do { return try body() } catch { throw .machine("\(error)") }
  }

  private func monitored(_ body: () throws(MonitorError) -> Void) throws(MigrationError) {
    do { try body() } catch { throw .machine("\(error)") }
  }
}

/// What this side says of a machine that cannot come.
enum MovingFault: CustomStringConvertible {
  case differs(what: String, there: String, here: String)
  case lacks(engine: String, [String])

  var description: String {
    switch self {
    case .differs(let what, let there, let here):
      "the machine has \(what) \(there), and the destination \(here): start it with the options of the source"
    case .lacks(let engine, let what):
      "engine \(engine) of the destination lacks what the guest has seen: \(what.joined(separator: ", ")); "
        + "a machine that is to change engines is started with --cpu common"
    }
  }
}

/// Keeps vCPUs from running for a part of their time.
final class VCPUThrottle: Sendable {
  private struct State {
    var percent = 0
    var thread: HostThread?
  }

  /// Microseconds of a turn of running and standing.
  private static let period = 20_000

  private let machine: Machine
  private let state = Condition(State())

  init(_ machine: Machine) { self.machine = machine }

  /// Begins, changes or ends it.
  func set(_ percent: Int) {
    let ending = state.withLock { state -> HostThread? in
      state.percent = percent
      guard percent == 0 else {
        // Without a thread they run as they like.
        if state.thread == nil { state.thread = try? HostThread(name: "throttle") { [self] in work() } }
        return nil
      }
      defer { state.thread = nil }
      return state.thread
    }
    ending?.join()
  }

  private func work() {
    while case let percent = state.withLock({ $0.percent }), percent > 0 {
      machine.whilePaused { _ = usleep(UInt32(Self.period * percent / 100)) }
      usleep(UInt32(Self.period * (100 - percent) / 100))
    }
  }
}
