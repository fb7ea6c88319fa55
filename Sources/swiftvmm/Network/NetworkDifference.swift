import NetLayer

/// What keeps a machine's network cards from going on at others; the networks behind them may be others.
extension MachineDescription {
  func networkDifference(from here: MachineDescription) -> (what: String, saved: String, here: String)? {
    func places(_ cards: [NetworkCard]) -> String {
      if cards.isEmpty { return "none" }
      return cards.map { "\($0.name)\($0.mtu == 0 ? "" : " with an MTU of \($0.mtu)") in place \($0.slot)" }
        .joined(separator: ", ")
    }
    let (own, other) = (places(networks), places(here.networks))
    if own != other { return ("the network cards", own, other) }
    for (card, there) in zip(networks, here.networks) {
      if there.isAddressed, card.address != there.address {
        return ("mac= of \(card.name)", "\(card.address)", "\(there.address)")
      }
      if !card.offloads.isSubset(of: there.offered) {
        return ("offloads of \(card.name)", Self.text(card.offloads), Self.text(there.offered))
      }
    }
    return nil
  }

  private static func text(_ offloads: NetworkOffloads) -> String {
    let names: [(NetworkOffloads, String)] = [
      (.checksum, "checksum"), (.tcp4, "TCP over IPv4"), (.tcp6, "TCP over IPv6"), (.ecn, "ECN"), (.udp, "UDP"),
    ]
    let found = names.filter { offloads.contains($0.0) }.map(\.1)
    return found.isEmpty ? "none" : found.joined(separator: " and ")
  }
}
