import Accelerator
import Host
import Synchronization

/// `--trace WHAT:FILE`: a JSON line an event, in the order in which vCPUs met them.
public final class Trace: VCPUTracer {
  /// What is traced.
  public enum Subject: RawRepresentable, Sendable {
    /// What made vCPUs leave the guest.
    case exits
    /// What they did in it, which only some accelerators tell.
    case vcpu(VCPUTraceKind)

    /// By the name on the command line.
    public init?(rawValue: String) {
      guard rawValue != "exits" else {
        self = .exits
        return
      }
      guard let kind = VCPUTraceKind(rawValue: rawValue) else { return nil }
      self = .vcpu(kind)
    }

    /// The name on the command line.
    public var rawValue: String {
      switch self {
      case .exits: "exits"
      case .vcpu(let kind): kind.rawValue
      }
    }
  }

  private struct Buffer {
    var bytes: [UInt8] = []
  }

  /// What is traced.
  public let subject: Subject
  private static let capacity = 64 << 10
  private let file: FileDescriptor
  private let start = monotonicNanoseconds()
  private let buffer = Mutex(Buffer())

  /// A trace into a file that the caller opened for writing.
  public init(_ subject: Subject, file: consuming FileDescriptor) {
    self.subject = subject
    self.file = file
  }

  /// Writes an exit down, with the virtual time where there is one.
  func record(_ exit: VCPUExit, vcpu: Int, at time: UInt64?) {
    var line = head(vcpu, time) + "\"exit\":\"\(ExitCounters.Reason(exit).name)\""
    switch exit {
    case .portIO(let access):
      line += ",\"port\":\"0x\(String(access.port, radix: 16))\",\"size\":\(access.size),\"count\":\(access.count)"
      if access.isWrite { line += ",\"data\":\"0x\(Self.hex(access.data, count: Int(access.size)))\"" }
    case .memoryIO(let access):
      line += ",\"address\":\"\(access.address)\",\"size\":\(access.size)"
      if access.isWrite { line += ",\"data\":\"0x\(Self.hex(access.data, count: Int(access.size)))\"" }
    default: break
    }
    append(line)
  }

  /// Writes down what a vCPU did.
  public func record(_ event: VCPUTraceEvent, vcpu: Int, time: UInt64?) {
    var line = head(vcpu, time)
    switch event {
    case .instruction(let rip, let bytes, let text):
      line += "\"rip\":\"\(Self.hex(rip))\",\"bytes\":\""
      for byte in bytes.array { line += (byte < 16 ? "0" : "") + String(byte, radix: 16) }
      line += "\",\"text\":\"\(text)\""
    case .exception(let vector, let errorCode, let rip, let address):
      line += "\"vector\":\(vector)"
      if let errorCode { line += ",\"error\":\"\(Self.hex(UInt64(errorCode)))\"" }
      line += ",\"rip\":\"\(Self.hex(rip))\""
      if let address { line += ",\"cr2\":\"\(Self.hex(address))\"" }
    case .interrupt(let vector, let rip, let source):
      line += "\"vector\":\(vector),\"rip\":\"\(Self.hex(rip))\",\"source\":\"\(source.rawValue)\""
    }
    append(line)
  }

  private func head(_ vcpu: Int, _ time: UInt64?) -> String {
    "{\"ns\":\(time ?? monotonicNanoseconds() - start),\"vcpu\":\(vcpu),"
  }

  /// Ends a line.
  private func append(_ line: String) {
    let line = line + "}\n"
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

  private static func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }

  private static func hex(_ data: UnsafeMutableRawPointer, count: Int) -> String {
    let value = (0..<count).reversed().reduce(UInt64(0)) {
      $0 << 8 | UInt64(data.load(fromByteOffset: $1, as: UInt8.self))
    }
    return String(value, radix: 16)
  }
}
