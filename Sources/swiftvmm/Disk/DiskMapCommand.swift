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
    var text = "["
    try chain.top.forEachExtent { found in
      let extent = found.extent
      if extent.offset > 0 { text += ",\n" }
      text += "{\"start\": \(extent.offset), \"length\": \(extent.length), \"depth\": \(found.depth), "
      text += "\"present\": \(extent.isAllocated), \"zero\": \(extent.isZero), \"data\": \(extent.isData)"
      if let offset = extent.hostOffset { text += ", \"offset\": \(offset)" }
      text += "}"
      if text.utf8.count > 1 << 16 {
        print(text, terminator: "")
        text = ""
      }
    }
    print(text + "]")
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
