import BlockLayer
import Glibc

/// The fuzzer's input as a file, which may be read and written and takes no room beyond a bound.
final class MemoryFile: BlockFile {
  static let limit = 1 << 20
  let path = "input"
  let isReadOnly: Bool
  var bytes: [UInt8]

  init(_ bytes: [UInt8], isReadOnly: Bool) {
    self.bytes = bytes
    self.isReadOnly = isReadOnly
  }

  var length: UInt64 { UInt64(bytes.count) }

  func submit(_ request: BlockRequest) {
    guard request.operation == .read || request.operation == .write else { return request.completion(nil) }
    let buffer = DiskBuffer(count: Int(request.length))
    do throws(BlockError) {
      if request.operation == .read {
        try read(at: request.offset, into: buffer.bytes)
        request.memory.copyIn(buffer.start, from: 0, length: Int(request.length))
      } else {
        request.memory.copyOut(buffer.start, from: 0, length: Int(request.length))
        try write(at: request.offset, from: UnsafeRawBufferPointer(buffer.bytes))
      }
      request.completion(nil)
    } catch {
      request.completion(error)
    }
  }

  func read(at offset: UInt64, into target: UnsafeMutableRawBufferPointer) throws(BlockError) {
    let available = offset < length ? min(target.count, Int(length - offset)) : 0
    guard let start = target.baseAddress else { return }
    bytes.withUnsafeBytes { bytes in
      if available > 0, let from = bytes.baseAddress { memcpy(start, from + Int(offset), available) }
    }
    memset(start + available, 0, target.count - available)
  }

  func write(at offset: UInt64, from source: UnsafeRawBufferPointer) throws(BlockError) {
    guard offset < UInt64(Self.limit), Int(offset) + source.count <= Self.limit else {
      throw .io(call: "write", path: path, errno: ENOSPC)
    }
    let end = Int(offset) + source.count
    if end > bytes.count { bytes += [UInt8](repeating: 0, count: end - bytes.count) }
    guard let start = source.baseAddress else { return }
    bytes.withUnsafeMutableBytes { bytes in
      if let to = bytes.baseAddress { memcpy(to + Int(offset), start, source.count) }
    }
  }

  func flush() throws(BlockError) {}
  func setLength(_ length: UInt64) throws(BlockError) {
    guard length <= UInt64(Self.limit) else { throw .io(call: "set the length of", path: path, errno: ENOSPC) }
    bytes = Array(bytes.prefix(Int(length))) + [UInt8](repeating: 0, count: max(0, Int(length) - bytes.count))
  }
  func punchHole(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool { false }
  func hole(at offset: UInt64, length: UInt64) -> (isHole: Bool, length: UInt64) { (false, length) }
  func close() {}
}

/// Everything completes at once.
final class NoQueue: IOQueue {
  var notifier: Int32 { -1 }
  func start(_ request: BlockRequest, descriptor: Int32, path: String) {}
  func poll() {}
  func wait() -> Bool { false }
}
