import ArgumentParser
import BlockLayer

/// `swiftvmm disk create`: an empty image, or a layer over another one.
struct DiskCreateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "create",
    abstract: "Make an image.",
    discussion: "Example: swiftvmm disk create -f qcow2 -b base.qcow2 -F qcow2 layer.qcow2")

  @Option(name: .customShort("f"), help: "raw or qcow2.")
  var format: ImageFormat = .raw

  @Option(name: .customShort("b"), help: "The backing file, relative to the image's folder.")
  var backing: String?

  @Option(name: .customShort("F"), help: "The backing file's format.")
  var backingFormat: ImageFormat?

  @Option(
    name: .customShort("o"),
    help:
      "NAME=VALUE,...: cluster_size, compression_type, refcount_bits, lazy_refcounts, extended_l2, preallocation, compat."
  )
  var options: [String] = []

  @Flag(name: .customShort("u"), help: "Do not look at the backing file.")
  var unchecked = false

  @Flag(name: .customShort("q"), help: "Print nothing but errors.")
  var quiet = false

  @Argument(help: "The image's file.")
  var file: String

  @Argument(help: "The disk's size, such as 10G; that of the backing file where it is left out.")
  var size: String?

  func run() throws {
    let queue = try makeIOQueue()
    var options = try DiskFormatOptions(options, format: format)
    options.backingName = backing ?? options.backingName
    options.backingFormat = backingFormat ?? options.backingFormat
    var bytes = try size.map { size in size == "0" ? 0 : try parseSize(size, option: "SIZE") }
    if let name = options.backingName {
      guard format == .qcow2 else { throw Failure.diskIsNotQcow2(path: file, operation: "a backing file") }
      guard let backingFormat = options.backingFormat else { throw Failure.diskNeedsBackingFormat(name: name) }
      if !unchecked {
        let chain = try BlockChain(path: BlockChain.resolve(name, besides: file), format: backingFormat, queue: queue)
        if bytes == nil { bytes = chain.top.size }
        try chain.close()
      }
    }
    guard let bytes else { throw Failure.diskNeedsSize(path: file) }
    try options.make(file, format: format, size: bytes, queue: queue)
    if !quiet { print("Formatted \(file): \(format.rawValue), \(readableSize(bytes)) (\(bytes) bytes)") }
  }
}
