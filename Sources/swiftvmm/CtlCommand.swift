import ArgumentParser
import JSON
import Monitor

/// `swiftvmm ctl`: one QMP command from the shell.
struct CtlCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "ctl",
    abstract: "Send a QMP command to a running machine and print what it returns as JSON.",
    discussion: """
      Example: swiftvmm ctl /tmp/vm.sock query-status
      With arguments: swiftvmm ctl /tmp/vm.sock NAME '{"key": "value"}'
      All commands: swiftvmm ctl /tmp/vm.sock query-commands
      """)

  @OptionGroup var control: ControlSocket

  @Argument(help: "The command's name.")
  var command: String

  @Argument(help: "Its arguments, a JSON object.")
  var arguments = "{}"

  func validate() throws {
    _ = try parsedArguments()
  }

  func run() throws {
    let arguments = try parsedArguments()
    let result = try control.withClient { client in try client.execute(command, arguments) }
    print(result.serialized(pretty: true))
  }

  private func parsedArguments() throws -> JSONObject {
    do throws(JSONError) {
      if let object = try JSONValue(parsing: arguments).objectValue { return object }
    } catch {
      throw ValidationError("the arguments are not JSON: \(error)")
    }
    throw ValidationError("the arguments are no JSON object; write '{\"key\": \"value\"}'")
  }
}
