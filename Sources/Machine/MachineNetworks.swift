import Host
import NetLayer
import Virtio

/// The machine's network cards, which its maker attaches before and closes after.
public struct MachineNetworks: @unchecked Sendable {
  /// What the cards belong to; running.
  public let loop: EventLoop
  /// The cards, in their order.
  public var cards: [MachineNetworkCard]

  /// Cards of one loop.
  public init(loop: EventLoop, cards: [MachineNetworkCard]) {
    self.loop = loop
    self.cards = cards
  }
}

/// A network card of a machine, as a virtio device on PCI.
public struct MachineNetworkCard {
  /// Unique in the machine.
  public var name: String
  /// Its address, unless it is restored with another one.
  public var address: MACAddress
  /// What the guest is told that a frame may carry; nil for nothing.
  public var mtu: UInt16?
  /// Whether the guest may leave work to the backend, and the backend to the guest.
  public var usesOffloads = true
  /// Where frames go.
  public var backend: any NetworkBackend

  /// A card without an MTU.
  public init(name: String, address: MACAddress, backend: any NetworkBackend) {
    self.name = name
    self.address = address
    self.backend = backend
  }
}

/// A network card where it is in a machine.
public struct PlacedNetworkCard: @unchecked Sendable {
  /// Unique in the machine.
  public let name: String
  /// Its place on PCI bus 0, which a saved state relies on.
  public let slot: UInt8
  /// It belongs to the cards' loop.
  public let device: VirtioNetwork
}
