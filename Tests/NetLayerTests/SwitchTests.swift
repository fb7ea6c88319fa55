import Foundation
import Host
import Testing

@testable import NetLayer

struct SwitchTests {
  private static let broadcast: UInt64 = 0xffff_ffff_ffff
  private static let a: UInt64 = 0x5254_0000_000a
  private static let b: UInt64 = 0x5254_0000_000b
  private static let c: UInt64 = 0x5254_0000_000c
  private let folder: TemporaryFolder
  private let network: TestSwitch

  init() throws {
    folder = try TemporaryFolder()
    network = try TestSwitch(in: folder)
  }

  /// The next frame is `frame`, so nothing came before it.
  private func expect(_ frame: [UInt8], at peer: TestPeer, _ comment: Comment) throws {
    #expect(try peer.receive() == frame, comment)
  }

  @Test func unknownAndGroupAddressesGoEverywhereButBackAndKnownOnesToTheirPort() throws {
    let peers = try network.connect(3)
    let toAll = makeFrame(from: Self.a, to: Self.broadcast)
    try peers[0].send(toAll)
    for peer in peers[1...] { try expect(toAll, at: peer, "flooded") }
    let toGroup = makeFrame(from: Self.b, to: 0x0100_5e00_0001)
    try peers[1].send(toGroup)
    try expect(toGroup, at: peers[0], "nothing of its own came back before")
    try expect(toGroup, at: peers[2], "flooded")
    let toNobody = makeFrame(from: Self.c, to: 0x5254_0000_00ff)
    try peers[2].send(toNobody)
    try expect(toNobody, at: peers[0], "flooded")
    try expect(toNobody, at: peers[1], "flooded")
    let toOne = makeFrame(from: Self.a, to: Self.b)
    try peers[0].send(toOne)
    try expect(toOne, at: peers[1], "known")
    let last = makeFrame(from: Self.b, to: Self.broadcast)
    try peers[1].send(last)
    try expect(last, at: peers[2], "what was for another did not come here")
    let total = try network.total
    #expect(total.stations == 3 && total.unknown == 1 && total.traffic.received == 5 && total.traffic.sent == 9)
    #expect(total.traffic.dropped == 0)
  }

  @Test func framesThatNoSwitchForwardsAreCountedAndGoNowhere() throws {
    let peers = try network.connect(2)
    try peers[0].send(makeFrame(from: 0x0100_0000_0001, to: Self.b))
    try peers[0].send(makeFrame(from: Self.broadcast, to: Self.b))
    try peers[0].send(makeFrame(from: 0, to: Self.b))
    for last in 0..<16 { try peers[0].send(makeFrame(from: Self.a, to: 0x0180_c200_0000 + UInt64(last))) }
    try peers[0].send(makeFrame(from: Self.a, to: Self.a))
    let good = makeFrame(from: Self.a, to: 0x0180_c200_0010)
    try peers[0].send(good)
    try expect(good, at: peers[1], "the first one that goes on")
    let total = try network.total
    #expect(total.invalidSources == 3 && total.reserved == 16 && total.filtered == 1 && total.stations == 1)
  }

  @Test func aStationThatAnnouncesItselfElsewhereIsThereAtOnce() throws {
    let peers = try network.connect(3)
    let station = MACAddress(rawValue: Self.a)
    try peers[0].send(makeFrame(from: Self.a, to: Self.broadcast))
    for peer in peers[1...] { _ = try peer.receive() }
    try peers[1].send(Announcement.frame(for: station))
    _ = try peers[0].receive()
    _ = try peers[2].receive()
    let frame = makeFrame(from: Self.c, to: Self.a)
    try peers[2].send(frame)
    try expect(frame, at: peers[1], "where it is now")
    #expect(try peers[0].receive(within: 100) == nil, "where it was")
    #expect(try network.total.moves == 1)
  }

  @Test func aFullTableFloodsAndOldStationsAreForgotten() throws {
    var configuration = VirtualSwitch.Configuration()
    configuration.stations = 2
    configuration.ageing = 300_000_000
    let small = try TestSwitch(in: folder, name: "small", configuration)
    let peers = try small.connect(3)
    for source in [Self.a, Self.b, Self.c] { try peers[0].send(makeFrame(from: source, to: Self.broadcast)) }
    for peer in peers[1...] { for _ in 0..<3 { _ = try peer.receive() } }
    #expect(try small.total.stations == 2)
    #expect(try small.total.unlearned == 1)
    let frame = makeFrame(from: 2, to: Self.c)
    try peers[1].send(frame)
    try expect(frame, at: peers[0], "flooded")
    try expect(frame, at: peers[2], "flooded")
    // Its own time, without a frame that asks.
    try eventually("stations are forgotten") { try small.total.stations == 0 }
  }

