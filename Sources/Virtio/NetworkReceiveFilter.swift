import NetLayer
import StateTree

/// Which frames a station wants to see (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.2).
public struct NetworkReceiveFilter: Equatable, Sendable {
  /// Addresses that the tables hold; a driver with more of a kind gets all of that kind.
  static let longestTable = 64

  /// What the driver has asked for.
  public struct Modes: OptionSet, Sendable {
    /// Bit n is command n of class 0; the highest two are tables that did not suffice.
    public let rawValue: UInt8
    /// See `rawValue`.
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    /// Every frame.
    public static let promiscuous = Self(rawValue: 1 << 0)
    /// Every frame to a group.
    public static let allMulticast = Self(rawValue: 1 << 1)
    /// Every frame to a station.
    public static let allUnicast = Self(rawValue: 1 << 2)
    /// None to a group but everybody.
    public static let noMulticast = Self(rawValue: 1 << 3)
    /// None to a station.
    public static let noUnicast = Self(rawValue: 1 << 4)
    /// None to everybody.
    public static let noBroadcast = Self(rawValue: 1 << 5)
    /// More stations than the table holds.
    public static let everyUnicast = Self(rawValue: 1 << 6)
    /// More groups than the table holds.
    public static let everyMulticast = Self(rawValue: 1 << 7)
  }

  /// A driver that sets no filter gets what stations have always got: its own frames and those of groups.
  public var modes: Modes = .allMulticast
  /// Addresses beside its own.
  public var addresses: Set<MACAddress> = []

  func accepts(_ destination: MACAddress, station: MACAddress) -> Bool {
    if modes.contains(.promiscuous) { return true }
    if destination == .broadcast { return !modes.contains(.noBroadcast) }
    if destination.isMulticast {
      if modes.contains(.noMulticast) { return false }
      return !modes.isDisjoint(with: [.allMulticast, .everyMulticast]) || addresses.contains(destination)
    }
    if modes.contains(.noUnicast) { return false }
    return destination == station || !modes.isDisjoint(with: [.allUnicast, .everyUnicast])
      || addresses.contains(destination)
  }

  // MARK: Saved state

  func write(to writer: inout StateWriter) {
    writer.write(modes.rawValue)
    writer.write(UInt32(addresses.count))
    for address in addresses.sorted(by: { $0.rawValue < $1.rawValue }) { writer.write(address.rawValue) }
  }

  init() {}

  init(from reader: inout StateReader) throws(StateError) {
    modes = Modes(rawValue: try reader.read())
    let count = try reader.read(UInt32.self)
    guard count <= 2 * Self.longestTable else { throw reader.invalid("addresses", UInt64(count)) }
    for _ in 0..<count { addresses.insert(MACAddress(rawValue: try reader.read())) }
  }
}
