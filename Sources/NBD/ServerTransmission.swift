import BlockLayer
import Glibc

/// The transmission phase: what each request does, and its reply.
extension ServerSession {
  /// Stretches of one reply; what follows is told as data, or asked for again.
  private static let stretchLimit = 64

  /// Checks a request and begins it ("Request types").
  func carryOut(_ transfer: ServerTransfer) {
    guard let export else { return breakOff(transfer) }
    if transfer.command == .disconnect {
      phase = .ending
      release(transfer)
      return onOutput()
    }
    let length = Int(transfer.length)
    if transfer.command == .write, length > NBDProtocol.longestPayload {
      // The bytes that follow are not worth reading.
      return breakOff(transfer)
    }
    if let code = refusal(transfer, export) {
      if transfer.command == .write, length > 0 {
        phase = .refusedPayload(transfer, rest: length, code)
      } else {
        answer(transfer, code)
      }
      return
    }
    switch transfer.command {
    case .read:
      if length == 0 { return answerRead(transfer) }
      if usesStructuredReplies, !transfer.flags.contains(.df), !findHoles(transfer, export.layers()) { return }
      let buffer = provideBuffer(transfer)
      transfer.request.memory.append(buffer.start, length)
      submit(transfer, .read)
    case .write:
      if length == 0 { return answer(transfer, nil) }
      let buffer = provideBuffer(transfer)
      transfer.request.memory.append(buffer.start, length)
      phase = .payload(transfer, filled: 0)
    case .flush: submit(transfer, .flush)
    case .trim:
      if length == 0 { return answer(transfer, nil) }
      submit(transfer, .discard)
    case .writeZeroes:
      if length == 0 { return answer(transfer, nil) }
      transfer.request.mayUnmap = !transfer.flags.contains(.noHole)
      submit(transfer, .writeZeroes)
    case .blockStatus: answerBlockStatus(transfer, export)
    case .disconnect: break
    }
  }

  func submit(_ transfer: ServerTransfer, _ operation: BlockRequest.Operation) {
    transfer.request.operation = operation
    transfer.request.offset = operation == .flush ? 0 : transfer.offset
    transfer.request.length = operation == .flush ? 0 : UInt64(transfer.length)
    export?.node.submit(transfer.request)
  }

  /// The error of a request that is not carried out ("Error values").
  private func refusal(_ transfer: ServerTransfer, _ export: NBDExport) -> NBDProtocol.Code? {
    var allowed: NBDProtocol.CommandFlags = .fua
    switch transfer.command {
    case .read: if usesStructuredReplies { allowed.insert(.df) }
    case .writeZeroes:
      allowed.insert(.noHole)
      if export.flags.contains(.sendFastZero) { allowed.insert(.fastZero) }
    case .blockStatus: allowed.insert(.reqOne)
    case .write, .trim, .flush, .disconnect: break
    }
    guard allowed.isSuperset(of: transfer.flags) else { return .invalid }
    if transfer.command.changes, export.isReadOnly || export.node.isReadOnly { return .notPermitted }
    if transfer.command == .flush { return transfer.offset == 0 && transfer.length == 0 ? nil : .invalid }
    if transfer.command == .read, Int(transfer.length) > NBDProtocol.longestPayload { return .invalid }
    if transfer.command == .blockStatus, transfer.length == 0 || contexts.isEmpty { return .invalid }
    let (end, overflow) = transfer.offset.addingReportingOverflow(UInt64(transfer.length))
    guard !overflow, end <= export.node.size else {
      return transfer.command == .write || transfer.command == .writeZeroes ? .noSpace : .invalid
    }
    return nil
  }

  // MARK: Replies

  private func breakOff(_ transfer: ServerTransfer) {
    release(transfer)
    drop()
  }

  /// The reply of a request that answers no data.
  func answer(_ transfer: ServerTransfer, _ code: NBDProtocol.Code?) {
    if let code, usesStructuredReplies, transfer.command == .read || transfer.command == .blockStatus {
      let text = Array(code.text.utf8)
      var bytes = chunkHeader(transfer, NBDProtocol.Chunk.error, NBDProtocol.Chunk.done, 6 + text.count)
      bytes.appendBigEndian(code.rawValue)
      bytes.appendBigEndian(UInt16(text.count))
      output.append(bytes + text, ends: transfer)
    } else {
      putSimpleHeader(transfer, code?.rawValue ?? 0)
      output.append(transfer.header, NBDProtocol.simpleReplySize, of: transfer, ends: true)
    }
    onOutput()
  }

