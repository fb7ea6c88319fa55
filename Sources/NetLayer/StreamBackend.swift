import CLinux
import Glibc
import Host

/// `switch=PATH`: frames over a unix socket, to `swiftvmm switch`, or QEMU's `-netdev stream` with `server=on`.
///
/// The stream has no header for frames, so nothing is taken over. Where the other end goes the link is down, and made again as
/// soon as somebody listens there.
public final class StreamBackend: NetworkBackend, @unchecked Sendable {
  /// Bytes of a series of frames that are sent at once.
  private static let seriesLimit = 256 << 10

  /// See `NetworkBackend`.
  public let offloads: NetworkOffloads = []
  /// See `NetworkBackend`.
  public var isLinkUp: Bool { connector?.link != nil }
  /// See `NetworkBackend`.
  public var counters: NetworkCounters { traffic.counters }
  /// See `NetworkBackend`.
  public let description: String

  private let path: String
  private let traffic = Traffic()
  private var loop: EventLoop?
  private var connector: StreamConnector?
  private var frame: UnsafeMutableRawBufferPointer?
  private var receives = true
  private var isResuming = false
  private var framesArrived: () -> Void = {}
  private let series = UnsafeMutableRawBufferPointer.allocate(byteCount: seriesLimit, alignment: 16)
  private var seriesCount = 0

  /// For a socket's path, which need not be there yet.
  public init(path: String) {
    self.path = path
    description = "switch=\(path)"
  }

  deinit {
    close()
    series.deallocate()
  }

  /// See `NetworkBackend`.
  ///
  /// - Throws: `noSwitch` where nobody listens.
  public func start(
    on loop: EventLoop, framesArrived: @escaping () -> Void, linkChanged: @escaping () -> Void
  ) throws(NetworkError) {
    self.framesArrived = framesArrived
    let endpoint: StreamEndpoint
    do throws(HostError) { endpoint = try StreamEndpoint("unix:" + path) } catch { throw .host(error) }
    do throws(HostError) {
      let connector = StreamConnector(endpoint, on: loop, traffic: traffic)
      connector.framesArrived = { [unowned self] in arrived() }
      connector.linkChanged = { [unowned self] in
        frame = nil
        linkChanged()
      }
      connector.receives = receives
      try connector.start()
      self.connector = connector
      self.loop = loop
    } catch {
      throw .noSwitch(path: path, error)
    }
  }

  private func arrived() {
    guard receives, nextFrame() != nil else { return }
    framesArrived()
    if nextFrame() != nil { resume() }
  }

  /// Frames that wait here make no event.
  private func resume() {
    guard receives, !isResuming else { return }
    isResuming = true
    loop?.execute { [weak self] in
      guard let self else { return }
      isResuming = false
      arrived()
    }
  }

  /// See `NetworkBackend`.
  public func setReceiveOffloads(_ offloads: NetworkOffloads) {}

  /// See `NetworkBackend`.
  public func nextFrame() -> UnsafeRawBufferPointer? {
    guard let link = connector?.link else { return nil }
    if frame == nil, let next = link.reader.next() {
      // The header takes the place of the length and what was before it, which has been taken.
      let start = next.baseAddress! + StreamFraming.prefix - NetworkHeader.size
      memset(start, 0, NetworkHeader.size)
      frame = UnsafeMutableRawBufferPointer(
        start: start, count: next.count - StreamFraming.prefix + NetworkHeader.size)
      link.isHeld = true
    }
    if link.reader.isMalformed { link.fail() }
    return frame.map { UnsafeRawBufferPointer($0) }
  }

  /// See `NetworkBackend`.
  public func takeFrame() {
    guard let taken = frame else { return }
    frame = nil
    connector?.link?.isHeld = false
    traffic.received(frames: 1, bytes: taken.count - NetworkHeader.size)
  }

  /// See `NetworkBackend`: the frame is copied, as the device's memory is the guest's.
  public func send(_ frame: UnsafeBufferPointer<iovec>) {
    var whole = 0
    for vector in frame { whole &+= vector.iov_len }
    let length = whole - NetworkHeader.size
    guard let link = connector?.link, (NetworkFrame.shortest...NetworkFrame.longest).contains(length) else {
      return traffic.dropped(frames: 1)
    }
    if Self.seriesLimit - seriesCount < StreamFraming.prefix + length { flush() }
    let start = series.baseAddress! + seriesCount
    start.storeBytes(of: UInt32(length).bigEndian, as: UInt32.self)
    var place = start + StreamFraming.prefix
    var header = NetworkHeader.size
    for vector in frame {
      let skip = min(header, vector.iov_len)
      header -= skip
      guard let base = vector.iov_base, vector.iov_len > skip else { continue }
      memcpy(place, base + skip, vector.iov_len - skip)
      place += vector.iov_len - skip
    }
    seriesCount += StreamFraming.prefix + length
    link.send(UnsafeRawBufferPointer(start: start, count: StreamFraming.prefix + length))
  }

  /// See `NetworkBackend`.
  public func flush() {
    connector?.link?.flush()
    seriesCount = 0
  }

  /// See `NetworkBackend`.
  public func setReceiving(_ wanted: Bool) {
    guard receives != wanted else { return }
    receives = wanted
    connector?.receives = wanted
    if wanted { resume() }
  }

  /// See `NetworkBackend`.
  public func close() {
    connector?.close()
    connector = nil
    frame = nil
    framesArrived = {}
  }
}