  /// One port does not read: its frames are dropped beyond its queue, and the others lose nothing.
  @Test func aPortThatDoesNotReadHoldsUpNobody() throws {
    let peers = try network.connect(3)
    for (peer, station) in zip(peers, [Self.a, Self.b, Self.c]) {
      try peer.send(makeFrame(from: station, to: 0x0180_c200_0000))
    }
    try eventually("three stations") { try network.total.stations == 3 }
    let count = 4000
    let payload = [UInt8](repeating: 0x55, count: 1500)
    let reader = peers[2]
    let received = Condition((count: 0, isOver: false))
    let thread = try HostThread(name: "reader") { [reader] in
      for _ in 0..<count {
        guard let frame = try? reader.receive(), frame.count == 1514 else { break }
        received.withLock { $0.count += 1 }
      }
      received.withLock { $0.isOver = true }
    }
    let toSlow = makeFrame(from: Self.a, to: Self.b, payload)
    let toReader = makeFrame(from: Self.a, to: Self.c, payload)
    for index in 0..<count {
      try peers[0].send(toSlow)
      try peers[0].send(toReader)
      // The reader has a queue as well, and would lose what it cannot keep up with.
      if index % 100 == 99 { _ = received.wait { $0.isOver || $0.count > index - 100 ? true : nil } }
    }
    #expect(received.wait { $0.isOver ? $0.count : nil } == count, "no frame of the other port was lost")
    thread.join()
    try eventually("everything has arrived") { try network.total.traffic.received == 2 * UInt64(count) + 3 }
    let slow = try network.ports[1].counters
    #expect(slow.sent + slow.dropped == UInt64(count))
    #expect(slow.dropped > 0)
    #expect(slow.sentBytes < 3 << 20, "a queue of a mebibyte, and what the kernel holds")
    // It reads again: whole frames come, as many as were kept, and then new ones.
    for _ in 0..<slow.sent { #expect(try peers[1].receive() == toSlow) }
    try peers[0].send(toSlow)
    #expect(try peers[1].receive() == toSlow)
    #expect(try network.total.traffic.dropped == slow.dropped)
  }

  @Test func aPortMayGoWhileFramesWaitForIt() throws {
    var peers = try network.connect(2)
    try peers[1].send(makeFrame(from: Self.b, to: Self.broadcast))
    _ = try peers[0].receive()
    let frame = makeFrame(from: Self.a, to: Self.b, [UInt8](repeating: 1, count: 9000))
    for _ in 0..<200 { try peers[0].send(frame) }
    try eventually("frames wait") { try network.total.traffic.dropped > 0 }
    peers.removeLast()
    try eventually("the port has gone") { try network.ports.count == 1 }
    #expect(try network.total.stations == 1, "and its station with it")
    peers += try network.connect(2)
    try peers[0].send(frame)
    try expect(frame, at: peers[1], "flooded")
    try expect(frame, at: peers[2], "flooded")
    #expect(try network.total.traffic.received == 202, "what has passed the port that went still counts")
  }

  @Test func whatIsNoStreamOfFramesLosesItsPortAndNoOther() throws {
    let peers = try network.connect(3)
    try peers[0].write(framed(makeFrame(from: Self.a, to: Self.broadcast)) + Array("GET / HTTP/1.1\r\n".utf8))
    #expect(try peers[0].isAtEnd())
    #expect(try peers[1].receive() != nil, "the frame before")
    let total = try network.total
    #expect(total.malformedStreams == 1)
    #expect(network.messages.withLock { $0 } == [.malformedStream(port: "port 1", longest: NetworkFrame.longest)])
    let frame = makeFrame(from: Self.b, to: Self.broadcast)
    try peers[1].send(frame)
    _ = try peers[2].receive()
    try expect(frame, at: peers[2], "the others go on")
  }

  /// Two peers send back whatever they get, as a second link between two switches would.
  @Test func aLoopStarvesNobody() throws {
    let peers = try network.connect(4)
    let isOver = Condition(false)
    let echoes = try peers[..<2].map { peer in
      try HostThread(name: "echo") { [peer] in
        while !isOver.withLock({ $0 }) {
          if let frame = try? peer.receive(within: 20) { try? peer.send(frame) }
        }
      }
    }
    try peers[2].send(makeFrame(from: Self.a, to: Self.broadcast))
    try eventually("the frame goes round") { try network.total.traffic.received > 1000 }
    let frame = makeFrame(from: Self.c, to: Self.b)
    try peers[2].send(makeFrame(from: Self.b, to: 0x0180_c200_0000))
    try eventually("both are known") { try network.total.reserved == 1 }
    try peers[3].send(frame)
    var came = false
    for _ in 0..<1_000_000 where !came {
      guard let next = try peers[2].receive() else { break }
      came = next == frame
    }
    #expect(came, "a frame between two others arrives")
    isOver.withLock { $0 = true }
    for echo in echoes { echo.join() }
  }

  @Test func portsAreBoundedAndTheirPlacesUsedAgain() throws {
    var configuration = VirtualSwitch.Configuration()
    configuration.ports = 2
    let small = try TestSwitch(in: folder, name: "small", configuration)
    var peers = try small.connect(2)
    let third = try TestPeer(small.path)
    #expect(try third.isAtEnd())
    #expect(try small.total.refusedPorts == 1)
    peers.removeFirst()
    try eventually("one has gone") { try small.ports.count == 1 }
    peers += try small.connect(1)
    #expect(try small.ports.map(\.name).sorted() == ["port 2", "port 3"])
  }

  /// A chain: a frame crosses two switches, and a switch that goes comes back without anybody's help.
  @Test func switchesAreLinkedAndTheLinkComesBack() throws {
    let far = try TestSwitch(in: folder, name: "far")
    try network.loop.sync { try network.switch.addUplink(.stream(path: far.path)) }
    let near = try network.connect(1)
    var peer = try far.connect(1)
    let frame = makeFrame(from: Self.a, to: Self.broadcast)
    try near[0].send(frame)
    try expect(frame, at: peer[0], "over both")
    let answer = makeFrame(from: Self.b, to: Self.a)
    try peer[0].send(answer)
    try expect(answer, at: near[0], "and back")
    #expect(try network.ports.first?.isUp == true)
    // Many at once keep their order.
    let burst = (0..<2000).map { index in
      makeFrame(
        from: Self.a, to: Self.b,
        withUnsafeBytes(of: UInt32(index)) { Array($0) } + [UInt8](repeating: 7, count: index % 500))
    }
    let writer = try HostThread(name: "writer") { [near, burst] in
      for frame in burst { try? near[0].send(frame) }
    }
    for frame in burst {
      let there = try peer[0].receive()
      try #require(there == frame)
    }
    writer.join()
    far.close()
    try eventually("the uplink is down") { try network.ports.first?.isUp == false }
    let again = try TestSwitch(in: folder, name: "far")
    try eventually("the uplink is up") { try network.ports.first?.isUp == true }
    peer = try again.connect(1)
    try near[0].send(frame)
    try expect(frame, at: peer[0], "over both again")
  }

  @Test func uplinksThatAreNotThereAreRefused() throws {
    let path = folder.path + "/none"
    #expect(throws: NetworkError.noSwitch(path: path, .path("connect to", path: path, errno: ENOENT))) {
      try network.loop.sync { try network.switch.addUplink(.stream(path: path)) }
    }
    #expect(try network.ports.isEmpty)
  }

