import Accelerator
import DeviceModel
import GuestMemory
import Host
import LoaderHardening
import Machine
import MemoryViews
import Monitor
import Synchronization

/// A machine as the control socket sees it.
final class MachineMonitor: MonitorTarget {
  private let machine: Machine
  private let hardening: LoaderHardening?
  let usesKVM: Bool

  init(_ machine: Machine, engine: String, hardening: LoaderHardening?) {
    self.machine = machine
    self.hardening = hardening
    usesKVM = engine == "kvm"
  }

  /// Serves the machine on `--control`, and tells every client what happens to it.
  static func serve(
    _ machine: Machine, engine: String, disks: DiskControl?, more: [QMPCommand], saver: MachineSaver,
    migrations: MigrationControl, hardening: LoaderHardening?, on text: String
  ) throws(Failure) -> MonitorServer {
    let server: MonitorServer
    do {
      let listener = try StreamListener(StreamEndpoint(text))
      let commands =
        QMPCommand.standard + SaveCommands.all(saver) + MigrationCommands.all(migrations) + migrations.objects.commands
        + (disks.map { DiskCommands.all($0) + ExportCommands.all($0.exports, $0.objects) + BackupCommands.all($0) }
          ?? [])
        + more
      let target = MachineMonitor(machine, engine: engine, hardening: hardening)
      server = try MonitorServer(listener, target: target, commands: commands, package: "swiftvmm \(Version.text)") {
        line in
        printError("swiftvmm: \(line)")
      }
    } catch let error as HostError {
      throw .host(error)
    } catch {
      throw .control("\(error)")
    }
    disks?.connect { server.emit($0) }
    migrations.connect { server.emit($0) }
    let isTold = Atomic<Bool>(false)
    machine.addListener { event in
      switch event {
      case .stopped: server.emit(.stop)
      case .resumed:
        isTold.store(false, ordering: .relaxed)
        server.emit(.resume)
      case .reset(let byGuest): server.emit(.reset(byGuest ? .guestReset : .systemReset))
      case .powerdown: server.emit(.powerDown)
      case .ioError(let report):
        // One line until it goes on, however many requests fail.
        if report.stops, !isTold.exchange(true, ordering: .relaxed) {
          Failure.diskStandsStill(name: report.disk, reason: report.reason).report()
        }
        server.emit(
          .blockIOError(
            device: report.disk, isWrite: report.isWrite, stops: report.stops, isNoSpace: report.isNoSpace,
            reason: report.reason))
      case .deviceDeleted(let name):
        // First, so that whoever reads the event finds the layers free.
        disks?.deviceDeleted(name)
        server.emit(.deviceDeleted(name))
      case .panicked: server.emit(.guestPanicked(pausing: false))
      case .shutdown(_, let reason): server.emit(.shutdown(QMPEvent.Cause(rawValue: reason) ?? .hostError))
      case .suspended: server.emit(.suspend)
      case .wokeUp: server.emit(.wakeUp)
      case .debug, .crashed: server.emit(.stop)
      }
    }
    return server
  }

  var runState: Monitor.RunState { Monitor.RunState(rawValue: machine.state.rawValue) ?? .internalError }

  var virtualCPUs: [MonitorVCPU] {
    machine.vcpus.map { MonitorVCPU(index: $0.index, threadID: machine.threadID(vcpu: $0.index)) }
  }

  var exitCounts: [ExitCount] {
    ExitCounters.Reason.allCases.map { reason in
      ExitCount(reason: reason.name, count: machine.counters.reduce(0) { $0 + $1[reason] })
    }
  }

  var views: MonitorViews? {
    guard let hardening else { return nil }
    let views = hardening.views.map { view in
      MonitorViews.View(
        name: view.name, number: view.number, rights: "\(view.rights)",
        ranges: view.ranges.map { ($0.range.start.rawValue, $0.range.size, "\($0.entry.rights)") })
    }
    let vcpus = hardening.visits.map {
      MonitorViews.VCPU(
        index: $0.vcpu, view: $0.isInside ? "loader" : "kernel", switches: $0.entries, denials: $0.denials)
    }
    return MonitorViews(isLocked: hardening.isLocked, views: views, vcpus: vcpus)
  }

  func protect(_ name: String, start: UInt64, size: UInt64, rights text: String) throws(MonitorError) {
    guard let hardening else { throw .refused("the machine runs without --harden") }
    guard let rights = PageRights(text) else { throw .parameterValue("rights", value: text) }
    guard (start | size) & 0xfff == 0, size > 0,
      let range = GuestRange(start: GuestPhysicalAddress(start), size: size),
      machine.memory.regions.contains(where: {
        $0.range.contains(range.start) && start + size - $0.range.start.rawValue <= $0.range.size
      })
    else { throw .refused("the range is not whole pages of one piece of RAM") }
    do { try hardening.protect(name, range, rights) } catch { throw .refused("\(error)") }
  }

  func pause() { machine.pause() }
  func resume() { machine.resume() }
  func powerDown() { machine.pressPowerButton() }
  func reset() { machine.reset(byGuest: false) }
  func quit() { machine.finish(.quit) }
}
