import BlockLayer
import JSON

/// Disks and layers as QMP tells of them (`BlockInfo`, `BlockDeviceInfo` and `ImageInfo` of QEMU's block-core.json).
enum DiskReport {
  static func disks(_ graph: BlockGraph) -> [JSONValue] {
    graph.disks.values.sorted { $0.name < $1.name }.map { disk in
      [
        "device": .string(disk.name), "qdev": .string("/machine/peripheral/\(disk.name)/virtio-backend"),
        "type": "unknown", "locked": false, "removable": false, "io-status": "ok",
        "inserted": .object(device(disk.top, isFlat: false)),
      ]
    }
  }

  /// `showsAll`: a backup's temporary snapshots too.
  static func nodes(_ graph: BlockGraph, isFlat: Bool, showsAll: Bool) -> [JSONValue] {
    graph.nodes.values.filter { showsAll || !$0.isBackupTemporary }.sorted { $0.name < $1.name }.map {
      .object(device($0, isFlat: isFlat))
    }
  }

  private static func device(_ node: LiveNode, isFlat: Bool) -> JSONObject {
    var object: JSONObject = [
      "file": .string(node.path), "node-name": .string(node.name), "ro": .bool(node.node.isReadOnly),
      "drv": .string(node.format.rawValue), "encrypted": false, "detect_zeroes": "off", "write_threshold": 0,
      "backing_file_depth": JSONValue(node.chain.count - 1), "image": .object(image(node, isFlat: isFlat)),
      "cache": [
        "writeback": true, "direct": .bool(node.access.direct), "no-flush": .bool(node.access.ignoresFlushes),
      ],
    ]
    for key in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] { object[key] = 0 }
    if let backing = node.backing { object["backing_file"] = .string(backing.path) }
    let bitmaps = bitmaps(node)
    if !bitmaps.isEmpty { object["dirty-bitmaps"] = .array(bitmaps) }
    return object
  }

  private static func image(_ node: LiveNode, isFlat: Bool) -> JSONObject {
    var object: JSONObject = [
      "filename": .string(node.path), "format": .string(node.format.rawValue),
      "virtual-size": JSONValue(node.node.size), "actual-size": JSONValue(node.allocatedBytes),
      "dirty-flag": .bool(node.qcow2?.isMarkedDirty ?? false),
    ]
    guard let image = node.qcow2 else { return object }
    object["cluster-size"] = JSONValue(image.clusterSize)
    if let name = image.backingName {
      object["backing-filename"] = .string(name)
      object["full-backing-filename"] = .string(BlockChain.resolve(name, besides: node.path))
      if let format = image.backingFormat { object["backing-filename-format"] = .string(format) }
    }
    if let backing = node.backing, !isFlat { object["backing-image"] = .object(self.image(backing, isFlat: false)) }
    return object
  }

  private static func bitmaps(_ node: LiveNode) -> [JSONValue] {
    node.bitmapStates.map { bitmap in
      var object: JSONObject = [
        "name": .string(bitmap.name), "count": JSONValue(bitmap.dirtyBytes),
        "granularity": JSONValue(bitmap.granularity), "recording": .bool(bitmap.isRecording), "busy": false,
        "persistent": .bool(bitmap.isPersistent),
      ]
      if bitmap.isInconsistent { object["inconsistent"] = true }
      return .object(object)
    }
  }
}
