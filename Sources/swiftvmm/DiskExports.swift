import BlockLayer
import Host
import Monitor
import NBD
import TLS

/// The NBD server of a running machine, and what it offers: disks as the guest has them, and layers.
final class DiskExports: @unchecked Sendable {
  /// What is to be offered.
  struct Request {
    var id: String
    var node: String
    var name: String
    var description = ""
    var isWritable = false
    var bitmaps: [String] = []
  }

  private struct Entry {
    let request: Request
    /// A layer that the export keeps open; nil for a disk.
    let layer: LiveNode?
    let disk: LiveDisk?
  }

  private unowned let control: DiskControl
  // These are the disks' thread's.
  private var server: NBDServer?
  private var entries: [Entry] = []
  /// It listens only until the disks are filled. Set before the machine comes.
  private var isForFilling = false

  init(_ control: DiskControl) { self.control = control }

  /// Whether it listens.
  var isRunning: Bool { control.disks.thread.perform { [self] in server != nil } }

  /// Listens.
  func start(
    _ endpoint: StreamEndpoint, clientLimit: Int, _ credentials: TLSCredentials? = nil
  ) throws(MonitorError) {
    try run { [self] _ throws(ExportError) in
      guard server == nil else { throw .running }
      do {
        let server = try NBDServer(
          StreamListener(endpoint), on: control.disks.thread, clientLimit: clientLimit, credentials: credentials
        ) { event in
          if case .refused(let error) = event { printError("swiftvmm: an NBD client was turned away: \(error)") }
        }
        try server.start()
        self.server = server
      } catch {
        throw .failed("\(error)")
      }
    }
  }

  /// Offers a disk or a layer.
  func add(_ request: Request) throws(MonitorError) {
    try run { [self] graph throws(ExportError) in
      guard let server else { throw .notRunning }
      guard !entries.contains(where: { $0.request.id == request.id }) else { throw .idTaken(request.id) }
      do {
        let top = try Self.layer(request, graph)
        // Below a disk, clients see what the guest sees, whatever layers come and go.
        let disk = graph.disks.values.first { $0.top === top }
        if request.isWritable, top.node.isReadOnly { throw BlockError.readOnly(path: top.path) }
        let bitmaps = try request.bitmaps.map { try Self.bitmap($0, top) }
        let node: any BlockNode = disk ?? top.node
        let layers = disk.map { disk in { [unowned disk] in disk.top.node as any BlockNode } }
        try server.add(
          NBDExport(
            name: request.name, description: request.description, node: node, isReadOnly: !request.isWritable,
            bitmaps: bitmaps, layers: layers))
        if disk == nil { top.beginUse() }
        entries.append(Entry(request: request, layer: disk == nil ? top : nil, disk: disk))
      } catch {
        throw .failed("\(error)")
      }
    }
  }

  /// What is to be offered. Who may write to a disk whose machine is still to come fills its image.
  private static func layer(_ request: Request, _ graph: BlockGraph) throws(BlockError) -> LiveNode {
    if request.isWritable, let disk = graph.disks[request.node], disk.absence != nil { return try graph.fill(disk) }
    return try graph.node(request.node)
  }

  /// Offers every disk that a machine on its way here writes to, to be filled, until that machine comes.
  func startFilling(_ endpoint: StreamEndpoint, _ credentials: TLSCredentials?) throws(MonitorError) {
    try start(endpoint, clientLimit: 0, credentials)
    isForFilling = true
    let names = try run { graph in graph.disks.values.filter { !$0.isReadOnly }.map(\.name) }
    for name in names {
      var request = Request(id: name, node: name, name: name)
      request.isWritable = true
      try add(request)
    }
  }

  /// The machine is about to have its disks: nobody else may write to them any more.
  func endFilling() throws(MonitorError) {
    try run { [self] graph in
      let filled = graph.disks.values.compactMap(\.filled)
      while let index = entries.firstIndex(where: { entry in filled.contains { $0 === entry.layer } }) {
        remove(at: index, graph)
      }
    }
    guard isForFilling else { return }
    isForFilling = false
    try stop()
  }

  /// A bitmap of a layer or of the first one below that has it, as QEMU looks for them.
  private static func bitmap(_ name: String, _ top: LiveNode) throws(ExportError) -> NBDBitmap {
    guard let layer = top.chain.first(where: { $0.hasBitmap(name) }) else { throw .noBitmap(name) }
    return NBDBitmap(name: name) { [weak layer] offset, length in
      layer?.dirtyRun(name, at: offset, length: length) ?? (false, length)
    }
  }

  /// Offers it no longer. Clients are dropped, or where `isSafe` are a reason not to.
  func remove(id: String, isSafe: Bool) throws(MonitorError) {
    try run { [self] graph throws(ExportError) in
      guard let index = entries.firstIndex(where: { $0.request.id == id }) else { throw .unknown(id) }
      if isSafe, let server, server.clientCount(of: entries[index].request.name) > 0 { throw .inUse(id) }
      remove(at: index, graph)
    }
  }

  private func remove(at index: Int, _ graph: BlockGraph) {
    let entry = entries.remove(at: index)
    // It was added, so it can be removed.
    try? server?.remove(entry.request.name)
    if let layer = entry.layer {
      layer.endUse()
      graph.drop(layer)
    }
    control.tell(.blockExportDeleted(entry.request.id))
  }

  /// Ends the server and drops every client.
  func stop() throws(MonitorError) {
    try run { [self] graph throws(ExportError) in
      guard let server else { throw .notRunning }
      while !entries.isEmpty { remove(at: 0, graph) }
      server.stop()
      self.server = nil
    }
  }

  /// The machine has lost a disk. On the disks' thread.
  func diskGone(_ disk: LiveDisk, _ graph: BlockGraph) {
    while let index = entries.firstIndex(where: { $0.disk === disk }) { remove(at: index, graph) }
  }

  /// What is offered: the ids and the layers' names.
  var list: [(id: String, node: String)] {
    control.disks.thread.perform { [self] in
      entries.map { ($0.request.id, $0.layer?.name ?? $0.disk?.top.name ?? $0.request.node) }
    }
  }

  private func run<Result>(
    _ body: @escaping (BlockGraph) throws(ExportError) -> Result
  ) throws(MonitorError) -> Result {
    let outcome = control.disks.thread.perform { [self] in
      Swift.Result { () throws(ExportError) in try body(control.disks.graph) }
    }
    do { return try outcome.get() } catch { throw .refused("\(error)") }
  }
}

/// Why QMP cannot have an export. Where QEMU has an error for the case, the text is QEMU's.
enum ExportError: Error, CustomStringConvertible {
  case running
  case notRunning
  case idTaken(String)
  case unknown(String)
  case inUse(String)
  case noBitmap(String)
  case failed(String)

  var description: String {
    switch self {
    case .running: "NBD server already running"
    case .notRunning: "NBD server not running"
    case .idTaken(let id): "Block export id '\(id)' is already in use"
    case .unknown(let id): "Export '\(id)' is not found"
    case .inUse(let id): "export '\(id)' still in use"
    case .noBitmap(let name): "Bitmap '\(name)' is not found"
    case .failed(let reason): reason
    }
  }
}
