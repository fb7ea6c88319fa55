import ArgumentParser
import BlockLayer
import JSON
import Monitor

/// `swiftvmm save`: a running machine into a file.
struct SaveCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "save",
    abstract: "Save a running machine to a file, from which 'run --restore' goes on.",
    discussion: """
      The machine stands still while it is saved, and goes on then; its disks are not in the file. \
      With --stop it ends instead, so that its disks stay as the saved guest knows them.

      Example: swiftvmm save /tmp/vm.sock vm.save --stop
      Then: swiftvmm run GUEST --restore vm.save, with the same options and disks
      """)

  @OptionGroup var control: ControlSocket

  @Argument(help: "The file; replaced if it is there.")
  var file: String

  @Flag(help: "End the machine when it is saved.")
  var stop = false

  @Flag(help: "Print JSON.")
  var json = false

  /// Seconds; RAM may be large and the file's medium slow.
  private static let patience = 3600

  func run() throws {
    // The machine's process has another working directory.
    let arguments: JSONObject = ["file": .string(BlockGraph.absolute(file)), "stop": .bool(stop)]
    let result = try control.withClient(patience: Self.patience) { client in
      try client.execute(SaveCommands.name, arguments)
    }
    if json { return print(result.serialized(pretty: true)) }
    let memory = result["memory"]?.unsignedValue ?? 0
    let pause = Double(result["pause-us"]?.unsignedValue ?? 0) / 1000
    print("saved \(memory >> 10) KiB of memory; the machine stood for \((pause * 10).rounded() / 10) ms")
  }
}
