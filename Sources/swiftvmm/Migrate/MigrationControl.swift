import Host
import JSON
import Machine
import Migration
import Monitor
import PageClasses
import Synchronization

/// The migrations of a machine as the control socket has them: at most one at a time.
final class MigrationControl: Sendable {
  private let machine: MovingMachine
  private let state = Mutex(State())
  private let emit = Mutex<@Sendable (QMPEvent) -> Void>({ _ in })

  private struct State {
    var parameters = MigrationParameters()
    var source: MigrationSource?
    /// Where the machine came from another process.
    var incoming: MigrationProgress?
    var isUnknown = false
  }

  init(_ machine: MovingMachine) { self.machine = machine }

  /// Where events go.
  func connect(_ emit: @escaping @Sendable (QMPEvent) -> Void) { self.emit.withLock { $0 = emit } }

  /// The machine is to come from elsewhere.
  func follow(_ progress: MigrationProgress) { state.withLock { $0.incoming = progress } }

  func tell(_ status: MigrationProgress.Status) { emit.withLock { $0 }(.migration(status.rawValue)) }

  var parameters: MigrationParameters {
    get { state.withLock { $0.parameters } }
    set { state.withLock { $0.parameters = newValue } }
  }

  /// Begins to move the machine; what becomes of it is told by `progress` and by events.
  func start(to text: String) throws(MonitorError) {
    let endpoint: StreamEndpoint
    do { endpoint = try StreamEndpoint(text) } catch { throw .refused("\(error)") }
    let source = try state.withLock { state throws(MonitorError) in
      if let source = state.source, [.setup, .active, .device].contains(source.progress.now.status) {
        throw .refused("There's a migration process in progress")
      }
      let source = MigrationSource(machine, to: endpoint, state.parameters) { [weak self] in self?.tell($0) }
      state.source = source
      return source
    }
    do throws(HostError) {
      _ = try HostThread(name: "migration") { [self] in move(source) }
    } catch {
      state.withLock { $0.source = nil }
      throw .refused("\(error)")
    }
  }

  private func move(_ source: MigrationSource) {
    do throws(MigrationError) {
      try source.run()
    } catch {
      if case .unknownOutcome = error { state.withLock { $0.isUnknown = true } }
      if error != .cancelled { printError("swiftvmm: \(error)") }
    }
  }

  /// Ends a migration, unless the destination may have the machine already.
  func cancel() throws(MonitorError) {
    guard let source = state.withLock({ $0.source }), [.setup, .active, .device].contains(source.progress.now.status)
    else { return }
    guard source.cancel() else { throw .refused("the machine has been handed over") }
  }

  /// Takes a machine back of which nobody could tell where it is; the user can.
  func reclaim() throws(MonitorError) {
    let isUnknown = state.withLock { state in
      defer { state.isUnknown = false }
      return state.isUnknown
    }
    guard isUnknown else { throw .refused("the machine was not lost on its way") }
    do throws(MigrationError) {
      try machine.comeBack(true)
    } catch {
      state.withLock { $0.isUnknown = true }
      throw .refused("\(error)")
    }
  }

  /// How far it is.
  var progress: MigrationProgress.Snapshot? { state.withLock { ($0.source?.progress ?? $0.incoming)?.now } }
}
