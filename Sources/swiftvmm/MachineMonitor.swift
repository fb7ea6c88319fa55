import Accelerator
import DeviceModel
import Host
import Machine
import Monitor

/// A machine as the control socket sees it.
final class MachineMonitor: MonitorTarget {
  private let machine: Machine
  let usesKVM: Bool

  init(_ machine: Machine, engine: String) {
    self.machine = machine
    usesKVM = engine == "kvm"
  }

  /// Serves the machine on `--control`, and tells every client what happens to it.
  static func serve(_ machine: Machine, engine: String, disks: DiskControl?, on text: String) throws(Failure)
    -> MonitorServer
  {
    let server: MonitorServer
    do {
      let listener = try StreamListener(StreamEndpoint(text))
      let commands = QMPCommand.standard + (disks.map { DiskCommands.all($0) + ExportCommands.all($0.exports) } ?? [])
      let target = MachineMonitor(machine, engine: engine)
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
    machine.addListener { event in
      switch event {
      case .stopped: server.emit(.stop)
      case .resumed: server.emit(.resume)
      case .reset(let byGuest): server.emit(.reset(byGuest ? .guestReset : .systemReset))
      case .powerdown: server.emit(.powerDown)
      case .ioError(let report):
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

  func pause() { machine.pause() }
  func resume() { machine.resume() }
  func powerDown() { machine.pressPowerButton() }
  func reset() { machine.reset(byGuest: false) }
  func quit() { machine.finish(.quit) }
}
