import Accelerator
import Boot
import CLinux
import GDBStub
import Glibc
import Host
import JSON
import LoaderHardening
import Machine
import Migration
import Monitor
import PlatformDevices
import SavedMachine
import SoftAccelerator
import StateTree
import Synchronization
import TLS

/// One `swiftvmm run`: builds the machine, connects its faces, waits for its end and reports.
struct RunSession {
  private let options: RunCommand
  private let machine: Machine
  private let accelerator: any Accelerator
  private let console: Console
  private let traces: [Trace]
  private let disks: RunDisks?
  private let networks: RunNetworks?
  private let ports: MachinePorts?
  private let hardening: RunHardening?
  /// Where the guest goes on, where it does not begin.
  private let saved: StateNode?

  init(_ options: RunCommand) throws(Failure) {
    self.options = options
    let memory = try parseSize(options.memory, option: "--memory")
    if let text = options.snapshotEvery { _ = try SnapshotInterval(text) }
    _ = try parseSize(options.recoveryQuota, option: "--recovery-quota")
    if let keep = options.keep { try SnapshotInterval.checkKeep(keep) }
    let image = try options.guest.map { name throws(Failure) in
      let path = try GuestCatalogue.path(of: name)
      return try Self.boot { () throws(BootError) in try BootImage(path: path) }
    }
    if options.deterministic, options.smpThreads == .on { throw .conflict("--deterministic", "--smp-threads on") }
    console = try Console(options.serial, isDeterministic: options.deterministic)
    let subjects = try Self.traceSubjects(options.trace)
    var configuration = MachineConfiguration(serial: console)
    configuration.memory = memory
    configuration.cpus = options.cpus
    configuration.cpu = options.cpu
    configuration.image = image
    configuration.interrupts = options.kernelIRQChip?.model
    configuration.commandLine = options.append
    configuration.loadAddress = try options.loadAddress.map { text throws(Failure) in
      try parseAddress(text, option: "--load-address")
    }
    configuration.initialRAMDisk = try options.initrd.map { path throws(Failure) in
      try Self.boot { () throws(BootError) in try BootImage(path: path) }
    }
    for text in options.module {
      // QEMU's syntax for -initrd with Multiboot: FILE and its arguments after the first blank.
      let parts = text.split(separator: " ", maxSplits: 1)
      let path = parts.first.map(String.init) ?? text
      let module = try Self.boot { () throws(BootError) in try BootImage(path: path) }
      configuration.modules.append(BootModule(image: module, string: text))
    }
    configuration.firmware = try Self.boot { () throws(BootError) in
      if let path = options.firmware { try BootROM(path: path) } else { try BootROM.builtIn() }
    }
    configuration.takesTurns = options.smpThreads == .off
    configuration.onDeviceFault = { printError("swiftvmm: \($0)") }
    // Disks may come later, by the control socket.
    disks =
      options.disk.isEmpty && options.control == nil
      ? nil
      : try RunDisks(
        options.disk, followsSnapshots: options.snapshotEvery != nil, absent: options.incoming != nil)
    configuration.disks = disks?.configuration
    ports = options.agent ? disks.map { MachinePorts(thread: $0.thread, names: [AgentControl.portName]) } : nil
    configuration.ports = ports
    if options.deterministic, let net = options.net.first(where: { !$0.isNone }) {
      throw .conflict("--deterministic", "--net \(net.text)")
    }
    networks = try RunNetworks(options.net) { () throws(Failure) in
      var disks: [Disk] = []
      for (number, option) in options.disk.enumerated() { disks.append(try option.parse(number: number)) }
      return StationAddress(disks: disks, control: options.control)
    }
    configuration.networks = networks?.configuration
    hardening = try options.harden.map { path throws(Failure) in try RunHardening(path, audit: options.audit) }
    configuration.supervisor = hardening?.supervisor
    accelerator = try options.engine.open(
      softOption: Self.softOption(options, subjects.map(\.0)), isDeterministic: options.deterministic, cpu: options.cpu)
    if hardening?.supervisor.policy.pins.isEmpty == false, !accelerator.capabilities.contains(.registerPinning) {
      throw .needsSoftEngine(option: "--harden with pinned registers")
    }
    traces = try subjects.map { subject, path throws(Failure) in try Self.openTrace(subject, path) }
    configuration.traces = traces
    if !(accelerator is SoftAccelerator) { configuration.assist = SoftInstructionAssist() }
    do { machine = try MachineBuilder(configuration, on: accelerator).build() } catch { throw .machine(error) }
    guard let path = options.restore else {
      saved = nil
      return
    }
    let description = MachineDescription(
      machine, engine: accelerator, cpu: options.cpu, hasAgent: options.agent, disks: disks, networks: networks,
      hardening: hardening?.supervisor.policy)
    saved = try MachineSaver.restore(path, into: machine, description, verify: options.verify)
  }