  private func putSimpleHeader(_ transfer: ServerTransfer, _ code: UInt32) {
    transfer.header.storeBigEndian(NBDProtocol.simpleReplyMagic, 0)
    transfer.header.storeBigEndian(code, 4)
    transfer.header.storeBigEndian(transfer.cookie, 8)
  }

  private func chunkHeader(_ transfer: ServerTransfer, _ type: UInt16, _ flags: UInt16, _ length: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(NBDProtocol.chunkHeaderSize + 16)
    bytes.appendBigEndian(NBDProtocol.structuredReplyMagic)
    bytes.appendBigEndian(flags)
    bytes.appendBigEndian(type)
    bytes.appendBigEndian(transfer.cookie)
    bytes.appendBigEndian(UInt32(length))
    return bytes
  }

  /// The bytes of a read that has been carried out.
  func answerRead(_ transfer: ServerTransfer) {
    let length = Int(transfer.length)
    defer { onOutput() }
    guard usesStructuredReplies else {
      putSimpleHeader(transfer, 0)
      output.append(transfer.header, NBDProtocol.simpleReplySize, of: transfer, ends: length == 0)
      if length > 0, let buffer = transfer.buffer { output.append(buffer.start, length, of: transfer, ends: true) }
      return
    }
    guard length > 0 else {
      return output.append(chunkHeader(transfer, NBDProtocol.Chunk.none, NBDProtocol.Chunk.done, 0), ends: transfer)
    }
    guard !transfer.stretches.isEmpty else {
      guard let buffer = transfer.buffer else { return answer(transfer, .inputOutput) }
      transfer.header.storeBigEndian(NBDProtocol.structuredReplyMagic, 0)
      transfer.header.storeBigEndian(NBDProtocol.Chunk.done, 4)
      transfer.header.storeBigEndian(NBDProtocol.Chunk.offsetData, 6)
      transfer.header.storeBigEndian(transfer.cookie, 8)
      transfer.header.storeBigEndian(UInt32(length + 8), 16)
      transfer.header.storeBigEndian(transfer.offset, 20)
      output.append(transfer.header, NBDProtocol.chunkHeaderSize + 8, of: transfer, ends: false)
      output.append(buffer.start, length, of: transfer, ends: true)
      return
    }
    answerStretches(transfer)
  }

  private func answerStretches(_ transfer: ServerTransfer) {
    var done = 0
    for (index, stretch) in transfer.stretches.enumerated() {
      let isLast = index == transfer.stretches.count - 1
      let flags = isLast ? NBDProtocol.Chunk.done : 0
      let length = Int(stretch.length)
      if stretch.isHole {
        var bytes = chunkHeader(transfer, NBDProtocol.Chunk.offsetHole, flags, 12)
        bytes.appendBigEndian(transfer.offset + UInt64(done))
        bytes.appendBigEndian(stretch.length)
        output.append(bytes, ends: isLast ? transfer : nil)
      } else if let buffer = transfer.buffer {
        var bytes = chunkHeader(transfer, NBDProtocol.Chunk.offsetData, flags, 8 + length)
        bytes.appendBigEndian(transfer.offset + UInt64(done))
        output.append(bytes)
        output.append(buffer.start + done, length, of: transfer, ends: isLast)
      }
      done += length
    }
  }

  // MARK: Extents

  /// Finds what of a read is a hole. Answers a read that is nothing else, and one that fails, and says false then.
  private func findHoles(_ transfer: ServerTransfer, _ node: any BlockNode) -> Bool {
    var done: UInt64 = 0
    let length = UInt64(transfer.length)
    while done < length {
      var stretch = ServerTransfer.Stretch(isHole: false, length: UInt32(length - done))
      if transfer.stretches.count < Self.stretchLimit {
        do throws(BlockError) {
          let extent = try node.chainExtent(at: transfer.offset + done, length: length - done).extent
          // A node that covers nothing would hold this loop for ever; the read itself will tell.
          if extent.length > 0 {
            stretch = ServerTransfer.Stretch(
              isHole: extent.isZero, length: UInt32(min(extent.length, length - done)))
          }
        } catch {
          answer(transfer, NBDProtocol.Code(error))
          return false
        }
      }
      if let last = transfer.stretches.last, last.isHole == stretch.isHole {
        transfer.stretches[transfer.stretches.count - 1].length += stretch.length
      } else {
        transfer.stretches.append(stretch)
      }
      done += UInt64(stretch.length)
    }
    guard transfer.stretches.count == 1 else { return true }
    if transfer.stretches[0].isHole {
      answerRead(transfer)
      return false
    }
    transfer.stretches.removeAll(keepingCapacity: true)
    return true
  }

