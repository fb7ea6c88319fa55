import Foundation
import Host
import Testing

@testable import NetLayer

/// QEMU at the other end of our streams: a machine of its own is not needed for that.
@Suite(.serialized)
struct QEMUTests {
  private let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  private final class QEMU {
    private let process = Process()
    private let input = Pipe()

    init(_ arguments: [String]) throws {
      process.executableURL = URL(fileURLWithPath: "/usr/bin/qemu-system-x86_64")
      process.arguments = ["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16M"] + arguments
      process.standardInput = input
      process.standardOutput = FileHandle.nullDevice
      process.standardError = FileHandle.standardError
      try process.run()
    }

    deinit {
      // It has the signals blocked that the thread which started it has.
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
    }

    func type(_ command: String) { input.fileHandleForWriting.write(Data((command + "\n").utf8)) }
  }

  private static var isInstalled: Bool { access("/usr/bin/qemu-system-x86_64", X_OK) == 0 }

  private func stream(_ id: String, _ path: String, server: Bool = false) -> [String] {
    ["-netdev", "stream,id=\(id),server=\(server ? "on" : "off"),addr.type=unix,addr.path=\(path)"]
  }

  private static let probe = makeFrame(from: 6, to: 0xffff_ffff_ffff, type: 0x88b6)

  /// QEMU drops frames until it has noticed that both of its sockets are connected, which is later than they are.
  private func waitUntilFramesCross(to peer: TestPeer, _ send: ([UInt8]) throws -> Void) throws {
    for _ in 0..<300 {
      try send(Self.probe)
      if try peer.receive(within: 100) != nil { return }
    }
    Issue.record("no frame crosses QEMU")
  }

  /// The next frame that is no late probe.
  private func receive(_ peer: TestPeer) throws -> [UInt8]? {
    while let frame = try peer.receive() {
      if frame != Self.probe { return frame }
    }
    return nil
  }

  /// Two of our switches, and QEMU's hub between them: every frame is read and written by QEMU.
  @Test func framesOfEveryLengthCrossQEMUsHub() throws {
    guard Self.isInstalled else { return print("skipped: needs qemu-system-x86") }
    let near = try TestSwitch(in: folder, name: "near")
    let far = try TestSwitch(in: folder, name: "far")
    let qemu = try QEMU(
      ["-machine", "none"] + stream("a", near.path) + stream("b", far.path)
        + ["-netdev", "hubport,id=ha,hubid=0,netdev=a", "-netdev", "hubport,id=hb,hubid=0,netdev=b"])
    defer { withExtendedLifetime(qemu) {} }
    try eventually("QEMU has two ports") { try near.ports.count == 1 && far.ports.count == 1 }
    let left = try near.connect(1)[0]
    let right = try far.connect(1)[0]
    try waitUntilFramesCross(to: right) { try left.send($0) }
    for length in [14, 15, 60, 1514, 9014, 65535, NetworkFrame.longest] {
      let frame = makeFrame(from: 2, to: 0xffff_ffff_ffff, [UInt8](repeating: UInt8(length & 255), count: length - 14))
      try left.send(frame)
      let there = try receive(right)
      #expect(there == frame, "\(length) bytes")
      let answer = makeFrame(from: 4, to: 2, [UInt8](repeating: 3, count: length - 14))
      try right.send(answer)
      let back = try left.receive()
      #expect(back == answer, "\(length) bytes back")
    }
    // Many at once, so that both ends meet frames in pieces.
    let burst = (0..<500).map { index in
      makeFrame(from: 2, to: 4, withUnsafeBytes(of: UInt32(index)) { Array($0) } + [UInt8](repeating: 7, count: index))
    }
    let writer = try HostThread(name: "writer") { [left, burst] in
      for frame in burst { try? left.send(frame) }
    }
    // Each comes once; which first is the hub's affair, that sends what it had to queue when it can.
    var missing = Set(burst)
    for _ in burst {
      let frame = try #require(try receive(right))
      try #require(missing.remove(frame) != nil)
    }
    writer.join()
  }

  /// Our backend at QEMU's server, and our switch behind its hub.
  @Test func aBackendIsAttachedToQEMUsServer() throws {
    guard Self.isInstalled else { return print("skipped: needs qemu-system-x86") }
    let path = folder.path + "/qemu"
    let network = try TestSwitch(in: folder)
    let qemu = try QEMU(
      ["-machine", "none"] + stream("a", path, server: true) + stream("b", network.path)
        + ["-netdev", "hubport,id=ha,hubid=0,netdev=a", "-netdev", "hubport,id=hb,hubid=0,netdev=b"])
    defer { withExtendedLifetime(qemu) {} }
    try eventually("QEMU has a port") { try network.ports.count == 1 }
    let peer = try network.connect(1)[0]
    let loop = try TestLoop()
    var attached: TestBackend?
    eventually("QEMU listens") {
      attached = try? TestBackend(loop, StreamBackend(path: path))
      return attached != nil
    }
    let backend = try #require(attached)
    try waitUntilFramesCross(to: peer) { try backend.send([$0]) }
    let frame = makeFrame(from: 2, to: 4, [UInt8](repeating: 9, count: 1500))
    try backend.send([frame])
    #expect(try receive(peer) == frame)
    let answer = makeFrame(from: 4, to: 2, [UInt8](repeating: 8, count: 900))
    try peer.send(answer)
    #expect(try backend.receive(1) == [answer])
  }

  @Test func anAnnouncementIsWhatQEMUSends() throws {
    guard Self.isInstalled else { return print("skipped: needs qemu-system-x86") }
    let network = try TestSwitch(in: folder)
    let peer = try network.connect(1)[0]
    let qemu = try QEMU(
      ["-machine", "pc", "-device", "e1000,netdev=n,mac=52:54:00:12:34:56,romfile="] + stream("n", network.path)
        + ["-monitor", "stdio"])
    try eventually("QEMU has a port") { try network.ports.count == 2 }
    qemu.type("announce_self")
    #expect(try peer.receive() == Announcement.frame(for: MACAddress(rawValue: 0x5254_0012_3456)))
  }

  /// A card's own boot code asks for an address through our switch.
  @Test func aMachineOfQEMUsIsAPortLikeOthers() throws {
    guard Self.isInstalled else { return print("skipped: needs qemu-system-x86") }
    guard access("/usr/lib/ipxe/qemu/pxe-virtio.rom", R_OK) == 0 else { return print("skipped: needs ipxe-qemu") }
    let network = try TestSwitch(in: folder)
    let peer = try network.connect(1)[0]
    let qemu = try QEMU(
      ["-machine", "pc", "-boot", "n", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56"]
        + stream("n", network.path))
    defer { withExtendedLifetime(qemu) {} }
    // DHCP: broadcast, IPv4, UDP from port 68 to 67, its hardware address in it.
    var request: [UInt8]?
    for _ in 0..<20 where request == nil {
      guard let frame = try peer.receive(within: 60_000) else { break }
      if frame[12..<14] == [8, 0], frame.count > 282, frame[34..<38] == [0, 68, 0, 67] { request = frame }
    }
    let frame = try #require(request, "no DHCP request came")
    #expect(Array(frame[..<12]) == [255, 255, 255, 255, 255, 255, 0x52, 0x54, 0, 0x12, 0x34, 0x56])
    #expect(Array(frame[70..<76]) == [0x52, 0x54, 0, 0x12, 0x34, 0x56])
  }
}
