import CFuzz
import Foundation

// `--seeds DIRECTORY` writes valid streams to begin with, `--mutate COUNT SEED` changes bytes of such streams at random, which
// goes far faster than with coverage to look at; anything else is libFuzzer's.
if CommandLine.arguments.count == 3, CommandLine.arguments[1] == "--seeds" {
  try MigrationHarness.writeSeeds(to: CommandLine.arguments[2])
} else if CommandLine.arguments.count == 4, CommandLine.arguments[1] == "--mutate" {
  try MigrationHarness.mutate(count: Int(CommandLine.arguments[2]) ?? 0, seed: UInt64(CommandLine.arguments[3]) ?? 0)
} else {
  var count = CommandLine.argc
  var arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = CommandLine.unsafeArgv
  exit(
    LLVMFuzzerRunDriver(&count, &arguments) { data, size in
      MigrationHarness.run(UnsafeBufferPointer(start: data, count: size))
      return 0
    })
}
