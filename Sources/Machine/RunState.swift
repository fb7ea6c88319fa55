import Accelerator
import DeviceModel

/// What the machine is doing, in QEMU's words (`query-status`).
public enum RunState: String, Sendable {
  /// Built, not yet started.
  case prelaunch
  /// Built, and waiting for a machine that is to come.
  case inMigrate = "inmigrate"
  /// Every vCPU is out of the guest while the last of it goes elsewhere.
  case finishMigrate = "finish-migrate"
  /// It is, or may be, elsewhere.
  case postMigrate = "postmigrate"
  /// vCPUs run.
  case running
  /// Every vCPU is out of the guest and has said so.
  case paused
  /// As `paused`, by a disk's policy on errors of the host.
  case ioError = "io-error"
  /// Sleeping in ACPI S3 until something wakes it.
  case suspended
  /// The run is over.
  case shutdown
  /// The guest crashed.
  case guestPanicked = "guest-panicked"
  /// The accelerator gave up.
  case internalError = "internal-error"
}

/// How a run ended.
public enum Outcome: Sendable {
  /// The guest powered off.
  case poweredOff
  /// The guest wrote a value to the debug-exit port.
  case debugExit(UInt32)
  /// A client of the control socket, or the user's key, ended it.
  case quit
  /// A signal ended it.
  case interrupted
  /// The time limit passed.
  case timeLimit
  /// The guest cannot go on: triple fault, or an instruction nothing here can execute.
  case crashed(CrashReport)
  /// The accelerator failed.
  case failed(AcceleratorError)
}

/// What happened to the machine, for control clients.
public enum MachineEvent: Sendable {
  /// The vCPUs stopped.
  case stopped
  /// The vCPUs run again.
  case resumed
  /// The machine was reset, by the guest or from outside.
  case reset(byGuest: Bool)
  /// The power button was pressed.
  case powerdown
  /// The guest sleeps in S3, and woke.
  case suspended
  case wokeUp
  /// The host failed a request to a disk; where the report says so, `stopped` follows.
  case ioError(IOErrorReport)
  /// The guest has given a device up that was asked for: it is the machine's no longer.
  case deviceDeleted(String)
  /// The guest crashed.
  case panicked
  /// The run is over; `reason` is QEMU's (`guest-shutdown`, `host-qmp-quit`, ...).
  case shutdown(byGuest: Bool, reason: String)
  /// The guest crashed, and the machine stopped for the debugger instead of ending.
  case crashed(CrashReport)
  /// A debugger's breakpoint or step stopped a vCPU; all others are stopped too.
  case debug(vcpu: Int, DebugEvent)
}
