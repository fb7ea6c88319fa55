import Accelerator
import Host
import Synchronization

/// `--trace exits:FILE`: one JSON line an exit, in the order in which vCPUs left the guest.
public final class ExitTrace: Sendable {
  private struct Buffer {
    var bytes: [UInt8] = []
  }

  private static let capacity = 64 << 10
  private let file: FileDescriptor
  private let start = monotonicNanoseconds()
  private let buffer = Mutex(Buffer())

  /// A trace into a file that the caller opened for writing.
  public init(file: consuming FileDescriptor) {
    self.file = file
  }

  /// Writes an exit down, with the virtual time where there is one.
  func record(_ exit: VCPUExit, vcpu: Int, at time: UInt64?) {
    let nanoseconds = time ?? monotonicNanoseconds() - start
    var line = "{\"ns\":\(nanoseconds),\"vcpu\":\(vcpu),\"exit\":\"\(ExitCounters.Reason(exit).name)\""
    switch exit {
    case .portIO(let access):
      line += ",\"port\":\"0x\(String(access.port, radix: 16))\",\"size\":\(access.size),\"count\":\(access.count)"
      if access.isWrite { line += ",\"data\":\"0x\(Self.hex(access.data, count: Int(access.size)))\"" }
    case .memoryIO(let access):
      line += ",\"address\":\"\(access.address)\",\"size\":\(access.size)"
      if access.isWrite { line += ",\"data\":\"0x\(Self.hex(access.data, count: Int(access.size)))\"" }
    default: break
    }
    line += "}\n"
    buffer.withLock { buffer in
      buffer.bytes += line.utf8
      if buffer.bytes.count >= Self.capacity { flush(&buffer) }
    }
  }

  /// Writes out what is buffered; a file that takes no more ends the trace's content, not the guest.
  public func flush() {
    buffer.withLock { flush(&$0) }
  }

  private func flush(_ buffer: inout Buffer) {
    buffer.bytes.withUnsafeBytes { try? file.writeAll($0) }
    buffer.bytes.removeAll(keepingCapacity: true)
  }

  private static func hex(_ data: UnsafeMutableRawPointer, count: Int) -> String {
    let value = (0..<count).reversed().reduce(UInt64(0)) {
      $0 << 8 | UInt64(data.load(fromByteOffset: $1, as: UInt8.self))
    }
    return String(value, radix: 16)
  }
}
