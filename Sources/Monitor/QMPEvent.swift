import Glibc
import JSON

/// Something that happened to the machine, for every client.
public struct QMPEvent: Equatable, Sendable {
  /// Why a machine shuts down or resets, by QEMU's names (`ShutdownCause` in its run-state.json).
  public enum Cause: String, Sendable, CaseIterable {
    /// An error on the host.
    case hostError = "host-error"
    /// `quit`.
    case quit = "host-qmp-quit"
    /// `system_reset`.
    case systemReset = "host-qmp-system-reset"
    /// A signal such as SIGINT.
    case signal = "host-signal"
    /// The terminal's Ctrl-A x.
    case userInterface = "host-ui"
    /// The guest powered off.
    case guestShutdown = "guest-shutdown"
    /// The guest reset itself.
    case guestReset = "guest-reset"
    /// The guest crashed.
    case guestPanic = "guest-panic"

    var isGuest: Bool { self == .guestShutdown || self == .guestReset || self == .guestPanic }
  }

  /// Its name.
  public let name: String
  /// What it tells besides.
  public let data: JSONObject

  /// An event of the catalogue.
  public init(_ name: String, _ data: JSONObject = [:]) {
    self.name = name
    self.data = data
  }

  /// Every vCPU is out of the guest.
  public static let stop = QMPEvent("STOP")
  /// The guest goes on.
  public static let resume = QMPEvent("RESUME")
  /// The guest sleeps in ACPI S3.
  public static let suspend = QMPEvent("SUSPEND")
  /// The guest woke from S3.
  public static let wakeUp = QMPEvent("WAKEUP")
  /// The guest was asked to power off.
  public static let powerDown = QMPEvent("POWERDOWN")
  /// The machine ends.
  public static func shutdown(_ cause: Cause) -> QMPEvent { QMPEvent("SHUTDOWN", data(cause)) }
  /// The machine starts anew.
  public static func reset(_ cause: Cause) -> QMPEvent { QMPEvent("RESET", data(cause)) }
  /// The guest crashed; a pause, or the end, follows.
  public static func guestPanicked(pausing: Bool) -> QMPEvent {
    QMPEvent("GUEST_PANICKED", ["action": pausing ? "pause" : "poweroff"])
  }

  /// How far a block job is.
  public struct BlockJob: Sendable {
    let members: JSONObject

    /// A job of a type of QEMU's `JobType`; lengths in bytes, the speed in bytes a second.
    public init(id: String, type: String, length: UInt64, offset: UInt64, speed: UInt64) {
      members = [
        "device": .string(id), "type": .string(type), "len": JSONValue(length), "offset": JSONValue(offset),
        "speed": JSONValue(speed),
      ]
    }
  }

  /// A job has another status.
  public static func jobStatusChange(id: String, status: String) -> QMPEvent {
    QMPEvent("JOB_STATUS_CHANGE", ["id": .string(id), "status": .string(status)])
  }

  /// `BLOCK_JOB_READY`, `_COMPLETED` or `_CANCELLED`.
  public static func blockJob(_ what: String, _ job: BlockJob, error: String?) -> QMPEvent {
    var data = job.members
    if let error { data["error"] = .string(error) }
    return QMPEvent("BLOCK_JOB_\(what)", data)
  }

  /// A migration has another status (`MigrationStatus` of QEMU's migration.json).
  public static func migration(_ status: String) -> QMPEvent { QMPEvent("MIGRATION", ["status": .string(status)]) }

  /// A disk or layer is offered no longer.
  public static func blockExportDeleted(_ id: String) -> QMPEvent {
    QMPEvent("BLOCK_EXPORT_DELETED", ["id": .string(id)])
  }

  /// The guest has given a device up, which is gone.
  public static func deviceDeleted(_ id: String) -> QMPEvent {
    QMPEvent("DEVICE_DELETED", ["device": .string(id), "path": .string("/machine/peripheral/\(id)")])
  }

  /// The host failed a request of the guest's to a disk (`BLOCK_IO_ERROR` of QEMU's block-core.json).
  public static func blockIOError(
    device: String, isWrite: Bool, stops: Bool, isNoSpace: Bool, reason: String
  ) -> QMPEvent {
    QMPEvent(
      "BLOCK_IO_ERROR",
      [
        "device": .string(device), "operation": isWrite ? "write" : "read", "action": stops ? "stop" : "report",
        "nospace": .bool(isNoSpace), "reason": .string(reason),
      ])
  }

  private static func data(_ cause: Cause) -> JSONObject {
    ["guest": .bool(cause.isGuest), "reason": .string(cause.rawValue)]
  }

  /// Every event with what it tells, for `query-qmp-schema`.
  static let catalogue: [(name: String, data: [QMPType.Member])] = [
    ("STOP", []), ("RESUME", []), ("POWERDOWN", []), ("SUSPEND", []), ("WAKEUP", []), ("SHUTDOWN", causeMembers),
    ("RESET", causeMembers),
    (
      "GUEST_PANICKED",
      [.required("action", .enumeration("GuestPanicAction", values: ["pause", "poweroff"]))]
    ),
    ("JOB_STATUS_CHANGE", [.required("id", .string), .required("status", .string)]),
    ("BLOCK_JOB_READY", jobMembers), ("BLOCK_JOB_CANCELLED", jobMembers),
    ("BLOCK_JOB_COMPLETED", jobMembers + [.optional("error", .string)]),
    ("MIGRATION", [.required("status", .string)]),
    ("BLOCK_EXPORT_DELETED", [.required("id", .string)]),
    ("DEVICE_DELETED", [.optional("device", .string), .required("path", .string)]),
    (
      "BLOCK_IO_ERROR",
      [
        .required("device", .string),
        .required("operation", .enumeration("IoOperationType", values: ["read", "write"])),
        .required("action", .enumeration("BlockErrorAction", values: ["ignore", "report", "stop"])),
        .optional("nospace", .bool), .required("reason", .string),
      ]
    ),
  ]

  private static let jobMembers: [QMPType.Member] = [
    .required("device", .string), .required("type", .string), .required("len", .integer),
    .required("offset", .integer), .required("speed", .integer),
  ]

  private static let causeMembers: [QMPType.Member] = [
    .required("guest", .bool),
    .required("reason", .enumeration("ShutdownCause", values: Cause.allCases.map(\.rawValue))),
  ]

  /// The message, with the time of this call.
  func message() -> JSONValue {
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    var message: JSONObject = [
      "timestamp": ["seconds": JSONValue(now.tv_sec), "microseconds": JSONValue(now.tv_nsec / 1000)],
      "event": .string(name),
    ]
    if data.count > 0 { message["data"] = .object(data) }
    return .object(message)
  }
}