  /// `--snapshot-every`.
  private static func schedule(
    _ options: RunCommand, _ keeper: SnapshotKeeper?, _ agent: AgentControl?
  ) throws(Failure) -> SnapshotSchedule? {
    guard let text = options.snapshotEvery, let keeper else { return nil }
    return SnapshotSchedule(
      keeper, agent, try SnapshotInterval(text), keep: options.keep ?? SnapshotInterval.defaultKeep)
  }

  /// `--incoming-disks`.
  private static func awaitDisks(
    _ control: DiskControl?, at text: String, _ credentials: TLSCredentials?
  ) throws(Failure) {
    let endpoint: StreamEndpoint
    do throws(HostError) { endpoint = try StreamEndpoint(text) } catch { throw .host(error) }
    do throws(MonitorError) { try control?.exports.startFilling(endpoint, credentials) } catch {
      throw .control("\(error)")
    }
  }

  /// The first option that only the software engine has.
  private static func softOption(_ options: RunCommand, _ traces: [Trace.Subject]) -> String? {
    if options.deterministic { return "--deterministic" }
    for case .vcpu(let kind) in traces { return "--trace \(kind.rawValue)" }
    return options.smpThreads == .off ? "--smp-threads off" : nil
  }

  /// A loop for what ends a run, signals and the time limit, where the machine is still to come: its own does not run yet.
  private static func watch() throws(Failure) -> EventLoop {
    do throws(HostError) { return try EventLoop() } catch { throw .host(error) }
  }

  private static func run(_ loop: EventLoop) throws(Failure) -> HostThread {
    do throws(HostError) { return try HostThread(name: "watch") { loop.run() } } catch { throw .host(error) }
  }

  /// Runs to the end and returns the exit status.
  func run() throws(Failure) -> Int32 {
    let started = monotonicNanoseconds()
    let isAwaited = options.incoming != nil
    let watch = try isAwaited ? Self.watch() : machine.loop
    let signals = try Signals(machine, on: watch)
    defer { withExtendedLifetime(signals) {} }
    let objects = TLSObjects()
    let control = disks.map { DiskControl(machine, $0, objects) }
    let agent = ports.map { AgentControl($0) }
    let networkCommands = networks.map { NetworkCommands.all(machine, $0) } ?? []
    var agentCommands = agent.map { AgentCommands.all($0) } ?? []
    let keeper = try control.map { control throws(Failure) in try SnapshotKeeper(control) }
    agentCommands += keeper?.commands ?? []
    if let agent, let keeper {
      let snapshots = try GuestSnapshots(
        keeper, agent, policy: options.recovery, quota: parseSize(options.recoveryQuota, option: "--recovery-quota"),
        audit: options.recoveryAudit)
      agentCommands += snapshots.commands
    }
    let schedule = try Self.schedule(options, keeper, agent)
    let saver = MachineSaver(
      machine, engine: accelerator, cpu: options.cpu, disks: control, networks: networks, hasAgent: ports != nil,
      hardening: hardening?.supervisor.policy
    )
    let moving = MovingMachine(saver, agent: agent)
    let migrations = MigrationControl(moving, objects)
    let credentials = try options.tlsCreds?.credentials(.server)
    let incoming = try options.incoming.map { text throws(Failure) in
      try IncomingMachine(moving, at: text, credentials, migrations)
    }
    if incoming != nil { machine.awaitState() }
    if let text = options.incomingDisks { try Self.awaitDisks(control, at: text, credentials) }
    // Nobody may ask anything of a machine that is not there yet.
    if let saved {
      do { try machine.start(paused: true, from: saved, isCopy: true) } catch { throw .machine(error) }
    }
    let monitor = try options.control.map { text throws(Failure) in
      try MachineMonitor.serve(
        machine, engine: accelerator.name, disks: control, more: agentCommands + networkCommands, saver: saver,
        migrations: migrations,
        hardening: hardening?.supervisor, on: text)
    }
    // Its commands use the disks.
    defer { monitor?.close() }
    let debugger = try options.gdb.map { text throws(Failure) in
      try MachineDebugger.serve(machine, on: accelerator, at: text)
    }
    defer { debugger?.close() }
    try console.attach(machine)
    let bounds = hardening?.watch(machine)
    defer { bounds?.cancel() }
    let watcher = try isAwaited ? Self.run(watch) : nil
    defer {
      if let watcher {
        watch.stop()
        watcher.join()
      }
    }
    let timer = watch.makeTimer { [machine] in machine.finish(.timeLimit) }
    if let limit = options.timeLimit { timer.arm(at: started + UInt64(limit * 1e9)) }
    let hasCome = Mutex<MigrationError?>(nil)
    if let incoming {
      try incoming.start { [machine] error in
        hasCome.withLock { $0 = error }
        machine.finish(.quit)
      }
    } else if saved != nil {
      if !options.paused { machine.resume() }
    } else {
      do { try machine.start(paused: options.paused) } catch { throw .machine(error) }
    }
    schedule?.start()
    let outcome = machine.waitUntilOver()
    timer.cancel()
    schedule?.stop()
    console.close()
    for trace in traces { trace.flush() }
    hardening?.log?.flush()
    if let path = options.report {
      try RunReport(machine, engine: accelerator.name, outcome: outcome, started: started).json.writeReport(to: path)
    }
    for line in outcome.explanation { printError("swiftvmm: \(line)") }
    monitor?.close()
    keeper?.finish()
    // One that does not run needs no end.
    try? control?.exports.stop()
    try? control?.backups.stop()
    networks?.close()
    try disks?.close()
    if let error = hasCome.withLock({ $0 }) { throw .notArrived(error) }
    return outcome.status
  }

