import BlockLayer
import Foundation

@testable import NBD

/// A client's bytes against the server's side of a connection.
enum NBDHarness {
  /// The first byte says how the rest comes in and goes out; see `run`.
  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    guard let first = input.first else { return }
    let node = MemoryNode(isReadOnly: first & 1 != 0, isDeferred: first & 2 != 0)
    let table = ExportTable()
    let bitmap = NBDBitmap(name: "bits") { offset, length in
      (offset / 512 % 2 == 0, min(length, 512 - offset % 512))
    }
    do {
      table.exports = [
        try NBDExport(name: "", node: node),
        try NBDExport(name: "disk", description: "a disk", node: node, isReadOnly: true, bitmaps: [bitmap]),
      ]
    } catch {
      preconditionFailure("\(error)")
    }
    let session = ServerSession(table: table, pool: BufferPool())
    // Bytes that one read brings, and that one write takes.
    let step = first & 4 != 0 ? 7 : 4096
    var rest = input.dropFirst()
    while !session.isOver {
      if session.wantsInput, let base = UnsafeBufferPointer(rebasing: rest).baseAddress, !rest.isEmpty {
        let space = session.space
        let count = min(rest.count, space.count, step)
        precondition(count > 0, "a session that wants input has room for it")
        space.baseAddress?.copyMemory(from: base, byteCount: count)
        rest = rest.dropFirst(count)
        session.received(count)
      } else if !node.completeOne(), session.output.isEmpty {
        break
      }
      send(session, step)
    }
    session.drop()
    while node.completeOne() {}
    precondition(session.inFlight == 0, "every request has ended")
  }

  private static func send(_ session: ServerSession, _ step: Int) {
    withUnsafeTemporaryAllocation(of: iovec.self, capacity: 4) { vectors in
      let count = session.output.fill(vectors)
      var sum = 0
      for vector in vectors[..<count] {
        sum &+= vector.iov_len
        // AddressSanitizer looks whether the memory is still there.
        if let base = vector.iov_base, vector.iov_len > 0 {
          _ = base.load(as: UInt8.self)
          _ = (base + vector.iov_len - 1).load(as: UInt8.self)
        }
      }
      if sum > 0 { session.sent(min(sum, step * 16)) }
    }
  }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    var number = 0
    func seed(_ bytes: [UInt8]) throws {
      for first in [UInt8(0), 2, 7] {
        try Data([first] + bytes).write(to: URL(fileURLWithPath: "\(directory)/seed\(number)"))
        number += 1
      }
    }
    let structured = option(.structuredReply)
    let contexts = option(.setMetaContext, context("disk", ["base:allocation", "qemu:dirty-bitmap:bits"]))
    let go = option(.go, string("disk") + [0, 2, 0, 1, 0, 3])
    let requests =
      [request(.read, 0, 8192), request(.blockStatus, 0, 65536), request(.flush, 0, 0), request(.trim, 512, 4096)]
      .joined() + request(.writeZeroes, 0, 65536) + request(.write, 100, 16) + [UInt8](repeating: 7, count: 16)
    try seed(flags(3) + structured + contexts + go + requests + request(.disconnect, 0, 0))
    try seed(flags(3) + option(.list) + option(.listMetaContext, context("disk", [])) + option(.abort))
    try seed(flags(1) + option(.exportName) + requests)
    try seed(
      flags(3) + option(.info, string("") + [0, 0]) + option(.startTLS) + option(.go, string("") + [0, 0]) + requests)
  }

  private static func flags(_ value: UInt32) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(value)
    return bytes
  }

  private static func option(_ option: NBDProtocol.Option, _ data: [UInt8] = []) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(NBDProtocol.optionMagic)
    bytes.appendBigEndian(option.rawValue)
    bytes.appendBigEndian(UInt32(data.count))
    return bytes + data
  }

  private static func string(_ text: String) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(UInt32(text.utf8.count))
    return bytes + text.utf8
  }

  private static func context(_ export: String, _ queries: [String]) -> [UInt8] {
    var bytes = string(export)
    bytes.appendBigEndian(UInt32(queries.count))
    return bytes + queries.flatMap { string($0) }
  }

  private static func request(_ command: NBDProtocol.Command, _ offset: UInt64, _ length: UInt32) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(NBDProtocol.requestMagic)
    bytes.appendBigEndian(UInt16(0))
    bytes.appendBigEndian(command.rawValue)
    bytes.appendBigEndian(UInt64(1))
    bytes.appendBigEndian(offset)
    bytes.appendBigEndian(length)
    return bytes
  }
}

/// A disk of 64 KiB, half of it holes, whose requests complete at once or when they are told to.
final class MemoryNode: BlockNode {
  let size: UInt64 = 64 << 10
  let isReadOnly: Bool
  private let isDeferred: Bool
  private var waiting: [(BlockRequest, BlockError?)] = []
  /// One for all runs, for speed: what it holds changes nothing.
  nonisolated(unsafe) private static let buffer = DiskBuffer(count: 64 << 10, zeroed: true)

  init(isReadOnly: Bool, isDeferred: Bool) {
    self.isReadOnly = isReadOnly
    self.isDeferred = isDeferred
  }

  func submit(_ request: BlockRequest) {
    precondition(request.offset + request.length <= size, "the session checks ranges")
    precondition(!isReadOnly || request.operation == .read || request.operation == .flush, "and rights")
    let error: BlockError? =
      request.offset == 666 ? .io(call: "reach", path: "memory", errno: EIO) : nil
    if request.operation == .read || request.operation == .write {
      precondition(request.memory.byteCount == Int(request.length), "and memory")
      let target = Self.buffer.start + Int(request.offset)
      if request.operation == .read {
        request.memory.copyIn(target, from: 0, length: Int(request.length))
      } else {
        request.memory.copyOut(target, from: 0, length: Int(request.length))
      }
    }
    if isDeferred { waiting.append((request, error)) } else { request.completion(error) }
  }

  func completeOne() -> Bool {
    guard let (request, error) = waiting.popLast() else { return false }
    request.completion(error)
    return true
  }

  func extent(at offset: UInt64, length: UInt64) throws(BlockError) -> BlockExtent {
    if offset == 777 { throw .io(call: "map", path: "memory", errno: EIO) }
    let isHole = offset / 4096 % 2 == 0
    return BlockExtent(
      offset: offset, length: min(length, 4096 - offset % 4096), isAllocated: true, isData: !isHole, isZero: isHole)
  }

  func close() throws(BlockError) {}
}
