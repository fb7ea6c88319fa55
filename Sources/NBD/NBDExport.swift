import BlockLayer

/// A disk that the server offers. It belongs to the thread of its node.
public final class NBDExport {
  /// What clients ask for; at most 4096 bytes.
  public let name: String
  /// What clients are told of it; at most 4096 bytes.
  public let description: String
  /// The disk.
  public let node: any BlockNode
  /// Writes are refused, whatever the node allows.
  public let isReadOnly: Bool
  /// Several connections see each other's writes, and a flush of one covers them all.
  ///
  /// True of every node of this server, whose thread is their one writer; a server that takes one client says nothing.
  public let allowsSeveralConnections: Bool
  /// The dirty bitmaps that clients may ask for.
  public let bitmaps: [NBDBitmap]
  /// The node whose layers say what is stored where.
  let layers: () -> any BlockNode

  /// Offers `node`; where its layers change while it is served, `layers` says which node has them.
  public init(
    name: String, description: String = "", node: any BlockNode, isReadOnly: Bool = false,
    allowsSeveralConnections: Bool = true, bitmaps: [NBDBitmap] = [],
    layers: (() -> any BlockNode)? = nil
  ) throws(NBDError) {
    for text in [name, description] where text.utf8.count > NBDProtocol.longestString {
      throw .textTooLong(bytes: text.utf8.count, limit: NBDProtocol.longestString)
    }
    self.name = name
    self.description = description
    self.node = node
    self.isReadOnly = isReadOnly || node.isReadOnly
    self.allowsSeveralConnections = allowsSeveralConnections
    self.bitmaps = bitmaps
    self.layers = layers ?? { node }
  }

  /// What clients may do with it ("Transmission flags").
  var flags: NBDProtocol.TransmissionFlags {
    var flags: NBDProtocol.TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .sendDF]
    if isReadOnly { flags.insert(.readOnly) } else { flags.formUnion([.sendTrim, .sendWriteZeroes]) }
    // Only a format's own zero clusters are sure to be quicker than data.
    if !isReadOnly, node is Qcow2Image { flags.insert(.sendFastZero) }
    if allowsSeveralConnections { flags.insert(.multiConn) }
    return flags
  }

  /// The contexts that a client may select: their names, and the number that replies have for each.
  var contexts: [String] {
    [NBDProtocol.baseAllocation] + bitmaps.map { NBDProtocol.dirtyBitmapPrefix + $0.name }
  }
}

/// A dirty bitmap that an export shows. It belongs to the thread of the export's node.
public struct NBDBitmap {
  /// The bitmap's name, without `qemu:dirty-bitmap:`.
  public let name: String
  /// Whether the byte at `offset` is dirty, and how many bytes from there on share that; `length` at most, 1 at least.
  public let run: (_ offset: UInt64, _ length: UInt64) -> (isDirty: Bool, length: UInt64)

  /// A bitmap by what it answers.
  public init(
    name: String, run: @escaping (_ offset: UInt64, _ length: UInt64) -> (isDirty: Bool, length: UInt64)
  ) {
    self.name = name
    self.run = run
  }

  /// A persistent bitmap as it is now: what is written later does not show.
  public init(_ bitmap: Qcow2Bitmap) {
    self.init(name: bitmap.name) { offset, length in bitmap.run(at: offset, length: length) }
  }
}
