import Host
import JSON
import Machine
import Migration
import Monitor
import PageClasses
import Synchronization
import TLS

/// The migrations of a machine as the control socket has them: at most one at a time.
final class MigrationControl: Sendable {
  private let machine: MovingMachine
  let objects: TLSObjects
  private let state = Mutex(State())
  private let emit = Mutex<@Sendable (QMPEvent) -> Void>({ _ in })

  private struct State {
    var parameters = MigrationParameters()
    var tls = TLSChoice()
    var source: MigrationSource?
    /// Where the machine came from another process.
    var incoming: MigrationDestination?
    var isUnknown = false
  }

  /// Which credentials a migration takes, as `migrate-set-parameters` has it.
  struct TLSChoice {
    /// An id of `objects`; empty for no TLS.
    var id = ""
    /// Empty for the destination's host.
    var hostName = ""
  }

  init(_ machine: MovingMachine, _ objects: TLSObjects) {
    self.machine = machine
    self.objects = objects
  }

  /// Where events go.
  func connect(_ emit: @escaping @Sendable (QMPEvent) -> Void) { self.emit.withLock { $0 = emit } }

  /// The machine is to come from elsewhere.
  func follow(_ destination: MigrationDestination) { state.withLock { $0.incoming = destination } }

  func tell(_ status: MigrationProgress.Status) { emit.withLock { $0 }(.migration(status.rawValue)) }

  var parameters: MigrationParameters {
    get { state.withLock { $0.parameters } }
    set { state.withLock { $0.parameters = newValue } }
  }

  var tls: TLSChoice {
    get { state.withLock { $0.tls } }
    set { state.withLock { $0.tls = newValue } }
  }

  /// Begins to move the machine; what becomes of it is told by `progress` and by events.
  func start(to text: String) throws(MonitorError) {
    let endpoint = try Self.endpoint(text)
    let source = try state.withLock { state throws(MonitorError) in
      if let source = state.source, Self.busy.contains(source.progress.now.status) {
        throw .refused("There's a migration process in progress")
      }
      var parameters = state.parameters
      if !state.tls.id.isEmpty {
        let credentials = try objects.credentials(state.tls.id, .client)
        parameters.tls = MigrationTLS(credentials, hostName: state.tls.hostName.isEmpty ? nil : state.tls.hostName)
      }
      let source = MigrationSource(machine, to: endpoint, parameters) { [weak self] in self?.tell($0) }
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

  private static let busy: [MigrationProgress.Status] = [
    .setup, .active, .device, .postCopyActive, .postCopyPaused,
  ]

  private static func endpoint(_ text: String) throws(MonitorError) -> StreamEndpoint {
    do { return try StreamEndpoint(text) } catch { throw .refused("\(error)") }
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
    guard let source = state.withLock({ $0.source }), Self.busy.contains(source.progress.now.status) else { return }
    guard source.cancel() else { throw .refused("the machine has been handed over") }
  }

  /// Has the machine go on there now, its pages after it, unless it is there already.
  func startPostCopy() throws(MonitorError) {
    guard let source = state.withLock({ $0.source }) else {
      throw .refused("there is no migration: use migrate first")
    }
    guard source.startPostCopy() else {
      throw .refused("the migration began without the capability postcopy-ram: set it before migrate")
    }
  }

  /// Cuts the links of a machine whose pages follow it, on either side.
  func pause() throws(MonitorError) {
    let (source, incoming) = state.withLock { ($0.source, $0.incoming) }
    guard source?.pausePostCopy() ?? false || incoming?.pausePostCopy() ?? false else { throw Self.noPostCopy }
  }

  /// Goes on after `pause`, or at another address of the destination's.
  func resume(to text: String) throws(MonitorError) {
    let endpoint = try Self.endpoint(text)
    guard let source = state.withLock({ $0.source }), source.resumePostCopy(endpoint) else { throw Self.noPostCopy }
  }

  /// Listens at another address for the source of pages that are still to come.
  func recover(at text: String) throws(MonitorError) {
    let endpoint = try Self.endpoint(text)
    guard let incoming = state.withLock({ $0.incoming }),
      [.postCopyActive, .postCopyPaused].contains(incoming.progress.now.status)
    else { throw Self.noPostCopy }
    do throws(HostError) { try incoming.listenAgain(at: endpoint) } catch { throw .refused("\(error)") }
  }

  private static let noPostCopy = MonitorError.refused("there is no machine whose pages follow it")

  /// Takes a machine back of which nobody could tell where it is; the user can.
  func reclaim() throws(MonitorError) {
    if state.withLock({ $0.source })?.reclaim() ?? false { return }
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
  var progress: MigrationProgress.Snapshot? { state.withLock { ($0.source?.progress ?? $0.incoming?.progress)?.now } }
}
