import ArgumentParser
import BlockLayer

/// `swiftvmm disk rebase`: another backing file, with the disk's contents as before.
struct DiskRebaseCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "rebase",
    abstract: "Give an image another backing file, or none (-b \"\").",
    discussion: "Example: swiftvmm disk rebase -b base.qcow2 -F qcow2 layer.qcow2")

  @Option(name: .customShort("b"), help: "The new backing file, relative to the image's folder; empty for none.")
  var backing: String

  @Option(name: .customShort("F"), help: "Its format.")
  var backingFormat: ImageFormat?

  @Flag(name: .customShort("u"), help: "Only change the name: for a file that was moved or renamed.")
  var unsafe = false

  @OptionGroup var progress: DiskProgress
  @OptionGroup var image: DiskImage

  func run() throws {
    let queue = try makeIOQueue()
    if !backing.isEmpty, backingFormat == nil { throw Failure.diskNeedsBackingFormat(name: backing) }
    let chain = try image.open(writable: true, backing: !unsafe, queue: queue)
    try withChain(chain) {
      let disk = try image.qcow2(chain, for: "a rebase")
      if !unsafe { try copyDifferences(disk, queue) }
      try disk.setBacking(name: backing.isEmpty ? nil : backing, format: backingFormat?.rawValue)
      disk.backing = nil
    }
  }

  private func copyDifferences(_ disk: Qcow2Image, _ queue: any IOQueue) throws {
    guard !backing.isEmpty else { return try progress.run(RebaseJob(disk, to: nil), on: queue) }
    let new = try BlockChain(
      path: BlockChain.resolve(backing, besides: image.file), format: backingFormat, queue: queue)
    try withChain(new) { try progress.run(RebaseJob(disk, to: new.top), on: queue) }
  }
}
