import ArgumentParser
import BlockLayer

/// `swiftvmm disk map`: which file of a chain holds what.
struct DiskMapCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "map",
    abstract: "Tell where each stretch of a disk is stored.",
    discussion: "Example: swiftvmm disk map --json disk.qcow2")

  @OptionGroup var output: DiskOutput
  @OptionGroup var image: DiskImage

  func run() throws {
    let queue = try makeIOQueue()
    let chain = try image.open(queue: queue)
    try withChain(chain) {
      if output.isJSON { try printJSON(chain) } else { try printTable(chain) }
    }
  }

  private func printJSON(_ chain: BlockChain) throws {
    // Numbers and booleans only, a great many of them: written as they come.
    var text = Text()
    text.add("[")
    try chain.top.forEachExtent { found in
      let extent = found.extent
      if extent.offset > 0 { text.add(",\n") }
      text.add("{\"start\": ", extent.offset)
      text.add(", \"length\": ", extent.length)
      text.add(", \"depth\": ", UInt64(found.depth))
      text.add(", \"present\": ", extent.isAllocated)
      text.add(", \"zero\": ", extent.isZero)
      text.add(", \"data\": ", extent.isData)
      if let offset = extent.hostOffset { text.add(", \"offset\": ", offset) }
      text.add("}")
      if text.isLong { text.print() }
    }
    text.add("]\n")
    text.print()
  }

  /// ASCII text on its way to standard output.
  private struct Text {
    private var bytes: [UInt8] = []

    var isLong: Bool { bytes.count > 1 << 16 }

    mutating func add(_ text: StaticString) { text.withUTF8Buffer { bytes += $0 } }

    mutating func add(_ name: StaticString, _ value: Bool) {
      add(name)
      add(value ? "true" : "false")
    }

    mutating func add(_ name: StaticString, _ value: UInt64) {
      add(name)
      var rest = value
      withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 20) { digits in
        var first = digits.count
        repeat {
          first -= 1
          digits[first] = UInt8(ascii: "0") + UInt8(rest % 10)
          rest /= 10
        } while rest > 0
        bytes += digits[first...]
      }
    }

    mutating func print() {
      Swift.print(String(decoding: bytes, as: UTF8.self), terminator: "")
      bytes.removeAll(keepingCapacity: true)
    }
  }

  private func printTable(_ chain: BlockChain) throws {
    func column(_ text: String) -> String { text + String(repeating: " ", count: max(1, 16 - text.count)) }
    func hexadecimal(_ value: UInt64) -> String { value == 0 ? "0" : "0x" + String(value, radix: 16) }
    print(column("Offset") + column("Length") + column("Mapped to") + "File")
    try chain.top.forEachExtent { found in
      let extent = found.extent
      guard extent.isData, !extent.isZero else { return }
      guard let offset = extent.hostOffset else {
        throw Failure.diskMapNeedsJSON(path: chain.layers[found.depth].path, offset: extent.offset)
      }
      let cells = [extent.offset, extent.length, offset].map { column(hexadecimal($0)) }
      print(cells.joined() + chain.layers[found.depth].path)
    }
  }
}