  @Test func aCaptureHasEveryFrame() throws {
    guard isInstalled("tshark") else { return print("skipped: needs tshark") }
    let file = folder.path + "/frames.pcap"
    try network.loop.sync { try network.switch.capture(to: file) }
    let peers = try network.connect(2)
    var lengths: [Int] = []
    for index in 0..<300 {
      let length = index == 77 ? 65_000 : 60 + index * 5
      lengths.append(length)
      try peers[0].send(makeFrame(from: Self.a, to: Self.broadcast, [UInt8](repeating: 1, count: length - 14)))
      _ = try peers[1].receive()
    }
    try peers[1].send(Announcement.frame(for: MACAddress(rawValue: Self.b)))
    _ = try peers[0].receive()
    try network.loop.sync { network.switch.flushCapture() }
    let seen = try hostTool(["tshark", "-r", file, "-T", "fields", "-e", "frame.len", "-e", "eth.src"])
      .split(separator: "\n").filter { $0.contains("52:54") }
    #expect(seen.map { String($0) } == (lengths.map { "\($0)\t52:54:00:00:00:0a" } + ["60\t52:54:00:00:00:0b"]))
    let rarp = try hostTool(["tshark", "-r", file, "-Y", "arp.opcode == 3 && arp.src.hw_mac == 52:54:00:00:00:0b"])
    #expect(rarp.contains("Who is 52:54:00:00:00:0b? Tell 52:54:00:00:00:0b"), "\(rarp)")
  }

  @Test func aCaptureThatCannotBeWrittenEndsAndTheSwitchGoesOn() throws {
    #expect(throws: NetworkError.capture(path: "/nowhere/x", .path("open", path: "/nowhere/x", errno: ENOENT))) {
      try network.loop.sync { try network.switch.capture(to: "/nowhere/x") }
    }
    guard access("/dev/full", W_OK) == 0 else { return print("skipped: needs /dev/full") }
    #expect(throws: NetworkError.capture(path: "/dev/full", .systemCall("write", errno: ENOSPC))) {
      try network.loop.sync { try network.switch.capture(to: "/dev/full") }
    }
  }
}
