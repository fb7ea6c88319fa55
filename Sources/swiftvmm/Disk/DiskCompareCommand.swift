import ArgumentParser
import BlockLayer

/// `swiftvmm disk compare`: whether two disks hold the same.
struct DiskCompareCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "compare",
    abstract: "Compare the contents of two disks: ends with 0 where they are the same, with 1 where they differ.",
    discussion: "Example: swiftvmm disk compare disk.qcow2 copy.raw")

  @Option(name: .customShort("F"), help: "The second image's format.")
  var secondFormat: ImageFormat?

  @Flag(name: .customShort("s"), help: "Sizes and what is stored must be the same too.")
  var strict = false

  @OptionGroup var progress: DiskProgress
  @OptionGroup var image: DiskImage

  @Argument(help: "The second image's file.")
  var second: String

  func run() throws {
    let queue = try makeIOQueue()
    let left = try image.open(queue: queue)
    try withChain(left) {
      let right = try BlockChain(
        path: second, format: secondFormat, access: FileAccess(sharesAll: image.forceShare), queue: queue)
      try withChain(right) { try compare(left.top, right.top, queue) }
    }
  }

  private func compare(_ left: any BlockNode, _ right: any BlockNode, _ queue: any IOQueue) throws {
    if strict, left.size != right.size { try differ("Strict mode: Image size mismatch!") }
    if strict, let offset = try left.firstStoredDifference(from: right) {
      try differ("Strict mode: Offset \(offset) block status mismatch!")
    }
    let job = CompareJob(left, right)
    try progress.run(job, on: queue)
    if let offset = job.firstDifference { try differ("Content mismatch at offset \(offset)!") }
    if left.size != right.size { progress.say("Warning: Image size mismatch!") }
    progress.say("Images are identical.")
  }

  private func differ(_ text: String) throws {
    progress.say(text)
    throw ExitCode(1)
  }
}
