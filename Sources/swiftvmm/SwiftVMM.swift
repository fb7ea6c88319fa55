import ArgumentParser
import BlockLayer
import Glibc

/// The command line: one file a subcommand.
@main
struct SwiftVMM: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "swiftvmm",
    abstract: "A small x86-64 virtual machine monitor.",
    discussion: "Example: swiftvmm run hello --memory 64M",
    version: Version.text,
    subcommands: [
      RunCommand.self, GuestsCommand.self, HardenCommand.self, DoctorCommand.self, CtlCommand.self, StatusCommand.self,
      PauseCommand.self,
      ResumeCommand.self, StopCommand.self, SaveCommand.self, MigrateCommand.self, DiskCommand.self, BackupCommand.self,
      RestoreBackupCommand.self, SnapshotsCommand.self, SwitchCommand.self, BenchCommand.self,
    ])

  static func main() {
    do {
      var command = try parseLeaf(Array(CommandLine.arguments.dropFirst())) ?? parseAsRoot()
      try command.run()
    } catch let failure as Failure {
      failure.report()
      Glibc.exit(failure.status.rawValue)
    } catch let error as BlockError {
      Failure.disk(error).report()
      Glibc.exit(Failure.disk(error).status.rawValue)
    } catch {
      exit(withError: error)
    }
  }
}

extension SwiftVMM {
  /// The subcommand that the arguments begin with, read by itself: it starts sooner than from the tree of all, which has the
  /// better messages. nil where the tree has to look.
  private static func parseLeaf(_ arguments: [String]) -> (any ParsableCommand)? {
    var rest = arguments[...]
    var type: any ParsableCommand.Type = SwiftVMM.self
    while let name = rest.first,
      let next = type.configuration.subcommands.first(where: { $0.configuration.commandName == name })
    {
      type = next
      rest = rest.dropFirst()
    }
    guard type.configuration.subcommands.isEmpty, let command = try? type.parseAsRoot(Array(rest)) else { return nil }
    // Else it is the help.
    return Swift.type(of: command) == type ? command : nil
  }
}

/// The program's version, in `--version`, QMP's greeting and reports.
enum Version {
  static let major = 0
  static let minor = 1
  static let micro = 0
  static var text: String { "\(major).\(minor).\(micro)" }
}
