import Foundation
import Host
import Testing

@testable import NetLayer

/// A backend on a loop, and what has come from it.
final class TestBackend {
  let loop: TestLoop
  let backend: any NetworkBackend
  let frames = Condition<[[UInt8]]>([])
  let linkChanges = Condition(0)
  /// Frames that one call of `framesArrived` takes.
  let taken = Condition(Int.max)

  init(_ loop: TestLoop, _ backend: any NetworkBackend) throws {
    self.loop = loop
    self.backend = backend
    nonisolated(unsafe) let backend = backend
    try loop.sync { [frames, linkChanges, taken] in
      nonisolated(unsafe) weak let weak: (any NetworkBackend)? = backend
      try backend.start(
        on: loop.loop,
        framesArrived: {
          var left = taken.withLock { $0 }
          while left > 0, let frame = weak?.nextFrame() {
            left -= 1
            frames.withLock { $0.append(Array(frame)) }
            weak?.takeFrame()
          }
        }, linkChanged: { linkChanges.withLock { $0 += 1 } })
    }
  }

  deinit { try? loop.sync { [backend] in backend.close() } }

  /// Sends frames whose header and bytes are in several pieces, and flushes once.
  func send(_ frames: [[UInt8]], header: [UInt8] = [UInt8](repeating: 0, count: NetworkHeader.size)) throws {
    try loop.sync { [backend] in
      for frame in frames {
        let bytes = header + frame
        bytes.withUnsafeBytes { bytes in
          let base = UnsafeMutableRawPointer(mutating: bytes.baseAddress!)
          let cuts = [0, 5, 5, 20, bytes.count].map { min($0, bytes.count) }
          let vectors = zip(cuts, cuts.dropFirst()).map { iovec(iov_base: base + $0, iov_len: $1 - $0) }
          vectors.withUnsafeBufferPointer { backend.send($0) }
        }
      }
      backend.flush()
    }
  }

  var counters: NetworkCounters { get throws { try loop.sync { [backend] in backend.counters } } }
  var isLinkUp: Bool { get throws { try loop.sync { [backend] in backend.isLinkUp } } }

  func setReceiving(_ wanted: Bool) throws { try loop.sync { [backend] in backend.setReceiving(wanted) } }

  /// Waits for so many frames and takes them, without their headers, which are zeros.
  func receive(_ count: Int) throws -> [[UInt8]] {
    eventually("\(count) frames") { frames.withLock { $0.count } >= count }
    return frames.withLock { frames in
      defer { frames = [] }
      return frames.map { frame in
        #expect(frame.prefix(NetworkHeader.size).allSatisfy { $0 == 0 })
        return Array(frame.dropFirst(NetworkHeader.size))
      }
    }
  }
}

struct StreamBackendTests {
  private let folder: TemporaryFolder
  private let loop: TestLoop

  init() throws {
    folder = try TemporaryFolder()
    loop = try TestLoop()
  }

  private func frames(_ count: Int, length: Int = 1514) -> [[UInt8]] {
    (0..<count).map { index in
      makeFrame(from: 2, to: 4, [UInt8](repeating: UInt8(index & 255), count: length - 14))
    }
  }

