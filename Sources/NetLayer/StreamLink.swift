import CLinux
import Glibc
import Host

/// One end of a connected stream socket that carries frames both ways. It belongs to its loop's thread.
///
/// Frames that are sent stay where they are until `flush`, which gives them to the socket in one call; what it has no room for
/// waits in a queue, and what the queue has no room for is dropped.
final class StreamLink: @unchecked Sendable {
  /// Frames in, and how they came.
  var reader = FrameReader()
  /// What has been sent and dropped.
  private let traffic: Traffic
  private let socket: FileDescriptor
  private let loop: EventLoop
  private var sender = FrameSender()
  private var isOver = false
  private var interest: EventLoop.Interest = []
  /// There may be frames in `reader`.
  private let framesArrived: () -> Void
  /// Nothing comes or goes any more; it is called once, and never from within a call.
  private let lost: () -> Void

  /// Takes a connected, non-blocking socket.
  init(
    _ socket: consuming FileDescriptor, on loop: EventLoop, traffic: Traffic, framesArrived: @escaping () -> Void,
    lost: @escaping () -> Void
  ) throws(HostError) {
    self.socket = socket
    self.loop = loop
    self.traffic = traffic
    self.framesArrived = framesArrived
    self.lost = lost
    try loop.add(self.socket.rawValue, []) { [weak self] what in self?.handle(what) }
  }

  deinit {
    close()
  }

  /// Whether bytes are read when there are some.
  var receives = false {
    didSet { watch() }
  }

  /// A frame of `reader` is in use, and what is after it: nothing is read, as that would move them.
  var isHeld = false

  /// Ends without a call of `lost`.
  func close() {
    isOver = true
    loop.remove(socket.rawValue)
  }

  private func watch() {
    guard !isOver else { return }
    var wanted: EventLoop.Interest = []
    if receives { wanted.insert(.readable) }
    if sender.isWaiting { wanted.insert(.writable) }
    guard wanted != interest else { return }
    interest = wanted
    try? loop.modify(socket.rawValue, wanted)
  }

  /// Something has happened to the socket.
  func handle(_ what: EventLoop.Interest) {
    if what.contains(.writable) {
      if !isOver { sender.drain(write) }
      watch()
    }
    if receives, !what.isDisjoint(with: [.readable, .failed]) {
      receive()
    } else if !what.isDisjoint(with: .failed) {
      // A hang-up is told for ever, whether anybody reads or not.
      end()
    }
  }

  /// Reads once: other descriptors of the loop have their turn before the next time.
  private func receive() {
    if !isHeld {
      do throws(HostError) {
        guard let count = try socket.read(into: reader.space) else { return }
        guard count > 0 else { return end() }
        reader.received(count)
      } catch {
        return end()
      }
    }
    framesArrived()
  }

  private func end() {
    guard !isOver else { return }
    close()
    lost()
  }

  /// Ends it, soon: for calls from above.
  func fail() {
    loop.execute { [weak self] in self?.end() }
  }

  /// Sends a frame with its length before it; the bytes stay where they are until `flush`.
  func send(_ frame: UnsafeRawBufferPointer) {
    sender.send(frame)
    if sender.isFull { flush() }
  }

  /// Gives what has been sent to the socket.
  func flush() {
    sender.flush(traffic, isOver: isOver, write)
    watch()
  }

  /// Bytes that the socket has taken: 0 where it is full, or its peer is gone.
  private func write(_ vectors: UnsafeMutablePointer<iovec>, _ count: Int) -> Int {
    var message = msghdr()
    message.msg_iov = vectors
    message.msg_iovlen = count
    while true {
      let written = sendmsg(socket.rawValue, &message, Int32(MSG_NOSIGNAL))
      if written >= 0 { return written }
      switch errno {
      case EINTR: continue
      case EAGAIN: return 0
      default:
        fail()
        return 0
      }
    }
  }
}

/// What has passed a link, and those before it in its place.
final class Traffic {
  private(set) var counters = NetworkCounters()

  func received(frames: Int, bytes: Int) {
    counters.received &+= UInt64(frames)
    counters.receivedBytes &+= UInt64(bytes)
  }

  func sent(frames: Int, bytes: Int) {
    counters.sent &+= UInt64(frames)
    counters.sentBytes &+= UInt64(bytes)
  }

  func dropped(frames: Int) { counters.dropped &+= UInt64(frames) }
}
