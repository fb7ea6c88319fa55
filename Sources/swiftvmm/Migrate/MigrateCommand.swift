import ArgumentParser
import BlockLayer
import Glibc
import Host
import JSON
import Monitor
import PageClasses
import TLS

/// `swiftvmm migrate`: a running machine into another process.
struct MigrateCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "migrate",
    abstract: "Move a running machine to another process, which waits with 'run --incoming'.",
    discussion: """
      The machine runs until the last moment, and goes on here if anything fails before the destination has it. \
      Its disks are files that both processes can open, or are copied with --copy-disks, into images of the same sizes \
      that 'run --incoming-disks' has. Once it is there, the process here ends.

      Example: swiftvmm run GUEST --incoming unix:/tmp/move --control unix:/tmp/there.sock
      Then: swiftvmm migrate /tmp/here.sock unix:/tmp/move
      """)

  @OptionGroup var control: ControlSocket

  @Argument(help: "Where the destination waits: unix:PATH or tcp:HOST:PORT.")
  var uri: String

  @Option(
    name: .customLong("copy-disks"),
    help: "Copy the disks first, to where 'run --incoming-disks' waits for them: unix:PATH or tcp:HOST:PORT.")
  var copyDisks: String?

  @Option(
    name: .customLong("tls-creds"),
    help: ArgumentHelp(
      "Move machine and disks by TLS: DIR[,verify-peer=on|off], a folder with ca-cert.pem and mostly client-cert.pem and client-key.pem.",
      valueName: "dir"))
  var tlsCreds: TLSOption?

  @Option(
    name: .customLong("tls-hostname"),
    help: "The name that the destination's certificate has, where it is not the host of the URI.")
  var tlsHostName: String?

  @Option(help: ArgumentHelp("In which order pages go: \(PageOrders.names.joined(separator: ", "))."))
  var order: String?

  @Option(help: "Connections, 1 to 16.")
  var links: Int?

  @Option(help: "Bytes a second, with a suffix K, M or G; 0 for as many as there go.")
  var bandwidth: String?

  @Option(help: "Milliseconds that the guest may stand still.")
  var downtime: Int?

  @Option(help: "zstd's level for pages, 1 to 20; 0 for none.")
  var compress: Int?

  @Flag(help: "Slow the vCPUs down where they write faster than the links carry.")
  var autoConverge = false

  @Flag(
    name: .customLong("postcopy"),
    help: "Have the guest go on there after the first round; what it has written since follows, first what it touches.")
  var postCopy = false

  @Option(help: "Write the order of pages to a file, as JSON lines.")
  var trace: String?

  @Option(help: "Write a page about the migration: HTML in one file.")
  var report: String?

  @Flag(help: "Leave the process here as it is, its machine stopped.")
  var keep = false

  @Flag(help: "Print JSON.")
  var json = false

  func validate() throws {
    if let order, !PageOrders.names.contains(order) {
      throw ValidationError("--order \(order): expected \(PageOrders.names.joined(separator: ", "))")
    }
    do {
      _ = try copyDisks.map { try StreamEndpoint($0) }
    } catch {
      throw ValidationError("--copy-disks: \(error)")
    }
    if tlsHostName != nil, tlsCreds == nil { throw ValidationError("--tls-hostname needs --tls-creds DIR") }
    if let compress, !(0...20).contains(compress) { throw ValidationError("--compress \(compress): expected 0 to 20") }
  }

  func run() throws {
    let arguments = try parameters()
    let result = try control.withClient { client in
      try beginTLS(&client)
      defer { endTLS(&client) }
      if arguments.count > 0 { _ = try client.execute("migrate-set-parameters", arguments) }
      _ = try client.execute(
        "migrate-set-capabilities",
        [
          "capabilities": [
            ["capability": "auto-converge", "state": .bool(autoConverge)],
            ["capability": "postcopy-ram", "state": .bool(postCopy)],
          ]
        ])
      let result =
        if let copyDisks { try move(copyingTo: StreamEndpoint(copyDisks), &client) } else { try move(&client) }
      if result["status"]?.stringValue == "completed", !keep { try client.quit() }
      return result
    }
    if let report { try MigrationPage.write(result, to: report) }
    let status = result["status"]?.stringValue ?? "failed"
    guard status == "completed" else {
      throw Failure.notMoved(status: status, reason: result["error-desc"]?.stringValue)
    }
    print(json ? result.serialized(pretty: true) : Self.summary(result))
  }

  /// The id of the credentials at the machine's process, for this migration.
  private static let credentials = "x-swiftvmm-migrate"

  private func beginTLS(_ client: inout QMPClient) throws {
    guard let tlsCreds else { return }
    // One that was killed may have left them.
    _ = try? client.execute("object-del", ["id": .string(Self.credentials)])
    _ = try client.execute("object-add", tlsCreds.object(Self.credentials, .client))
    _ = try client.execute(
      "migrate-set-parameters",
      ["tls-creds": .string(Self.credentials), "tls-hostname": .string(tlsHostName ?? "")])
  }

  private func endTLS(_ client: inout QMPClient) {
    guard tlsCreds != nil else { return }
    // The process may have ended.
    _ = try? client.execute("migrate-set-parameters", ["tls-creds": "", "tls-hostname": ""])
    _ = try? client.execute("object-del", ["id": .string(Self.credentials)])
  }

  private func move(_ client: inout QMPClient) throws -> JSONValue {
    _ = try client.execute("migrate", ["uri": .string(uri)])
    return try Self.follow(&client, startsPostCopy: postCopy)
  }

  private func move(copyingTo endpoint: StreamEndpoint, _ client: inout QMPClient) throws -> JSONValue {
    var tls: JSONObject = [:]
    if tlsCreds != nil { tls["tls-creds"] = .string(Self.credentials) }
    if let tlsHostName { tls["tls-hostname"] = .string(tlsHostName) }
    let copies = try DiskCopies.begin(to: endpoint, tls, &client)
    do {
      try copies.waitUntilReady(&client)
      let result = try move(&client)
      if result["status"]?.stringValue != "completed" { copies.giveUp(&client) }
      return result
    } catch {
      copies.giveUp(&client)
      throw error
    }
  }

  private func parameters() throws -> JSONObject {
    var arguments: JSONObject = [:]
    if let order { arguments["x-swiftvmm-order"] = .string(order) }
    if let links { arguments["multifd-channels"] = JSONValue(links) }
    if let bandwidth {
      arguments["max-bandwidth"] = JSONValue(bandwidth == "0" ? 0 : try parseSize(bandwidth, option: "--bandwidth"))
    }
    if let downtime { arguments["downtime-limit"] = JSONValue(downtime) }
    if let compress {
      arguments["multifd-compression"] = compress > 0 ? "zstd" : "none"
      if compress > 0 { arguments["multifd-zstd-level"] = JSONValue(compress) }
    }
    // The machine's process has another working directory.
    if let trace { arguments["x-swiftvmm-trace"] = .string(BlockGraph.absolute(trace)) }
    return arguments
  }

  /// Waits for the end, and shows how far it is where somebody looks.
  private static func follow(_ client: inout QMPClient, startsPostCopy: Bool) throws -> JSONValue {
    let isTerminal = isatty(STDERR_FILENO) == 1
    var startsPostCopy = startsPostCopy
    var told: String?
    while true {
      let state = try client.execute("query-migrate")
      if isTerminal { show(state) }
      if let reason = MoveTrouble(state)?.description, told != reason {
        told = reason
        printError("\(isTerminal ? "\r" : "")swiftvmm: \(reason)")
      }
      if startsPostCopy, state["ram"]?["dirty-sync-count"]?.unsignedValue ?? 0 > 0 {
        startsPostCopy = false
        _ = try client.execute("migrate-start-postcopy")
      }
      switch state["status"]?.stringValue {
      case "completed", "failed", "cancelled":
        if isTerminal { printError("") }
        return state
      default: usleep(isTerminal ? 100_000 : 10_000)
      }
    }
  }

  private static func show(_ state: JSONValue) {
    let sent = (state["ram"]?["transferred"]?.unsignedValue ?? 0) >> 20
    let left = (state["ram"]?["remaining"]?.unsignedValue ?? 0) >> 20
    let round = state["ram"]?["dirty-sync-count"]?.unsignedValue ?? 0
    var line = Array("\rround \(round + 1): \(sent) MiB sent, \(left) MiB left   ".utf8)
    _ = write(STDERR_FILENO, &line, line.count)
  }

  private static func summary(_ result: JSONValue) -> String {
    let bytes = result["ram"]?["transferred"]?.unsignedValue ?? 0
    let own = result["x-swiftvmm"]
    let downtime = Double(own?["downtime-us"]?.unsignedValue ?? 0) / 1000
    let rounds = own?["rounds"]?.arrayValue?.count ?? 0
    let time = result["total-time"]?.unsignedValue ?? 0
    let line = "moved in \(time) ms: \(bytes >> 20) MiB in \(rounds) rounds; the guest stood for \(downtime.tenths) ms"
    guard let postCopy = own?["postcopy"] else { return line }
    let longest = Double(postCopy["longest-stall-us"]?.unsignedValue ?? 0) / 1000
    let faults = postCopy["faults"]?.unsignedValue ?? 0
    return line + " and waited for \(faults) pages, \(longest.tenths) ms at most"
  }
}

/// What keeps a move from its end, while it goes on.
enum MoveTrouble: CustomStringConvertible {
  case stall(String)
  case cut(reason: String)

  init?(_ state: JSONValue) {
    if state["status"]?.stringValue == "postcopy-paused" {
      self = .cut(reason: state["error-desc"]?.stringValue ?? "")
    } else if let stall = state["x-swiftvmm"]?["stall"]?.stringValue {
      self = .stall(stall)
    } else {
      return nil
    }
  }

  var description: String {
    switch self {
    case .stall(let reason): reason
    case .cut(let reason): "the link was cut, it is tried again and again: \(reason)"
    }
  }
}

extension Double {
  /// With one digit behind the point.
  fileprivate var tenths: String { "\((self * 10).rounded() / 10)" }
}
