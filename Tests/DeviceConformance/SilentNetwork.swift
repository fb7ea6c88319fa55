import Glibc
import Host
import NetLayer

/// A network on which nothing happens, and the thread of its device.
final class SilentNetwork: NetworkBackend {
  let offloads: NetworkOffloads = [.checksum, .tcp4, .tcp6, .ecn, .udp]
  let isLinkUp = true
  let counters = NetworkCounters()
  let description = "silent"
  let thread: LoopThread
  init() throws { thread = try LoopThread() }
  func start(on loop: EventLoop, framesArrived: @escaping () -> Void, linkChanged: @escaping () -> Void) {}
  func setReceiveOffloads(_ offloads: NetworkOffloads) {}
  func nextFrame() -> UnsafeRawBufferPointer? { nil }
  func takeFrame() {}
  func send(_ frame: UnsafeBufferPointer<iovec>) {}
  func flush() {}
  func setReceiving(_ wanted: Bool) {}
  func close() {}
}

/// A running loop, which ends with its owner.
final class LoopThread {
  let loop: EventLoop

  init() throws {
    let loop = try EventLoop()
    self.loop = loop
    _ = try HostThread(name: "loop") { loop.run() }
  }

  deinit { loop.stop() }
}