  private static func boot<Value>(_ body: () throws(BootError) -> Value) throws(Failure) -> Value {
    do { return try body() } catch { throw .machine(.boot(error)) }
  }

  /// What is to be traced, and into which files; each subject once.
  private static func traceSubjects(_ texts: [String]) throws(Failure) -> [(Trace.Subject, path: String)] {
    var result: [(Trace.Subject, path: String)] = []
    for text in texts {
      let parts = text.split(separator: ":", maxSplits: 1).map(String.init)
      guard parts.count == 2, let subject = Trace.Subject(rawValue: parts[0]) else {
        throw .badValue(
          option: "--trace", value: text, expected: "WHAT:FILE with exits, instructions, exceptions or interrupts")
      }
      guard !result.contains(where: { $0.0.rawValue == subject.rawValue }) else {
        throw .badValue(option: "--trace", value: text, expected: "one file for \(subject.rawValue)")
      }
      result.append((subject, parts[1]))
    }
    return result
  }

  private static func openTrace(_ subject: Trace.Subject, _ path: String) throws(Failure) -> Trace {
    do {
      return Trace(subject, file: try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC))
    } catch {
      throw .output(path: path, reason: HostError.reason(error.errno))
    }
  }
}

extension Outcome {
  /// cli.md's exit statuses.
  var status: Int32 {
    switch self {
    case .poweredOff, .quit: 0
    // As QEMU's isa-debug-exit: the low byte is all that a parent sees.
    case .debugExit(let value): Int32(truncatingIfNeeded: value << 1 | 1) & 0xff
    case .interrupted: ExitStatus.interrupted.rawValue
    case .timeLimit: ExitStatus.timeLimit.rawValue
    case .crashed: ExitStatus.crashed.rawValue
    case .failed: ExitStatus.software.rawValue
    }
  }

  /// The name in reports.
  var name: String {
    switch self {
    case .poweredOff: "powered-off"
    case .debugExit: "debug-exit"
    case .quit: "quit"
    case .interrupted: "interrupted"
    case .timeLimit: "time-limit"
    case .crashed: "crashed"
    case .failed: "failed"
    }
  }

  /// What standard error says about it.
  var explanation: [String] {
    switch self {
    case .crashed(let report): report.lines
    case .failed(let error): ["\(error)"]
    case .timeLimit: ["the time limit passed before the guest ended"]
    default: []
    }
  }
}
