import BlockLayer
import Foundation
import Host
import TLS

@testable import NBD

/// A folder that goes away with its owner.
final class TemporaryFolder {
  let path: String

  init() throws {
    path = NSTemporaryDirectory() + "nbd-\(UUID().uuidString.prefix(8))"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }
}

/// A program of the host, run to its end; standard output and error together.
func hostTool(_ arguments: [String]) throws -> (status: Int32, output: String) {
  let process = Process()
  process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
  process.arguments = ["timeout", "60"] + arguments
  process.standardInput = FileHandle.nullDevice
  let pipe = Pipe()
  process.standardOutput = pipe
  process.standardError = pipe
  try process.run()
  let bytes = pipe.fileHandleForReading.readDataToEndOfFile()
  process.waitUntilExit()
  return (process.terminationStatus, String(decoding: bytes, as: UTF8.self))
}

func isInstalled(_ tools: String...) -> Bool {
  tools.allSatisfy { access("/usr/bin/" + $0, X_OK) == 0 }
}

/// An image behind our server, in this process.
final class TestServer {
  let thread: IOThread
  let server: NBDServer
  let chain: BlockChain
  let socket: String
  let certificates: String?

  var uri: String {
    let tls = certificates.map { NBDURI.TLS(certificates: $0, hostName: "localhost") }
    return "\(NBDURI(server.endpoint, export: "", tls: tls))"
  }

  init(
    _ image: String, format: ImageFormat? = nil, in folder: TemporaryFolder, writable: Bool = false,
    bitmaps: [String] = [], certificates: String? = nil, verifiesPeer: Bool = true, tcp: Bool = false,
    onEvent: @escaping (NBDServer.Event) -> Void = { _ in }
  ) throws {
    self.certificates = certificates
    thread = try IOThread()
    chain = try BlockChain(
      path: image, format: format, access: FileAccess(writable: writable), queue: thread.queue)
    socket = folder.path + "/\(UUID().uuidString.prefix(8))"
    let credentials = try certificates.map {
      try TLSCredentials(directory: $0, endpoint: .server, verifiesPeer: verifiesPeer)
    }
    let endpoint = tcp ? StreamEndpoint.tcp(host: "127.0.0.1", port: 0) : .unix(path: socket)
    server = try NBDServer(StreamListener(endpoint), on: thread, credentials: credentials, onEvent: onEvent)
    let shown = chain.layers[0].qcow2?.bitmaps.filter { bitmaps.contains($0.name) } ?? []
    try server.add(NBDExport(name: "", node: chain.top, isReadOnly: !writable, bitmaps: shown.map { NBDBitmap($0) }))
    try server.start()
    try thread.start()
  }

  func stop() throws {
    thread.stop()
    server.stop()
    try chain.close()
  }
}

/// A client that a test speaks for, byte by byte, and the server's side of its connection.
final class Conversation {
  let session: ServerSession
  let node: TestNode
  let table = ExportTable()

  init(isReadOnly: Bool = false, structured: Bool = false, bitmaps: Int = 0, requiresTLS: Bool = false) throws {
    node = TestNode()
    let bits = (0..<bitmaps).map { number in
      NBDBitmap(name: "bits\(number)") { offset, length in
        (offset < 1024, offset < 1024 ? min(length, 1024 - offset) : length)
      }
    }
    table.exports = [
      try NBDExport(name: "disk", description: "a disk", node: node, isReadOnly: isReadOnly, bitmaps: bits),
      try NBDExport(name: "other", node: TestNode()),
    ]
    session = ServerSession(table: table, pool: BufferPool(), requiresTLS: requiresTLS)
  }

  /// What the server has to say to `bytes`, which come `step` at a time.
  @discardableResult
  func say(_ bytes: [UInt8], step: Int = .max) -> [UInt8] {
    var rest = bytes[...]
    var answer = drain()
    while !rest.isEmpty, session.wantsInput {
      let space = session.space
      let count = min(rest.count, step, space.count)
      space.copyBytes(from: rest.prefix(count))
      rest = rest.dropFirst(count)
      session.received(count)
      answer += drain()
    }
    return answer
  }

  func drain() -> [UInt8] {
    var bytes: [UInt8] = []
    while !session.output.isEmpty {
      var vector = [iovec()]
      let count = vector.withUnsafeMutableBufferPointer { session.output.fill($0) }
      guard count == 1, vector[0].iov_len > 0 else { return bytes }
      bytes += UnsafeRawBufferPointer(start: vector[0].iov_base, count: vector[0].iov_len)
      session.sent(vector[0].iov_len)
    }
    return bytes
  }

