import ArgumentParser
import BlockLayer

/// `swiftvmm disk resize`: a longer or shorter disk.
struct DiskResizeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "resize",
    abstract: "Change a disk's size: SIZE, or by +SIZE or -SIZE.",
    discussion: "Example: swiftvmm disk resize disk.qcow2 +10G")

  @Flag(help: "The disk may become shorter; what is behind its new end is lost.")
  var shrink = false

  @Flag(name: .customShort("q"), help: "Print nothing but errors.")
  var quiet = false

  @OptionGroup var image: DiskImage

  @Argument(parsing: .allUnrecognized, help: "The new size, such as 20G, or +10G.")
  var size: [String]

  func run() throws {
    guard size.count == 1, let text = size.first else {
      throw Failure.badValue(
        option: "SIZE", value: size.joined(separator: " "), expected: "one size, such as 20G or +10G")
    }
    let queue = try makeIOQueue()
    let chain = try image.open(writable: true, queue: queue)
    try withChain(chain) {
      let old = chain.top.size
      let isRelative = text.hasPrefix("+") || text.hasPrefix("-")
      let amount = try parseSize(isRelative ? String(text.dropFirst()) : text, option: "SIZE")
      let (new, overflow) =
        text.hasPrefix("+")
        ? old.addingReportingOverflow(amount)
        : text.hasPrefix("-") ? old.subtractingReportingOverflow(amount) : (amount, false)
      guard !overflow, new <= UInt64(Int64.max) else {
        throw Failure.badValue(option: "SIZE", value: text, expected: "a size that the disk of \(old) bytes can get")
      }
      guard new >= old || shrink else { throw Failure.diskShrinks(path: image.file, from: old, to: new) }
      try chain.top.resize(to: new, on: queue)
    }
    if !quiet { print("Image resized.") }
  }
}
