import BlockLayer
import Foundation
import Host
import Testing

@testable import NBD

/// NBD exports as images: ours against qemu-nbd, our own server, and servers that lie.
@Suite(.serialized)
struct ClientTests {
  private func open(_ uri: String, writable: Bool = false, format: ImageFormat? = nil) throws -> BlockChain {
    try BlockChain(path: uri, format: format, access: FileAccess(writable: writable), queue: makeIOQueue())
  }

  private func read(_ chain: BlockChain, at offset: UInt64, _ count: Int) throws -> [UInt8] {
    let buffer = DiskBuffer(count: count)
    try chain.top.perform(
      .read, at: offset, memory: UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count]), on: chain.queue)
    return Array(buffer.bytes[..<count])
  }

  private func write(_ chain: BlockChain, at offset: UInt64, _ bytes: [UInt8]) throws {
    let buffer = DiskBuffer(count: bytes.count)
    buffer.bytes.copyBytes(from: bytes)
    try chain.top.perform(
      .write, at: offset, memory: UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<bytes.count]), on: chain.queue
    )
  }

  @Test(arguments: [
    "nbd://host", "nbd://host:1234/a%20b", "nbd+unix:///disk?socket=/tmp/s", "nbd+unix:///?socket=/a%3Fb",
    "nbd://[::1]:7/x", "nbds://host", "nbds://host:1/x?tls-certificates=/a%20b&tls-hostname=other",
    "nbds+unix:///x?socket=/s&tls-certificates=dir&tls-verify-peer=false",
  ])
  func urisAreReadAndWritten(text: String) throws {
    let uri = try NBDURI(text)
    #expect(try NBDURI("\(uri)") == uri)
  }

  @Test(arguments: [
    "nbd:///x", "nbd+unix:///x", "nbd+unix://host/x?socket=/s", "nbd://host:port/x", "nbd://h/%zz",
    "nbd://host/x?tls-hostname=h",
    "nbds://host/x?tls-verify-peer=maybe", "nbds://host/x?socket=/s", "nbds://host/x?tls-hostname=", "nbds+unix:///x",
    "nbds://host/x?other=1", "nbdx://host/x",
    "nbd+unix:///?socket=/\(String(repeating: "x", count: 200))",
  ])
  func urisThatMeanNothingAreRefused(text: String) {
    #expect(throws: BlockError.self) { try NBDURI(text) }
  }

  /// Random changes through the client are what a byte array says, through our server and through qemu-nbd.
  @Test(arguments: [false, true])
  func aDiskBehindAServerIsADisk(isQemu: Bool) throws {
    guard !isQemu || isInstalled("qemu-nbd", "qemu-img") else { return print("skipped: needs qemu-utils") }
    let folder = try TemporaryFolder()
    let path = folder.path + "/disk"
    try HostFile.create(path, length: 4 << 20)
    if isQemu {
      try withQemuNBD(["-f", "raw", path], folder) { try exercise($0) }
    } else {
      let server = try TestServer(path, format: .raw, in: folder, writable: true)
      try exercise(server.uri)
      try server.stop()
    }
  }

  private func exercise(_ uri: String) throws {
    let chain = try open(uri, writable: true, format: .raw)
    #expect(chain.top.size == 4 << 20)
    var expected = [UInt8](repeating: 0, count: 4 << 20)
    var generator = SeededGenerator(state: 7)
    for step in 0..<60 {
      let offset = Int.random(in: 0..<(4 << 20 - 1) / 512, using: &generator) * 512
      let count = min(512 * Int.random(in: 1...2000, using: &generator), (4 << 20) - offset)
      switch step % 4 {
      case 0, 1:
        let bytes = [UInt8](repeating: UInt8(step + 1), count: count)
        try write(chain, at: UInt64(offset), bytes)
        expected.replaceSubrange(offset..<(offset + count), with: bytes)
      case 2:
        try chain.top.perform(.writeZeroes, at: UInt64(offset), length: UInt64(count), mayUnmap: true, on: chain.queue)
        expected.replaceSubrange(offset..<(offset + count), with: repeatElement(0, count: count))
      default: #expect(try read(chain, at: UInt64(offset), count) == Array(expected[offset..<(offset + count)]))
      }
    }
    try chain.top.perform(.flush, on: chain.queue)
    #expect(try read(chain, at: 0, 4 << 20) == expected)
    // Extents cover the disk and never call data a hole.
    var covered: UInt64 = 0
    try chain.top.forEachExtent { found in
      let range = Int(found.extent.offset)..<Int(found.extent.offset + found.extent.length)
      if found.extent.isZero { #expect(expected[range].allSatisfy { $0 == 0 }) }
      covered += found.extent.length
    }
    #expect(covered == 4 << 20)
    #expect(chain.queue.wait() == false)
    try chain.close()
  }

  /// A qcow2 image inside an export, and one whose backing file is an export.
  @Test func layersMayBeBehindServers() throws {
    let folder = try TemporaryFolder()
    let base = folder.path + "/base"
    try HostFile.create(base)
    let queue = try makeIOQueue()
    let file = try HostFile(path: base, access: FileAccess(writable: true), queue: queue)
    try Qcow2Image.create(Qcow2CreateOptions(size: 8 << 20), in: file)
    file.close()
    let local = try BlockChain(path: base, access: FileAccess(writable: true), queue: queue)
    try write(local, at: 1 << 20, [UInt8](repeating: 5, count: 1 << 20))
    try local.close()
    // The file's bytes, not the disk's.
    let server = try TestServer(base, format: .raw, in: folder)
    let remote = try open(server.uri)
    #expect(remote.layers[0].format == .qcow2)
    #expect(remote.top.size == 8 << 20)
    #expect(try read(remote, at: 1 << 20, 4096) == [UInt8](repeating: 5, count: 4096))
    try remote.close()
    let overlay = folder.path + "/overlay"
    try HostFile.create(overlay)
    let overlayFile = try HostFile(path: overlay, access: FileAccess(writable: true), queue: queue)
    var options = Qcow2CreateOptions(size: 8 << 20)
    options.backingName = server.uri
    options.backingFormat = "qcow2"
    try Qcow2Image.create(options, in: overlayFile)
    overlayFile.close()
    let chain = try open(overlay, writable: true)
    #expect(chain.layers.count == 2)
    try write(chain, at: (1 << 20) + 512, [UInt8](repeating: 6, count: 512))
    let bytes = try read(chain, at: 1 << 20, 1536)
    #expect(
      bytes == [UInt8](repeating: 5, count: 512) + [UInt8](repeating: 6, count: 512) + [UInt8](repeating: 5, count: 512)
    )
    try chain.close()
    try server.stop()
  }

  @Test func aServerThatGoesIsAnErrorOfTheRequests() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/disk"
    try HostFile.create(path, length: 1 << 20)
    let server = try TestServer(path, format: .raw, in: folder)
    let chain = try open(server.uri, format: .raw)
    #expect(try read(chain, at: 0, 512) == [UInt8](repeating: 0, count: 512))
    try server.stop()
    #expect(throws: BlockError.remote(uri: server.uri, .closed)) { try read(chain, at: 0, 512) }
    #expect(throws: BlockError.remote(uri: server.uri, .closed)) { try read(chain, at: 0, 512) }
    try chain.close()
  }

  /// What servers that lie say after the handshake to a read of 512 bytes at 0, and what they say in its place.
  private static let lies: [(name: String, reply: [UInt8])] = [
    ("no magic number", [UInt8](repeating: 1, count: 64)),
    (
      "an answer to no request",
      Wire.words(NBDProtocol.structuredReplyMagic, UInt16(1), UInt16(0), UInt64(99), UInt32(0))
    ),
    ("a simple reply to a read", Wire.simpleReply(0, cookie: 1) + [UInt8](repeating: 1, count: 512)),
    (
      "data before the request",
      Wire.chunk(1, cookie: 1, Wire.words(UInt64.max) + [UInt8](repeating: 1, count: 512))
    ),
    ("more data than asked for", Wire.chunk(1, cookie: 1, Wire.words(UInt64(0)) + [UInt8](repeating: 1, count: 1024))),
    ("less data than asked for", Wire.chunk(1, cookie: 1, Wire.words(UInt64(0)) + [UInt8](repeating: 1, count: 256))),
    (
      "the same data twice",
      Wire.chunk(1, done: false, cookie: 1, Wire.words(UInt64(0)) + [UInt8](repeating: 1, count: 256))
        + Wire.chunk(1, cookie: 1, Wire.words(UInt64(0)) + [UInt8](repeating: 1, count: 256))
    ),
    ("a hole that is too long", Wire.chunk(2, cookie: 1, Wire.words(UInt64(0), UInt32.max))),
    ("a chunk of an unknown kind", Wire.chunk(77, cookie: 1, [])),
    ("a status for a read", Wire.chunk(5, cookie: 1, Wire.words(UInt32(0), UInt32(1), UInt32(0)))),
    (
      "an error that is too long",
      Wire.words(NBDProtocol.structuredReplyMagic, UInt16(1), UInt16(0x8001), UInt64(1), UInt32.max)
    ),
    ("nothing", []),
  ]

  @Test(arguments: 0..<lies.count)
  func whoLiesIsNotBelieved(index: Int) throws {
    let folder = try TemporaryFolder()
    let listener = try StreamListener(.unix(path: folder.path + "/s"))
    let uri = "\(NBDURI(listener.endpoint, export: ""))"
    let server = try LyingServer(listener, reply: Self.lies[index].reply)
    let chain = try open(uri, format: .raw)
    #expect(throws: BlockError.self, "\(Self.lies[index].name)") { try read(chain, at: 0, 512) }
    try chain.close()
    server.join()
  }

  @Test(arguments: [
    [UInt8](repeating: 0, count: 18), Array("NBDMAGIC".utf8) + [UInt8](repeating: 0, count: 10),
    Array("NBDMAGICIHAVEOPT".utf8) + [0, 0],
    Array("NBDMAGICIHAVEOPT".utf8) + [0, 3] + [UInt8](repeating: 9, count: 20),
    Array("NBDMAGICIHAVEOPT".utf8) + [0, 3]
      + Wire.optionReply(.structuredReply, NBDProtocol.OptionReply.ack)
      + Wire.words(NBDProtocol.optionReplyMagic, UInt32(10), UInt32(4), UInt32.max),
  ])
  func handshakesThatAreNoneAreRefused(bytes: [UInt8]) throws {
    let folder = try TemporaryFolder()
    let listener = try StreamListener(.unix(path: folder.path + "/s"))
    let uri = "\(NBDURI(listener.endpoint, export: ""))"
    let server = try LyingServer(listener, handshake: bytes)
    #expect(throws: BlockError.self) { try open(uri) }
    server.join()
  }
}

