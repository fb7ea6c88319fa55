import BlockLayer
import JSON

/// What is known of a disk's snapshots, in a file beside the disk (docs/agent.md).
///
/// The chain is what counts: a layer below the top is a snapshot, whatever the file says. The file has what the chain cannot tell: when
/// a cut was made, its name, and whose state a layer holds that another one was merged into. Where it is missing or damaged it is made
/// again, with the time of a layer's last write in place of the cut's.
struct SnapshotCatalogue {
  /// One snapshot: a layer that takes no more writes.
  struct Entry {
    var id: String
    var name: String
    /// Milliseconds since 1970, of the cut.
    var time: UInt64
    var size: UInt64
    var format: String
    /// The run of the machine, counted from 1, that the cut was made in.
    var generation: UInt64
    var isScheduled: Bool
    /// The layer's file, absolute.
    var file: String
    /// The file that this layer is being merged into, whose own state is lost.
    var into: String?
  }

  /// What the chain says of a layer.
  struct Layer {
    var file: String
    var node: String
    var size: UInt64
    var format: String
  }

  /// What is known of a cut before the catalogue has it.
  struct Cut {
    var time: UInt64
    /// Nil for the file's name.
    var id: String?
    var name = ""
    var isScheduled = false
  }

  private static let suffix = ".snapshots"
  private static let mostEntries = 1024
  static let longestName = 64
  static let longestIdentifier = 128

  /// The image that the file is beside.
  let image: String
  /// The disk's top layer, absolute.
  private(set) var top: String
  let generation: UInt64
  /// From the bottom of the chain.
  private(set) var entries: [Entry] = []
  /// Files of layers that another one is being merged into, or was in part: their own state is lost.
  private var spoiled: Set<String> = []
  /// Rises with each change.
  private(set) var revision: UInt64 = 0

  static func path(besides image: String) -> String { image + suffix }

  /// The catalogue of a disk with these layers, from the bottom, below `top`.
  ///
  /// It is beside the layer that it was beside before, else beside the top.
  init(top: String, layers: [Layer]) {
    let files = [top] + layers.reversed().map(\.file)
    let known = files.lazy.compactMap { file in Self.read(besides: file).map { (file, $0) } }
    let own = known.first { $0.1.top == top || $0.0 == top }
    image = own?.0 ?? top
    self.top = top
    entries = (own ?? known.first)?.1.entries ?? []
    spoiled = (own ?? known.first)?.1.spoiled ?? []
    generation = (own?.1.generation ?? 0).addingReportingOverflow(1).partialValue
  }

  // MARK: The chain

  /// Makes the entries fit the chain, from the bottom.
  mutating func follow(top: String, layers: [Layer], cuts: [String: Cut]) {
    let files = Set(layers.map(\.file))
    var left = entries
    var result: [Entry] = []
    var rebuilt: Set<String> = []
    for layer in layers {
      // What was merged there is what it holds now.
      let merged = left.first { $0.into == layer.file && !files.contains($0.file) }
      if merged == nil, spoiled.contains(layer.file) { continue }
      spoiled.remove(layer.file)
      let found = merged ?? left.first { $0.file == layer.file }
      guard var entry = found ?? Self.entry(layer, cuts[layer.file], generation, taken: left + result) else { continue }
      if found == nil, cuts[layer.file] == nil { rebuilt.insert(entry.id) }
      left.removeAll { $0.id == entry.id }
      (entry.file, entry.size, entry.format) = (layer.file, layer.size, layer.format)
      if let into = entry.into, !spoiled.contains(into) { entry.into = nil }
      result.append(entry)
    }
    // A layer is made durable after the cut, so its last write may be later than that of the layer above.
    for index in result.indices.dropLast().reversed() where rebuilt.contains(result[index].id) {
      result[index].time = min(result[index].time, result[index + 1].time)
    }
    // And that of a layer that was never written to is of its making, before the cut below was known to be over.
    for index in result.indices.dropFirst() where rebuilt.contains(result[index].id) {
      result[index].time = max(result[index].time, result[index - 1].time)
    }
    let kept = spoiled.intersection(files)
    if top == self.top, kept == spoiled, result.map(\.json) == entries.map(\.json) { return }
    (self.top, spoiled, entries) = (top, kept, result)
    revision += 1
  }

  private static func entry(_ layer: Layer, _ cut: Cut?, _ generation: UInt64, taken: [Entry]) -> Entry? {
    guard let time = cut?.time ?? RecoveryTime.modified(layer.file) else { return nil }
    let name = cut?.id ?? identifier(of: layer.file)
    var id = name
    var number = 2
    while taken.contains(where: { $0.id == id }) {
      id = "\(name)-\(number)"
      number += 1
    }
    return Entry(
      id: id, name: cut?.name ?? "", time: time, size: layer.size, format: layer.format, generation: generation,
      isScheduled: cut?.isScheduled ?? false, file: layer.file)
  }

