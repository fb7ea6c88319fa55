import CFuzz
import Foundation
import RandomCode

// `--seeds DIRECTORY` writes inputs to begin with; anything else is libFuzzer's.
if CommandLine.arguments.count == 3, CommandLine.arguments[1] == "--seeds" {
  let directory = CommandLine.arguments[2]
  try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
  for seed in 0..<192 as Range<UInt64> {
    try Data(RandomRun.input(seed: seed)).write(to: URL(fileURLWithPath: "\(directory)/\(seed)"))
  }
} else {
  nonisolated(unsafe) let run = try RandomRun()
  var count = CommandLine.argc
  var arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = CommandLine.unsafeArgv
  exit(
    LLVMFuzzerRunDriver(&count, &arguments) { data, size in
      do { try run.run(UnsafeBufferPointer(start: data, count: size)) } catch { fatalError("\(error)") }
      return 0
    })
}
