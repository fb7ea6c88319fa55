import BlockLayer
import Glibc

/// A disk in memory, whose requests can be held back and made to fail.
final class MemoryDisk: BlockNode, @unchecked Sendable {
  var size: UInt64 { UInt64(bytes.count) }
  let isReadOnly: Bool
  private(set) var bytes: [UInt8]
  /// Errors of the requests to come, in their order; nil for none.
  var errors: [BlockError?] = []
  /// Requests wait for `release`.
  var holds = false
  private(set) var flushes = 0
  private var held: [BlockRequest] = []

  init(size: Int, isReadOnly: Bool = false) {
    bytes = (0..<size).map { UInt8(truncatingIfNeeded: $0 / 512 &* 31 &+ $0) }
    self.isReadOnly = isReadOnly
  }

  func resize(_ size: Int) { bytes += [UInt8](repeating: 0, count: size - bytes.count) }

  func submit(_ request: BlockRequest) {
    if holds { held.append(request) } else { carryOut(request) }
  }

  func release() {
    holds = false
    let requests = held
    held = []
    // The last first: nothing may depend on the order.
    for request in requests.reversed() { carryOut(request) }
  }

  private func carryOut(_ request: BlockRequest) {
    if !errors.isEmpty, let error = errors.removeFirst() { return request.completion(error) }
    let (offset, length) = (Int(request.offset), Int(request.length))
    bytes.withUnsafeMutableBytes { bytes in
      guard let start = bytes.baseAddress else { return }
      switch request.operation {
      case .read: request.memory.copyIn(start + offset, from: 0, length: length)
      case .write: request.memory.copyOut(start + offset, from: 0, length: length)
      case .writeZeroes: memset(start + offset, 0, length)
      case .discard: break
      case .flush: flushes += 1
      }
    }
    request.completion(nil)
  }

  func extent(at offset: UInt64, length: UInt64) -> BlockExtent {
    BlockExtent(offset: offset, length: length, isAllocated: true, isData: true, isZero: false)
  }

  func close() {}
}