  @Test func framesOfEveryLengthGoBothWays() throws {
    let listener = try StreamListener(.unix(path: folder.path + "/s"))
    let backend = try TestBackend(loop, StreamBackend(path: folder.path + "/s"))
    let peer = TestPeer(try listener.accept())
    #expect(try backend.isLinkUp && backend.backend.offloads.isEmpty)
    let all = [14, 15, 60, 1514, 9014, 65536, NetworkFrame.longest].flatMap { frames(1, length: $0) }
    let writer = try HostThread(name: "writer") { [all, peer] in
      for frame in all { try? peer.send(frame) }
    }
    #expect(try backend.receive(all.count) == all)
    writer.join()
    try backend.send(all)
    for frame in all { #expect(try peer.receive() == frame) }
    // What is no frame is none.
    try backend.send([[UInt8](repeating: 0, count: 13), [], [UInt8](repeating: 0, count: NetworkFrame.longest + 1)])
    try backend.loop.sync { [backend = backend.backend] in backend.send(UnsafeBufferPointer(start: nil, count: 0)) }
    let counters = try backend.counters
    #expect(counters.sent == UInt64(all.count) && counters.received == counters.sent && counters.dropped == 4)
    #expect(counters.sentBytes == UInt64(all.map(\.count).reduce(0, +)) && counters.receivedBytes == counters.sentBytes)
  }

  /// The device's own buffers are used again as soon as `send` has returned.
  @Test func whatASlowPeerGetsIsWholeFramesAndTheRestIsDropped() throws {
    let listener = try StreamListener(.unix(path: folder.path + "/s"))
    let backend = try TestBackend(loop, StreamBackend(path: folder.path + "/s"))
    let peer = TestPeer(try listener.accept())
    let all = (0..<3000).map { index in
      makeFrame(
        from: 2, to: 4, withUnsafeBytes(of: UInt64(index)) { Array($0) } + [UInt8](repeating: 9, count: index % 1400))
    }
    for start in stride(from: 0, to: all.count, by: 100) { try backend.send(Array(all[start..<start + 100])) }
    let counters = try backend.counters
    #expect(counters.sent + counters.dropped == 3000 && counters.dropped > 0)
    #expect(counters.sentBytes < 2 << 20)
    var next = 0
    for _ in 0..<counters.sent {
      let frame = try #require(try peer.receive())
      // Whole ones in their order; a short one may have found room where a longer one before it had none.
      next = try #require(all[next...].firstIndex(of: frame)) + 1
    }
    try backend.send([all[5]])
    #expect(try peer.receive() == all[5], "and then new ones")
  }

  @Test func aDeviceWithoutBuffersIsNotToldOfFramesAndTheyWait() throws {
    let listener = try StreamListener(.unix(path: folder.path + "/s"))
    let backend = try TestBackend(loop, StreamBackend(path: folder.path + "/s"))
    let peer = TestPeer(try listener.accept())
    let all = frames(60)
    try backend.setReceiving(false)
    for frame in all { try peer.send(frame) }
    usleep(50_000)
    #expect(backend.frames.withLock { $0.isEmpty })
    try backend.setReceiving(true)
    #expect(try backend.receive(60) == all)
    // One at a time is slower and no other.
    backend.taken.withLock { $0 = 1 }
    for frame in all { try peer.send(frame) }
    #expect(try backend.receive(60) == all)
    // A peer that goes is noticed by a device that does not receive.
    try backend.setReceiving(false)
    withExtendedLifetime(peer) { _ = shutdown(peer.socket.rawValue, Int32(SHUT_RDWR)) }
    try eventually("the link is down") { try !backend.isLinkUp }
  }

  @Test func theLinkGoesAndComesWithTheSwitch() throws {
    var network: TestSwitch? = try TestSwitch(in: folder)
    let path = try #require(network).path
    let backend = try TestBackend(loop, StreamBackend(path: path))
    network?.close()
    network = nil
    try eventually("the link is down") { try !backend.isLinkUp }
    #expect(backend.linkChanges.withLock { $0 } == 1)
    try backend.send(frames(3))
    #expect(try backend.counters.dropped == 3)
    usleep(300_000)
    let again = try TestSwitch(in: folder)
    try eventually("the link is up") { try backend.isLinkUp }
    #expect(backend.linkChanges.withLock { $0 } == 2)
    let peer = try again.connect(1)[0]
    try eventually("both have ports") { try again.ports.count == 2 }
    try backend.send(frames(1))
    #expect(try peer.receive() == frames(1)[0])
  }

  @Test func aPeerThatSendsNoFramesLosesTheLink() throws {
    let listener = try StreamListener(.unix(path: folder.path + "/s"))
    let backend = try TestBackend(loop, StreamBackend(path: folder.path + "/s"))
    let first = TestPeer(try listener.accept())
    try first.write(framed(frames(1)[0]) + [0xff, 0xff, 0xff, 0xff])
    #expect(try first.isAtEnd())
    #expect(try backend.receive(1) == frames(1))
    // It tries again, and takes frames.
    let second = TestPeer(try listener.accept())
    try second.send(frames(1)[0])
    #expect(try backend.receive(1) == frames(1))
  }

  @Test func whereNobodyListensItSaysSo() throws {
    let path = folder.path + "/none"
    let error = #expect(throws: NetworkError.self) { try TestBackend(loop, StreamBackend(path: path)) }
    let text = try #require(error.map { "\($0)" })
    #expect(
      text
        == "no switch at \(path): cannot connect to \(path): No such file or directory; start one there first: swiftvmm switch unix:\(path)"
    )
    let long = "/" + String(repeating: "x", count: 120)
    #expect(throws: NetworkError.host(.socketPathTooLong(path: long, limit: 107))) {
      try TestBackend(loop, StreamBackend(path: long))
    }
  }

  @Test func attachmentsAreRead() throws {
    #expect(try NetworkAttachment("tap=tap0") == .tap(name: "tap0"))
    #expect(try NetworkAttachment("switch=/a=b") == .stream(path: "/a=b"))
    #expect(try NetworkAttachment("switch=unix:s") == .stream(path: "s"))
    for text in ["", "tap", "user", "tap0"] {
      #expect(throws: NetworkError.attachment(text)) { try NetworkAttachment(text) }
    }
  }
}
