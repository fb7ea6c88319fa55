import Accelerator
import Boot
import Glibc
import GuestMemory
import Host
import Machine

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
  case host(HostError)
  case control(String)
  case accelerator(AcceleratorError)

  var status: ExitStatus {
    switch self {
    case .unknownGuest, .guestsNotBuilt, .linuxNotFetched, .input: .badInput
    case .badSize, .badValue, .needsSoftEngine, .conflict: .usage
    case .engineMissing: .unavailable
    case .host(.endpoint), .host(.socketPathTooLong): .usage
    case .output, .host, .control: .inputOutput
    case .accelerator(let error): Self.status(error)
    case .machine(let error): Self.status(error)
    }
  }

  private static func status(_ error: MachineError) -> ExitStatus {
    switch error {
    case .cpus, .memorySize: .usage
    case .interruptControllers: .unavailable
    case .boot, .state: .badInput
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

  private static func status(_ error: AcceleratorError) -> ExitStatus {
    switch error {
    case .missing, .noPermission, .interfaceVersion, .unsupported: .unavailable
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
    case .host(let error): "\(error)"
    case .control(let text): text
    case .accelerator(let error): "\(error)"
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
