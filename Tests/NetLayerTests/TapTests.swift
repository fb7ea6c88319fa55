import Foundation
import Host
import Testing

@testable import NetLayer

/// A network namespace of a thread's own, with a TAP interface whose host side is the kernel's.
private enum Namespace {
  typealias Unshare = @convention(c) (Int32) -> Int32
  private static let newNetwork: Int32 = 0x4000_0000

  /// Puts the calling thread, and those that it starts, into a new one; false where that is not allowed.
  static func enter() -> Bool {
    guard let symbol = dlsym(nil, "unshare") else { return false }
    return unsafeBitCast(symbol, to: Unshare.self)(newNetwork) == 0
  }

  /// In the calling thread's: Foundation's own processes are another thread's.
  static func ip(_ arguments: String) throws {
    let result = try ChildProcess.run(["ip"] + arguments.split(separator: " ").map(String.init))
    try #require(result.status == 0, "ip \(arguments)")
  }
}

/// Runs as root with iproute2 only; elsewhere it says so.
@Suite(.serialized)
struct TapTests {
  private static let station = MACAddress(rawValue: 0x5254_0000_0002)

  /// Runs `body` on a loop's thread that is in a namespace of its own, with `tap0` up at 192.0.2.1.
  private func withTap(_ body: @escaping (TestLoop) throws -> Void) throws {
    guard geteuid() == 0, access("/usr/sbin/ip", X_OK) == 0 || access("/sbin/ip", X_OK) == 0 else {
      return print("skipped: needs root and iproute2")
    }
    guard access("/dev/net/tun", R_OK | W_OK) == 0 else { return print("skipped: needs /dev/net/tun") }
    let isInside = Condition<Bool?>(nil)
    let loop = try TestLoop { isInside.withLock { $0 = Namespace.enter() } }
    guard isInside.wait({ $0 }) else { return print("skipped: this host allows no network namespaces") }
    try loop.sync {
      try Namespace.ip("tuntap add tap0 mode tap")
      try Namespace.ip("link set tap0 address 52:54:00:00:00:01 mtu 9000 up")
      try Namespace.ip("addr add 192.0.2.1/24 dev tap0")
      try Namespace.ip("neigh add 192.0.2.2 lladdr \(Self.station) dev tap0 nud permanent")
    }
    try body(loop)
  }

  /// The next IPv4 frame that a backend has for the station: the kernel talks of other things as well.
  private func next(_ backend: TestBackend) throws -> (header: [UInt8], frame: [UInt8]) {
    var found: [UInt8]?
    eventually("a frame") {
      found = backend.frames.withLock { frames in
        let index = frames.firstIndex {
          $0.count > 26 && $0[12..<18] == Self.station.bytes[...] && $0[24..<26] == [8, 0]
        }
        defer { if let index { frames.removeSubrange(...index) } }
        return index.map { frames[$0] }
      }
      return found != nil
    }
    let frame = try #require(found)
    return (Array(frame.prefix(NetworkHeader.size)), Array(frame.dropFirst(NetworkHeader.size)))
  }

  /// A UDP socket of the namespace, at 192.0.2.1 port 7, once the interface that somebody has attached to carries frames.
  private func makeSocket(_ loop: TestLoop) throws -> FileDescriptor {
    try eventually("the kernel has seen the carrier") {
      let link = try loop.sync { try ChildProcess.run(["ip", "link", "show", "tap0"], keepingOutput: true) }
      return String(decoding: link.output, as: UTF8.self).contains("state UP")
    }
    return try bindSocket(loop)
  }

  private func bindSocket(_ loop: TestLoop) throws -> FileDescriptor {
    FileDescriptor(
      owning: try loop.sync {
        let descriptor = socket(AF_INET, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        var address = Self.address(1)
        let status = withUnsafePointer(to: &address) {
          $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(descriptor, $0, 16) }
        }
        try #require(status == 0)
        var time = timeval(tv_sec: 10, tv_usec: 0)
        setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
        return descriptor
      })
  }

