/// Tells a network where a station is now, after it has moved: switches learn the port from the frame's source.
public enum Announcement {
  /// A RARP request of the station for its own address (RFC 903), without a check sequence, of Ethernet's least length. It is
  /// what QEMU sends for its guests: no station's ARP cache takes anything from it, as the VMM knows no addresses of the guest's.
  public static func frame(for station: MACAddress) -> [UInt8] {
    var frame = MACAddress.broadcast.bytes + station.bytes + [0x80, 0x35]
    // Ethernet, IPv4, lengths of both addresses, request reverse.
    frame += [0, 1, 8, 0, 6, 4, 0, 3]
    // Sender and target: the station, whose IPv4 address is not known.
    for _ in 0..<2 { frame += station.bytes + [0, 0, 0, 0] }
    return frame + [UInt8](repeating: 0, count: 60 - frame.count)
  }
}
