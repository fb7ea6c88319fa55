import CLinux
import Glibc
import Host

/// `tap=NAME`: the kernel's TAP interface, which takes over checksums and segmentation.
public final class TapBackend: NetworkBackend, @unchecked Sendable {
  /// Frames between two looks at the loop's other events.
  private static let burst = 256

  /// See `NetworkBackend`.
  public let offloads: NetworkOffloads
  /// See `NetworkBackend`. It is up until the interface is removed; whether the host has it up is the host's affair.
  public private(set) var isLinkUp = false
  /// See `NetworkBackend`.
  public var counters: NetworkCounters { traffic.counters }
  /// See `NetworkBackend`.
  public let description: String

  private let interface: TapInterface
  private let traffic = Traffic()
  /// A byte more than the longest frame, which tells of longer ones.
  private let buffer = UnsafeMutableRawBufferPointer.allocate(
    byteCount: NetworkHeader.size + NetworkFrame.longest + 1, alignment: 16)
  /// Bytes of the frame in the buffer; 0 for none.
  private var held = 0
  private var left = 0
  private var receives = true
  private var loop: EventLoop?
  private var framesArrived: () -> Void = {}
  private var linkChanged: () -> Void = {}

  /// Attaches to the interface.
  public init(name: String) throws(NetworkError) {
    interface = try TapInterface(name: name)
    offloads = interface.offloads
    description = "tap=\(name)"
  }

  deinit {
    close()
    buffer.deallocate()
  }

  /// See `NetworkBackend`.
  public func start(
    on loop: EventLoop, framesArrived: @escaping () -> Void, linkChanged: @escaping () -> Void
  ) throws(NetworkError) {
    self.framesArrived = framesArrived
    self.linkChanged = linkChanged
    do throws(HostError) {
      try loop.add(interface.descriptor.rawValue, receives ? .readable : []) { [weak self] what in self?.arrived(what) }
    } catch {
      throw .host(error)
    }
    self.loop = loop
    isLinkUp = true
  }

  private func arrived(_ what: EventLoop.Interest) {
    // The interface has been removed, which is told for ever.
    guard what.isDisjoint(with: .failed) else { return lose() }
    guard receives else { return }
    left = Self.burst
    framesArrived()
    if receives, held > 0 { resume() }
  }

  private func lose() {
    guard isLinkUp else { return }
    loop?.remove(interface.descriptor.rawValue)
    isLinkUp = false
    held = 0
    linkChanged()
  }

  /// See `NetworkBackend`.
  public func setReceiveOffloads(_ offloads: NetworkOffloads) {
    interface.setReceiveOffloads(offloads.intersection(self.offloads))
  }

  /// See `NetworkBackend`.
  public func nextFrame() -> UnsafeRawBufferPointer? {
    while held == 0 {
      guard isLinkUp, left > 0 else { return nil }
      guard case .frame(let count) = interface.receive(into: buffer) else { return nil }
      left -= 1
      guard count >= NetworkHeader.size + NetworkFrame.shortest, count < buffer.count else { continue }
      held = count
    }
    return UnsafeRawBufferPointer(rebasing: buffer[..<held])
  }

  /// See `NetworkBackend`.
  public func takeFrame() {
    guard held > 0 else { return }
    traffic.received(frames: 1, bytes: held - NetworkHeader.size)
    held = 0
  }

  /// See `NetworkBackend`: it goes at once.
  public func send(_ frame: UnsafeBufferPointer<iovec>) {
    var whole = 0
    for vector in frame { whole &+= vector.iov_len }
    if isLinkUp, interface.send(frame.baseAddress, count: frame.count) {
      traffic.sent(frames: 1, bytes: whole - NetworkHeader.size)
    } else {
      traffic.dropped(frames: 1)
    }
  }

  /// See `NetworkBackend`.
  public func flush() {}

  /// See `NetworkBackend`.
  public func setReceiving(_ wanted: Bool) {
    guard receives != wanted else { return }
    receives = wanted
    guard isLinkUp else { return }
    try? loop?.modify(interface.descriptor.rawValue, wanted ? .readable : [])
    if wanted, held > 0 { resume() }
  }

  /// A frame that waits here makes no event.
  private func resume() {
    loop?.execute { [weak self] in
      guard let self, receives, held > 0 else { return }
      arrived(.readable)
    }
  }

  /// See `NetworkBackend`.
  public func close() {
    loop?.remove(interface.descriptor.rawValue)
    loop = nil
    isLinkUp = false
    framesArrived = {}
    linkChanged = {}
  }
}
