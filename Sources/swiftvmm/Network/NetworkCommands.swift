import JSON
import Machine
import Monitor
import NetLayer
import Virtio

/// QMP's commands on network cards (QEMU's net.json), and what is ours beside them.
enum NetworkCommands {
  /// The catalogue: a command is one entry.
  static func all(_ machine: Machine, _ networks: RunNetworks) -> [QMPCommand] {
    [
      QMPCommand("set_link", [.required("name", .string), .required("up", .bool)]) {
        _, arguments throws(MonitorError) in
        let card = try card(arguments.text("name"), machine)
        let isUp = arguments["up"]?.boolValue ?? true
        networks.perform { card.device.setPlugged(isUp) }
        return [:]
      },
      QMPCommand(
        "announce-self",
        [
          .required("initial", .integer), .required("max", .integer), .required("rounds", .integer),
          .required("step", .integer), .optional("interfaces", .array(.string)), .optional("id", .string),
        ]
      ) { _, arguments throws(MonitorError) in
        // QEMU's bounds.
        var announcement = NetworkAnnouncement()
        announcement.initial = try number("initial", arguments, 1...100_000)
        announcement.maximum = try number("max", arguments, 1...100_000)
        announcement.rounds = try number("rounds", arguments, 1...1000)
        announcement.step = try number("step", arguments, 0...10_000)
        var cards = machine.networkCards
        if let names = arguments["interfaces"]?.arrayValue {
          cards = try names.map { name throws(MonitorError) in try card(name.stringValue ?? "", machine) }
        }
        networks.perform { for card in cards { card.device.announce(announcement) } }
        return [:]
      },
      QMPCommand("query-rx-filter", [.optional("name", .string)], returns: .array(filterInfo)) {
        _, arguments throws(MonitorError) in
        var cards = machine.networkCards
        if let name = arguments["name"]?.stringValue { cards = [try card(name, machine)] }
        return .array(networks.perform { cards.map { filter($0) } })
      },
      QMPCommand("x-swiftvmm-query-networks", returns: .array(networkInfo)) { _, _ in
        .array(networks.perform { machine.networkCards.map { report($0, networks) } })
      },
    ]
  }

  private static func card(_ name: String, _ machine: Machine) throws(MonitorError) -> PlacedNetworkCard {
    guard let card = machine.networkCards.first(where: { $0.name == name }) else { throw .deviceNotFound(name) }
    return card
  }

  private static func number(
    _ name: String, _ arguments: JSONObject, _ range: ClosedRange<UInt64>
  ) throws(MonitorError) -> UInt64 {
    guard let value = arguments[name]?.unsignedValue, range.contains(value) else {
      throw .parameterValue(name, value: "\(arguments[name]?.integerValue ?? 0)")
    }
    return value
  }

  // MARK: Reports

  private static let receiving = QMPType.enumeration("RxState", values: ["normal", "none", "all"])
  private static let filterInfo = QMPType.object(
    "RxFilterInfo",
    members: [
      .required("name", .string), .required("promiscuous", .bool), .required("multicast", receiving),
      .required("unicast", receiving), .required("vlan", receiving), .required("broadcast-allowed", .bool),
      .required("multicast-overflow", .bool), .required("unicast-overflow", .bool), .required("main-mac", .string),
      .required("vlan-table", .array(.integer)), .required("unicast-table", .array(.string)),
      .required("multicast-table", .array(.string)),
    ])
  private static let networkInfo = QMPType.object(
    "NetworkInfo",
    members: [
      .required("name", .string), .required("network", .string), .required("mac", .string), .optional("mtu", .integer),
      .required("link", .bool), .required("received", .integer), .required("sent", .integer),
      .required("dropped", .integer),
    ])

  private static func filter(_ card: PlacedNetworkCard) -> JSONValue {
    let filter = card.device.receiveFilter
    func table(_ isMulticast: Bool) -> JSONValue {
      .array(
        filter.addresses.filter { $0.isMulticast == isMulticast }.map(\.description).sorted().map { .string($0) })
    }
    func state(_ isNone: Bool, _ isAll: Bool) -> JSONValue { isNone ? "none" : isAll ? "all" : "normal" }
    let modes = filter.modes
    return [
      "name": .string(card.name), "promiscuous": .bool(modes.contains(.promiscuous)),
      "multicast": state(modes.contains(.noMulticast), modes.contains(.allMulticast)),
      "unicast": state(modes.contains(.noUnicast), modes.contains(.allUnicast)), "vlan": "all",
      "broadcast-allowed": .bool(!modes.contains(.noBroadcast)),
      "multicast-overflow": .bool(modes.contains(.everyMulticast)),
      "unicast-overflow": .bool(modes.contains(.everyUnicast)), "main-mac": .string("\(card.device.station)"),
      "vlan-table": .array([]), "unicast-table": table(false), "multicast-table": table(true),
    ]
  }

  private static func report(_ card: PlacedNetworkCard, _ networks: RunNetworks) -> JSONValue {
    let backend = networks.backend(of: card.name)
    let counters = backend?.counters ?? NetworkCounters()
    var report: JSONObject = [
      "name": .string(card.name), "network": .string(backend?.description ?? ""),
      "mac": .string("\(card.device.station)"), "link": .bool(card.device.isLinkUp),
      "received": JSONValue(counters.received), "sent": JSONValue(counters.sent),
      "dropped": JSONValue(counters.dropped),
    ]
    if let mtu = card.device.mtu { report["mtu"] = JSONValue(Int(mtu)) }
    return .object(report)
  }
}
