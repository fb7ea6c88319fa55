import Host
import JSON

/// Why a QMP command, the server or the client failed. Where QEMU has an error for the case, the text is QEMU's.
public enum MonitorError: Error, Equatable, Sendable, CustomStringConvertible {
  /// Input that is not JSON.
  case syntax(JSONError)
  /// Input that is JSON but no object.
  case notAnObject
  /// A request without `execute`.
  case lacksExecute
  /// A request's member of the wrong type.
  case memberType(String, expected: String)
  /// A request's member that QMP does not have.
  case memberUnexpected(String)
  /// No such command.
  case unknownCommand(String)
  /// A command before `qmp_capabilities`.
  case negotiationExpected
  /// `qmp_capabilities` once more.
  case negotiationComplete
  /// A capability that the greeting does not offer.
  case capability(String)
  /// An argument that the command needs.
  case parameterMissing(String)
  /// An argument that the command does not have.
  case parameterUnexpected(String)
  /// An argument of the wrong type.
  case parameterType(String, expected: String)
  /// An argument that is none of the values allowed.
  case parameterValue(String, value: String)
  /// The human monitor is asked for.
  case noHumanMonitor
  /// No device has the id.
  case deviceNotFound(String)
  /// The machine refuses or cannot do it now.
  case refused(String)

  /// The server's event loop could not take the socket.
  case server(StreamEndpoint, reason: String)

  /// The client found nobody at the socket.
  case unreachable(StreamEndpoint, HostError)
  /// What answers the client does not speak QMP.
  case notQMP(StreamEndpoint)
  /// The client waited for an answer in vain.
  case timeout(StreamEndpoint, seconds: Int)
  /// The server ended the connection before it answered.
  case closed(StreamEndpoint)
  /// The machine took `quit` and has not ended.
  case stillRunning(StreamEndpoint, seconds: Int)
  /// The server answered with an error.
  case reply(errorClass: String, text: String)

  /// One line: what failed, which value, and what to do where that is not plain.
  public var description: String {
    switch self {
    case .syntax(let error): "JSON parse error, \(error)"
    case .notAnObject: "QMP input must be a JSON object"
    case .lacksExecute: "QMP input lacks member 'execute'"
    case .memberType(let name, let expected): "QMP input member '\(name)' must be \(expected)"
    case .memberUnexpected(let name): "QMP input member '\(name)' is unexpected"
    case .unknownCommand(let name): "The command \(name) has not been found"
    case .negotiationExpected: "Expecting capabilities negotiation with 'qmp_capabilities'"
    case .negotiationComplete: "Capabilities negotiation is already complete, command ignored"
    case .capability(let name): "Capability '\(name)' is not available"
    case .parameterMissing(let name): "Parameter '\(name)' is missing"
    case .parameterUnexpected(let name): "Parameter '\(name)' is unexpected"
    case .parameterType(let name, let expected): "Invalid parameter type for '\(name)', expected: \(expected)"
    case .parameterValue(let name, let value): "Parameter '\(name)' does not accept value '\(value)'"
    case .noHumanMonitor: "There is no human monitor; use the QMP commands that query-commands lists"
    case .deviceNotFound(let id): "Device '\(id)' not found"
    case .refused(let reason): reason
    case .server(let endpoint, let reason): "cannot serve QMP on \(endpoint): \(reason)"
    case .unreachable(_, let error): "\(error); is swiftvmm running with --control on this socket?"
    case .notQMP(let endpoint): "what answers on \(endpoint) does not speak QMP; give the socket of --control"
    case .timeout(let endpoint, let seconds): "no answer on \(endpoint) within \(seconds) s"
    case .closed(let endpoint): "the connection to \(endpoint) ended before the answer"
    case .stillRunning(let endpoint, let seconds):
      "the machine on \(endpoint) has not ended \(seconds) s after it was told to; end its process"
    case .reply(let errorClass, let text): "\(errorClass): \(text)"
    }
  }

  /// The `class` of an error reply (QEMU's `QapiErrorClass`).
  var errorClass: String {
    switch self {
    case .unknownCommand, .negotiationExpected, .negotiationComplete: "CommandNotFound"
    case .deviceNotFound: "DeviceNotFound"
    default: "GenericError"
    }
  }
}
