import Glibc

/// The formats of images.
public enum ImageFormat: String, Sendable, CaseIterable {
  case raw, qcow2
}

/// A disk with the layers below it, as files name each other.
public final class BlockChain {
  /// More layers than anybody needs, and few enough for the stack.
  public static let maximumDepth = 512

  /// One layer.
  public struct Layer {
    /// The file's path, relative to the working directory.
    public let path: String
    /// Its format.
    public let format: ImageFormat
    /// The layer with all below it.
    public let node: any BlockNode
    /// Its file.
    public let file: any BlockFile

    /// The layer, where its format is qcow2.
    public var qcow2: Qcow2Image? { node as? Qcow2Image }
  }

  /// The layers, the top one first.
  public let layers: [Layer]
  /// Where its requests wait.
  public let queue: any IOQueue

  /// The disk.
  public var top: any BlockNode { layers[0].node }

  /// Opens an image and, where `backing`, every image below it, those for reading.
  ///
  /// A format that is not given is taken from the bytes. A commit writes to the layer `writableDepth` too.
  public init(
    path: String, format: ImageFormat? = nil, access: FileAccess = FileAccess(), backing: Bool = true,
    writableDepth: Int? = nil, options: Qcow2Image.Options = Qcow2Image.Options(), queue: any IOQueue
  ) throws(BlockError) {
    self.queue = queue
    var layers: [Layer] = []
    var seen: Set<FileIdentity> = []
    var next: (path: String, format: ImageFormat?)? = (path, format)
    do throws(BlockError) {
      while let (path, format) = next {
        guard layers.count < Self.maximumDepth else {
          throw .chainTooDeep(path: layers[0].path, limit: Self.maximumDepth)
        }
        var layerAccess = access
        layerAccess.writable = access.writable && (layers.isEmpty || layers.count == writableDepth)
        let layer = try Self.open(path, format, layerAccess, options, queue)
        if let identity = layer.file.identity, !seen.insert(identity).inserted { throw .chainLoop(path: path) }
        layers.last?.qcow2?.backing = layer.node
        layers.append(layer)
        next = backing ? try Self.backing(of: layer) : nil
      }
    } catch {
      for layer in layers { layer.file.close() }
      guard let last = layers.last else { throw error }
      switch error {
      case .chainLoop, .chainTooDeep: throw error
      default: throw .backing(of: last.path, reason: "\(error)")
      }
    }
    self.layers = layers
  }

  private static func open(
    _ path: String, _ format: ImageFormat?, _ access: FileAccess, _ options: Qcow2Image.Options, _ queue: any IOQueue
  ) throws(BlockError) -> Layer {
    let file = try openFile(path, access, queue)
    do throws(BlockError) {
      let format = if let format { format } else { try probe(file) }
      let node: any BlockNode =
        switch format {
        case .raw: RawImage(file)
        case .qcow2: try Qcow2Image(file, options: options)
        }
      return Layer(path: path, format: format, node: node, file: file)
    } catch {
      file.close()
      throw error
    }
  }

  /// A file of the host, or an export of an NBD server.
  private static func openFile(
    _ path: String, _ access: FileAccess, _ queue: any IOQueue
  ) throws(BlockError) -> any BlockFile {
    guard NBDURI.isURI(path) else { return try HostFile(path: path, access: access, queue: queue) }
    return try NBDFile(NBDURI(path), access: access, queue: queue)
  }

  /// The format that a file's bytes say.
  public static func probe(_ file: any BlockFile) throws(BlockError) -> ImageFormat {
    try file.readArray(at: 0, count: 4).bigEndian32(0) == Qcow2Header.magic ? .qcow2 : .raw
  }

  private static func backing(of layer: Layer) throws(BlockError) -> (path: String, format: ImageFormat?)? {
    guard let image = layer.qcow2, let name = image.backingName else { return nil }
    var format: ImageFormat?
    if let text = image.backingFormat {
      format = ImageFormat(rawValue: text)
      guard format != nil else { throw .unsupported(path: name, .format(text)) }
    }
    return (resolve(name, besides: layer.path), format)
  }

  /// A backing file's name is relative to the image that has it.
  public static func resolve(_ name: String, besides path: String) -> String {
    let name = name.hasPrefix("file:") ? String(name.dropFirst(5)) : name
    guard !name.hasPrefix("/"), !NBDURI.isURI(name), let slash = path.lastIndex(of: "/") else { return name }
    return String(path[...slash]) + name
  }

  /// Writes everything back and closes the files; the first error counts.
  public func close() throws(BlockError) {
    var first: BlockError?
    for layer in layers {
      do throws(BlockError) {
        try layer.node.close()
      } catch {
        first = first ?? error
      }
    }
    if let first { throw first }
  }
}
