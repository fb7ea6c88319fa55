import Accelerator
import BlockLayer
import GuestMemory
import Host
import LoaderHardening
import Machine
import Monitor
import SavedMachine
import StateTree

/// Writes a running machine to a file, and takes one from there.
final class MachineSaver: Sendable {
  private static let nodeName = "saved"
  private static let version: UInt32 = 1

  let machine: Machine
  private let engine: any Accelerator
  private let cpu: CPUModel
  let disks: DiskControl?
  private let networks: RunNetworks?
  private let hasAgent: Bool
  private let hardening: HardeningPolicy?

  init(
    _ machine: Machine, engine: any Accelerator, cpu: CPUModel, disks: DiskControl?, networks: RunNetworks?,
    hasAgent: Bool, hardening: HardeningPolicy?
  ) {
    self.networks = networks
    self.cpu = cpu
    self.hasAgent = hasAgent
    self.hardening = hardening
    self.machine = machine
    self.engine = engine
    self.disks = disks
  }

  /// Saves the machine, which goes on afterwards, or ends where it `stops`. Returns how long it stood, too, in microseconds.
  func save(to path: String, stops: Bool) throws(MonitorError) -> (SaveReport, pause: UInt64) {
    try check()
    do { return try write(to: path, stops: stops) } catch { throw .refused("\(error)") }
  }

  /// RAM goes while the machine runs; what was written meanwhile, while it stands; checksums and durability, once it goes on.
  private func write(to path: String, stops: Bool) throws -> (SaveReport, pause: UInt64) {
    let description = description
    let writer = LiveWriter(try SavedMachineWriter(machine.memory, to: path))
    try machine.startDirtyTracking()
    defer { machine.stopDirtyTracking() }
    try writer.file.writeAll()
    let pending = try writeRounds(writer.file)
    let started = monotonicNanoseconds()
    let outcome = try machine.save { [machine, disks] state in
      Result { () throws(SaveFailure) -> (StateNode, SaveReport?) in
        if let disks { try Self.flush(disks) }
        let tree = StateNode(Self.nodeName, version: Self.version, children: [description.node, state])
        let last: [UInt64]
        do throws(MachineError) { last = try machine.takeDirtyPages() } catch { throw .machine(error) }
        try Self.file { () throws(SavedMachineError) in
          try writer.file.write(pages: zip(pending, last).map { $0 | $1 })
        }
        guard stops else { return (tree, nil) }
        let report = try Self.file { () throws(SavedMachineError) in try writer.file.finish(tree) }
        // The vCPUs do not run again, whatever else is under way.
        machine.finish(.quit)
        return (tree, report)
      }
    }
    let pause = (monotonicNanoseconds() - started) / 1000
    let (tree, report) = try outcome.get()
    return (try report ?? writer.file.finish(tree), pause)
  }

  /// Writes what has changed, until that is little or becomes no less; returns the pages that are to be written yet.
  private func writeRounds(_ file: SavedMachineWriter) throws -> [UInt64] {
    var before = Int.max
    for _ in 0..<Self.mostRounds {
      let dirty = try machine.takeDirtyPages()
      let count = dirty.reduce(0) { $0 + $1.nonzeroBitCount }
      guard count > Self.fewPages, count < before / 4 * 3 else { return dirty }
      before = count
      try file.write(pages: dirty)
    }
    return try machine.takeDirtyPages()
  }

  private static let mostRounds = 10
  private static let fewPages = 64

  /// For the closure that runs while the machine stands.
  private struct LiveWriter: @unchecked Sendable {
    let file: SavedMachineWriter
    init(_ file: SavedMachineWriter) { self.file = file }
  }

  private static func file<Result>(_ body: () throws(SavedMachineError) -> Result) throws(SaveFailure) -> Result {
    do throws(SavedMachineError) { return try body() } catch { throw .file(error) }
  }

  /// Refuses what has something that no state carries.
  func check() throws(MonitorError) {
    guard !machine.memory.isArriving else {
      throw .refused("pages of the machine are still to come: wait until query-migrate says completed")
    }
  }

  /// What the machine is made of.
  var description: MachineDescription {
    MachineDescription(
      machine, engine: engine, cpu: cpu, hasAgent: hasAgent, disks: disks?.disks, networks: networks,
      hardening: hardening)
  }

  /// Makes durable what the guest has written to its disks.
  func flushDisks() throws(MonitorError) {
    guard let disks else { return }
    do { try Self.flush(disks) } catch { throw .refused("\(error)") }
  }

  private enum SaveFailure: Error, CustomStringConvertible {
    case disks(MonitorError)
    case file(SavedMachineError)
    case machine(MachineError)

    var description: String {
      switch self {
      case .disks(let error): "\(error)"
      case .file(let error): "\(error)"
      case .machine(let error): "\(error)"
      }
    }
  }

  /// What the guest takes for written must be in the files that the restored machine opens.
  private static func flush(_ control: DiskControl) throws(SaveFailure) {
    let names = control.machine.diskPlaces.map(\.name)
    do throws(MonitorError) {
      for name in names {
        try control.wait { graph, done in
          guard let disk = graph.disks[name], !disk.isReadOnly else { return done(nil) }
          // The request keeps itself until it is answered.
          let request = BlockRequest(.flush) { _ in }
          request.completion = { error in
            request.completion = { _ in }
            done(error)
          }
          disk.submit(request)
        }
      }
    } catch {
      throw .disks(error)
    }
  }

  /// Opens a saved machine, checks that this one is made as it was, and puts its RAM in place; returns the rest.
  static func restore(
    _ path: String, into machine: Machine, _ here: MachineDescription, verify: Bool
  ) throws(Failure) -> StateNode {
    do throws(SavedMachineError) {
      let saved = try SavedMachine(path: path)
      let description: MachineDescription
      let state: StateNode
      do throws(StateError) {
        guard saved.state.name == nodeName else { throw .unexpected(node: saved.state.name, wanted: nodeName) }
        guard saved.state.version == version else {
          throw .version(node: nodeName, found: saved.state.version, known: version...version)
        }
        description = try MachineDescription(saved.state.child(MachineDescription.nodeName))
        state = try saved.state.child("machine")
      } catch {
        throw .state(path: path, error)
      }
      if let (what, then, now) = description.difference(from: here) {
        throw .differs(path: path, what: what, saved: then, here: now)
      }
      let lacks = description.lacks(here)
      guard lacks.isEmpty else { throw .lacks(path: path, engine: here.engine, lacks) }
      if verify { try saved.verifyMemory() }
      try saved.map(into: machine.memory)
      return state
    } catch {
      throw .saved(error)
    }
  }
}
