import ArgumentParser
import BlockLayer
import Glibc
import JSON

/// `swiftvmm disk info`: what an image is.
struct DiskInfoCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "info",
    abstract: "Tell what an image is, and which images it stands on.",
    discussion: "Example: swiftvmm disk info --backing-chain --json disk.qcow2")

  @Flag(help: "Tell of every image in the chain.")
  var backingChain = false

  @OptionGroup var output: DiskOutput
  @OptionGroup var image: DiskImage

  func run() throws {
    let queue = try makeIOQueue()
    let chain = try image.open(backing: backingChain, queue: queue)
    try withChain(chain) {
      if output.isJSON {
        let entries = chain.layers.map { Self.json($0) }
        print((backingChain ? .array(entries) : entries[0]).serialized(pretty: true))
      } else {
        print(chain.layers.map { Self.text($0) }.joined(separator: "\n\n"))
      }
    }
  }

  private static func json(_ layer: BlockChain.Layer) -> JSONValue {
    var object = JSONObject()
    object["virtual-size"] = JSONValue(layer.node.size)
    object["filename"] = .string(layer.path)
    object["format"] = .string(layer.format.rawValue)
    if let bytes = layer.file.allocatedBytes { object["actual-size"] = JSONValue(bytes) }
    object["dirty-flag"] = .bool(layer.qcow2?.isMarkedDirty ?? false)
    guard let image = layer.qcow2 else { return .object(object) }
    object["cluster-size"] = JSONValue(image.clusterSize)
    if let name = image.backingName {
      object["backing-filename"] = .string(name)
      object["full-backing-filename"] = .string(BlockChain.resolve(name, besides: layer.path))
      if let format = image.backingFormat { object["backing-filename-format"] = .string(format) }
    }
    if !image.snapshots.isEmpty { object["snapshots"] = .array(image.snapshots.map { DiskSnapshotCommand.json($0) }) }
    object["format-specific"] = ["type": "qcow2", "data": .object(specific(image))]
    return .object(object)
  }

  private static func specific(_ image: Qcow2Image) -> JSONObject {
    var data: JSONObject = [
      "compat": .string(image.version == 2 ? "0.10" : "1.1"), "compression-type": .string(image.compression.name),
    ]
    data["refcount-bits"] = JSONValue(image.refcountBits)
    guard image.version >= 3 else { return data }
    data["lazy-refcounts"] = .bool(image.usesLazyRefcounts)
    data["corrupt"] = .bool(image.isMarkedCorrupt)
    data["extended-l2"] = .bool(image.hasExtendedL2)
    if !image.bitmaps.isEmpty {
      data["bitmaps"] = .array(
        image.bitmaps.map { bitmap in
          let flags = (bitmap.isInconsistent ? ["in-use"] : []) + (bitmap.isRecording ? ["auto"] : [])
          return [
            "name": .string(bitmap.name), "granularity": JSONValue(bitmap.granularity),
            "flags": .array(flags.map { .string($0) }),
          ]
        })
    }
    return data
  }

  private static func text(_ layer: BlockChain.Layer) -> String {
    var lines = [
      "image: \(layer.path)", "file format: \(layer.format.rawValue)",
      "virtual size: \(readableSize(layer.node.size)) (\(layer.node.size) bytes)",
      "disk size: \(layer.file.allocatedBytes.map(readableSize) ?? "unavailable")",
    ]
    guard let image = layer.qcow2 else { return lines.joined(separator: "\n") }
    lines.append("cluster_size: \(image.clusterSize)")
    if image.isMarkedDirty { lines.append("cleanly shut down: no") }
    if let name = image.backingName {
      let resolved = BlockChain.resolve(name, besides: layer.path)
      lines.append("backing file: \(name)" + (resolved == name ? "" : " (actual path: \(resolved))"))
      if let format = image.backingFormat { lines.append("backing file format: \(format)") }
    }
    if !image.snapshots.isEmpty { lines += ["Snapshot list:"] + DiskSnapshotCommand.table(image.snapshots) }
    lines.append("Format specific information:")
    let data = specific(image)
    for key in data.keys where key != "bitmaps" {
      let value = data[key]?.stringValue ?? data[key]?.serialized() ?? ""
      lines.append("    \(key.replacingDashes): \(value)")
    }
    for (index, bitmap) in image.bitmaps.enumerated() {
      if index == 0 { lines.append("    bitmaps:") }
      let state = bitmap.isInconsistent ? ", in use" : bitmap.isRecording ? ", recording" : ""
      lines.append("        \(bitmap.name): granularity \(bitmap.granularity)\(state)")
    }
    return lines.joined(separator: "\n")
  }
}

extension String {
  /// A JSON key as words.
  fileprivate var replacingDashes: String { String(map { $0 == "-" ? " " : $0 }) }
}
