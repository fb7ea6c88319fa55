import ArgumentParser
import BlockLayer
import CLinux
import Glibc
import Host
import NBD
import TLS

/// `swiftvmm disk serve`: a disk for NBD clients.
struct DiskServeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "serve",
    abstract: "Serve a disk, with all its layers, to NBD clients, with qemu-nbd's options.",
    discussion: """
      The disk's URI is printed once clients can connect. The command ends when the last client has left, or by SIGTERM.
      Example: swiftvmm disk serve --socket /run/disk.sock --read-only --shared 0 disk.qcow2
      """)

  @Option(help: "unix:PATH or [tcp:]HOST:PORT, instead of --socket, --bind and --port.")
  var nbd: String?

  @Option(name: [.customShort("k"), .long], help: "Listen on this unix socket.")
  var socket: String?

  @Option(name: [.customShort("b"), .long], help: "Listen on this address.")
  var bind = "127.0.0.1"

  @Option(name: [.customShort("p"), .long], help: "Listen on this TCP port; 0 for any free one.")
  var port: UInt16 = 10809

  @Flag(name: [.customShort("r"), .long], help: "Refuse changes.")
  var readOnly = false

  @Option(name: [.customShort("x"), .long], help: "The export's name.")
  var exportName = ""

  @Option(name: [.customShort("D"), .long], help: "What clients are told of the export.")
  var description = ""

  @Option(name: [.customShort("B"), .long], help: "Show this dirty bitmap as qemu:dirty-bitmap:NAME; may be repeated.")
  var bitmap: [String] = []

  @Option(name: [.customShort("l"), .long], help: "Serve this snapshot inside the image, read-only.")
  var loadSnapshot: String?

  @Option(name: [.customShort("e"), .long], help: "Clients at a time; 0 for no limit.")
  var shared = 1

  @Flag(name: [.customShort("t"), .long], help: "Go on when the last client has left.")
  var persistent = false

  @Option(
    name: .customLong("tls-creds"),
    help: ArgumentHelp(
      "Serve by TLS alone: DIR[,verify-peer=on|off], a folder with ca-cert.pem, server-cert.pem and server-key.pem.",
      valueName: "dir"))
  var tlsCreds: TLSOption?

  @Option(help: "How the host's page cache is used: writeback, none, unsafe.")
  var cache = DiskOption.Cache.writeback

  @OptionGroup var image: DiskImage

  func validate() throws {
    if shared < 0 { throw ValidationError("--shared \(shared): expected 0 or more") }
    if nbd != nil, socket != nil {
      throw ValidationError("--nbd and --socket exclude each other: leave one of them out")
    }
  }

  func run() throws {
    do {
      try serve()
    } catch let error as NBDError {
      throw Failure.nbd(error)
    } catch let error as HostError {
      throw Failure.host(error)
    }
  }

  private func endpoint() throws(HostError) -> StreamEndpoint {
    if let nbd { return try StreamEndpoint(nbd) }
    if let socket { return try StreamEndpoint("unix:" + socket) }
    return .tcp(host: bind, port: port)
  }

  private func serve() throws {
    let endpoint = try endpoint()
    let credentials = try tlsCreds?.credentials(.server)
    let isReadOnly = readOnly || loadSnapshot != nil
    let thread = try IOThread()
    let access = FileAccess(
      writable: !isReadOnly, direct: cache == .none, ignoresFlushes: cache == .unsafe,
      sharesAll: image.forceShare && isReadOnly)
    let chain = try BlockChain(path: image.file, format: image.format, access: access, queue: thread.queue)
    try withChain(chain) {
      if let loadSnapshot { try image.qcow2(chain, for: "a snapshot").readSnapshot(loadSnapshot) }
      let over = Condition(false)
      signal(SIGPIPE, SIG_IGN)
      let signals = FileDescriptor(
        owning: try check("signalfd", clinux_signal_descriptor([SIGINT, SIGTERM, SIGHUP], 3)))
      try thread.loop.add(signals.rawValue, .readable) { _ in over.withLock { $0 = true } }
      let endsAlone = !persistent
      let server = try NBDServer(
        StreamListener(endpoint), on: thread, clientLimit: shared, credentials: credentials
      ) { event in
        switch event {
        case .disconnected(0): if endsAlone { over.withLock { $0 = true } }
        case .refused(let error): printError("swiftvmm: a client was turned away: \(error)")
        default: break
        }
      }
      try server.add(
        NBDExport(
          name: exportName, description: description, node: chain.top, isReadOnly: isReadOnly,
          allowsSeveralConnections: shared != 1, bitmaps: try bitmaps(chain)))
      try server.start()
      try thread.start()
      print(NBDURI(server.endpoint, export: exportName, tls: credentials == nil ? nil : NBDURI.TLS()))
      fflush(nil)
      _ = over.wait { $0 ? true : nil }
      thread.loop.remove(signals.rawValue)
      thread.stop()
      server.stop()
    }
  }

  private func bitmaps(_ chain: BlockChain) throws -> [NBDBitmap] {
    try bitmap.map { name in
      let image = try self.image.qcow2(chain, for: "a bitmap")
      guard let found = image.bitmaps.first(where: { $0.name == name }), !found.isInconsistent else {
        throw BlockError.unknown(what: "consistent bitmap", name: name, path: self.image.file)
      }
      return NBDBitmap(name: name) { [unowned image] offset, length in
        // As it is at the moment: clients of a disk that is written to see what they wrote.
        image.bitmaps.first { $0.name == name }?.run(at: offset, length: length) ?? (false, length)
      }
    }
  }
}