  private func answerBlockStatus(_ transfer: ServerTransfer, _ export: NBDExport) {
    var chunks: [[UInt8]] = []
    for (index, context) in contexts.enumerated() {
      let extents: [UInt8]
      do throws(BlockError) {
        extents = try self.extents(transfer, export, context: context)
      } catch {
        return answer(transfer, NBDProtocol.Code(error))
      }
      let flags = index == contexts.count - 1 ? NBDProtocol.Chunk.done : 0
      var bytes = chunkHeader(transfer, NBDProtocol.Chunk.blockStatus, flags, 4 + extents.count)
      bytes.appendBigEndian(UInt32(context))
      chunks.append(bytes + extents)
    }
    for (index, chunk) in chunks.enumerated() {
      output.append(chunk, ends: index == chunks.count - 1 ? transfer : nil)
    }
    onOutput()
  }

  private func extents(
    _ transfer: ServerTransfer, _ export: NBDExport, context: Int
  ) throws(BlockError) -> [UInt8] {
    let limit = transfer.flags.contains(.reqOne) ? 1 : Self.extentLimit
    var bytes: [UInt8] = []
    var pending: (length: UInt64, flags: UInt32) = (0, 0)
    var done: UInt64 = 0
    var count = 0
    var looked = 0
    let length = UInt64(transfer.length)
    while done < length, looked < Self.extentLimit * 2 {
      looked += 1
      let (next, flags) = try state(export, context, at: transfer.offset + done, length: length - done)
      guard next > 0 else { break }
      if pending.length > 0, flags != pending.flags {
        bytes.appendBigEndian(UInt32(pending.length))
        bytes.appendBigEndian(pending.flags)
        count += 1
        pending = (0, 0)
        if count == limit { return bytes }
      }
      pending = (pending.length + next, flags)
      done += next
    }
    guard pending.length > 0 else { throw .io(call: "map", path: export.name, errno: EIO) }
    bytes.appendBigEndian(UInt32(pending.length))
    bytes.appendBigEndian(pending.flags)
    return bytes
  }

  private func state(
    _ export: NBDExport, _ context: Int, at offset: UInt64, length: UInt64
  ) throws(BlockError) -> (length: UInt64, flags: UInt32) {
    if context == 0 {
      let extent = try export.layers().chainExtent(at: offset, length: length).extent
      let flags = (extent.isData ? 0 : NBDProtocol.stateHole) | (extent.isZero ? NBDProtocol.stateZero : 0)
      return (min(extent.length, length), flags)
    }
    let run = export.bitmaps[context - 1].run(offset, length)
    return (min(run.length, length), run.isDirty ? NBDProtocol.stateDirty : 0)
  }
}

extension NBDProtocol.Command {
  /// Whether the disk is another afterwards.
  var changes: Bool { self == .write || self == .trim || self == .writeZeroes }
}

extension NBDProtocol.Code {
  /// What a client is told of a node's error: the host's paths are none of its business.
  init(_ error: BlockError) {
    switch error {
    case .readOnly: self = .notPermitted
    case .outOfRange: self = .invalid
    case .io(_, _, EPERM), .io(_, _, EACCES), .io(_, _, EROFS): self = .notPermitted
    case .io(_, _, ENOMEM): self = .noMemory
    case .io(_, _, EOPNOTSUPP): self = .notSupported
    default: self = error.isNoSpace ? .noSpace : .inputOutput
    }
  }

  /// For people, in structured errors.
  var text: String {
    switch self {
    case .notPermitted: "not permitted"
    case .inputOutput: "input/output error"
    case .noMemory: "out of memory"
    case .invalid: "invalid request"
    case .noSpace: "no space left"
    case .overflow: "too large"
    case .notSupported: "not supported"
    case .shutdown: "the server is shutting down"
    }
  }
}
