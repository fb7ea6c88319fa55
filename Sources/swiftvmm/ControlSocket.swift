import ArgumentParser
import Glibc
import Host
import Monitor

/// The commands' way to a running machine: connects, and turns each failure into one line and an exit status.
struct ControlSocket: ParsableArguments {
  @Argument(help: "The socket that `run --control` was given: PATH or unix:PATH.")
  var socket: String

  @Option(name: .customLong("timeout"), help: "Seconds to wait for each answer.")
  var seconds = 10

  func validate() throws {
    guard (1...86400).contains(seconds) else {
      throw ValidationError("--timeout is 1 to 86400 seconds, not \(seconds)")
    }
    do {
      _ = try endpoint()
    } catch {
      throw ValidationError("\(error)")
    }
  }

  /// Runs `body` with a connected client.
  ///
  /// - Throws: The exit status, after the line on standard error: 69 where nobody answers, 74 where the connection is
  ///   lost, 1 where the machine refuses.
  ///
  /// An answer may take `patience` seconds, where that is longer than what the user has said.
  func withClient<Result>(patience: Int = 0, _ body: (inout QMPClient) throws -> Result) throws -> Result {
    do {
      var client = try QMPClient.connect(to: try endpoint(), timeout: max(seconds, patience))
      return try body(&client)
    } catch let error as MonitorError {
      let line = "swiftvmm: \(error)\n"
      _ = line.withCString { write(STDERR_FILENO, $0, strlen($0)) }
      throw Self.status(error)
    }
  }

  private func endpoint() throws -> StreamEndpoint {
    try StreamEndpoint(socket.hasPrefix("unix:") ? socket : "unix:" + socket)
  }

  private static func status(_ error: MonitorError) -> ExitCode {
    switch error {
    case .unreachable, .notQMP: ExitCode(EX_UNAVAILABLE)
    case .reply: ExitCode(1)
    default: ExitCode(EX_IOERR)
    }
  }
}