  /// A file's name as far as an identifier can say it.
  static func identifier(of file: String) -> String {
    let name = file.split(separator: "/").last ?? ""
    let bytes = name.utf8.prefix(longestIdentifier - 8).map { byte in
      GuestSnapshots.isIdentifier(byte) ? byte : UInt8(ascii: "_")
    }
    let text = String(decoding: bytes, as: UTF8.self)
    return text.hasPrefix(".") || text.isEmpty ? "_" + text.dropFirst() : text
  }

  // MARK: Changes

  /// Layers are about to be merged: those from `lowest` to below `upper` lose their state, and the lowest gets that of `upper`.
  mutating func beginMerge(of upper: String, losing files: [String], into lowest: String) {
    entries.removeAll { files.contains($0.file) }
    spoiled.formUnion(files)
    if let index = entries.firstIndex(where: { $0.file == upper }) { entries[index].into = lowest }
    revision += 1
  }

  /// - Returns: Whether there is such a snapshot.
  mutating func rename(_ id: String, _ name: String) -> Bool {
    guard let index = entries.firstIndex(where: { $0.id == id }) else { return false }
    entries[index].name = name
    revision += 1
    return true
  }

  // MARK: The file

  /// Writes it; a disk without snapshots has no file.
  func save() throws(Failure) {
    guard !NBDURI.isURI(image) else { return }
    let path = Self.path(besides: image)
    if entries.isEmpty, spoiled.isEmpty {
      if BackupFiles.exists(path) { try BackupFiles.remove(path) }
      return
    }
    let json: JSONValue = [
      "version": 1, "top": .string(top), "generation": JSONValue(generation),
      "snapshots": .array(entries.map(\.json)), "spoiled": .array(spoiled.sorted().map { .string($0) }),
    ]
    try BackupFiles.replace(path, json)
  }

  /// The file says what will not be true in a moment: better none, which is made again.
  func forget() {
    if !NBDURI.isURI(image) { try? BackupFiles.remove(Self.path(besides: image)) }
  }

  private struct Contents {
    var top: String
    var generation: UInt64
    var entries: [Entry]
    var spoiled: Set<String>
  }

  private static func read(besides image: String) -> Contents? {
    let path = path(besides: image)
    guard !NBDURI.isURI(image), BackupFiles.exists(path), let json = try? BackupFiles.read(path),
      json["version"]?.integerValue == 1, let top = json["top"]?.stringValue,
      let generation = json["generation"]?.unsignedValue, let list = json["snapshots"]?.arrayValue,
      list.count <= mostEntries
    else { return nil }
    var entries: [Entry] = []
    for item in list {
      // One that is wrong is damage: the chain says more than the rest would.
      guard let entry = Entry(item), !entries.contains(where: { $0.id == entry.id }) else { return nil }
      entries.append(entry)
    }
    let spoiled = (json["spoiled"]?.arrayValue ?? []).compactMap(\.stringValue)
    return Contents(top: top, generation: generation, entries: entries, spoiled: Set(spoiled))
  }

  /// The newest layer of the disk whose catalogue is beside `image`; nil for the image itself.
  static func newestLayer(above image: String) -> String? {
    guard let top = read(besides: image)?.top, top != BackupFiles.real(image), BackupFiles.exists(top) else {
      return nil
    }
    return top
  }
}

extension SnapshotCatalogue.Entry {
  var json: JSONValue {
    [
      "id": .string(id), "name": .string(name), "time": JSONValue(time), "size": JSONValue(size),
      "format": .string(format), "generation": JSONValue(generation), "scheduled": .bool(isScheduled),
      "file": .string(file), "into": into.map { .string($0) } ?? .null,
    ]
  }

  init?(_ json: JSONValue) {
    guard let id = json["id"]?.stringValue, GuestSnapshots.isIdentifier(id), let name = json["name"]?.stringValue,
      name.utf8.count <= SnapshotCatalogue.longestName, let time = json["time"]?.unsignedValue,
      let size = json["size"]?.unsignedValue, let format = json["format"]?.stringValue,
      let generation = json["generation"]?.unsignedValue, let file = json["file"]?.stringValue
    else { return nil }
    self.init(
      id: id, name: name, time: time, size: size, format: format, generation: generation,
      isScheduled: json["scheduled"]?.boolValue ?? false, file: file, into: json["into"]?.stringValue)
  }
}
