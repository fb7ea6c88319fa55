import Host
import JSON
import Synchronization

/// An audit as a file of JSON lines.
public final class AuditLog: Sendable {
  private static let capacity = 64 << 10
  private let file: FileDescriptor
  private let buffer = Mutex<[UInt8]>([])

  /// An audit into a file that the caller opened for writing.
  public init(_ file: consuming FileDescriptor) { self.file = file }

  /// Writes an event down; what was denied reaches the file at once, whatever becomes of this process.
  public func record(_ event: AuditEvent) {
    let line = Array((event.json.serialized() + "\n").utf8)
    buffer.withLock { buffer in
      buffer += line
      if buffer.count >= Self.capacity || event.kind == .denied { write(&buffer) }
    }
  }

  /// Writes what is left.
  public func flush() { buffer.withLock { write(&$0) } }

  /// What does not reach the file is lost: a full disk does not stop the guest.
  private func write(_ buffer: inout [UInt8]) {
    buffer.withUnsafeBytes { bytes in
      do { try file.writeAll(bytes) } catch {}
    }
    buffer.removeAll(keepingCapacity: true)
  }

  /// Reads an audit.
  ///
  /// - Throws: the first line that is no event.
  public static func events(_ text: String) throws(HardeningError) -> [AuditEvent] {
    var events: [AuditEvent] = []
    for (number, line) in text.split(separator: "\n").enumerated() {
      guard let json = try? JSONValue(parsing: String(line)), let event = AuditEvent(json) else {
        throw .auditTooOld(line: number + 1)
      }
      events.append(event)
    }
    return events
  }
}
