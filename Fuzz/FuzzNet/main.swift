import CFuzz
import Foundation

// `--seeds DIRECTORY` writes frames to begin with; anything else is libFuzzer's.
if CommandLine.arguments.count == 3, CommandLine.arguments[1] == "--seeds" {
  try NetHarness.writeSeeds(to: CommandLine.arguments[2])
} else {
  var count = CommandLine.argc
  var arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = CommandLine.unsafeArgv
  exit(
    LLVMFuzzerRunDriver(&count, &arguments) { data, size in
      NetHarness.run(UnsafeBufferPointer(start: data, count: size))
      return 0
    })
}
