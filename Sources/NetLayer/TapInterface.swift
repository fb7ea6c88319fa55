import CLinux
import Glibc
import Host

/// A TAP interface that this process has: frames with their virtio header, one a call.
struct TapInterface: ~Copyable {
  /// IFNAMSIZ less its terminator.
  static let longestName = 15
  private static let device = "/dev/net/tun"

  let descriptor: FileDescriptor

  /// Attaches to an interface that is there already: one made by this process would have no address and nobody to bring it up.
  init(name: String) throws(NetworkError) {
    let bytes = name.utf8
    guard (1...Self.longestName).contains(bytes.count),
      !bytes.contains(where: { $0 <= UInt8(ascii: " ") || $0 == UInt8(ascii: "/") || $0 == UInt8(ascii: ":") })
    else { throw .interfaceName(name, limit: Self.longestName) }
    let descriptor: FileDescriptor
    do throws(HostError) {
      descriptor = try FileDescriptor.open(Self.device, O_RDWR | O_NONBLOCK)
    } catch {
      throw error.errno == EACCES || error.errno == EPERM ? .tapPermission(name: name) : .noTap(error)
    }
    try Self.attach(descriptor, name)
    self.descriptor = descriptor
    setReceiveOffloads([])
  }

  private static func attach(_ descriptor: borrowing FileDescriptor, _ name: String) throws(NetworkError) {
    guard if_nametoindex(name) != 0 else { throw .noInterface(name: name) }
    guard clinux_tap_attach(descriptor.rawValue, name, Int32(NetworkHeader.size)) < 0 else { return }
    let code = errno
    switch code {
    case EPERM, EACCES: throw .tapPermission(name: name)
    case EBUSY: throw .tapInUse(name: name)
    case EINVAL: throw .notATap(name: name)
    default: throw .host(.path("attach to", path: name, errno: code))
    }
  }

  /// What the kernel can take over, and does when told.
  var offloads: NetworkOffloads {
    var known: NetworkOffloads = []
    // Each is tried with the checksums that it needs: kernels differ in what they have had, and lost.
    for offload: NetworkOffloads in [.checksum, .tcp4, .tcp6, .udp] where set([.checksum, offload]) {
      known.insert([.checksum, offload])
    }
    if set([.checksum, .tcp4, .ecn]) { known.insert(.ecn) }
    setReceiveOffloads([])
    return known
  }

  func setReceiveOffloads(_ offloads: NetworkOffloads) {
    // Nothing beyond what `offloads` has found is asked for, so it does not fail.
    _ = set(offloads)
  }

  private func set(_ offloads: NetworkOffloads) -> Bool {
    // TUN_F_CSUM and so on, of linux/if_tun.h.
    var flags: UInt32 = 0
    if offloads.contains(.checksum) { flags |= 1 }
    if offloads.contains(.tcp4) { flags |= 2 }
    if offloads.contains(.tcp6) { flags |= 4 }
    if offloads.contains(.ecn) { flags |= 8 }
    if offloads.contains(.udp) { flags |= 16 }
    return clinux_tap_offload(descriptor.rawValue, flags) == 0
  }

  /// What reading has brought.
  enum Received: Equatable {
    /// A frame with its header, of so many bytes.
    case frame(Int)
    case none
    /// The interface has been removed.
    case gone
  }

  func receive(into space: UnsafeMutableRawBufferPointer) -> Received {
    while true {
      let count = read(descriptor.rawValue, space.baseAddress, space.count)
      if count >= 0 { return .frame(count) }
      switch errno {
      case EINTR: continue
      case EAGAIN: return .none
      default: return .gone
      }
    }
  }

  /// False where the kernel does not take it: the interface is down, or what the header says is not so.
  func send(_ vectors: UnsafePointer<iovec>?, count: Int) -> Bool {
    while writev(descriptor.rawValue, vectors, Int32(count)) < 0 {
      if errno != EINTR { return false }
    }
    return true
  }
}
