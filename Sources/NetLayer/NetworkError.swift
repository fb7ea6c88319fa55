import Host

/// Why a network backend or the switch cannot do what its owner asks.
public enum NetworkError: Error, Equatable, CustomStringConvertible {
  /// A name that no network interface can have.
  case interfaceName(String, limit: Int)
  /// The host has no /dev/net/tun.
  case noTap(HostError)
  /// The interface is not there, and this user may not make it, or may not use it.
  case tapPermission(name: String)
  /// Another program has the interface.
  case tapInUse(name: String)
  /// The interface is there and no TAP, or one of another kind.
  case notATap(name: String)
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
    case .tapPermission(let name):
      "no permission for the TAP interface \(name); make it for this user: ip tuntap add \(name) mode tap vnet_hdr user $USER"
    case .tapInUse(let name): "the TAP interface \(name) is in use by another process; choose another or end that one"
    case .notATap(let name): "the network interface \(name) is not a TAP with one queue; choose another name"
    case .noSwitch(let path, let error):
      "no switch at \(path): \(error); start one there first: swiftvmm switch unix:\(path)"
    case .host(let error): "\(error)"
    }
  }
}
