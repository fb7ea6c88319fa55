import ArgumentParser
import BlockLayer

/// `swiftvmm disk commit`: what a layer holds goes into the one below.
struct DiskCommitCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "commit",
    abstract: "Write what a layer holds into its backing file, and empty the layer.",
    discussion: "Example: swiftvmm disk commit layer.qcow2")

  @Option(name: .customShort("b"), help: "Commit to this image of the chain; the layers above it are left as they are.")
  var base: String?

  @Flag(name: .customShort("d"), help: "Do not empty the layer.")
  var keep = false

  @OptionGroup var progress: DiskProgress
  @OptionGroup var image: DiskImage

  func run() throws {
    let queue = try makeIOQueue()
    let depth = try baseDepth(queue)
    let chain = try image.open(writable: true, writableDepth: depth, queue: queue)
    try withChain(chain) {
      guard depth < chain.layers.count else { throw Failure.diskHasNoBacking(path: image.file) }
      let top = try image.qcow2(chain, for: "a commit")
      let target = chain.layers[depth].node
      if target.size < top.size { try target.resize(to: top.size, on: queue) }
      var options = CopyJob.Options()
      options.layers = depth
      try progress.run(CopyJob(from: top, to: target, options), on: queue)
      // The layer may be emptied only when what it held is durable below.
      try target.perform(.flush, on: queue)
      if !keep, base == nil { try top.makeEmpty() }
    }
    progress.say("Image committed.")
  }

  private func baseDepth(_ queue: any IOQueue) throws -> Int {
    guard let base else { return 1 }
    let chain = try image.open(queue: queue)
    return try withChain(chain) {
      guard
        let depth = chain.layers.firstIndex(where: {
          $0.path == base || $0.path == BlockChain.resolve(base, besides: image.file)
        }),
        depth > 0
      else { throw Failure.diskIsNotBacking(base: base, of: image.file) }
      return depth
    }
  }
}
