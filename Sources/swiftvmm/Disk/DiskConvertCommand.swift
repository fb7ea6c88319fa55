import ArgumentParser
import BlockLayer

/// `swiftvmm disk convert`: a disk's contents in a file of their own.
struct DiskConvertCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "convert",
    abstract: "Copy a disk, with all its layers, into a new image.",
    discussion: "Example: swiftvmm disk convert -O qcow2 -c disk.raw disk.qcow2")

  @Option(name: .customShort("O"), help: "The new image's format, raw or qcow2.")
  var targetFormat: ImageFormat = .raw

  @Option(name: .customShort("o"), help: "NAME=VALUE,... as disk create has it.")
  var options: [String] = []

  @Flag(name: .customShort("c"), help: "Compress; for qcow2.")
  var compress = false

  @Option(name: .customShort("S"), help: "Runs of so many zero bytes are left out; 0 allocates everything.")
  var sparse = "4k"

  @Option(
    name: .customShort("B"),
    help: "Copy the top layer only, over this backing file, which has the same contents as the old one.")
  var backing: String?

  @Option(name: .customShort("F"), help: "The backing file's format.")
  var backingFormat: ImageFormat?

  @Option(name: .customShort("l"), help: "Copy this snapshot inside the image.")
  var snapshot: String?

  @Flag(name: .customShort("n"), help: "The target is there already, with its size.")
  var noCreate = false

  @OptionGroup var progress: DiskProgress
  @OptionGroup var image: DiskImage

  @Argument(help: "The new file.")
  var target: String

  func validate() throws {
    if compress, targetFormat != .qcow2 { throw ValidationError("-c: only qcow2 images are compressed; say -O qcow2") }
    if compress, noCreate { throw ValidationError("-c and -n exclude each other: leave one of them out") }
  }

  func run() throws {
    let queue = try makeIOQueue()
    var format = try DiskFormatOptions(options, format: targetFormat)
    var copy = CopyJob.Options()
    copy.sparse = sparse == "0" ? 0 : try parseSize(sparse, option: "-S")
    copy.compresses = compress
    format.backingName = backing ?? format.backingName
    format.backingFormat = backingFormat ?? format.backingFormat
    if let name = format.backingName {
      guard format.backingFormat != nil else { throw Failure.diskNeedsBackingFormat(name: name) }
      copy.layers = 1
    }
    copy.targetReadsZero = !noCreate && format.backingName == nil
    let source = try image.open(queue: queue)
    try withChain(source) {
      if let snapshot { try image.qcow2(source, for: "a snapshot").readSnapshot(snapshot) }
      if !noCreate { try format.make(target, format: targetFormat, size: source.top.size, queue: queue) }
      // A copy that is cut off is made again: it needs no flushes on the way.
      var access = FileAccess(writable: true, ignoresFlushes: true)
      access.isBulk = true
      let result = try BlockChain(path: target, format: targetFormat, access: access, queue: queue)
      try withChain(result) {
        guard result.top.size >= source.top.size else {
          throw BlockError.outOfRange(offset: 0, length: source.top.size, size: result.top.size)
        }
        try progress.run(CopyJob(from: source.top, to: result.top, copy), on: queue)
      }
    }
  }
}
