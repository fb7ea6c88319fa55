import BlockLayer
import GuestMemory
import Host
import Machine
import Monitor
import SavedMachine
import StateTree

/// Writes a running machine to a file, and takes one from there.
final class MachineSaver: Sendable {
  private static let nodeName = "saved"
  private static let version: UInt32 = 1

  let machine: Machine
  private let engine: String
  let disks: DiskControl?
  private let hasAgent: Bool

  init(_ machine: Machine, engine: String, disks: DiskControl?, hasAgent: Bool) {
    self.hasAgent = hasAgent
    self.machine = machine
    self.engine = engine
    self.disks = disks
  }

  /// Saves the machine, which goes on afterwards, or ends where it `stops`. Returns how long it stood, too, in milliseconds.
  func save(to path: String, stops: Bool) throws(MonitorError) -> (SaveReport, pause: UInt64) {
    try check()
    let description = description
    let started = monotonicNanoseconds()
    let outcome: Result<SaveReport, SaveFailure>
    do {
      outcome = try machine.save { [machine, disks] state in
        let result = Result { () throws(SaveFailure) in
          if let disks { try Self.flush(disks) }
          let tree = StateNode(Self.nodeName, version: Self.version, children: [description.node, state])
          do throws(SavedMachineError) {
            return try SavedMachine.write(tree, machine.memory, to: path)
          } catch {
            throw .file(error)
          }
        }
        // The vCPUs do not run again, whatever else is under way.
        if stops, case .success = result { machine.finish(.quit) }
        return result
      }
    } catch {
      throw .refused("\(error)")
    }
    let pause = (monotonicNanoseconds() - started) / 1_000_000
    do { return (try outcome.get(), pause) } catch { throw .refused("\(error)") }
  }

  /// Refuses what has something that no state carries.
  func check() throws(MonitorError) {
    guard !machine.memory.isArriving else {
      throw .refused("pages of the machine are still to come: wait until query-migrate says completed")
    }
  }

  /// What the machine is made of.
  var description: MachineDescription {
    MachineDescription(machine, engine: engine, hasAgent: hasAgent, disks: disks?.disks)
  }

  /// Makes durable what the guest has written to its disks.
  func flushDisks() throws(MonitorError) {
    guard let disks else { return }
    do { try Self.flush(disks) } catch { throw .refused("\(error)") }
  }

  private enum SaveFailure: Error, CustomStringConvertible {
    case disks(MonitorError)
    case file(SavedMachineError)

    var description: String {
      switch self {
      case .disks(let error): "\(error)"
      case .file(let error): "\(error)"
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
      if verify { try saved.verifyMemory() }
      try saved.map(into: machine.memory)
      return state
    } catch {
      throw .saved(error)
    }
  }
}
