import Host

/// Why a network backend or the switch cannot do what its owner asks.
public enum NetworkError: Error, Equatable, CustomStringConvertible {
  /// A name that no network interface can have.
  case interfaceName(String, limit: Int)
  /// The host has no /dev/net/tun.
  case noTap(HostError)
  /// No interface has that name.
  case noInterface(name: String)
  /// This user may not use the interface.
  case tapPermission(name: String)
  /// Another program has the interface.
  case tapInUse(name: String)
  /// The interface is there and no TAP, or one of another kind.
  case notATap(name: String)
  /// An uplink's interface has been removed.
  case uplinkGone(NetworkAttachment)
  /// Text that names no attachment.
  case attachment(String)
  /// The switch has no place for an uplink.
  case tooManyPorts(limit: Int)
  /// What came in at a switch's port was no stream of frames.
  case malformedStream(port: String, longest: Int)
  /// The file of captured frames cannot be written.
  case capture(path: String, HostError)
  /// Nobody listens there.
  case noSwitch(path: String, HostError)
  /// The host refuses something else.
  case host(HostError)

  /// One line: what failed, which value, what to do.
  public var description: String {
    switch self {
    case .interfaceName(let name, let limit):
      "'\(name)' cannot be a network interface's name: 1 to \(limit) bytes, without '/', ':' and spaces"
    case .noTap(let error): "TAP interfaces are not to be had here: \(error); load the module tun, or use switch=PATH"
    case .noInterface(let name):
      "no network interface is called \(name); make it first: ip tuntap add \(name) mode tap user $USER && ip link set \(name) up"
    case .tapPermission(let name):
      "no permission for the TAP interface \(name): it belongs to another user, or /dev/net/tun does; make it with: ip tuntap add \(name) mode tap user $USER"
    case .tapInUse(let name): "the TAP interface \(name) is in use by another process; choose another or end that one"
    case .notATap(let name): "the network interface \(name) is not a TAP with one queue; choose another name"
    case .uplinkGone(let uplink): "the uplink \(uplink) has been removed; make it again and restart the switch"
    case .attachment(let text): "'\(text)' names no network: expected tap=NAME or switch=PATH"
    case .tooManyPorts(let limit): "the switch has \(limit) ports already; leave an uplink out"
    case .malformedStream(let port, let longest):
      "\(port) was closed: it announced a frame of more than \(longest) bytes, so it does not speak QEMU's stream framing"
    case .capture(let path, let error): "cannot capture frames in \(path): \(error)"
    case .noSwitch(let path, let error):
      "no switch at \(path): \(error); start one there first: swiftvmm switch unix:\(path)"
    case .host(let error): "\(error)"
    }
  }
}
