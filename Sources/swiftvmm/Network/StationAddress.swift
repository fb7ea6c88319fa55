import BlockLayer
import Glibc
import NetLayer

/// Addresses of network cards that the command line gives none.
///
/// A machine has the same at every start where it has something that outlives it and that no other machine can have at the same
/// time: its writable disks, which are locked, else its control socket, else a card's TAP interface. The address is a hash of
/// that and of the host. A machine that has nothing of the kind leaves nothing to know it by, and gets random ones: two of
/// them, started alike on one switch, must not share one.
struct StationAddress {
  private let owner: String?

  init(disks: [Disk], control: String?) {
    let images = disks.filter { !$0.isReadOnly }.map { BackupFiles.real($0.path) }
    if !images.isEmpty {
      owner = images.joined(separator: "\n")
    } else {
      owner = control.map { BlockGraph.absolute($0.hasPrefix("unix:") ? String($0.dropFirst(5)) : $0) }
    }
  }

  /// The address of the card with this number.
  func address(of network: Network, number: Int) -> MACAddress {
    var owner = owner
    if owner == nil, case .tap(let name) = network.attachment { owner = name }
    guard let owner else { return Self.local(UInt64.random(in: .min ... .max)) }
    return Self.local(Self.hash("\(Self.host)\n\(owner)\n\(number)"))
  }

  /// Unicast, and locally administered (IEEE 802, 8.4).
  private static func local(_ bits: UInt64) -> MACAddress {
    MACAddress(rawValue: bits & ~(3 << 40) | 2 << 40)
  }

  /// Containers of one image may share the first, and hosts the second.
  private static var host: String {
    var name = utsname()
    uname(&name)
    let node = withUnsafeBytes(of: name.nodename) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    guard let file = fopen("/etc/machine-id", "re") else { return node }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 64)
    _ = fgets(&line, 64, file)
    return node + "\n" + line.prefix { $0 > 32 }.map { String(UInt8(bitPattern: $0), radix: 16) }.joined()
  }

  /// FNV-1a, its high bits mixed into the low ones. It must not change: guests know their cards by it.
  private static func hash(_ text: String) -> UInt64 {
    let hash = text.utf8.reduce(0xcbf2_9ce4_8422_2325) { (hash: UInt64, byte) in
      (hash ^ UInt64(byte)) &* 0x100_0000_01b3
    }
    return (hash ^ hash >> 31) &* 0x94d0_49bb_1331_11eb
  }
}
