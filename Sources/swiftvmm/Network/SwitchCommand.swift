import ArgumentParser
import CLinux
import Glibc
import Host
import JSON
import NetLayer

/// `swiftvmm switch`: the virtual switch.
struct SwitchCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "switch",
    abstract: "A learning Ethernet switch for virtual machines on this host, ours and QEMU's.",
    discussion: """
      Machines connect with run --net switch=SOCKET, or QEMU's -netdev stream,server=off,addr.type=unix,addr.path=SOCKET. It runs \
      until SIGINT or SIGTERM; SIGUSR1 prints its counters.
      Example: swiftvmm switch unix:net.sock --uplink tap=tap0 --pcap frames.pcap
      """)

  @Argument(help: "The unix socket to make: PATH or unix:PATH.")
  var socket: String

  @Option(
    help: ArgumentHelp(
      "A port of its own for tap=NAME, an interface of the host's, or switch=PATH, another switch; repeatable.",
      valueName: "network"))
  var uplink: [String] = []

  @Option(help: "Write every frame that comes in to a file for tshark or tcpdump.")
  var pcap: String?

  @Option(help: "Stations that are remembered at most; frames for others go to every port.")
  var macEntries = 4096

  @Option(help: "Write a JSON report at the end, to a file or - for standard output.")
  var report: String?

  func validate() throws {
    if !(1...1_048_576).contains(macEntries) {
      throw ValidationError("--mac-entries \(macEntries): expected 1 to 1048576")
    }
  }

  func run() throws {
    do {
      try serve()
    } catch let error as NetworkError {
      throw Failure.network(error)
    } catch let error as HostError {
      throw Failure.host(error)
    }
  }

  private func serve() throws {
    let uplinks = try uplink.map { text throws(NetworkError) in try NetworkAttachment(text) }
    let endpoint = try StreamEndpoint(socket.hasPrefix("unix:") ? socket : "unix:" + socket)
    let loop = try EventLoop()
    signal(SIGPIPE, SIG_IGN)
    let signals = FileDescriptor(
      owning: try check("signalfd", clinux_signal_descriptor([SIGINT, SIGTERM, SIGHUP, SIGUSR1], 4)))
    var configuration = VirtualSwitch.Configuration()
    configuration.stations = macEntries
    let network = VirtualSwitch(on: loop, configuration)
    network.onMessage = { printError("swiftvmm: \($0)") }
    if let pcap { try network.capture(to: pcap) }
    for uplink in uplinks { try network.addUplink(uplink) }
    try network.listen(StreamListener(endpoint))
    let descriptor = signals.rawValue
    try loop.add(descriptor, .readable) { [loop] _ in
      // struct signalfd_siginfo has 128 bytes, of which the first four are the signal.
      var information = [UInt32](repeating: 0, count: 32)
      guard read(descriptor, &information, 128) == 128 else { return }
      if information[0] == UInt32(SIGUSR1) {
        for line in SwitchReport(network).lines { printError(line) }
      } else {
        loop.stop()
      }
    }
    loop.run()
    let report = SwitchReport(network)
    network.close()
    if let path = self.report { try report.json.writeReport(to: path) }
  }
}

/// What has passed a switch, for people and programs.
private struct SwitchReport {
  private let total: SwitchCounters
  private let ports: [SwitchPortReport]

  init(_ network: VirtualSwitch) {
    total = network.total
    ports = network.portReports
  }

  var lines: [String] {
    let sum = total.traffic
    return [
      "switch: \(ports.count) ports, \(total.stations) stations, \(sum.received) frames in, \(sum.sent) out, "
        + "\(sum.dropped) dropped, \(total.unknown) for unknown stations, \(total.moves) moves"
    ]
      + ports.map {
        "\($0.name)\($0.isUp ? "" : " (down)"): \($0.counters.received) frames in, \($0.counters.sent) out, "
          + "\($0.counters.dropped) dropped"
      }
  }

  private static func fields(_ counters: NetworkCounters) -> JSONObject {
    [
      "received": JSONValue(counters.received), "received-bytes": JSONValue(counters.receivedBytes),
      "sent": JSONValue(counters.sent), "sent-bytes": JSONValue(counters.sentBytes),
      "dropped": JSONValue(counters.dropped),
    ]
  }

  var json: JSONValue {
    var object: JSONObject = ["version": .string(Version.text), "total": .object(Self.fields(total.traffic))]
    object["unknown"] = JSONValue(total.unknown)
    object["filtered"] = JSONValue(total.filtered)
    object["reserved"] = JSONValue(total.reserved)
    object["invalid-sources"] = JSONValue(total.invalidSources)
    object["unlearned"] = JSONValue(total.unlearned)
    object["moves"] = JSONValue(total.moves)
    object["stations"] = JSONValue(total.stations)
    object["connected-ports"] = JSONValue(total.connectedPorts)
    object["refused-ports"] = JSONValue(total.refusedPorts)
    object["malformed-streams"] = JSONValue(total.malformedStreams)
    object["ports"] = .array(
      ports.map { port in
        var fields = Self.fields(port.counters)
        fields["name"] = .string(port.name)
        fields["up"] = .bool(port.isUp)
        return .object(fields)
      })
    return .object(object)
  }
}
