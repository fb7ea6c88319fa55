import Accelerator
import BlockLayer
import Boot
import Glibc
import GuestMemory
import Host
import LoaderHardening
import Machine
import Migration
import NBD
import NetLayer
import SavedMachine
import TLS

/// Exit statuses that other programs rely on; the ones a guest chooses are in `Outcome.status`.
enum ExitStatus: Int32 {
  case usage = 64
  case badInput = 66
  case unavailable = 69
  case software = 70
  case inputOutput = 74
  case timeLimit = 124
  case interrupted = 130
  case crashed = 134
}

/// What the command line reports in one line, with the status it exits with.
enum Failure: Error {
  case unknownGuest(String, known: [String])
  case guestsNotBuilt(searched: [String])
  case linuxNotFetched(searched: [String])
  case badSize(option: String, value: String)
  case badValue(option: String, value: String, expected: String)
  case engineMissing(String, reason: String)
  case needsSoftEngine(option: String)
  case conflict(String, String)
  case input(String)
  case output(path: String, reason: String)
  case machine(MachineError)
  case hardening(path: String, HardeningError)
  case notAKey(path: String)
  case diskClosed(BlockError)
  case host(HostError)
  case control(String)
  case accelerator(AcceleratorError)
  case disk(BlockError)
  case nbd(NBDError)
  case network(NetworkError)
  case tls(TLSError)
  case diskNeedsSize(path: String)
  case diskNeedsBackingFormat(name: String)
  case diskShrinks(path: String, from: UInt64, to: UInt64)
  case diskHasNoBacking(path: String)
  case diskIsNotBacking(base: String, of: String)
  case diskIsRemote(path: String)
  case diskIsNotQcow2(path: String, operation: String)
  case diskMapNeedsJSON(path: String, offset: UInt64)
  case notAbove(top: String, image: String, catalogue: String)
  case diskStandsStill(name: String, reason: String)
  case saved(SavedMachineError)
  case backup(BackupFault)
  case notMoved(status: String, reason: String?)
  case notArrived(MigrationError)
  case notCopied(disk: String, reason: String?)

  /// What a call that may fail in several ways has thrown.
  init(_ error: any Error) {
    self =
      switch error {
      case let failure as Failure: failure
      case let error as BlockError: .disk(error)
      case let error as HostError: .host(error)
      default: .control("\(error)")
      }
  }

  /// The host has no room left for a file.
  var isNoSpace: Bool {
    switch self {
    case .disk(let error): error.isNoSpace
    case .backup(.file(_, _, let code)): code == ENOSPC || code == EDQUOT
    default: false
    }
  }

  var status: ExitStatus {
    switch self {
    case .unknownGuest, .guestsNotBuilt, .linuxNotFetched, .input, .hardening, .notAKey, .tls: .badInput
    case .badSize, .badValue, .needsSoftEngine, .conflict: .usage
    case .diskIsRemote: .usage
    case .diskNeedsSize, .diskNeedsBackingFormat, .diskShrinks, .diskIsNotBacking, .diskMapNeedsJSON: .usage
    case .diskHasNoBacking, .diskIsNotQcow2, .notAbove: .badInput
    case .disk(let error): Self.status(error)
    case .network(let error): Self.status(error)
    case .backup(let fault): fault.status
    case .saved: .badInput
    case .notMoved, .notArrived, .notCopied: .inputOutput
    case .engineMissing: .unavailable
    case .host(.endpoint), .host(.socketPathTooLong): .usage
    case .nbd, .output, .host, .control, .diskClosed, .diskStandsStill: .inputOutput
    case .accelerator(let error): Self.status(error)
    case .machine(let error): Self.status(error)
    }
  }

  private static func status(_ error: BlockError) -> ExitStatus {
    switch error {
    case .malformed, .unsupported, .damaged, .backing, .chainTooDeep, .chainLoop, .unknown, .exists: .badInput
    case .io(let call, _, _): call == "open" ? .badInput : .inputOutput
    case .invalid, .outOfRange: .usage
    case .locked, .readOnly, .remote: .inputOutput
    case .queue: .unavailable
    // Only the control socket's clients, who get no status, meet these.
    case .noNode, .noDisk, .nodeNameTaken, .nodeInUse, .overlayHasBacking, .diskTwice, .aborted, .notBelow, .jobExists,
      .diskHasJob, .diskIsBackedUp, .quota, .noJob, .noMirror, .mirrorNotReady, .jobState:
      .usage
    }
  }

