import ArgumentParser
import BlockLayer
import Glibc

/// `swiftvmm disk`: work on disk images, one file a subcommand. The work itself is BlockLayer's.
struct DiskCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "disk",
    abstract: "Make, look at and change disk images (raw and qcow2), with qemu-img's meanings.",
    discussion: "Example: swiftvmm disk create -f qcow2 disk.qcow2 10G",
    subcommands: [
      DiskCreateCommand.self, DiskInfoCommand.self, DiskCheckCommand.self, DiskMapCommand.self,
      DiskConvertCommand.self, DiskSnapshotCommand.self, DiskCommitCommand.self, DiskRebaseCommand.self,
      DiskResizeCommand.self, DiskCompareCommand.self, DiskServeCommand.self,
    ])
}

extension ImageFormat: ExpressibleByArgument {}

/// How a subcommand's result is printed.
struct DiskOutput: ParsableArguments {
  @Flag(help: "Print JSON, as qemu-img's --output json does.")
  var json = false

  @Option(help: "json, or human, as qemu-img has it.")
  var output: Kind = .human

  enum Kind: String, ExpressibleByArgument, CaseIterable {
    case human, json
  }

  var isJSON: Bool { json || output == .json }
}

/// The image that a subcommand works on.
struct DiskImage: ParsableArguments {
  @Option(name: .customShort("f"), help: "The image's format, raw or qcow2; else its bytes tell.")
  var format: ImageFormat?

  @Flag(name: [.customShort("U"), .long], help: "Read even what another process writes to.")
  var forceShare = false

  @Argument(help: "The image's file.")
  var file: String

  func open(
    writable: Bool = false, backing: Bool = true, writableDepth: Int? = nil,
    options: Qcow2Image.Options = Qcow2Image.Options(), queue: any IOQueue
  ) throws(BlockError) -> BlockChain {
    var access = FileAccess(writable: writable, sharesAll: forceShare && !writable)
    access.isBulk = writable
    return try BlockChain(
      path: file, format: format, access: access, backing: backing, writableDepth: writableDepth, options: options,
      queue: queue)
  }

  func qcow2(_ chain: BlockChain, for operation: String) throws(Failure) -> Qcow2Image {
    guard let image = chain.layers[0].qcow2 else { throw .diskIsNotQcow2(path: file, operation: operation) }
    return image
  }
}

/// Whether and how a long operation says how far it is.
struct DiskProgress: ParsableArguments {
  @Flag(name: .customShort("q"), help: "Print nothing but errors.")
  var quiet = false

  @Flag(name: .customShort("p"), help: "Show a progress bar even where standard error is no terminal.")
  var progress = false

  @Option(name: .customShort("r"), help: "At most so many bytes a second, such as 100M.")
  var rate: String?

  @Option(name: .customShort("m"), help: "Stretches in flight.")
  var parallel = 4

  func validate() throws {
    if !(1...64).contains(parallel) { throw ValidationError("-m \(parallel): expected 1 to 64") }
  }

  /// Runs a job to its end, with a call to `watch` now and then.
  func run(_ job: BlockJob, on queue: any IOQueue, watch: () -> Void = {}) throws {
    if let rate { job.bytesPerSecond = try parseSize(rate, option: "-r") }
    job.parallel = parallel
    let isShown = !quiet && (progress || isatty(STDERR_FILENO) == 1)
    var shown = -1
    try job.run(on: queue) {
      watch()
      guard isShown else { return }
      let tenths = job.total == 0 ? 1000 : Int(Double(job.done) / Double(job.total) * 1000)
      guard tenths != shown else { return }
      shown = tenths
      let bar = String(repeating: "#", count: tenths / 25)
      var bytes = Array(
        "\r[\(bar)\(String(repeating: " ", count: 40 - tenths / 25))] \(decimal(Double(tenths) / 10, 1))%".utf8)
      _ = write(STDERR_FILENO, &bytes, bytes.count)
    }
    if isShown { printError("") }
  }

  func say(_ line: String) {
    if !quiet { print(line) }
  }
}

/// Closes what was opened, whatever happened; the first error counts.
func withChain<Result>(_ chain: BlockChain, _ body: () throws -> Result) throws -> Result {
  let result: Result
  do {
    result = try body()
  } catch {
    try? chain.close()
    throw error
  }
  try chain.close()
  return result
}

/// A number of bytes with three significant digits, as qemu-img prints it.
func readableSize(_ bytes: UInt64) -> String {
  let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
  var value = Double(bytes)
  var unit = 0
  while value >= 1000, unit < units.count - 1 {
    value /= 1024
    unit += 1
  }
  var digits = decimal(value, value >= 100 ? 0 : value >= 10 ? 1 : 2)
  if digits.contains(".") {
    while digits.hasSuffix("0") { digits.removeLast() }
    if digits.hasSuffix(".") { digits.removeLast() }
  }
  return "\(digits) \(units[unit])"
}
