import CLinux
import Glibc
import Host

/// A port's TAP interface.
final class TapLink: SwitchLink, @unchecked Sendable {
  /// Bytes of a series of frames.
  private static let capacity = 256 << 10

  private let interface: TapInterface
  private let loop: EventLoop
  private let traffic: Traffic
  private let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: capacity, alignment: 16)
  /// The virtio header, all zeros: nothing is taken over. Then the frame.
  private let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 2)
  private let header = UnsafeMutableRawPointer.allocate(byteCount: NetworkHeader.size, alignment: 4)
  private let receiveFrame: (UnsafeRawBufferPointer) -> Void
  private let seriesEnds: () -> Void
  private let lost: () -> Void

  /// Attaches to an interface.
  ///
  /// Frames are given to `receive`, each with its length before it, and stay until `seriesEnds` has returned.
  init(
    name: String, on loop: EventLoop, traffic: Traffic, receive: @escaping (UnsafeRawBufferPointer) -> Void,
    seriesEnds: @escaping () -> Void, lost: @escaping () -> Void
  ) throws(NetworkError) {
    interface = try TapInterface(name: name)
    self.loop = loop
    self.traffic = traffic
    self.receiveFrame = receive
    self.seriesEnds = seriesEnds
    self.lost = lost
    memset(header, 0, NetworkHeader.size)
    vectors[0] = iovec(iov_base: header, iov_len: NetworkHeader.size)
    do throws(HostError) {
      try loop.add(interface.descriptor.rawValue, .readable) { [weak self] what in self?.handle(what) }
    } catch {
      throw .host(error)
    }
  }

  deinit {
    close()
    buffer.deallocate()
    vectors.deallocate()
    header.deallocate()
  }

  func close() { loop.remove(interface.descriptor.rawValue) }

  private func handle(_ what: EventLoop.Interest) {
    guard what.isDisjoint(with: .failed) else {
      close()
      return lost()
    }
    var place = 0
    while buffer.count - place > NetworkHeader.size + NetworkFrame.longest {
      let space = UnsafeMutableRawBufferPointer(rebasing: buffer[place...])
      guard case .frame(let count) = interface.receive(into: space) else { break }
      let length = count - NetworkHeader.size
      guard (NetworkFrame.shortest...NetworkFrame.longest).contains(length) else { continue }
      // The length takes the place of the header's end.
      let start = space.baseAddress! + NetworkHeader.size - StreamFraming.prefix
      start.storeBytes(of: UInt32(length).bigEndian, as: UInt32.self)
      receiveFrame(UnsafeRawBufferPointer(start: start, count: StreamFraming.prefix + length))
      place += (count + 15) & ~15
    }
    seriesEnds()
  }

  func send(_ frame: UnsafeRawBufferPointer) {
    let ethernet = frame.dropFirst(StreamFraming.prefix)
    let bytes = UnsafeRawBufferPointer(rebasing: ethernet)
    vectors[1] = iovec(iov_base: UnsafeMutableRawPointer(mutating: bytes.baseAddress), iov_len: bytes.count)
    if interface.send(vectors, count: 2) {
      traffic.sent(frames: 1, bytes: bytes.count)
    } else {
      traffic.dropped(frames: 1)
    }
  }

  func flush() {}
}