  private static func status(_ error: MachineError) -> ExitStatus {
    switch error {
    case .cpus, .memorySize, .disks, .diskName, .noDisk, .networkCards, .networkName: .usage
    case .network(_, let error): status(error)
    case .interruptControllers, .cpuModel: .unavailable
    case .notCarried: .badInput
    case .boot, .state: .badInput
    // Only the control socket's clients meet it.
    case .unsaved: .usage
    case .accelerator(let error): status(error)
    case .host: .inputOutput
    case .memory(let error):
      switch error {
      case .exceedsHost, .host: .unavailable
      default: .software
      }
    case .device: .software
    }
  }

  private static func status(_ error: NetworkError) -> ExitStatus {
    switch error {
    case .interfaceName, .attachment, .tooManyPorts: .usage
    case .noTap, .noInterface, .tapPermission, .tapInUse, .notATap, .uplinkGone, .noSwitch: .unavailable
    case .malformedStream: .badInput
    case .capture, .host: .inputOutput
    }
  }

  private static func status(_ error: AcceleratorError) -> ExitStatus {
    switch error {
    case .missing, .noPermission, .interfaceVersion, .unsupported, .counterBehind: .unavailable
    default: .software
    }
  }

  /// One line: what failed, the value, the cause, what to do.
  var text: String {
    switch self {
    case .unknownGuest(let name, let known):
      "no guest or file is called \(name); bundled guests: \(known.joined(separator: ", "))"
    case .guestsNotBuilt(let searched):
      "the bundled guests are not built (looked in \(searched.joined(separator: ", "))): run scripts/build-guests"
    case .linuxNotFetched(let searched):
      "Linux's files are missing (looked in \(searched.joined(separator: ", "))): run scripts/fetch-linux"
    case .badSize(let option, let value):
      "\(option) \(value): not a size; give bytes, or a number with K, M or G, such as 256M"
    case .badValue(let option, let value, let expected): "\(option) \(value): expected \(expected)"
    case .engineMissing(let engine, let reason): "engine \(engine) is not available: \(reason)"
    case .needsSoftEngine(let option): "\(option): engine kvm cannot do that; use --engine soft"
    case .conflict(let one, let other): "\(one) and \(other) exclude each other: leave one of them out"
    case .input(let text): text
    case .output(let path, let reason): "cannot write \(path): \(reason)"
    case .machine(let error): "\(error)"
    case .notAKey(let path): "\(path) is no secret key: 64 hexadecimal digits, as harden keygen writes"
    case .hardening(let path, let error): "\(path): \(error)"
    case .diskClosed(let error): "a disk could not be closed: \(error)"
    case .host(let error): "\(error)"
    case .control(let text): text
    case .accelerator(let error): "\(error)"
    case .disk(let error): "\(error)"
    case .nbd(let error): "\(error)"
    case .network(let error): "\(error)"
    case .tls(let error): "\(error)"
    case .backup(let fault): fault.text
    case .diskNeedsSize(let path): "the size of \(path) is missing: give one such as 10G, or a backing file with -b"
    case .diskNeedsBackingFormat(let name):
      "the format of the backing file \(name) is missing: give it with -F, for whoever can write a raw disk could fake one"
    case .diskShrinks(let path, let from, let to):
      "\(path) would shrink from \(from) to \(to) bytes and lose what is behind: say --shrink if that is meant"
    case .diskHasNoBacking(let path): "\(path) has no backing file to commit to"
    case .diskIsNotBacking(let base, let path):
      "\(base) is not in the backing chain of \(path): see disk info --backing-chain"
    case .diskIsRemote(let path): "\(path) is on a server, where images cannot be made; use -n to write into it"
    case .diskIsNotQcow2(let path, let operation): "\(path) is not qcow2, and \(operation) needs that"
    case .diskMapNeedsJSON(let path, let offset):
      "\(path) has compressed clusters (at \(offset)), which have no plain place in the file: use --json"
    case .diskStandsStill(let name, let reason):
      "the machine stands still, for its disk \(name) failed: \(reason); put that right, then swiftvmm resume tries again"
    case .notAbove(let top, let image, let catalogue):
      "\(catalogue) says that \(image) goes on in \(top), which is not above it: remove \(catalogue), or name \(top) with --disk"
    case .saved(let error): "\(error)"
    case .notMoved("cancelled", _): "the migration was cancelled; the machine goes on where it is"
    case .notMoved(_, let reason): "the machine has not been moved: \(reason ?? "no reason is known")"
    case .notCopied(let disk, let reason):
      "the disk \(disk) was not copied, and the machine goes on where it is: \(reason ?? "its job was ended")"
    case .notArrived(let error): "no machine has come: \(error)"
    }
  }

  func report() {
    printError("swiftvmm: \(text)")
  }
}

/// Writes a line to standard error.
func printError(_ line: String) {
  var bytes = Array((line + "\n").utf8)
  _ = write(STDERR_FILENO, &bytes, bytes.count)
}
