import JSON
import Machine
import Monitor
import SavedMachine

/// QMP's command that saves a machine.
enum SaveCommands {
  static let name = "x-swiftvmm-save"

  private static let generation = QMPType.object("GuidInfo", members: [.required("guid", .string)])
  private static let result = QMPType.object(
    "SaveReport",
    members: [
      .required("memory", .integer), .required("state", .integer), .required("pause", .integer),
      .required("pause-us", .integer),
    ])

  /// The catalogue.
  static func all(_ saver: MachineSaver) -> [QMPCommand] {
    [
      QMPCommand(name, [.required("file", .string), .optional("stop", .bool)], returns: result) {
        _, arguments throws(MonitorError) in
        let (report, pause) = try saver.save(
          to: arguments.text("file"), stops: arguments["stop"]?.boolValue ?? false)
        return [
          "memory": JSONValue(report.memoryBytes), "state": JSONValue(report.stateBytes),
          "pause": JSONValue(pause / 1000),
          "pause-us": JSONValue(pause),
        ]
      },
      QMPCommand("query-vm-generation-id", returns: generation) { _, _ in
        ["guid": .string(saver.machine.generationID)]
      },
    ]
  }
}
