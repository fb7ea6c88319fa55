import CLinux
import Host

/// Work on frames that one end may leave to the other (virtio 1.2, 5.1.3, and linux/if_tun.h).
public struct NetworkOffloads: OptionSet, Sendable {
  /// Bits of this type only: neither virtio's nor the kernel's.
  public let rawValue: UInt8
  /// Bits of this type.
  public init(rawValue: UInt8) { self.rawValue = rawValue }
  /// Frames may have a checksum still to be filled in; without it there is nothing of the following.
  public static let checksum = NetworkOffloads(rawValue: 1 << 0)
  /// TCP segments over IPv4 longer than the MTU, to be split.
  public static let tcp4 = NetworkOffloads(rawValue: 1 << 1)
  /// TCP segments over IPv6 longer than the MTU, to be split.
  public static let tcp6 = NetworkOffloads(rawValue: 1 << 2)
  /// Long TCP segments may have ECN's bits.
  public static let ecn = NetworkOffloads(rawValue: 1 << 3)
  /// UDP datagrams longer than the MTU, to be fragmented.
  public static let udp = NetworkOffloads(rawValue: 1 << 4)
}

/// What has passed a backend since it was made; a frame counts once.
public struct NetworkCounters: Equatable, Sendable {
  /// Frames that were taken from the network.
  public var received: UInt64 = 0
  /// Their bytes, without headers.
  public var receivedBytes: UInt64 = 0
  /// Frames that were given to it, or wait for it.
  public var sent: UInt64 = 0
  /// Their bytes, without headers.
  public var sentBytes: UInt64 = 0
  /// Frames that were to be sent and were dropped: no link, no room, or refused by the kernel.
  public var dropped: UInt64 = 0

  /// Nothing yet.
  public init() {}
}

/// Where a network device's frames go.
///
/// It is owned by the event loop that runs its device: every call is made there, and every callback comes from there, never
/// from within a call. Frames have their header, `struct virtio_net_hdr` of 12 bytes (virtio 1.2, 5.1.6), before them in both
/// directions. The header's `num_buffers` is the device's to set.
///
/// A backend is a wire: what it cannot send now it keeps for a while, within bounds, and then drops and counts. So nothing ever
/// waits for it, and no frame is owed to anybody when its device is paused, saved or moved.
public protocol NetworkBackend: AnyObject {
  /// What the other end can take over for the device, and the device for it. It never changes: the device offers its driver
  /// these features and no others of the kind.
  var offloads: NetworkOffloads { get }

  /// Whether frames have somewhere to go: the device's link status. False before `start`.
  var isLinkUp: Bool { get }

  /// What has passed.
  var counters: NetworkCounters { get }

  /// As the command line has it: `tap=tap0`, `switch=net.sock`.
  var description: String { get }

  /// Begins, once.
  ///
  /// - Parameters:
  ///   - loop: its device's, which outlives it.
  ///   - framesArrived: there may be frames: take them until `nextFrame` returns nil, or stop receiving. It is called again while
  ///     there are some and they are not taken.
  ///   - linkChanged: `isLinkUp` has another value.
  /// - Throws: why it cannot begin, such as that nobody listens there.
  func start(
    on loop: EventLoop, framesArrived: @escaping () -> Void, linkChanged: @escaping () -> Void
  ) throws(NetworkError)

  /// What frames may be received: a subset of `offloads`, which a driver has accepted. Before the first call it is nothing.
  func setReceiveOffloads(_ offloads: NetworkOffloads)

  /// The next frame from the network, header first; nil where there is none now. It is the same one, and its bytes stay where
  /// they are, until `takeFrame`.
  ///
  /// At least `NetworkHeader.size` + `NetworkFrame.shortest` bytes and at most `NetworkHeader.size` + `NetworkFrame.longest`.
  func nextFrame() -> UnsafeRawBufferPointer?

  /// Is done with the frame that `nextFrame` returned.
  func takeFrame()

  /// Sends a frame, header first, from memory that is read during the call only. What is no frame is dropped.
  ///
  /// It may wait for further ones until `flush`.
  func send(_ frame: UnsafeBufferPointer<iovec>)

  /// Ends a series of `send`.
  func flush()

  /// Whether `framesArrived` is wanted; true from the start. A device whose driver has no buffers sets false, and frames wait
  /// where they are, or are dropped there.
  func setReceiving(_ wanted: Bool)

  /// Ends; no callback comes any more.
  func close()
}

/// `struct virtio_net_hdr` (virtio 1.2, 5.1.6), as a driver of virtio 1.x and the kernel's TAP with a header of 12 bytes have it.
public enum NetworkHeader {
  /// Bytes.
  public static let size = 12
}

/// Ethernet frames without their check sequence.
public enum NetworkFrame {
  /// Two addresses and a type: what is shorter is dropped.
  public static let shortest = 14
  /// 64 KiB after an Ethernet header with a VLAN tag.
  public static let longest = 65536 + 18
}
