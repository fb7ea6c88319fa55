/// What a switch has done since it was made. Frames count once where they came in, but for `sent` and `dropped`, which count them at
/// each port that they were for.
public struct SwitchCounters: Equatable, Sendable {
  /// What has passed its ports.
  public var traffic = NetworkCounters()
  /// Frames for a station that was nowhere known, which went to all ports.
  public var unknown: UInt64 = 0
  /// Frames for a station at the port that they came from.
  public var filtered: UInt64 = 0
  /// Frames of protocols that no switch forwards: 01-80-c2-00-00-00 to -0f.
  public var reserved: UInt64 = 0
  /// Frames from an address that no station has.
  public var invalidSources: UInt64 = 0
  /// Frames of stations that the table had no room for.
  public var unlearned: UInt64 = 0
  /// Stations that came to another port.
  public var moves: UInt64 = 0
  /// Stations that are known now.
  public var stations = 0
  /// Ports that there have been.
  public var connectedPorts: UInt64 = 0
  /// Peers that were turned away, as there were too many.
  public var refusedPorts: UInt64 = 0
  /// Ports that were closed, as what came in was no stream of frames.
  public var malformedStreams: UInt64 = 0

  /// Nothing yet.
  public init() {}

  mutating func add(_ counters: NetworkCounters) {
    traffic.received &+= counters.received
    traffic.receivedBytes &+= counters.receivedBytes
    traffic.sent &+= counters.sent
    traffic.sentBytes &+= counters.sentBytes
    traffic.dropped &+= counters.dropped
  }
}

/// What has passed a port.
public struct SwitchPortReport: Equatable, Sendable {
  /// `tap=NAME` or `switch=PATH` of an uplink, or a number.
  public let name: String
  /// Whether somebody is at the other end.
  public let isUp: Bool
  /// From the switch's side: `sent` is what the port's station was sent.
  public let counters: NetworkCounters
}