/// A server that says what it is told to one client and hangs up.
private final class LyingServer: @unchecked Sendable {
  private let thread: HostThread

  static let handshake: [UInt8] =
    Array("NBDMAGICIHAVEOPT".utf8) + [0, 3] + Wire.optionReply(.structuredReply, NBDProtocol.OptionReply.ack)
    + Wire.optionReply(.setMetaContext, NBDProtocol.OptionReply.ack)
    + Wire.optionReply(.go, NBDProtocol.OptionReply.info, Wire.words(UInt16(0), UInt64(1 << 20), UInt16(1)))
    + Wire.optionReply(.go, NBDProtocol.OptionReply.ack)

  init(_ listener: consuming StreamListener, handshake: [UInt8] = handshake, reply: [UInt8]? = nil) throws {
    let owner = Owner(listener)
    thread = try HostThread(name: "liar") {
      guard let client = try? owner.listener.accept() else { return }
      func say(_ bytes: [UInt8]) {
        _ = bytes.withUnsafeBytes { send(client.rawValue, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
      }
      say(handshake)
      // All of the client's handshake, and a request.
      var input = [UInt8](repeating: 0, count: 4 + 16 + 43 + 24 + 28)
      guard let reply else { return }
      _ = recv(client.rawValue, &input, input.count, Int32(MSG_WAITALL))
      say(reply)
    }
  }

  func join() { thread.join() }

  private final class Owner: Sendable {
    let listener: StreamListener
    init(_ listener: consuming StreamListener) { self.listener = listener }
  }
}

private struct SeededGenerator: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return state ^ state >> 31
  }
}