  private static func address(_ host: UInt32) -> sockaddr_in {
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = UInt16(7).bigEndian
    address.sin_addr.s_addr = (0xc000_0200 | host).bigEndian
    return address
  }

  private func send(_ bytes: [UInt8], from socket: borrowing FileDescriptor) throws {
    var address = Self.address(2)
    let descriptor = socket.rawValue
    let count = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { sendto(descriptor, bytes, bytes.count, 0, $0, 16) }
    }
    try #require(count == bytes.count)
  }

  /// An IPv4 datagram from the station to 192.0.2.1 port 7, without a UDP checksum, which is allowed.
  private static func datagram(_ payload: [UInt8]) -> [UInt8] {
    func big(_ value: Int) -> [UInt8] { [UInt8(value >> 8 & 255), UInt8(value & 255)] }
    var header: [UInt8] = [0x45, 0] + big(28 + payload.count) + [0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1]
    var sum = stride(from: 0, to: 20, by: 2).reduce(0) { $0 + (Int(header[$1]) << 8 | Int(header[$1 + 1])) }
    while sum > 0xffff { sum = sum >> 16 + sum & 0xffff }
    header.replaceSubrange(10..<12, with: big(~sum & 0xffff))
    let udp = big(7) + big(7) + big(8 + payload.count) + [0, 0]
    return makeFrame(from: station.rawValue, to: 0x5254_0000_0001, type: 0x0800, header + udp + payload)
  }

  @Test func theKernelsStackIsAtTheOtherEnd() throws {
    try withTap { loop in
      let tap = try loop.sync { try TapBackend(name: "tap0") }
      #expect(tap.offloads.isSuperset(of: [.checksum, .tcp4, .tcp6]))
      let backend = try TestBackend(loop, tap)
      let socket = try makeSocket(loop)
      for length in [1, 100, 1400, 8900] {
        let payload = [UInt8](repeating: UInt8(length & 255), count: length)
        try backend.send([Self.datagram(payload)])
        var bytes = [UInt8](repeating: 0, count: 65536)
        let count = recv(socket.rawValue, &bytes, bytes.count, 0)
        #expect(count == length && Array(bytes.prefix(length)) == payload)
      }
      #expect(try backend.counters.sent == 4)
      // Whole checksums as long as the driver has not said that it can do without, and not then.
      try send([1, 2, 3], from: socket)
      var (header, frame) = try next(backend)
      #expect(header == [UInt8](repeating: 0, count: 12))
      #expect(frame.suffix(3) == [1, 2, 3])
      try loop.sync { tap.setReceiveOffloads([.checksum, .tcp4]) }
      try send([1, 2, 3], from: socket)
      (header, frame) = try next(backend)
      // VIRTIO_NET_HDR_F_NEEDS_CSUM, at the UDP header's start, into its checksum.
      #expect(header[0] == 1 && header[6..<10] == [34, 0, 6, 0], "\(header)")
      // The other way round.
      var toKernel = Self.datagram([5, 6, 7])
      let pseudo = 0xc000 + 0x0202 + 0xc000 + 0x0201 + 17 + 11
      toKernel[40] = UInt8((pseudo >> 16 + pseudo & 0xffff) >> 8)
      toKernel[41] = UInt8((pseudo >> 16 + pseudo & 0xffff) & 255)
      try backend.send([toKernel], header: [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0])
      var bytes = [UInt8](repeating: 0, count: 16)
      #expect(recv(socket.rawValue, &bytes, bytes.count, 0) == 3 && bytes.prefix(3) == [5, 6, 7])
      // Headers that say what is not so are the kernel's to refuse.
      let before = try backend.counters.dropped
      try backend.send([toKernel], header: [1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0])
      try backend.send([[1, 2, 3]])
      #expect(try backend.counters.dropped == before + 2)
    }
  }

  @Test func framesWaitInTheKernelForADeviceWithoutBuffers() throws {
    try withTap { loop in
      let backend = try TestBackend(loop, try loop.sync { try TapBackend(name: "tap0") })
      let socket = try makeSocket(loop)
      try backend.setReceiving(false)
      backend.frames.withLock { $0 = [] }
      for number in 0..<300 { try send([UInt8(number & 255), UInt8(number >> 8)], from: socket) }
      usleep(50_000)
      #expect(backend.frames.withLock { $0.isEmpty })
      try backend.setReceiving(true)
      for number in 0..<300 {
        #expect(try next(backend).frame.suffix(2) == [UInt8(number & 255), UInt8(number >> 8)])
      }
    }
  }

  @Test func anInterfaceThatIsRemovedTakesTheLinkDown() throws {
    try withTap { loop in
      let backend = try TestBackend(loop, try loop.sync { try TapBackend(name: "tap0") })
      #expect(try backend.isLinkUp)
      try loop.sync { try Namespace.ip("link set tap0 down") }
      try backend.send([Self.datagram([1])])
      #expect(try backend.counters.dropped == 1, "the host has it down")
      try loop.sync { try Namespace.ip("link delete tap0") }
      try eventually("the link is down") { try !backend.isLinkUp }
      #expect(backend.linkChanges.withLock { $0 } == 1)
    }
  }

  @Test func aSwitchHasItAsAnUplink() throws {
    let folder = try TemporaryFolder()
    try withTap { loop in
      let network = VirtualSwitch(on: loop.loop)
      let path = folder.path + "/s"
      let lost = Condition<[NetworkError]>([])
      try loop.sync {
        network.onMessage = { message in lost.withLock { $0.append(message) } }
        try network.listen(StreamListener(.unix(path: path)))
        try network.addUplink(.tap(name: "tap0"))
      }
      let peer = try TestPeer(path)
      let socket = try makeSocket(loop)
      try peer.send(Self.datagram([1, 2, 3]))
      var bytes = [UInt8](repeating: 0, count: 16)
      #expect(recv(socket.rawValue, &bytes, bytes.count, 0) == 3 && bytes.prefix(3) == [1, 2, 3])
      for number in 0..<300 { try send([UInt8(number & 255), UInt8(number >> 8)], from: socket) }
      var seen = 0
      while seen < 300, let frame = try peer.receive() {
        guard frame[12..<14] == [8, 0] else { continue }
        #expect(frame.suffix(2) == [UInt8(seen & 255), UInt8(seen >> 8)])
        seen += 1
      }
      #expect(seen == 300)
      try loop.sync { try Namespace.ip("link delete tap0") }
      eventually("it is gone") { lost.withLock { $0 } == [.uplinkGone(.tap(name: "tap0"))] }
      try loop.sync {
        #expect(network.portReports.count == 1)
        network.close()
      }
    }
  }

  @Test func whatCannotBeHadIsSaidInOneLine() throws {
    for name in ["", "sixteen-letters!", "a b", "a/b", "a:b"] {
      #expect(throws: NetworkError.interfaceName(name, limit: 15)) { try TapBackend(name: name) }
    }
    try withTap { loop in
      try loop.sync {
        #expect(throws: NetworkError.noInterface(name: "tap7")) { try TapBackend(name: "tap7") }
        #expect(throws: NetworkError.notATap(name: "lo")) { try TapBackend(name: "lo") }
        try Namespace.ip("tuntap add tun0 mode tun")
        #expect(throws: NetworkError.notATap(name: "tun0")) { try TapBackend(name: "tun0") }
        try Namespace.ip("tuntap add many mode tap multi_queue")
        #expect(throws: NetworkError.notATap(name: "many")) { try TapBackend(name: "many") }
        let held = try TapBackend(name: "tap0")
        #expect(throws: NetworkError.tapInUse(name: "tap0")) { try TapBackend(name: "tap0") }
        held.close()
      }
    }
  }
}