  /// Through the handshake.
  func negotiate(structured: Bool = true, contexts: [String] = []) {
    say(Wire.flags(3))
    if structured { say(Wire.option(.structuredReply)) }
    if !contexts.isEmpty { say(Wire.option(.setMetaContext, Wire.queries("disk", contexts))) }
    say(Wire.option(.go, Wire.string("disk") + [0, 0]))
  }
}

/// What clients send.
enum Wire {
  static func words(_ values: any FixedWidthInteger...) -> [UInt8] {
    var bytes: [UInt8] = []
    for value in values { bytes.appendBigEndian(value) }
    return bytes
  }

  static func flags(_ value: UInt32) -> [UInt8] { words(value) }

  static func option(_ option: NBDProtocol.Option, _ data: [UInt8] = []) -> [UInt8] {
    self.option(option.rawValue, length: UInt32(data.count)) + data
  }

  static func option(_ option: UInt32, length: UInt32) -> [UInt8] { words(NBDProtocol.optionMagic, option, length) }

  static func string(_ text: String) -> [UInt8] { words(UInt32(text.utf8.count)) + text.utf8 }

  static func queries(_ export: String, _ queries: [String]) -> [UInt8] {
    string(export) + words(UInt32(queries.count)) + queries.flatMap { string($0) }
  }

  static func request(
    _ command: UInt16, flags: UInt16 = 0, cookie: UInt64 = 7, at offset: UInt64 = 0, length: UInt32 = 0
  ) -> [UInt8] {
    words(NBDProtocol.requestMagic, flags, command, cookie, offset, length)
  }

  static func request(
    _ command: NBDProtocol.Command, flags: NBDProtocol.CommandFlags = [], cookie: UInt64 = 7, at offset: UInt64 = 0,
    length: UInt32 = 0
  ) -> [UInt8] {
    request(command.rawValue, flags: flags.rawValue, cookie: cookie, at: offset, length: length)
  }

  static func simpleReply(_ code: UInt32, cookie: UInt64 = 7) -> [UInt8] {
    words(NBDProtocol.simpleReplyMagic, code, cookie)
  }

  static func chunk(_ type: UInt16, done: Bool = true, cookie: UInt64 = 7, _ payload: [UInt8]) -> [UInt8] {
    words(NBDProtocol.structuredReplyMagic, UInt16(done ? 1 : 0), type, cookie, UInt32(payload.count)) + payload
  }

  static func errorCode(_ reply: [UInt8]) -> UInt32? {
    guard reply.count >= 26, reply.bigEndian16(6) == NBDProtocol.Chunk.error else { return nil }
    return reply.bigEndian32(20)
  }

  static func optionReply(_ option: NBDProtocol.Option, _ type: UInt32, _ data: [UInt8] = []) -> [UInt8] {
    words(NBDProtocol.optionReplyMagic, option.rawValue, type, UInt32(data.count)) + data
  }
}

/// A disk of 64 KiB in memory: byte n is n / 256, but the second 4 KiB are a hole. What it is asked stays in `log`.
final class TestNode: BlockNode {
  let size: UInt64 = 64 << 10
  let isReadOnly = false
  var bytes: [UInt8]
  var log: [String] = []
  var failure: BlockError?
  /// Requests wait for `completeAll`.
  var holds = false
  var held: [BlockRequest] = []

  init() {
    bytes = (0..<(64 << 10)).map { UInt8($0 / 256) }
    for index in 4096..<8192 { bytes[index] = 0 }
  }

  func submit(_ request: BlockRequest) {
    log.append("\(request.operation) \(request.offset) \(request.length)\(request.mayUnmap ? " unmap" : "")")
    if holds { return held.append(request) }
    complete(request)
  }

  func complete(_ request: BlockRequest) {
    if failure == nil { move(request) }
    request.completion(failure)
  }

  private func move(_ request: BlockRequest) {
    let start = Int(request.offset)
    bytes.withUnsafeMutableBytes { bytes in
      guard let base = bytes.baseAddress else { return }
      switch request.operation {
      case .read: request.memory.copyIn(base + start, from: 0, length: Int(request.length))
      case .write: request.memory.copyOut(base + start, from: 0, length: Int(request.length))
      case .writeZeroes, .discard: memset(base + start, 0, Int(request.length))
      case .flush: break
      }
    }
  }

  func extent(at offset: UInt64, length: UInt64) throws(BlockError) -> BlockExtent {
    let isHole = (4096..<8192).contains(offset)
    let end: UInt64 = offset < 4096 ? 4096 : isHole ? 8192 : size
    return BlockExtent(
      offset: offset, length: min(length, end - offset), isAllocated: true, isData: !isHole, isZero: isHole)
  }

  func close() throws(BlockError) {}
}
